"""Exports of trained subjects, loaded by the stock tools they are for and compared with the pack's own patches."""

import copy
import dataclasses
import functools
import logging
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from comfy_sude import files
from comfy_sude.host import export, stock
from comfy_sude.host.apply import apply_subject
from comfy_sude.recipe import Prior
from comfy_sude.subject import PRECISIONS

from .helpers import fingerprint, predictions, recipe, sample, train

pytestmark = pytest.mark.slow

SETTINGS = {
    "DreamBooth": {"learning_rate": 1e-3},
    "DreamBooth LoRA": {"learning_rate": 5e-2, "rank": 4, "alpha": 2.0},
    "Custom Diffusion": {"learning_rate": 1e-2, "vectors": 2, "views": 1},
    "ViCo": {"learning_rate": 1e-2},
}
WITH_WEIGHTS = ("DreamBooth", "DreamBooth LoRA", "Custom Diffusion")
PROMPT = "photo of a sks dog"


@pytest.fixture(scope="module")
def _exact(_shared):
    """The shared models with the text encoder in fp32, so that no rounding of patched weights hides an error."""
    model, clip, vae = _shared
    with torch.inference_mode():
        clip = clip.clone()
        clip.cond_stage_model = copy.deepcopy(clip.cond_stage_model).float()
        patcher = clip.patcher
        clip.patcher = type(patcher)(clip.cond_stage_model, patcher.load_device, patcher.offload_device)
    return model, clip, vae


@pytest.fixture
def models(_exact):
    """MODEL, CLIP and VAE, checked to be as they were after each test."""
    before = fingerprint(*_exact)
    yield _exact
    assert fingerprint(*_exact) == before, "a MODEL, CLIP or VAE that was only lent has changed"


@pytest.fixture(scope="module")
def subject(_exact, tmp_path_factory):
    """The subject of a baseline after one large step, trained once."""
    cache = tmp_path_factory.mktemp("cache")
    picture = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))

    @functools.cache
    def make(method: str):
        with torch.inference_mode():
            made = recipe(method, steps=1, w_s=0.0, prior=Prior(kind="off"), **SETTINGS[method])
            return train(_exact, picture, cache, made)

    return make


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """ComfyUI's output, LoRA and embedding folders, for one test."""
    import folder_paths

    extensions = folder_paths.supported_pt_extensions
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    for name, place in (("loras", tmp_path / "output" / "loras"), ("embeddings", tmp_path / "embeddings")):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(place)], extensions))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def load_lora(model, clip, exported, folder: Path, caplog):
    """MODEL and CLIP as the stock Load LoRA node makes them of a file; every key of it must be one that it knows."""
    import nodes

    files.write(folder / "output" / "loras" / "it.safetensors", exported.tensors, exported.metadata)
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        patched = nodes.LoraLoader().load_lora(model, clip, "it.safetensors", 1.0, 1.0)
    assert not caplog.records, [record.getMessage() for record in caplog.records][:3]
    return patched


def reads_embeddings(clip, folder: Path):
    """A clone of a CLIP that looks for embeddings in a folder, as a checkpoint loader's does."""
    clone = clip.clone()
    clone.tokenizer = copy.copy(clip.tokenizer)
    clone.tokenizer.clip_l = copy.copy(clip.tokenizer.clip_l)
    clone.tokenizer.clip_l.embedding_directory = [str(folder)]
    return clone


@pytest.fixture(scope="module")
def untrained(_exact):
    """What the incoming models sample from a prompt."""

    @functools.cache
    def make(prompt: str):
        with torch.inference_mode():
            return sample(*_exact[:2], prompt, steps=1)

    return make


def part_of(subject, *beginnings: str, vectors: bool = True):
    """A subject with some of its weights only, to save time; with or without biases and norms."""
    kept = {
        key: tensors
        for key, tensors in subject.tensors.items()
        if key[1].startswith(beginnings) and (vectors or max(t.ndim for t in tensors.values()) > 1)
    }
    assert kept
    return dataclasses.replace(subject, tensors=kept)


def some(subject, vectors: bool = True):
    """Changes of convolutions, attention, biases and norms and a text layer."""
    places = ("0.in_layers", "1.proj_in", "1.transformer_blocks.0.attn2")
    return part_of(
        subject,
        "diffusion_model.out.2",
        *(f"diffusion_model.input_blocks.1.{place}" for place in places),
        "clip_l.transformer.text_model.encoder.layers.1.self_attn.q_proj",
        vectors=vectors,
    )


