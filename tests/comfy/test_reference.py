"""ViCo's attention to the reference picture when stock nodes sample: guidance, batches, memory, patches, clones."""

import logging

import pytest
import torch

from comfy_sude import image_attention
from comfy_sude.host import model as host_model
from comfy_sude.host.apply import apply_subject

from .helpers import recipe, sample, train
from .test_host_model import with_lora

pytestmark = pytest.mark.slow
PLACES = ("output_blocks.1.1", "output_blocks.3.1")


def subject_of(models, folder, **changes):
    y, x = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 64), indexing="ij")
    with torch.inference_mode():
        made = recipe("ViCo", steps=1, learning_rate=1e-3, w_s=0.0, **changes)
        return train(models, torch.stack([x, y, x * y], -1)[None], folder, made)


@pytest.fixture(scope="module")
def subject(_shared, tmp_path_factory):
    return subject_of(_shared, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def halved(_shared, tmp_path_factory):
    """A subject whose unconditional half does not see the picture."""
    return subject_of(_shared, tmp_path_factory.mktemp("cache"), unconditional_image=False)


class Seen:
    """One run of the stock KSampler on a MODEL: latents, both halves of each step, passes of the UNet.

    Prompts are texts or CONDITIONINGs.
    """

    def __init__(self, model, clip, text="photo of a *", negative="", cfg=5.0, steps=2, batch=1, **how):
        import nodes
        from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

        model = model.clone()
        self.halves: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.passes: list[tuple[int, bool]] = []  # rows, and whether it was a reference's

        def look(args):
            self.halves.append((args["cond_denoised"], args["uncond_denoised"]))
            return args["denoised"]

        model.set_model_sampler_post_cfg_function(look, disable_cfg1_optimization=False)
        unet = model.model.diffusion_model

        def count(x, *args, **kwargs):
            self.passes.append((len(x), args[-1].get("cond_or_uncond") is None))
            return UNetModel._forward(unet, x, *args, **kwargs)

        encoder = nodes.CLIPTextEncode()
        positive, negative = (
            prompt if isinstance(prompt, list) else encoder.encode(clip, prompt)[0] for prompt in (text, negative)
        )
        latent = how.get("latent") or nodes.EmptyLatentImage().generate(64, 64, batch)[0]
        unet._forward = count
        try:
            node = nodes.KSampler()
            sampler = how.get("sampler", "euler")
            out = node.sample(model, 1, steps, cfg, sampler, "normal", positive, negative, latent)
        finally:
            del unet._forward
        self.samples = out[0]["samples"]

    @property
    def references(self) -> list[int]:
        return [rows for rows, reference in self.passes if reference]


def close(a, b, tolerance=1e-4) -> bool:
    return bool((a - b).abs().max() < tolerance * b.abs().max())


# --- What it computes


def restated(models, subject, x, sigma, prompt_ids, at, strength=1.0):
    """The denoised latents by an own copy of the UNet and the blocks as plain torch layers."""
    model, clip, _ = models
    base = host_model.build_unet(model)
    tensors = subject.of("reference")
    blocks = {}
    for place in PLACES:
        block = image_attention.ImageBlock(320, 8)
        names = {name for name, _ in block.named_parameters()}
        block.load_state_dict({name: tensors[f"{place}.{name}"]["value"] for name in names})
        blocks[image_attention.key(place)] = block
    t = base.model_sampling.timestep(torch.tensor([sigma]))
    record = image_attention.Record(PLACES)
    host_model.predict(base, tensors["latent"]["value"], t, prompt_ids, record)
    masks = {place: image_attention.object_mask(record.maps[place][:, :, at]) for place in PLACES}
    taps = image_attention.Attend(blocks, record.kept, masks, None, strength)
    eps = host_model.predict(base, x / (sigma**2 + 1) ** 0.5, t, prompt_ids, taps)
    return x - sigma * eps


def test_both_halves_are_those_of_the_restatement_with_the_prompts_position(models, subject):
    import comfy.sample
    import nodes

    model, clip = apply_subject(*models[:2], subject)
    seen = Seen(model, clip, "photo of a running *", steps=1)
    sigma = float(model.get_model_object("model_sampling").sigma_max)
    x = comfy.sample.prepare_noise(torch.zeros(1, 4, 8, 8), 1) * (1 + sigma**2) ** 0.5
    own, empty = (nodes.CLIPTextEncode().encode(clip, text)[0][0][0] for text in ("photo of a running *", ""))
    at = 5  # start, photo, of, a, running, *
    for half, context in zip(seen.halves[0], (own, empty), strict=True):
        expected = restated(models, subject, x, sigma, context, at)
        assert close(half, expected, 1e-3)
        assert not close(half, restated(models, subject, x, sigma, context, at - 3), 1e-3), "any position would do"


def test_taps_that_change_nothing_leave_the_prediction_as_it_is(models, load):
    for model in (models[0], load("sd21v", clip=False, vae="none")[0]):
        g = torch.Generator().manual_seed(1)
        base = host_model.build_unet(model)
        places = image_attention.places(base.diffusion_model)
        width = model.model.model_config.unet_config["context_dim"]
        x, t = torch.randn(2, 4, 8, 8, generator=g), torch.tensor([3, 700])
        context = torch.randn(2, 77, width, generator=g)
        record = image_attention.Record(places)
        assert torch.equal(host_model.predict(base, x, t, context), host_model.predict(base, x, t, context, record))
        for place in places:
            maps = record.maps[place]
            assert maps.shape == (2, record.kept[place].shape[1], 77)
            assert torch.allclose(maps.sum(-1), torch.ones(maps.shape[:2]), atol=1e-5)


# --- How often it runs


@pytest.mark.parametrize(("sampler", "steps", "references"), [("euler", 3, 3), ("heun", 2, 2), ("dpm_2", 2, 3)])
def test_the_reference_runs_once_for_each_time_and_text(models, subject, sampler, steps, references):
    model, clip = apply_subject(*models[:2], subject)
    seen = Seen(model, clip, steps=steps, sampler=sampler, batch=2)
    assert seen.references == [2] * references, "one row for each of the two texts, whatever the batch"
    same = Seen(model, clip, text="photo of a *", negative="photo of a *", steps=1)
    assert same.references == [1], "one text needs one reference"


def test_guidance_of_one_runs_one_half(models, subject):
    model, clip = apply_subject(*models[:2], subject)
    seen, both = Seen(model, clip, cfg=1.0, steps=1), Seen(model, clip, cfg=5.0, steps=1)
    assert seen.references == [1] and [rows for rows, reference in seen.passes if not reference] == [1]
    assert close(seen.halves[0][0], both.halves[0][0])


def test_the_unconditional_half_can_be_left_plain(models, subject, halved):
    model, clip = apply_subject(*models[:2], halved)
    base = Seen(*models[:2], steps=1)
    plain = Seen(model, clip, steps=1)
    assert plain.references == [1]
    assert close(plain.halves[0][1], base.halves[0][1]), "the unconditional half is not the base model's"
    both = Seen(*apply_subject(*models[:2], subject), steps=1)
    assert not close(both.halves[0][1], base.halves[0][1], 1e-2)
    assert torch.isfinite(Seen(model, clip, batch=3).samples).all()


# --- Batches and memory


def test_split_batches_under_low_memory_give_the_same(models, subject, monkeypatch):
    model, clip = apply_subject(*models[:2], subject)
    together = Seen(model, clip, batch=2)
    monkeypatch.setattr(type(model), "get_free_memory", lambda self, device: 0)
    apart = Seen(model, clip, batch=2)
    assert {rows for rows, reference in apart.passes if not reference} == {2}
    assert {rows for rows, reference in together.passes if not reference} == {4}
    assert apart.references == [1] * 4 and close(apart.samples, together.samples, 1e-3)


def test_a_batch_is_what_its_pictures_are_alone(models, subject):
    import comfy.sample

    model, clip = apply_subject(*models[:2], subject)
    latents = torch.zeros(3, 4, 8, 8)
    noise = comfy.sample.prepare_noise(latents, 1)
    batch = Seen(model, clip, latent={"samples": latents}).samples
    import nodes
    from comfy.samplers import KSampler

    positive, negative = (nodes.CLIPTextEncode().encode(clip, text)[0] for text in ("photo of a *", ""))
    for index in (0, 2):
        sampler = KSampler(model, 2, "cpu", "euler", "normal", 1.0, model.model_options)
        alone = sampler.sample(noise[index : index + 1], positive, negative, 5.0, latents[:1], disable_pbar=True)
        assert close(alone, batch[index : index + 1], 1e-3)


def test_other_resolutions_than_the_references(models, subject):
    model, clip = apply_subject(*models[:2], subject)
    wide = Seen(model, clip, latent={"samples": torch.zeros(1, 4, 8, 16)}).samples
    assert wide.shape == (1, 4, 8, 16) and torch.isfinite(wide).all()


def test_the_blocks_are_loaded_and_counted_by_comfyui(models, subject):
    import comfy.model_management

    model, clip = apply_subject(*models[:2], subject)
    seen = []

    def look(args):
        seen.append([type(entry.model.model).__name__ for entry in comfy.model_management.current_loaded_models])
        return args["denoised"]

    looked = model.clone()
    looked.set_model_sampler_post_cfg_function(look)
    sample(looked, clip, "photo of a *")
    assert "ModuleDict" in seen[0]
    (patcher,) = looked.get_nested_additional_models()
    assert patcher.model_size() == 4 * sum(20 * w**2 + 17 * w for w in (320, 320))
    comfy.model_management.unload_all_models()
    assert torch.equal(sample(model, clip, "photo of a *"), sample(looked, clip, "photo of a *"))


# --- With everything else


def test_strength_zero_is_the_base_model_bit_for_bit_and_half_is_between(models, subject):
    none, clip = apply_subject(*models[:2], subject, 0.0, 1.0)
    assert torch.equal(Seen(none, clip).samples, Seen(models[0], clip).samples)
    assert not none.model_options["transformer_options"].get("patches") and not none.wrappers
    distances = [
        float((Seen(apply_subject(*models[:2], subject, s)[0], clip, steps=1).samples
               - Seen(models[0], clip, steps=1).samples).norm())
        for s in (0.25, 0.5, 1.0)
    ]  # fmt: skip
    assert 0 < distances[0] < distances[1] < distances[2]


def test_the_base_model_is_untouched_after_and_between(models, subject):
    before = Seen(*models[:2], "photo of a dog").samples
    model, clip = apply_subject(*models[:2], subject)
    with_picture = Seen(model, clip).samples
    assert torch.equal(Seen(*models[:2], "photo of a dog").samples, before)
    assert torch.equal(Seen(model, clip).samples, with_picture)
    assert not torch.equal(with_picture, Seen(models[0], clip).samples)


def test_clones_and_loras_before_and_after(models, subject):
    model, clip = apply_subject(*models[:2], subject)
    alone = Seen(model, clip).samples
    assert torch.equal(Seen(model.clone().clone(), clip).samples, alone)
    after = Seen(with_lora(model), clip).samples
    before = Seen(apply_subject(with_lora(models[0]), models[1], subject)[0], clip).samples
    assert torch.equal(after, before) and not close(after, alone, 1e-3)
    assert torch.equal(Seen(model, clip).samples, alone), "the reference of another clone's weights was reused"


@pytest.fixture(scope="module")
def second(_shared, tmp_path_factory):
    return subject_of(_shared, tmp_path_factory.mktemp("cache"), identifier="<two>", seed=5)


def test_a_second_subject_acts_beside_the_first(models, subject, second):
    one = apply_subject(*models[:2], subject)
    both = apply_subject(*one, second)
    text = "photo of a * and <two>"
    seen = Seen(*both, text, steps=1)
    assert seen.references == [2, 2], "each has its own reference, not seen by the other's"
    first_only = Seen(one[0], both[1], text, steps=1)  # the same prompts: only the attention differs
    second_only = Seen(apply_subject(*models[:2], second)[0], both[1], text, steps=1)
    assert not close(seen.samples, first_only.samples, 1e-3) and not close(seen.samples, second_only.samples, 1e-3)
    assert len(both[0].get_nested_additional_models()) == 2
    swapped = Seen(*apply_subject(*apply_subject(*models[:2], second), subject), text, steps=1)
    assert torch.isfinite(swapped.samples).all()
    assert torch.equal(Seen(*one, "photo of a *").samples, Seen(*apply_subject(*models[:2], subject)).samples)


def control_net(model):
    """A ControlNet of the model's own shape with random weights."""
    import comfy.controlnet
    import comfy.ops
    from comfy.cldm.cldm import ControlNet

    config = dict(model.model.model_config.unet_config)
    for name in ("disable_unet_model_output", "out_channels", "transformer_depth_output", "dtype"):
        config.pop(name, None)
    network = ControlNet(
        hint_channels=3, **{**config, "dtype": torch.float32, "operations": comfy.ops.disable_weight_init}
    )
    g = torch.Generator().manual_seed(2)
    for parameter in network.parameters():
        std = 0.05 if parameter.ndim < 2 else 0.7 / parameter[0].numel() ** 0.5
        parameter.data = torch.randn(parameter.shape, generator=g) * std
        parameter.requires_grad_(False)
    return comfy.controlnet.ControlNet(network, load_device=model.load_device)


def test_a_control_net_steers_the_picture_and_not_the_reference(models, subject, picture):
    import nodes

    model, clip = apply_subject(*models[:2], subject)
    net = control_net(model)
    positive, negative = (nodes.CLIPTextEncode().encode(clip, text)[0] for text in ("photo of a *", ""))
    controlled = nodes.ControlNetApplyAdvanced().apply_controlnet(positive, negative, net, picture, 0.7, 0.0, 1.0)
    positive_c, negative_c = controlled[:2]
    kept = []
    masks = image_attention.Record.masks

    def keep(self, positions):
        kept.append({place: tokens.clone() for place, tokens in self.kept.items()})
        return masks(self, positions)

    image_attention.Record.masks = keep
    try:
        with_net = Seen(model, clip, text=positive_c, negative=negative_c, steps=1)
        without = Seen(model, clip, text=positive, negative=negative, steps=1)
    finally:
        image_attention.Record.masks = masks
    assert not close(with_net.samples, without.samples, 1e-3)
    assert with_net.references == without.references == [2]
    assert all(torch.equal(kept[0][place], kept[1][place]) for place in PLACES)
    base = Seen(models[0], clip, text=positive_c, negative=negative_c, steps=1)
    assert not close(with_net.samples, base.samples, 1e-3)


def test_prompts_of_another_clip_and_without_the_word_still_sample(models, subject, caplog):
    model, clip = apply_subject(*models[:2], subject)
    with caplog.at_level(logging.WARNING):
        assert torch.isfinite(Seen(model, models[1], "photo of a dog").samples).all()
    assert "not encoded with the CLIP that knows '*'" in caplog.text
    caplog.clear()
    assert torch.isfinite(Seen(model, clip, "photo of a dog").samples).all()
    assert "SuDe" not in caplog.text


def test_training_on_a_model_with_a_picture_attached_trains_the_model_alone(models, subject, tmp_path, caplog):
    with_picture, _ = apply_subject(*models[:2], subject)
    y, x = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 64), indexing="ij")
    picture = torch.stack([y, x, x], -1)[None]
    made = recipe("DreamBooth LoRA", steps=2, rank=2)
    plain = train(models, picture, tmp_path / "a", made)
    assert "do not take part" not in caplog.text
    other = train((with_picture, *models[1:]), picture, tmp_path / "b", made)
    assert "patches that are no weights do not take part in the training" in caplog.text
    assert plain.log.values == other.log.values, "the class images or the training saw the attached picture"


