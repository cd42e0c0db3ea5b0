"""fine_tune from end to end in process: determinism, priors, stop and failure, the gradient of the first step."""

import gc

import pytest
import torch

from comfy_sude import sude
from comfy_sude.baselines import REGISTRY
from comfy_sude.baselines.base import Networks
from comfy_sude.data import Latents
from comfy_sude.host import images, text
from comfy_sude.host import model as host_model
from comfy_sude.host.apply import apply_subject
from comfy_sude.recipe import Prior
from comfy_sude.store import Store
from comfy_sude.train import Predictors, Trainer

from .helpers import Silent, recipe, sample, train
from .test_host_text import transformers_copy

OFF = Prior(kind="off")
pytestmark = pytest.mark.slow  # seconds each: a CLIP's token table alone has 38 million weights to update


def tensors_equal(a, b) -> bool:
    return a.tensors.keys() == b.tensors.keys() and all(
        torch.equal(a.tensors[key][part], b.tensors[key][part]) for key in a.tensors for part in a.tensors[key]
    )


@pytest.mark.parametrize("method", list(REGISTRY))
def test_same_inputs_same_bits_twice_and_another_seed_differs(models, picture, tmp_path, method):
    torch.manual_seed(1)
    first = train(models, picture, tmp_path, recipe(method))
    torch.manual_seed(2)  # the global generator must not matter
    again = train(models, picture, tmp_path, recipe(method))
    assert tensors_equal(first, again) and first.log.values == again.log.values
    assert not tensors_equal(first, train(models, picture, tmp_path, recipe(method, seed=1)))


@pytest.mark.parametrize("method", list(REGISTRY))
def test_sude_changes_the_result_and_zero_weight_does_not_even_look(models, picture, tmp_path, method):
    plain = train(models, picture, tmp_path, recipe(method, w_s=0.0))
    with_sude = train(models, picture, tmp_path, recipe(method, w_s=5.0, truncation=False))
    assert plain.log.values["gate"] == [0.0] * 3 and plain.log.values["l_sude"] == [0.0] * 3
    assert with_sude.log.values["gate"] == [1.0] * 3 and any(with_sude.log.values["l_sude"])
    assert plain.log.values["l_sub"][0] == with_sude.log.values["l_sub"][0], "the draws depend on w_s"
    assert not tensors_equal(plain, with_sude)


def test_result_is_sampled_by_stock_nodes_with_the_subjects_prompt(models, picture, tmp_path):
    subject = train(models, picture, tmp_path, recipe())
    assert subject.prompt("running", "on the beach") == "photo of a running sks dog on the beach"
    model, clip = apply_subject(*models[:2], subject)
    changed = sample(model, clip, subject.prompt("running"))
    assert torch.isfinite(changed).all()
    assert not torch.equal(changed, sample(*models[:2], subject.prompt("running")))


def test_everything_dreambooth_promises_to_train_has_changed(models, picture, tmp_path):
    subject = train(models, picture, tmp_path, recipe())
    unet = {f"diffusion_model.{name}" for name, _ in models[0].model.diffusion_model.named_parameters()}
    assert {key for network, key in subject.tensors if network == "model"} == unet
    clip = {key for network, key in subject.tensors if network == "clip"}
    for part in (
        "token_embedding",
        "position_embedding",
        "layers.0.mlp.fc1",
        "layers.1.self_attn.q_proj",
        "final_layer_norm",
    ):
        assert any(part in key for key in clip), part
    assert not any("text_projection" in key or "logit_scale" in key for key in clip)


def test_lora_is_small_and_its_text_encoder_is_optional(models, picture, tmp_path):
    both = train(models, picture, tmp_path, recipe("DreamBooth LoRA", rank=4))
    assert both.size < 2e6 and {network for network, _ in both.tensors} == {"model", "clip"}
    unet_only = train(models, picture, tmp_path, recipe("DreamBooth LoRA", rank=4, train_text_encoder=False))
    assert {network for network, _ in unet_only.tensors} == {"model"}
    assert any(tensors["up"].abs().max() > 0 for tensors in unet_only.tensors.values())
    model, clip = apply_subject(*models[:2], unet_only)
    assert not torch.equal(sample(model, clip), sample(*models[:2]))


def test_class_images_are_drawn_once_and_found_again(models, picture, tmp_path):
    first, second, other = Silent(), Silent(), Silent()
    a = train(models, picture, tmp_path, recipe(), first)
    b = train(models, picture, tmp_path, recipe(), second)
    assert "drawing class images" in first.phases and "drawing class images" not in second.phases
    assert tensors_equal(a, b)
    train(models, picture, tmp_path, recipe(category="cat"), other)
    assert "drawing class images" in other.phases
    damaged, _ = [entry.path for entry in Store(tmp_path).entries("class_images")]
    damaged.write_bytes(damaged.read_bytes()[:100])
    third, fourth = Silent(), Silent()
    train(models, picture, tmp_path, recipe(), third)
    train(models, picture, tmp_path, recipe(category="cat"), fourth)
    assert ["drawing class images" in report.phases for report in (third, fourth)].count(True) == 1


