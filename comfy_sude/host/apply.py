"""A Subject -> patches on clones of MODEL and CLIP."""

import logging

from comfy.weight_adapter.lora import LoRAAdapter
from torch import Tensor

from ..image_attention import places
from .model import base_hash, checkpoint_name, family
from .placeholder import with_placeholder
from .reference import ReferenceAttention, load_blocks


def apply_subject(model, clip, subject, strength_model: float = 1.0, strength_clip: float = 1.0):
    """Clones of MODEL and CLIP with the subject added.

    Strength scales weights and the attention to the reference picture, and LoRAs combine in any order. A new word has
    no strength: the CLIP knows it.

    Raises:
        ValueError: the subject does not belong to this model or text encoder.
    """
    trained_on = subject.metadata.get("base", {}).get("family")
    if trained_on and trained_on != family(model):
        raise ValueError(
            f"subject was trained on a model of the family {trained_on}, and this model is of the family "
            f"{family(model)}: load a checkpoint of its family."
        )
    model, clip = (
        _with_weights(host, patcher, network, subject, strength)
        for network, host, patcher, strength in (
            ("model", model, model, strength_model),
            ("clip", clip, clip.patcher, strength_clip),
        )
    )
    for placeholder, tensors in subject.of("token").items():
        width = clip.cond_stage_model.get_parameter(_table(clip)).shape[1]
        vectors = tensors["vectors"]
        if vectors.shape[1] != width:
            raise ValueError(
                f"subject does not fit this clip: its word {placeholder!r} is {vectors.shape[1]} wide and the text "
                f"encoder {width}. Use a checkpoint of the family it was trained on."
            )
        clip = with_placeholder(clip, placeholder, vectors)
    reference = subject.of("reference")
    if reference and strength_model != 0:
        _reference(model, subject, reference, strength_model).attach(model)
    return model, clip


def differences(model, subject) -> list[str]:
    """A warning if the MODEL's weights are not those the subject was trained on, else nothing."""
    base = subject.metadata.get("base", {})
    if not base.get("sha256") or base["sha256"] == base_hash(model):
        return []
    name, here = base.get("checkpoint") or "another checkpoint", checkpoint_name(model) or "another"
    text = f"trained on {name}, this is {here}" if name != here else f"trained on another file named {name}"
    logging.warning("SuDe: the subject was %s: it works, but may look different.", text)
    return [f"note: {text}; it may look different"]


def _with_weights(host, patcher, network: str, subject, strength: float):
    """A clone of a MODEL or CLIP with the subject's weights on it."""
    tensors = subject.of(network)
    patches = {key: _patch(parts) for key, parts in tensors.items()}
    clone = host.clone()
    accepted = set(clone.add_patches(patches, strength))
    weights = patcher.model_state_dict()
    wrong = [key for key in patches if key not in accepted or _shape(tensors[key]) != tuple(weights[key].shape)]
    if wrong:
        raise ValueError(
            f"subject does not fit this {network}: {len(wrong)} of its {len(patches)} weights are unknown to it or "
            f"of another shape (first: {wrong[0]}). Use a checkpoint of the family it was trained on."
        )
    return clone


def _patch(tensors: dict[str, Tensor]):
    if "diff" in tensors:
        return ("diff", (tensors["diff"],))
    return LoRAAdapter(set(), (tensors["up"], tensors["down"], float(tensors["alpha"]), None, None, None))


def _shape(tensors: dict[str, Tensor]) -> tuple[int, ...]:
    if "diff" in tensors:
        return tuple(tensors["diff"].shape)
    return len(tensors["up"]), tensors["down"].shape[1]


def _table(clip) -> str:
    """Name of the text encoder's token table."""
    (name,) = (n for n, _ in clip.cond_stage_model.named_parameters() if n.endswith("token_embedding.weight"))
    return name


def _reference(model, subject, tensors: dict[str, dict[str, Tensor]], strength: float) -> ReferenceAttention:
    """The subject's attention to its reference picture, for a MODEL that has the places for it."""
    settings = subject.metadata["reference"]
    here = places(model.model.diffusion_model)
    for place, heads in settings["heads"].items():
        norm = tensors.get(f"{place}.norm1.weight", {}).get("value")
        width = len(norm) if norm is not None and norm.ndim else 0
        if here.get(place) != (width, heads):
            raise ValueError(
                f"subject does not fit this model: it attends to its picture at {place}, {width} wide, where the "
                f"model has {here[place][0] if place in here else 'nothing'}. Use a checkpoint of the family it was "
                "trained on."
            )
    try:
        blocks = load_blocks(tensors, settings["heads"])
    except RuntimeError as error:
        raise ValueError("subject's attention to its picture is not whole: get its file again.") from error
    return ReferenceAttention(
        blocks,
        list(settings["heads"]),
        tensors["latent"]["value"],
        subject.metadata["identifier"],
        strength,
        settings["unconditional"],
    )