# --- ComfyUI


@pytest.mark.parametrize("method", WITH_WEIGHTS)
def test_load_lora_gives_what_the_pack_gives(models, subject, untrained, folders, caplog, method):
    model, clip, _ = models
    learned = subject(method)
    exported = export.lora(learned, model, clip)
    lora_model, lora_clip = load_lora(model, clip, exported, folders, caplog)
    assert set(lora_model.patches) == set(learned.of("model"))
    assert set(lora_clip.patcher.patches) == set(learned.of("clip"))
    ours_model, ours_clip = apply_subject(model, clip, learned)
    prompt, stock_prompt = learned.prompt("running"), learned.prompt("running")
    if learned.of("token"):
        word = export.embedding(learned, model, clip)
        files.write(folders / "embeddings" / "word.safetensors", word.tensors, word.metadata)
        lora_clip = reads_embeddings(lora_clip, folders / "embeddings")
        stock_prompt = prompt.replace("<new1>", "embedding:word")
        assert stock_prompt != prompt
    ours = sample(ours_model, ours_clip, prompt, steps=1)
    theirs = sample(lora_model, lora_clip, stock_prompt, steps=1)
    assert (ours - theirs).abs().max() < 1e-4
    before = untrained(prompt)
    assert (ours - before).abs().max() > 1e-2 * before.abs().max(), "there is no change that could get lost"


def test_a_full_subject_is_exported_down_to_biases_norms_and_embeddings(models, subject):
    learned = subject("DreamBooth")
    exported = export.lora(learned, *models[:2])
    assert len(exported.tensors) == len(learned.tensors)
    for key in (
        "lora_unet_conv_in.diff",
        "lora_unet_conv_in.diff_b",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_norm1.diff",
        "lora_te_text_model_encoder_layers_1_mlp_fc1.diff_b",
        "text_encoders.clip_l.transformer.text_model.embeddings.token_embedding.diff",
        "text_encoders.clip_l.transformer.text_model.embeddings.position_embedding.diff",
        "text_encoders.clip_l.transformer.text_model.final_layer_norm.diff_b",
    ):
        assert key in exported.tensors
    assert "exactly" in exported.text


