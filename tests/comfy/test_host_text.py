"""The own text encoder encodes as the CLIP does and has the right gradient, which the stock one does not."""

import pytest
import torch

from comfy_sude.host import text

CAPTIONS = ["photo of a sks dog", "photo of a dog", ""]


@pytest.fixture
def encoder(models):
    with torch.inference_mode(False):
        return text.Encoder(models[1], text.build_text_encoder(models[1]), torch.device("cpu"))


def test_encodings_are_the_clips_own(models, encoder):
    import nodes

    ours = encoder(CAPTIONS)
    for caption, encoding in zip(CAPTIONS, ours, strict=True):
        assert torch.equal(nodes.CLIPTextEncode().encode(models[1], caption)[0][0][0][0], encoding)


def test_clip_skip_and_clip_loras_are_trained_on(models):
    import comfy.sd
    import nodes

    g = torch.Generator().manual_seed(1)
    key = "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1"
    lora = {f"{key}.lora_up.weight": torch.randn(3072, 2, generator=g) * 0.1}
    lora[f"{key}.lora_down.weight"] = torch.randn(2, 768, generator=g) * 0.1
    clip = comfy.sd.load_lora_for_models(None, models[1], lora, 0.0, 1.0)[1]
    clip = nodes.CLIPSetLastLayer().set_last_layer(clip, -2)[0]
    expected = nodes.CLIPTextEncode().encode(clip, CAPTIONS[0])[0][0][0][0]
    with torch.inference_mode(False):
        encoder = text.Encoder(clip, text.build_text_encoder(clip), torch.device("cpu"))
    # the graph stores patched text weights in fp16, the copy keeps fp32
    assert (encoder(CAPTIONS[:1])[0] - expected).abs().max() < 5e-3
    stock = nodes.CLIPTextEncode().encode(models[1], CAPTIONS[0])[0][0][0][0]
    assert (expected - stock).abs().max() > 0.1


def transformers_copy(model):
    """transformers' own CLIP text model in fp64 with the same weights: an independent implementation."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=2, num_attention_heads=12,
        max_position_embeddings=77, hidden_act="quick_gelu", attn_implementation="eager",
    )  # fmt: skip
    reference = CLIPTextModel(config).double()
    prefix = "clip_l.transformer."
    state = {k.removeprefix(prefix): v.double() for k, v in model.state_dict().items() if k.startswith(prefix)}
    known = reference.state_dict()
    if not any(key.startswith("text_model.") for key in known):  # transformers 5 dropped the prefix
        state = {k.removeprefix("text_model."): v for k, v in state.items()}
    missing, _unexpected = reference.load_state_dict(state, strict=False)
    assert not [key for key in missing if "position_ids" not in key]
    return reference


def test_gradient_of_every_weight_is_that_of_an_independent_fp64_encoder(encoder):
    with torch.inference_mode(False), torch.enable_grad():
        encoder.model.requires_grad_(True)
        weight = torch.randn(2, 77, 768, generator=torch.Generator().manual_seed(0))
        (encoder(CAPTIONS[:2]) * weight).sum().backward()
        reference = transformers_copy(encoder.model)
        ids = torch.tensor([encoder._ids(caption) for caption in CAPTIONS[:2]])
        (reference(input_ids=ids).last_hidden_state * weight.double()).sum().backward()
    expected = dict(reference.named_parameters())
    compared = 0
    for name, parameter in encoder.model.named_parameters():
        key = name.removeprefix("clip_l.transformer.")
        key = key if key in expected else key.removeprefix("text_model.")
        if parameter.grad is None or key not in expected:
            assert "text_projection" in name or "logit_scale" in name, name
            continue
        scale = expected[key].grad.abs().max()
        if "k_proj.bias" in name:  # exactly zero in exact arithmetic: softmax does not see a shift of all keys
            assert parameter.grad.abs().max() < 1e-2
        else:
            assert (parameter.grad - expected[key].grad).abs().max() <= 1e-4 * scale, name
        compared += 1
    assert compared == 2 + 2 * 16 + 2


def test_captions_too_long_for_clip_are_refused(models):
    with pytest.raises(ValueError, match="longer than the 75 tokens CLIP reads"):
        text.check_captions(models[1], models[0], ["photo of a " + "very " * 80 + "long dog"], "category")


def test_clip_of_another_family_is_refused(models, load):
    with pytest.raises(ValueError, match="not this model's text encoder"):
        text.check_captions(models[1], load("sd21v")[0], CAPTIONS, "category")
