"""MODEL -> an own fp32 UNet that can be trained.

The MODEL that came in is only read. ComfyUI runs nodes in inference mode and may memory-map or page its weights, so
autograd must never see them: every weight is copied into a new module (spec: host side of TrainLoraNode's defects).
"""

import copy
import hashlib
import json
import logging
import weakref
from collections.abc import Iterator
from pathlib import Path

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from comfy.ldm.modules.attention import BasicTransformerBlock, get_attention_function
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..diffusion import NoiseProcess
from ..store import key, tensor_hash
from .reference import tappable, with_taps

FAMILIES = {"SD15": 512, "SD20": 512}  # supported model configs and their native side in pixels
V_PREDICTION_SIDE = 768  # SD2.x-v
PREFIX = "diffusion_model."
UNUSED = ("logit_scale", "text_projection.weight")  # of text encoders: no encoding depends on them


def check_supported(model) -> NoiseProcess:
    """The noise process of a MODEL that can be trained.

    Raises:
        ValueError: no SD1.x or SD2.x model, an inpainting UNet, or a noise process that is not discrete eps or v.
    """
    channels = model.model.model_config.unet_config.get("in_channels")
    if family(model) not in FAMILIES:
        raise ValueError(
            f"model is of the family {family(model)}, which SuDe Fine-Tune does not train yet: load an SD1.x or SD2.x "
            "one."
        )
    if channels != 4:
        raise ValueError(
            f"model is an inpainting or edit UNet ({channels} input channels): load the plain text-to-image checkpoint."
        )
    return NoiseProcess.from_model_sampling(model.get_model_object("model_sampling"))


def family(model) -> str:
    """ComfyUI's name of a MODEL's architecture: "SD15", "SD20", "SDXL"."""
    return type(model.model.model_config).__name__


def without_patches(model):
    """A clone of a MODEL that predicts by its weights alone, as the training copy does.

    LoRAs and model sampling are kept; attention patches, wrappers and guidance functions are left out, with a warning.
    """
    bare = model.clone()
    options = bare.model_options
    carried = [name for name in options if name != "transformer_options"]
    carried += [*options.get("transformer_options", {}), *bare.wrappers, *bare.additional_models]
    if carried:
        logging.warning(
            "SuDe: the model's patches that are no weights do not take part in the training (%s); apply them after it.",
            ", ".join(carried),
        )
    bare.model_options = {"transformer_options": {}}
    bare.wrappers, bare.additional_models = {}, {}
    return bare


def native_resolution(model) -> int:
    """Side in pixels the checkpoint was made for: its file's modelspec.resolution, else its family's.

    Source: Stability AI Model Metadata Standard, field modelspec.resolution ("512x512").
    """
    path = _checkpoint_path(model)
    if path is not None and path.suffix == ".safetensors" and path.is_file():
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        side = header.get("__metadata__", {}).get("modelspec.resolution", "").split("x")[0]
        if side.isdigit() and int(side) >= 64:
            return int(side) // 8 * 8
    if NoiseProcess.from_model_sampling(model.get_model_object("model_sampling")).prediction == "v":
        return V_PREDICTION_SIDE
    return FAMILIES[family(model)]


def _checkpoint_path(model) -> Path | None:
    loader = getattr(model, "cached_patcher_init", None)
    arguments = loader[1] if loader else ()
    return Path(arguments[0]) if arguments and isinstance(arguments[0], str) else None


def checkpoint_name(model) -> str:
    """File name of the checkpoint a MODEL came from, "" if its loader does not say."""
    path = _checkpoint_path(model)
    return path.name if path else ""


def identities(model, clip, vae) -> dict[str, str]:
    """Hashes of what MODEL, CLIP and VAE are, every weight and every patch on it; the same in any process.

    "unet" is that of the MODEL's own weights, without patches and settings.
    """
    unet = _weights_hash(model)
    sampling = model.get_model_object("model_sampling")
    settings = " ".join(base.__name__ for base in type(sampling).__mro__)
    return {
        "unet": unet,
        "model": key(unet=unet, patches=_patches_hash(model), sampling=tensor_hash([(settings, sampling.sigmas)])),
        "clip": key(weights=_weights_hash(clip.patcher), patches=_patches_hash(clip.patcher), layer=clip.layer_idx),
        "vae": tensor_hash(sorted(vae.patcher.model.state_dict().items())),
    }