def test_a_lora_has_kohyas_keys_and_says_what_it_is(models, subject):
    exported = export.lora(subject("DreamBooth LoRA"), *models[:2])
    kinds = {re.sub(r"\d", "#", key) for key in exported.tensors}
    places = ["lora_unet_down_blocks_#_attentions_#", "lora_unet_mid_block_attentions_#"]
    places += ["lora_unet_up_blocks_#_attentions_#"]
    layers = [f"{p}_transformer_blocks_#_attn#_to_{n}" for p in places for n in ("q", "k", "v", "out_#")]
    layers += [f"lora_te_text_model_encoder_layers_#_self_attn_{n}_proj" for n in ("q", "k", "v", "out")]
    endings = (".lora_up.weight", ".lora_down.weight", ".alpha")
    assert kinds == {f"{layer}{ending}" for layer in layers for ending in endings}
    about = exported.metadata
    assert about["ss_network_dim"] == "4" and about["ss_network_alpha"] == "2"
    assert about["ss_network_module"] == "networks.lora" and about["ss_base_model_version"] == "sd_v1"
    assert about["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert about["modelspec.trigger_phrase"] == "sks dog" and about["modelspec.prediction_type"] == "epsilon"
    assert about["modelspec.usage_hint"] == "photo of a running sks dog"
    assert all(isinstance(value, str) for value in about.values())


def test_kohyas_fields_are_not_there_where_they_are_not_true(models, subject):
    about = export.lora(some(subject("DreamBooth")), *models[:2]).metadata
    assert not {"ss_network_dim", "ss_network_alpha", "ss_network_module"} & about.keys()
    about = export.lora(some(subject("DreamBooth")), *models[:2], rank=8).metadata
    assert about["ss_network_dim"] == "8" and "ss_network_module" not in about
    assert "ss_network_alpha" not in about, "conv_out has four rows and so a lower rank"


def test_the_lora_of_full_rank_is_the_exact_one(models, subject, untrained, folders, caplog):
    model, clip, _ = models
    learned = some(subject("DreamBooth"))
    exported = export.lora(learned, model, clip, rank=1024)
    assert "keeps 100 % of the change" in exported.text
    prompt = learned.prompt("running")
    ours = sample(*apply_subject(model, clip, learned), prompt, steps=1)
    theirs = sample(*load_lora(model, clip, exported, folders, caplog), prompt, steps=1)
    size = ours.abs().max()
    assert (ours - theirs).abs().max() < 1e-4 * size and (ours - untrained(prompt)).abs().max() > 1e-2 * size
    assert not any(key.endswith((".diff", ".diff_b")) and t.ndim > 1 for key, t in exported.tensors.items())


@pytest.mark.parametrize("method", ["DreamBooth", "DreamBooth LoRA"])
def test_a_higher_rank_keeps_more_and_the_text_says_how_much(models, subject, folders, caplog, method):
    from comfy_sude.host.model import current_weight

    model, clip, _ = models
    place = "diffusion_model.input_blocks.1.1.transformer_blocks.0."
    learned = part_of(subject(method), f"{place}attn2", f"{place}norm2")
    ours, _ = apply_subject(model, clip, learned)
    wanted = {name: current_weight(ours, name) for name in ours.patches}
    changed = sum(float((w - current_weight(model, name)).double().square().sum()) for name, w in wanted.items())
    shares = []
    for rank in (1, 2, 3):
        exported = export.lora(learned, model, clip, rank=rank)
        theirs, _ = load_lora(model, clip, exported, folders, caplog)
        lost = sum(float((w - current_weight(theirs, name)).double().square().sum()) for name, w in wanted.items())
        shares.append(float(re.search(rf"rank {rank} keeps (\S+) %", exported.text)[1]))
        assert shares[-1] == pytest.approx(100 * (1 - lost / changed), abs=0.02)
    assert 0 < shares[0] < shares[1] < shares[2] < 100


def test_a_low_rank_subject_of_a_lower_rank_stays_what_it_is(models, subject):
    learned = subject("DreamBooth LoRA")
    exact, limited = (export.lora(learned, *models[:2], rank=rank) for rank in (None, 4))
    assert exact.tensors.keys() == limited.tensors.keys()
    assert all(torch.equal(exact.tensors[key], limited.tensors[key]) for key in exact.tensors)
    assert "keeps 100 %" in limited.text


def test_half_precision_halves_the_file_and_says_so(models, subject):
    learned = part_of(subject("DreamBooth LoRA"), "diffusion_model.input", "clip_l")
    full = export.lora(learned, *models[:2]).tensors
    for precision in ("fp16", "bf16"):
        half = export.lora(learned, *models[:2], precision=precision)
        assert half.tensors.keys() == full.keys() and f"rounded to {precision}" in half.text
        for key, tensor in half.tensors.items():
            assert tensor.dtype == (torch.float32 if key.endswith(".alpha") else PRECISIONS[precision])
            assert (tensor.float() - full[key]).norm() < 1e-2 * full[key].norm(), key


@pytest.mark.parametrize("method", ["Custom Diffusion", "ViCo"])
def test_the_embedding_is_the_word(models, subject, folders, method):
    import nodes

    model, clip, _ = models
    learned = subject(method)
    exported = export.embedding(learned, model, clip)
    ((key, vectors),) = exported.tensors.items()
    assert vectors.shape == (SETTINGS[method].get("vectors", 1), 768)
    assert key == {"Custom Diffusion": "<new1>", "ViCo": "<*>"}[method]
    files.write(folders / "embeddings" / "spike.safetensors", exported.tensors, exported.metadata)
    _, ours = apply_subject(model, clip, learned, strength_model=0)
    stock_clip = reads_embeddings(clip, folders / "embeddings")
    word, prompt = learned.metadata["identifier"], "(very {}:1.3) near a tree and a {}"
    ours, theirs, without = (
        nodes.CLIPTextEncode().encode(encoder, prompt.format(name, name))[0][0][0]
        for encoder, name in ((ours, word), (stock_clip, "embedding:spike"), (clip, word))
    )
    assert (ours - theirs).abs().max() < 1e-5 and (ours - without).abs().max() > 1e-2
    assert exported.metadata["modelspec.architecture"] == "stable-diffusion-v1/textual-inversion"


# --- diffusers


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers")


def unet(state: dict[str, torch.Tensor]):
    """The small checkpoint's UNet by diffusers; strict: no key missing, none unknown, every shape right."""
    import diffusers

    with torch.inference_mode(False):
        with torch.device("meta"):
            made = diffusers.UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(320, 320),
                layers_per_block=1,
                down_block_types=("CrossAttnDownBlock2D",) * 2,
                up_block_types=("CrossAttnUpBlock2D",) * 2,
                attention_head_dim=8,
                cross_attention_dim=768,
            )
        made.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
        return made.requires_grad_(False).eval()


