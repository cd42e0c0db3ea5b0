"""CLIP -> an own fp32 text encoder with a correct gradient, and captions -> encodings.

ComfyUI's CLIPLayer adds in place, which autograd refuses; checkpointing it instead would hide the check and return a
wrong gradient. The own copy's layers add out of place: same values, right gradient.
"""

import types

import comfy.ops
import torch
from comfy.clip_model import CLIPLayer
from torch import Tensor, nn

from .model import current_weight


def check_captions(clip, model, captions: list[str]) -> None:
    """Raises ValueError if the CLIP does not belong to the MODEL's family or a caption does not fit its 77 tokens."""
    width = model.model.model_config.unet_config["context_dim"]
    parts = _parts(clip.cond_stage_model)
    widths = [
        part.transformer.get_input_embeddings().weight.shape[1] for _, part in parts if hasattr(part, "transformer")
    ]
    if widths != [width]:
        raise ValueError(
            f"clip is not this model's text encoder (width {widths or 'unknown'}, the model reads {width}): take MODEL "
            "and CLIP from the same checkpoint."
        )
    for caption in captions:
        tokens = clip.tokenize(caption)
        if any(len(windows) != 1 for windows in tokens.values()):
            raise ValueError(
                f"caption {caption!r} is longer than the 75 tokens CLIP reads: shorten category or identifier."
            )


@torch.inference_mode(False)
def build_text_encoder(clip, device="cpu") -> nn.Module:
    """A copy of a CLIP's text model: ordinary fp32 parameters, all frozen, upstream patches baked in, trainable layers.

    Parameter names are those of the CLIP's patcher (`clip_l.transformer.text_model...`).
    """
    source = clip.cond_stage_model
    options = {"custom_operations": comfy.ops.disable_weight_init}
    layers = {f"{name}_model_config": {"num_hidden_layers": part.num_layers} for name, part in _parts(source)}
    model = type(source)(device=device, dtype=torch.float32, model_options={**options, **layers})
    for name, parameter in model.named_parameters():
        parameter.data = current_weight(clip.patcher, name, device)
        parameter.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, CLIPLayer):
            module.forward = types.MethodType(_forward_out_of_place, module)
    for _, part in _parts(model):
        _leave_out(part, "logit_scale")
        _leave_out(part.transformer.text_projection, "weight")
    return model


def _leave_out(module: nn.Module, name: str) -> None:
    """Make a parameter no encoding depends on a plain zero: SD1 checkpoints lack these, so the CLIP's hold anything."""
    parameter = module._parameters.pop(name)
    module.register_buffer(name, torch.zeros_like(parameter), persistent=False)


def _parts(source: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, part) for name, part in source.named_children() if hasattr(part, "num_layers")]


def _forward_out_of_place(self: CLIPLayer, x: Tensor, mask=None, optimized_attention=None) -> Tensor:
    x = x + self.self_attn(self.layer_norm1(x), mask, optimized_attention)
    return x + self.mlp(self.layer_norm2(x))


class Encoder:
    """Captions to encodings through an own text model, with the CLIP's tokenizer and clip-skip setting."""

    def __init__(self, clip, model: nn.Module, device: torch.device):
        self.clip = clip
        self.model = model
        self.device = device
        self._tokens: dict[str, list[int]] = {}
        model.reset_clip_options()
        if clip.layer_idx is not None:
            model.set_clip_options({"layer": clip.layer_idx})

    def __call__(self, captions: list[str]) -> Tensor:
        """[N, 77, width] the encodings, differentiable with respect to the model's parameters."""
        ((_, part),) = _parts(self.model)
        ids = torch.tensor([self._ids(caption) for caption in captions], device=self.device)
        # one look-up for all captions: SDClipModel's own makes a gradient of the whole token table for each
        embeddings = part.transformer.get_input_embeddings()(ids, out_dtype=torch.float32)
        last, hidden, *_ = part.transformer(
            None,
            embeds=embeddings,
            num_tokens=[ids.shape[1]] * len(captions),  # for the pooled output, which nothing here reads
            intermediate_output=part.layer_idx,
            final_layer_norm_intermediate=part.layer_norm_hidden_state,
            dtype=torch.float32,
        )
        return (last if part.layer == "last" else hidden).float()

    def _ids(self, caption: str) -> list[int]:
        if caption not in self._tokens:
            (window,) = next(iter(self.clip.tokenize(caption).values()))
            self._tokens[caption] = [token for token, _weight in window]
        return self._tokens[caption]
