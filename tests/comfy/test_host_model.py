"""The own trainable copy predicts as the MODEL does, and what it learned comes back as patches that behave."""

import pytest
import torch

from comfy_sude.host.apply import apply_subject

from .helpers import predictions, recipe, sample, train


def random_lora(generator, strength=0.1):
    keys = [f"diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.{name}" for name in ("to_q", "to_v")]
    return {
        f"{key}.{part}.weight": torch.randn(shape, generator=generator) * strength
        for key in keys
        for part, shape in (("lora_up", (320, 4)), ("lora_down", (4, 320)))
    }


def with_lora(model, seed=5):
    import comfy.sd

    return comfy.sd.load_lora_for_models(model, None, random_lora(torch.Generator().manual_seed(seed)), 1.0, 0)[0]


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(3)
    return torch.randn(2, 77, 768, generator=g), torch.randn(2, 4, 8, 8, generator=g), torch.tensor([0.7, 6.0])


@pytest.mark.parametrize("loaded_last", ["itself", "another clone"])
def test_copy_predicts_bit_for_bit_as_the_model_with_its_loras(models, inputs, loaded_last):
    from comfy_sude.host.model import build_unet

    context, x, sigma = inputs
    model = with_lora(models[0])
    expected = predictions(model, context, x, sigma).clone()
    if loaded_last == "another clone":  # then the shared weights no longer hold this clone's patches
        predictions(models[0], context, x, sigma)
    with torch.inference_mode(False):
        base = build_unet(model)
        assert not any(p.is_inference() or p.requires_grad for p in base.parameters())
    assert torch.equal(base.apply_model(x, sigma, c_crossattn=context), expected)
    assert not torch.equal(predictions(models[0], context, x, sigma), expected), "the LoRA made no difference"


def test_gradient_checkpointing_gives_the_same_gradients(models, inputs):
    from comfy_sude.host import model as host_model

    context, x, _ = inputs
    gradients = []
    with torch.inference_mode(False):
        context, x, t = context.clone(), x.clone(), torch.tensor([10, 500])
        for checkpointed in (False, True):
            base = host_model.build_unet(models[0])
            base.diffusion_model.requires_grad_(True)
            if checkpointed:
                host_model.checkpoint_blocks(base.diffusion_model)
            saved = []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda v, saved=saved: saved.append(v.numel()) or v, lambda v: v
            ):
                loss = host_model.predict(base, x, t, context).pow(2).mean()
            loss.backward()
            named = base.diffusion_model.named_parameters()
            gradients.append(({name: p.grad for name, p in named if p.grad is not None}, sum(saved)))
    (plain, stored), (recomputed, stored_less) = gradients
    assert plain.keys() == recomputed.keys() and len(plain) > 150
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)
    assert stored_less < 0.7 * stored


def test_graph_model_predicts_as_the_trained_module(models, picture, tmp_path, inputs, monkeypatch):
    from comfy_sude import finetune
    from comfy_sude.host import model as host_model

    trained = {}
    take = finetune._differences

    def keep(model, clip, baseline):
        trained["unet"] = {n: p.detach().clone() for n, p in baseline.networks.unet.named_parameters()}
        return take(model, clip, baseline)

    monkeypatch.setattr(finetune, "_differences", keep)
    model, clip, vae = models
    model = with_lora(model)
    subject = train((model, clip, vae), picture, tmp_path, recipe())
    patched, _ = apply_subject(model, clip, subject)
    context, x, sigma = inputs
    actual = predictions(patched, context, x, sigma).clone()
    base = host_model.build_unet(model)
    for name, parameter in base.diffusion_model.named_parameters():
        parameter.data = trained["unet"][name]
    expected = base.apply_model(x, sigma, c_crossattn=context)
    assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (actual - predictions(model, context, x, sigma)).abs().max() > 1e-2 * expected.abs().max()


@pytest.fixture(scope="module")
def subject(_shared, tmp_path_factory):
    y, x = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 64), indexing="ij")
    with torch.inference_mode():
        return train(_shared, torch.stack([x, y, x * y], -1)[None], tmp_path_factory.mktemp("cache"), recipe())