def test_own_class_images_replace_drawing_them(models, picture, tmp_path):
    report = Silent()
    train(models, picture, tmp_path, recipe(), report, class_images=picture.flip(1).repeat(3, 1, 1, 1))
    assert "drawing class images" not in report.phases and not Store(tmp_path).entries("class_images")


@pytest.mark.parametrize("method", [name for name in REGISTRY if REGISTRY[name].settings.TAKES_PRIOR])
def test_distillation_and_pretrained_reference_start_from_the_incoming_model(models, picture, tmp_path, method):
    subject = train(
        models, picture, tmp_path, recipe(method, prior=Prior(kind="distillation"), reference="pretrained", steps=2)
    )
    assert subject.log.values["l_prior"][0] < 1e-9 < subject.log.values["l_prior"][1]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("method", list(REGISTRY))
def test_half_precision_trains_close_to_fp32(models, picture, tmp_path, method, precision):
    prior = Prior(kind="distillation" if REGISTRY[method].settings.TAKES_PRIOR else "preset")
    options = {"prior": prior, "reference": "pretrained", "steps": 2}
    full = train(models, picture, tmp_path, recipe(method, **options))
    half = train(models, picture, tmp_path, recipe(method, precision=precision, **options))
    assert half.log.values["l_sub"] == pytest.approx(full.log.values["l_sub"], rel=0.05)
    assert half.log.values["l_sub"] != full.log.values["l_sub"]
    assert all(part.dtype == torch.float32 for tensors in half.tensors.values() for part in tensors.values())


def test_rgba_picture_is_composited_and_several_pictures_are_drawn_from(models, picture, tmp_path):
    alpha = torch.cat([picture, torch.zeros_like(picture[..., :1])], -1)
    white = train(models, torch.ones_like(picture), tmp_path, recipe(prior=OFF))
    assert tensors_equal(white, train(models, alpha, tmp_path, recipe(prior=OFF)))
    both = train(models, torch.cat([picture, 1 - picture]), tmp_path, recipe(prior=OFF, steps=6))
    one = train(models, picture, tmp_path, recipe(prior=OFF, steps=6))
    assert both.log.values["l_sub"] != one.log.values["l_sub"]


def test_kl_autoencoder_posterior_is_the_one_comfyui_encodes_with(load, picture):
    _, _, vae = load("abs", vae="kl")
    model = load("abs")[0]
    latent_format = model.get_model_object("latent_format")
    latents = images.encode(vae, latent_format, picture, Silent(), "encoding")
    assert torch.allclose(latents.mean[0, 0], latent_format.process_in(vae.encode(picture))[0], atol=1e-5)
    assert torch.allclose(latents.mean[0, 1], latent_format.process_in(vae.encode(picture.flip(2)))[0], atol=1e-5)
    stage = vae.first_stage_model
    moments = stage.quant_conv(stage.encoder(vae.process_input(picture.movedim(-1, 1)).to(vae.vae_dtype))).float()
    std = (0.5 * moments.chunk(2, 1)[1]).exp() * 0.18215
    assert torch.allclose(latents.std[0, 0], std[0], rtol=1e-3, atol=1e-5)
    assert not stage.regularization._forward_pre_hooks


class Stop(BaseException):
    """Like ComfyUI's InterruptProcessingException: not an Exception."""


@pytest.mark.parametrize("error", [Stop, RuntimeError, torch.OutOfMemoryError])
def test_stop_or_crash_in_the_middle_frees_the_copies_and_leaves_the_models(models, picture, tmp_path, error):
    import comfy.model_management

    def fail(done):
        if done == 2:
            raise error("now")

    before = sample(*models[:2])
    gc.collect()
    alive = living_unets()
    report = Silent(fail)
    with pytest.raises(error):
        train(models, picture, tmp_path, recipe(steps=5), report)
    assert report.steps[-1] == 2
    gc.collect()
    assert living_unets() == alive
    lent = (models[0].model, models[1].patcher.model, models[2].patcher.model)
    loaded = [entry.model.model for entry in comfy.model_management.current_loaded_models if entry.model is not None]
    assert all(any(one is other for other in lent) for one in loaded)
    assert torch.equal(sample(*models[:2]), before)