def base_hash(model) -> str:
    """`identities`' "unet" of a MODEL, computed once for each loaded checkpoint."""
    network = model.model
    if network not in _HASHES:
        _HASHES[network] = _weights_hash(model)
    return _HASHES[network]


_HASHES: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _weights_hash(patcher) -> str:
    """Hash of a patcher's weights as they were loaded, but for what no checkpoint of these families has."""
    weights = sorted(patcher.get_key_patches().items())
    return tensor_hash((name, entry[0][0]) for name, entry in weights if not name.endswith(UNUSED))


def _patches_hash(patcher) -> str:
    """Hash of the patches on a patcher's weights."""
    digest = hashlib.sha256()
    for name in sorted(patcher.patches):
        for strength, value, strength_model, offset, _function in patcher.patches[name]:
            digest.update(f"{name} {strength} {strength_model} {offset} {type(value).__name__}".encode())
            digest.update(tensor_hash(_tensors(value)).encode())
    return digest.hexdigest()


def _tensors(value, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor and number inside a patch, however it is nested."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, int | float):
        yield name, torch.tensor(float(value))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _tensors(item, f"{name}.{index}")
    elif hasattr(value, "weights"):
        yield from _tensors(value.weights, name)


def current_weight(patcher, key: str, device="cpu") -> Tensor:
    """One weight of a MODEL's or CLIP's patcher as it acts: an fp32 copy, dequantized, upstream patches baked in."""
    weight, _, convert = comfy.model_patcher.get_key_weight(patcher.model, key)
    if key in patcher.backup:  # the shared module is patched in place for some clone: the original is in the backup
        weight = patcher.backup[key].weight
    if key in patcher.hook_backup:
        weight = patcher.hook_backup[key][0]
    weight = comfy.model_management.cast_to_device(weight, torch.device(device), torch.float32, copy=True)
    if convert is not None:
        weight = convert(weight, inplace=True)
    if key in patcher.patches:
        weight = comfy.lora.calculate_weight(patcher.patches[key], weight, key)
    return weight.clone()


@torch.inference_mode(False)
def build_unet(model, device="cpu"):
    """A ComfyUI BaseModel of ordinary fp32 parameters, all frozen, that predicts exactly as the incoming MODEL does."""
    source = model.model
    config = type(source.model_config)(dict(source.model_config.unet_config))
    config.unet_config["dtype"] = torch.float32
    config.manual_cast_dtype = None
    config.custom_operations = comfy.ops.disable_weight_init
    config.sampling_settings = dict(source.model_config.sampling_settings)
    base = config.get_model({}, "", device=device)
    base.model_type = source.model_type  # an empty state dict cannot tell v-prediction
    base.model_sampling = copy.deepcopy(model.get_model_object("model_sampling"))
    base.latent_format = model.get_model_object("latent_format")
    for name, parameter in base.diffusion_model.named_parameters():
        parameter.data = current_weight(model, PREFIX + name, device)
        parameter.requires_grad_(False)  # older versions of ComfyUI (0.16.3) make it trainable
    tappable(base.diffusion_model)
    return base


def checkpoint_blocks(unet: nn.Module) -> None:
    """Recompute every transformer block of an own UNet in the backward pass: exact gradients, fewer activations."""
    for block in unet.modules():
        if isinstance(block, BasicTransformerBlock):
            block.forward = _Recompute(block.forward)


class _Recompute:
    def __init__(self, forward):
        self.forward = forward

    def __call__(self, x, context=None, transformer_options={}):  # noqa: B006 the signature of the block it stands for
        if not torch.is_grad_enabled():
            return self.forward(x, context, transformer_options)
        return checkpoint(self.forward, x, context, transformer_options, use_reentrant=False)


def _attention(_chosen, *args, **kwargs):
    """PyTorch's attention whatever the server was started with: Sage- and FlashAttention have no usable backward."""
    return get_attention_function("pytorch")(*args, **kwargs)


def predict(base, x_t: Tensor, t: Tensor, context: Tensor, taps=None) -> Tensor:
    """[B, C, h, w] the raw prediction (noise or velocity) of an own BaseModel.

    Args:
        base: from `build_unet`.
        x_t: [B, C, h, w] noisy latents in variance-preserving scale.
        t: [B] integer timesteps.
        context: [B, tokens, width] caption encodings.
        taps: optional `baselines.base.Taps` that see and change the transformers' tokens.
    """
    options = {"optimized_attention_override": _attention}
    if taps is not None:
        options = with_taps(options, taps)
    return base.diffusion_model(x_t, t.float(), context=context, transformer_options=options)