def test_strength_scales_the_subject_and_zero_is_the_base(models, subject, inputs):
    from comfy_sude.host.model import current_weight

    model, clip, _ = models
    key = next(k for network, k in subject.tensors if network == "model")
    half = apply_subject(model, clip, subject, 0.5, 0.5)[0]
    diff = subject.tensors["model", key]["diff"]
    assert torch.allclose(current_weight(half, key), current_weight(model, key) + 0.5 * diff, atol=1e-7)
    none, none_clip = apply_subject(model, clip, subject, 0.0, 0.0)
    assert torch.equal(sample(none, none_clip), sample(model, clip))


def test_lora_before_and_after_the_subject_give_the_same_picture(models, subject):
    model, clip, _ = models
    before, clip_a = apply_subject(with_lora(model), clip, subject)
    patched, clip_b = apply_subject(model, clip, subject)
    a, b = sample(before, clip_a), sample(with_lora(patched), clip_b)
    assert (a - b).abs().max() < 1e-4 * a.abs().max()
    assert (a - sample(patched, clip_b)).abs().max() > 2e-3 * a.abs().max()


def test_clip_skip_after_the_subject_is_honoured(models, subject):
    import nodes

    patched, clip = apply_subject(*models[:2], subject)
    skipped = nodes.CLIPSetLastLayer().set_last_layer(clip, -2)[0]
    assert not torch.equal(sample(patched, skipped), sample(patched, clip))


def test_base_model_is_untouched_when_used_again_in_the_same_graph(models, subject):
    model, clip, _ = models
    first = sample(model, clip)
    patched, patched_clip = apply_subject(model, clip, subject)
    other = sample(patched, patched_clip)
    assert torch.equal(sample(model, clip), first)
    assert not torch.equal(other, first)
    assert torch.equal(sample(patched, patched_clip), other)


def test_subject_on_a_model_of_another_shape_is_refused(subject, load, models):
    other = load("abs")
    with pytest.raises(ValueError, match="does not fit this model.*unknown to it or of another shape"):
        apply_subject(other[0], models[1], subject)


@pytest.mark.parametrize(
    ("variant", "message"),
    [("sdxl", "family SDXL|family .*KOALA|family .*SDXL"), ("inpaint", "inpainting or edit UNet .9 input channels")],
)
def test_unsupported_models_are_refused_before_anything_is_done(load, models, picture, tmp_path, variant, message):
    model = load(variant)[0]
    with pytest.raises(ValueError, match=message):
        train((model, *models[1:]), picture, tmp_path, recipe())


def test_flow_sampling_on_an_sd_model_is_refused(models, picture, tmp_path):
    import comfy.model_sampling

    class Flow(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        pass

    model = models[0].clone()
    model.add_object_patch("model_sampling", Flow(model.model.model_config))
    with pytest.raises(ValueError, match="noise process .*CONST.* is not supported"):
        train((model, *models[1:]), picture, tmp_path, recipe())


def test_sd2_v_model_copies_exactly_and_counts_as_v_prediction(load):
    from comfy_sude.host.model import build_unet, check_supported, native_resolution, predict

    model = load("sd21v")[0]
    process = check_supported(model)
    assert process.prediction == "v" and native_resolution(model) == 768
    g = torch.Generator().manual_seed(0)
    x, context, t = torch.randn(1, 4, 8, 8, generator=g), torch.randn(1, 77, 1024, generator=g), torch.tensor([300])
    sigma = model.get_model_object("model_sampling").sigma(t)
    x0 = predictions(model, context, x * (sigma**2 + 1).sqrt(), sigma)
    v = predict(build_unet(model), x, t, context)
    alpha, noise_scale = process.signal(t, x)
    assert torch.allclose(x0, alpha * x - noise_scale * v, atol=1e-4)


def test_class_images_of_an_eps_and_a_v_model_are_told_apart(models):
    import comfy.model_sampling

    from comfy_sude.host.model import identities

    class Velocity(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.V_PREDICTION):
        pass

    model, clip, vae = models
    velocity = model.clone()
    velocity.add_object_patch("model_sampling", Velocity(model.model.model_config))
    assert len({identities(one, clip, vae)["model"] for one in (model, model.clone(), velocity, with_lora(model))}) == 3