def living_unets() -> int:
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    return sum(type(thing) is UNetModel for thing in gc.get_objects())


def test_loss_that_explodes_says_what_to_do(models, picture, tmp_path):
    with pytest.raises(FloatingPointError, match="not finite at step .*smaller learning rate"):
        train(models, picture, tmp_path, recipe(learning_rate=1.0, steps=50, prior=OFF))


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_gradient_of_the_first_step_is_that_of_a_mu_space_fp64_reference(models, prediction):
    """In fp64 again: the text encoder by transformers, posterior means and variances as the paper prints them."""
    model, clip, _ = models
    w_s, w_r = 0.4, 2.0
    g = torch.Generator().manual_seed(0)
    example, classes = (torch.randn(1, 2, 4, 8, 8, generator=g) for _ in range(2))
    made = recipe(w_s=w_s, prior=Prior(w_r=w_r), truncation=False)
    with torch.inference_mode(False), torch.enable_grad():
        example, classes = example.clone(), classes.clone()
        base, encoder_model = host_model.build_unet(model), text.build_text_encoder(clip)
        process = host_model.check_supported(model)
        if prediction == "v":
            process = type(process)(process.alphas_cumprod, "v")
        encoder = text.Encoder(clip, encoder_model, torch.device("cpu"))
        reference_text, reference = transformers_copy(encoder_model), host_model.build_unet(model)
        reference.diffusion_model.double().requires_grad_(True)

        baseline = REGISTRY["DreamBooth"](made, Networks(base.diffusion_model, encoder_model))
        on = Predictors(process, lambda x, t, c: host_model.predict(base, x, t, c), encoder, torch.device("cpu"))
        trainer = Trainer(baseline, on, Latents(example), Latents(classes))
        drawn = []
        noised = trainer._noised
        trainer._noised = lambda z: drawn.append(noised(z)) or drawn[-1]
        terms = trainer.losses()
        (terms["l_sub"] + w_s * terms["l_sude"] + w_r * terms["l_prior"]).backward()

        def encode(caption):
            return reference_text(input_ids=torch.tensor([encoder._ids(caption)])).last_hidden_state

        def predict(x, t, context):
            return host_model.predict(reference, x, t, context)

        ab = process.alphas_cumprod
        (z, n, t), (z_p, n_p, t_p) = [(z.double(), n.double(), t) for z, n, t in drawn]
        x, x_p = (ab[s].sqrt() * i + (1 - ab[s]).sqrt() * j for i, j, s in ((z, n, t), (z_p, n_p, t_p)))
        a = predict(x, t, encode("photo of a sks dog"))
        p = predict(x_p, t_p, encode("photo of a dog"))
        with torch.no_grad():
            c, u = predict(x, t, encode("photo of a dog")), predict(x, t, encode(""))
        target, target_p = n, n_p
        eps = [a, c, u]
        if prediction == "v":
            target, target_p = (ab[s].sqrt() * j - (1 - ab[s]).sqrt() * i for i, j, s in ((z, n, t), (z_p, n_p, t_p)))
            eps = [ab[t].sqrt() * v + (1 - ab[t]).sqrt() * x for v in eps]
        beta = 1 - ab[t] / ab[t - 1]
        c1, c2 = beta * ab[t - 1].sqrt() / (1 - ab[t]), (1 - ab[t - 1]) * (1 - beta).sqrt() / (1 - ab[t])
        variance = beta * (1 - ab[t - 1]) / (1 - ab[t])
        mu_a, mu_c, mu_u = (c1 * (x - (1 - ab[t]).sqrt() * e) / ab[t].sqrt() + c2 * x for e in eps)
        l_sude = ((mu_a - mu_c).pow(2).mean() - (mu_a - mu_u).pow(2).mean()) / (2 * variance + 1e-6) / c1
        loss = (a - target).pow(2).mean() + w_s * l_sude.sum() + w_r * (p - target_p).pow(2).mean()
        loss.backward()
    assert int(t) > 0 and abs(float(terms["l_sude"]) - float(l_sude)) < 1e-4 * abs(float(l_sude))
    expected = dict(reference.diffusion_model.named_parameters()) | dict(reference_text.named_parameters())
    total, wrong = 0.0, 0.0
    for name, parameter in [*base.diffusion_model.named_parameters(), *encoder_model.named_parameters()]:
        key = name.removeprefix("clip_l.transformer.")
        key = key if key in expected else key.removeprefix("text_model.")
        if parameter.grad is not None:
            total += expected[key].grad.pow(2).sum().item()
            wrong += (parameter.grad - expected[key].grad).pow(2).sum().item()
    assert (wrong / total) ** 0.5 < 1e-4
    assert sude.T0_MODES[0] == "clamp"