def text_encoder(state: dict[str, torch.Tensor]):
    """The small checkpoint's text encoder by transformers, which names every key that it lacks or does not know."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=2, num_attention_heads=12,
        hidden_act="quick_gelu", eos_token_id=49407,
    )  # fmt: skip
    with torch.inference_mode(False):
        own = {name: tensor.clone() for name, tensor in state.items()}
        made, found = CLIPTextModel.from_pretrained(None, config=config, state_dict=own, output_loading_info=True)
        assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"]
        return made.requires_grad_(False).eval()


def tokenizer():
    import comfy.sd1_clip
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(Path(comfy.sd1_clip.__file__).parent / "sd1_tokenizer")


def encoded(encoder, words, prompt: str) -> torch.Tensor:
    ids = words(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
    return encoder(ids)[0]


def base_weights(model, clip, part: str) -> dict[str, torch.Tensor]:
    """The incoming weights in diffusers' names, written out by the names themselves."""
    patcher = {"unet": model, "text_encoder": clip.patcher}[part]
    weights = patcher.model.state_dict()
    names = stock.diffusers_names(model, clip)
    return {t.partition(".")[2]: weights[ours].float() for ours, t in names.items() if t.startswith(f"{part}.")}


def difference(model, unet, t: int = 300) -> tuple[float, float]:
    """Largest difference between ComfyUI's and diffusers' noise predictions, and the largest prediction."""
    g = torch.Generator().manual_seed(2)
    sampling = model.get_model_object("model_sampling")
    sigma = sampling.sigmas[t].reshape(1)
    x, context = torch.randn(1, 4, 8, 8, generator=g) * sigma, torch.randn(1, 77, 768, generator=g)
    ours = (x - predictions(model, context, x, sigma)) / sigma
    theirs = unet(sampling.calculate_input(sigma, x), torch.tensor([t]), context).sample
    return float((ours - theirs).abs().max()), float(ours.abs().max())


def test_diffusers_loads_the_weights_and_predicts_the_same(models, subject, diffusers):
    learned = subject("DreamBooth")
    made = export.diffusers_weights(learned, *models[:2])
    their_unet, their_encoder = made[export.UNET].tensors, made[export.TEXT_ENCODER].tensors
    check_networks(models, learned, unet(their_unet), text_encoder(their_encoder))


@pytest.mark.parametrize("method", ["DreamBooth LoRA", "DreamBooth"])
def test_a_diffusers_pipeline_loads_the_lora_and_predicts_the_same(models, subject, folders, diffusers, method):
    pytest.importorskip("peft", reason="load_lora_weights needs peft, which is no dependency of these tests")
    model, clip, _ = models
    learned = subject(method) if method == "DreamBooth LoRA" else some(subject(method), vectors=False)
    exported = export.diffusers_lora(learned, model, clip, rank=1024)
    files.write(folders / "it.safetensors", exported.tensors, exported.metadata)
    encoder = text_encoder(base_weights(model, clip, "text_encoder"))
    with torch.inference_mode(False):
        pipeline = diffusers.StableDiffusionPipeline(
            None, encoder, tokenizer(), unet(base_weights(model, clip, "unet")), diffusers.DDIMScheduler(), None, None,
            requires_safety_checker=False,
        )  # fmt: skip
        pipeline.load_lora_weights(folders, weight_name="it.safetensors")
    check_networks(models, learned, pipeline.unet, pipeline.text_encoder)


def check_networks(models, learned, their_unet, their_encoder):
    """Hold diffusers' networks against the pack's patches and the base model."""
    model, clip, _ = models
    ours_model, ours_clip = apply_subject(model, clip, learned)
    error, size = difference(ours_model, their_unet)
    assert error < 1e-4 * size and difference(model, their_unet)[0] > 1e-2 * size
    ours, before = (c.encode_from_tokens(c.tokenize(PROMPT)) for c in (ours_clip, clip))
    theirs = encoded(their_encoder, tokenizer(), PROMPT)
    assert (theirs - ours).abs().max() < 1e-4 * ours.abs().max() and (theirs - before).abs().max() > 1e-2


