"""How stock tools name a model's weights and describe a file: LoRA keys, diffusers' names, modelspec and ss_ fields."""

import json

import comfy.lora
import comfy.utils
from torch import Tensor

from .model import PREFIX, check_supported


def loader_keys(model, clip) -> dict[str, str]:
    """Weight name -> the key ComfyUI's LoRA loader knows it by, kohya's where there is one."""
    known = comfy.lora.model_lora_keys_unet(model.model, {})
    known |= comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    keys: dict[str, list[str]] = {}
    for key, name in known.items():
        keys.setdefault(name, []).append(key)
    return {name: min(found, key=lambda key: (_preference(key, name), key)) for name, found in keys.items()}


def _preference(key: str, name: str) -> int:
    """0 for kohya's key, made of diffusers' name; 1 for one of the checkpoint's name; 2 for ComfyUI's; 3 for others."""
    if key.startswith(("lora_unet_", "lora_te_")):
        in_checkpoint = name.removeprefix(PREFIX).removesuffix(".weight").replace(".", "_")
        return int(key == f"lora_unet_{in_checkpoint}")
    return 2 if key.startswith(("text_encoders.", PREFIX)) else 3


def place(name: str, keys: dict[str, str]) -> tuple[str, str]:
    """The loader's key of a weight and the ending its difference has there; ValueError if the loader has none.

    Args:
        name: of a weight.
        keys: from `loader_keys`.
    """
    layer = name.removesuffix("bias") + "weight"
    if name.endswith(".bias") and layer in keys:
        return keys[layer], "diff_b"
    if name in keys:
        return keys[name], "diff"
    raise ValueError(f"ComfyUI's LoRA loader has no name for {name}: save the subject with SuDe Save Subject instead.")


def diffusers_names(model, clip) -> dict[str, str]:
    """Weight name -> "unet." or "text_encoder." and its name in diffusers or transformers, of every weight.

    A text encoder's layers behind the one whose output the model reads have none: diffusers' text encoders for SD2.x
    end there.

    Raises:
        ValueError: a UNet that diffusers has no names for.
    """
    there = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    weights = {name for name, _ in model.model.named_parameters() if name.startswith(PREFIX)}
    names = {PREFIX + ours: f"unet.{theirs}" for theirs, ours in there.items() if PREFIX + ours in weights}
    missing = weights - names.keys()
    if missing:
        raise ValueError(f"diffusers has no name for {len(missing)} weights of this model (first: {min(missing)}).")
    for name, _ in clip.cond_stage_model.named_parameters():
        _, inside, rest = name.partition(".transformer.text_model.")
        if inside and not _is_behind(clip, rest):
            names[name] = f"text_encoder.text_model.{rest}"
    return names


def _is_behind(clip, rest: str) -> bool:
    """Whether a weight belongs to a text encoder's layer behind the one whose output the model was made for."""
    (part,) = (part for part in clip.cond_stage_model.children() if hasattr(part, "num_layers"))
    layer, index, _ = part.options_default
    if layer != "hidden" or not rest.startswith("encoder.layers."):
        return False
    return int(rest.split(".")[2]) > (index if index >= 0 else part.num_layers + index)


def size_fields(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Kohya's fields on a LoRA's size, where they are true of these tensors (keys of `loader_keys`).

    `ss_network_dim` is the largest rank, `ss_network_alpha` is there if all alphas are the same, `ss_network_module` if
    nothing else is in the file.
    """
    ranks = [len(tensor) for key, tensor in tensors.items() if key.endswith(".lora_down.weight")]
    if not ranks:
        return {}
    fields = {"ss_network_dim": str(max(ranks))}
    alphas = {float(tensor) for key, tensor in tensors.items() if key.endswith(".alpha")}
    if len(alphas) == 1:
        fields["ss_network_alpha"] = f"{alphas.pop():g}"
    if all(key.startswith("lora_") and not key.endswith((".diff", ".diff_b")) for key in tensors):
        fields["ss_network_module"] = "networks.lora"
    return fields


def description(subject, model, kind: str, trigger: str = "", implementation: str = "") -> dict[str, str]:
    """The metadata of a file made of a subject.

    Source: Stability AI Model Metadata Standard 1.0.0 (`modelspec.*`); kohya-ss/sd-scripts (names of `ss_*`,
    architectures).

    Args:
        subject: the Subject.
        model: the MODEL it belongs to.
        kind: what the file is, "lora".
        trigger: what names the subject in prompts; the subject's own words if empty.
        implementation: whose names the tensors have; the original Stable Diffusion's if empty.
    """
    about = subject.metadata
    prediction = check_supported(model).prediction
    architecture, version = "stable-diffusion-v1", "sd_v1"
    if type(model.model.model_config).__name__ == "SD20":
        architecture, version = {
            "eps": ("stable-diffusion-v2-512", "sd_v2"),
            "v": ("stable-diffusion-v2-768-v", "sd_v2_v"),
        }[prediction]
    side = about.get("resolution")
    checkpoint = about.get("base", {}).get("checkpoint") or about.get("checkpoint", "")
    trained_on = f" on {checkpoint}" if checkpoint else ""
    fields = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/{kind}",
        "modelspec.implementation": implementation or "https://github.com/Stability-AI/generative-models",
        "modelspec.title": f"{about['subject']} ({about['method']} with SuDe)",
        "modelspec.description": f"One {about['category']}, learned with {about['method']} and SuDe{trained_on}.",
        "modelspec.trigger_phrase": trigger or about["subject"],
        "modelspec.usage_hint": subject.prompt("running"),
        "modelspec.prediction_type": {"eps": "epsilon", "v": "v"}[prediction],
        "modelspec.resolution": f"{side}x{side}" if side else "",
        "modelspec.date": about.get("trained", ""),
        "ss_base_model_version": version,
        "ss_v2": str(version != "sd_v1"),
        "ss_sd_model_name": checkpoint,
        "sude.recipe": json.dumps(about.get("recipe", {}), sort_keys=True),
    }
    return {name: value for name, value in fields.items() if value}