def test_conditioning_nodes_in_between_keep_the_position(models, subject):
    import nodes

    model, clip = apply_subject(*models[:2], subject)
    plain = nodes.CLIPTextEncode().encode(clip, "photo of a *")[0]
    area = nodes.ConditioningSetArea().append(plain, 32, 64, 0, 0, 1.0)[0]
    both = nodes.ConditioningCombine().combine(area, nodes.CLIPTextEncode().encode(clip, "* at night")[0])[0]
    seen = Seen(model, clip, both, steps=1)
    assert sum(seen.references) == 3 and torch.isfinite(seen.samples).all()


def test_a_model_without_the_places_is_refused(models, subject, load, tmp_path):
    other = load("abs")
    with pytest.raises(ValueError, match="does not fit this model: it attends to its picture at output_blocks.1.1"):
        apply_subject(other[0], models[1], subject)
    with pytest.raises(ValueError, match="no cross-attention in its decoder"):
        train(other, torch.rand(1, 64, 64, 3), tmp_path, recipe("ViCo"))


def test_the_subject_says_where_it_attends(subject):
    assert subject.metadata["remark"] == "attention to the picture in output blocks 1, 3"
    assert subject.metadata["reference"] == {"heads": dict.fromkeys(PLACES, 8), "unconditional": True}
    assert subject.prompt("running", "on the beach") == "photo of a running * on the beach"