@pytest.mark.parametrize("method", ["DreamBooth LoRA", "DreamBooth"])
def test_the_matrices_of_a_diffusers_lora_are_those_of_diffusers_modules(models, subject, diffusers, method):
    model, clip, _ = models
    learned = subject(method) if method == "DreamBooth LoRA" else some(subject(method))
    exported = export.diffusers_lora(learned, model, clip, rank=1024)
    modules = unet(base_weights(model, clip, "unet"))
    layers = {key.removesuffix(".lora_A.weight") for key in exported.tensors if ".lora_A." in key}
    assert exported.tensors.keys() == {f"{layer}.lora_{part}.weight" for layer in layers for part in "AB"}
    ours = {theirs: ours for ours, theirs in stock.diffusers_names(model, clip).items()}
    for layer in layers:
        part, _, path = layer.partition(".")
        a, b = (exported.tensors[f"{layer}.lora_{which}.weight"] for which in "AB")
        tensors = learned.of({"unet": "model", "text_encoder": "clip"}[part])[ours[f"{layer}.weight"]]
        if part == "unet":
            weight = modules.get_submodule(path).weight
            assert b.shape[2:] == (1,) * (weight.ndim - 2) and a.shape[1:] == weight.shape[1:]
        wanted = tensors["diff"] if "diff" in tensors else tensors["up"] @ tensors["down"] * 2 / 4
        assert ((b.flatten(1) @ a.flatten(1)).reshape(wanted.shape) - wanted).norm() < 1e-5 * wanted.norm(), layer
    assert len({len(t) for key, t in exported.tensors.items() if ".lora_A." in key}) == 1
    left = sum(1 for _, name in learned.tensors) - len(layers)
    assert left == 0 if method == "DreamBooth LoRA" else f"({left} biases, norms and embedding tables" in exported.text


def test_diffusers_loads_embeddings(models, subject, folders, diffusers):
    model, clip, _ = models
    encoder = text_encoder(base_weights(model, clip, "text_encoder"))
    with torch.inference_mode(False):
        pipeline = diffusers.StableDiffusionPipeline(
            None, encoder, tokenizer(), None, None, None, None, requires_safety_checker=False
        )
    for method in ("Custom Diffusion", "ViCo"):
        learned = subject(method)
        exported = export.embedding(learned, model, clip)
        (key,) = exported.tensors
        assert exported.metadata["modelspec.trigger_phrase"] == key
        files.write(folders / "word.safetensors", exported.tensors, exported.metadata)
        with torch.inference_mode(False):
            pipeline.load_textual_inversion(folders, weight_name="word.safetensors")
        prompt, word = "photo of a {} dog", learned.metadata["identifier"]
        stock_prompt = pipeline.maybe_convert_prompt(prompt.format(key), pipeline.tokenizer)
        theirs = encoded(pipeline.text_encoder, pipeline.tokenizer, stock_prompt)
        _, ours = apply_subject(model, clip, learned, strength_model=0)
        ours, before = (c.encode_from_tokens(c.tokenize(prompt.format(word))) for c in (ours, clip))
        assert (theirs - ours).abs().max() < 1e-4 * ours.abs().max(), method
        assert (ours - before).abs().max() > 1e-2, method


def config_of(**values):
    """A diffusers UNet's names and shapes."""
    import diffusers

    with torch.inference_mode(False), torch.device("meta"):
        return {name: tuple(t.shape) for name, t in diffusers.UNet2DConditionModel(**values).state_dict().items()}


@pytest.mark.parametrize("family", ["SD1.5", "SD2.1"])
def test_every_weight_of_the_real_shapes_has_its_name_in_diffusers(diffusers, family):
    from types import SimpleNamespace

    import comfy.ops
    import comfy.sd1_clip
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from comfy.text_encoders.sd2_clip import SD2ClipModel
    from transformers import CLIPTextConfig, CLIPTextModel

    second = family == "SD2.1"
    width, heads = (1024, {"num_heads": -1, "num_head_channels": 64}) if second else (768, {"num_heads": 8})
    shape = {
        "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_middle": 1, "transformer_depth_output": [1] * 9 + [0] * 3,
    }  # fmt: skip
    ours = UNetModel(
        image_size=32, in_channels=4, out_channels=4, model_channels=320, use_spatial_transformer=True, legacy=False,
        context_dim=width, use_linear_in_transformer=second, dtype=torch.float32, device="meta",
        operations=comfy.ops.disable_weight_init, **heads, **{k: copy.copy(v) for k, v in shape.items()},
    )  # fmt: skip
    with torch.inference_mode(False):
        text = (SD2ClipModel if second else comfy.sd1_clip.SD1ClipModel)(device="meta", dtype=torch.float32)
    base = torch.nn.Module()
    base.diffusion_model, base.model_config = ours, SimpleNamespace(unet_config=shape)
    model, clip = SimpleNamespace(model=base), SimpleNamespace(cond_stage_model=text)
    weights = {**dict(base.named_parameters()), **dict(text.named_parameters())}
    found = {theirs: tuple(weights[name].shape) for name, theirs in stock.diffusers_names(model, clip).items()}

    theirs = config_of(
        block_out_channels=(320, 640, 1280, 1280),
        attention_head_dim=[5, 10, 20, 20] if second else 8,
        cross_attention_dim=width,
        use_linear_projection=second,
    )
    assert {n.removeprefix("unet."): s for n, s in found.items() if n.startswith("unet.")} == theirs
    # the configurations of the published text encoders; SD2.x's has 23 of OpenCLIP's 24 layers
    config = CLIPTextConfig(
        hidden_size=width,
        num_hidden_layers=23 if second else 12,
        intermediate_size=4 * width,
        num_attention_heads=16 if second else 12,
    )
    with torch.inference_mode(False), torch.device("meta"):
        encoder = CLIPTextModel(config)
    theirs = {name.removeprefix("text_model."): tuple(t.shape) for name, t in encoder.named_parameters()}
    prefix = "text_encoder.text_model."
    assert {n.removeprefix(prefix): s for n, s in found.items() if n.startswith(prefix)} == theirs


# --- What has no such form


def test_attention_to_a_picture_has_no_stock_form_and_the_error_says_what_to_do(models, subject):
    learned = subject("ViCo")
    for make in (export.lora, export.diffusers_weights, functools.partial(export.diffusers_lora, rank=8)):
        with pytest.raises(ValueError, match="attends to its picture.*SuDe Save Subject and export its word"):
            make(learned, *models[:2])


def test_a_subject_without_a_word_or_without_changes_says_what_to_export_instead(models, subject):
    with pytest.raises(ValueError, match="no word of its own.*'sks dog'.*Export it as a LoRA"):
        export.embedding(subject("DreamBooth LoRA"), *models[:2])
    word_only = part_of(subject("Custom Diffusion"), "<new1>")
    with pytest.raises(ValueError, match="changes no weight.*export its word as an embedding"):
        export.lora(word_only, *models[:2])
    with pytest.raises(ValueError, match="clip is missing"):
        export.lora(word_only, models[0], None)
    biases = some(subject("DreamBooth"))
    biases = dataclasses.replace(biases, tensors={k: t for k, t in biases.tensors.items() if t["diff"].ndim == 1})
    with pytest.raises(ValueError, match="holds matrices.*diffusers weights"):
        export.diffusers_lora(biases, *models[:2], rank=8)


def test_a_subject_of_another_family_or_too_large_for_half_precision_is_refused(models, subject):
    learned = part_of(subject("Custom Diffusion"), "<new1>")
    learned.tensors[("token", "<new1>")] = {"vectors": torch.full((1, 768), 1e5)}
    with pytest.raises(ValueError, match="fp16 cannot hold.*bf16"):
        export.embedding(learned, *models[:2], precision="fp16")
    learned.tensors[("token", "<new1>")] = {"vectors": torch.zeros(1, 1024)}
    with pytest.raises(ValueError, match="1024 wide"):
        export.embedding(learned, *models[:2])
    learned.tensors[("model", "diffusion_model.out.2.bias")] = {"diff": torch.ones(5)}
    with pytest.raises(ValueError, match="does not fit this model"):
        export.lora(learned, *models[:2])


@pytest.mark.parametrize("method", ["DreamBooth", "DreamBooth LoRA"])
def test_weights_never_get_a_subject_twice(models, subject, method):
    learned = part_of(subject(method), "clip_l.transformer.text_model.encoder.layers.1.self_attn")
    saved = {key: {part: t.clone() for part, t in tensors.items()} for key, tensors in learned.tensors.items()}
    again = dataclasses.replace(learned, tensors=saved)
    with pytest.raises(ValueError, match="clip has the subject in it already.*twice"):
        export.diffusers_weights(again, *apply_subject(*models[:2], learned))


# --- The node


@pytest.fixture
def node():
    from comfy_sude.nodes.export_subject import SuDeExportSubject

    return SuDeExportSubject.PREPARE_CLASS_CLONE(None)


def test_the_node_writes_each_format_where_its_loader_looks(models, subject, folders, node):
    import folder_paths

    learned = part_of(subject("Custom Diffusion"), "<new1>", "diffusion_model.input_blocks.1.")  # keys and values
    expected = {
        "LoRA": "output/loras/dogs/my spike_00001_.safetensors",
        "LoRA of a rank": "output/loras/dogs/my spike_00002_.safetensors",
        "embedding": "embeddings/dogs/my_spike_00001_.safetensors",
        "diffusers LoRA": "output/diffusers/dogs/my spike_00001_.safetensors",
        "diffusers weights": "output/diffusers/dogs/my spike_00002_",
    }
    said = {}
    for format, place in expected.items():
        result = node.execute(learned, *models[:2], format, "dogs/my spike", rank=2, precision="fp16")
        path, said[format] = result.args
        assert Path(path) == folders / place and said[format] in result.ui.as_dict()["text"][0]
    for path in folders.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert file.metadata()["modelspec.title"] == "<new1> dog (Custom Diffusion with SuDe)"
            assert {str(file.get_tensor(key).dtype) for key in file.keys() if not key.endswith(".alpha")} == {
                "torch.float16"
            }
    (unet_file,) = (folders / expected["diffusers weights"]).rglob("*.*")
    assert unet_file.parts[-2:] == ("unet", "diffusion_pytorch_model.safetensors")
    names = [f"dogs/my spike_0000{n}_.safetensors" for n in (1, 2)]
    assert [Path(name).as_posix() for name in folder_paths.get_filename_list("loras")] == names
    assert "write embedding:dogs/my_spike_00001_ in prompts" in said["embedding"]
    assert "'<new1>' is not in it, export that as an embedding" in said["LoRA"]


HOSTILE = [
    "../../escape",
    "/etc/escape",
    "..\\..\\escape",
    "C:\\escape",
    "C:/escape",
    "esc\0ape",
    "x" * 5000,
    "犬/スパイク",
]
HOSTILE += ["con", "lpt1.safetensors", "nul/aux", "a/../../../escape", "<new1>:*?|", "~/escape", "a\nb", " .. / . "]


def test_no_name_leads_out_of_comfyuis_folders_or_onto_a_file_that_is_there(models, subject, folders, node):
    word = part_of(subject("Custom Diffusion"), "<new1>")
    bias = part_of(subject("DreamBooth"), "diffusion_model.out.2.bias")
    roots = {"embedding": folders / "embeddings", "LoRA": folders / "output" / "loras"}
    for format, learned in (("embedding", word), ("LoRA", bias)):
        written = set()
        for prefix in [*HOSTILE, *HOSTILE, "", "..", "/", "\0"]:
            try:
                path = Path(node.execute(learned, *models[:2], format, prefix).args[0])
            except ValueError as error:
                assert "filename_prefix" in str(error) and not set(prefix) - set("/. \0"), prefix
                continue
            assert path.is_file() and path.resolve().is_relative_to(roots[format].resolve()), prefix
            assert path not in written and not {"con", "nul", "aux"} & {part.lower() for part in path.parts}
            written.add(path)
        assert len(written) >= 2 * (len(HOSTILE) - 1)
        assert {path for path in roots[format].rglob("*") if path.is_file()} == written
    assert {path.name for path in folders.iterdir()} <= {"embeddings", "output"}


def test_what_cannot_be_exported_leaves_no_file(models, subject, folders, node):
    with pytest.raises(ValueError, match="'GGUF'.*one of: LoRA, "):
        node.execute(subject("DreamBooth LoRA"), *models[:2], "GGUF")
    for values, said in (({"rank": 0}, "rank is 0.*1 to 1024"), ({"precision": "fp8"}, "'fp8'.*fp32, fp16, bf16")):
        with pytest.raises(ValueError, match=said):
            node.execute(subject("DreamBooth LoRA"), *models[:2], "LoRA of a rank", **values)
    with pytest.raises(ValueError, match="attends to its picture"):
        node.execute(subject("ViCo"), *models[:2], "LoRA")
    assert not list(folders.rglob("*.*"))
