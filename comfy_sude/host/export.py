"""A Subject in the formats of stock tools: LoRA files, textual-inversion embeddings, what diffusers loads.

LoRA files carry kohya's key names where ComfyUI's own loader knows them, so that other tools read them too; what kohya
has no name for (norms, token and position embeddings) carries ComfyUI's. A learned word is a file of its own, an
embedding. ViCo's attention to its picture has no stock form.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..lowrank import Share, factor, padded
from ..subject import PRECISIONS
from .apply import apply_subject
from .model import current_weight
from .placeholder import sub_tokenizer
from .stock import description, diffusers_names, loader_keys, place, size_fields

UNET, TEXT_ENCODER = "unet/diffusion_pytorch_model", "text_encoder/model"  # as in a folder of diffusers

Step = Callable[[int, int, str], None]
"""(done, of how many, which) at each weight, for progress; may raise to stop."""


@dataclass(frozen=True)
class Export:
    """One file.

    Attributes:
        tensors: what it holds, on the CPU.
        metadata: its safetensors metadata.
        text: what there is to say about it.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    text: str


def lora(subject, model, clip, rank: int | None = None, precision: str = "fp32", step: Step | None = None) -> Export:
    """The subject for ComfyUI's LoRA loader.

    Args:
        subject: a Subject with changes of weights.
        model: the MODEL it was trained on, or one of that family; only read.
        clip: that checkpoint's CLIP; only read.
        rank: None keeps everything exactly: low-rank updates as they are, other weights as differences (`.diff`,
            `.diff_b`). A number makes the nearest low-rank update of that rank of every matrix and convolution that has
            a higher one, and keeps vectors (biases, norms) exactly.
        precision: of the file: fp32, fp16 or bf16.
        step: told the progress.

    Raises:
        ValueError: the subject has no such form, or belongs to other models.
    """
    _patched(subject, model, clip, "a LoRA")
    keys = loader_keys(model, clip)
    made, share = {}, Share()
    for name, tensors in _changed(subject, step):
        key, ending = place(name, keys)
        if "diff" in tensors and (rank is None or tensors["diff"].ndim < 2):
            made[f"{key}.{ending}"] = share.whole(tensors["diff"])
            continue
        if "up" in tensors and (rank is None or len(tensors["down"]) <= rank):
            up, down, alpha = tensors["up"], tensors["down"], tensors["alpha"]
            share.whole(_change(tensors))
        else:
            up, down = share.part(factor(_change(tensors), rank))
            alpha = torch.tensor(float(len(down)))
        made |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down, f"{key}.alpha": alpha}
    what = "with every change exactly as learned" if rank is None else f"rank {rank} keeps {share} of the change"
    text = f"LoRA, {what}{_rounded(precision)}{_without_word(subject)}"
    return Export(_cast(made, precision), description(subject, model, "lora") | size_fields(made), text)


def embedding(subject, model, clip, precision: str = "fp32") -> Export:
    """The learned word as a textual-inversion embedding: one tensor [n, width].

    ComfyUI reads it as `embedding:NAME`, diffusers by `load_textual_inversion`. The tensor's key is the word diffusers
    will know: the subject's own, in <> if CLIP's vocabulary has that already.

    Args:
        subject: a Subject with a word of its own.
        model: the MODEL it was trained on, or one of that family.
        clip: that checkpoint's CLIP.
        precision: of the file: fp32, fp16 or bf16.

    Raises:
        ValueError: the subject has no word of its own, or the clip is not of its family.
    """
    _check_connected(model, clip)
    words = subject.of("token")
    if not words:
        raise ValueError(
            f"this subject has no word of its own to export as an embedding: {subject.metadata['method']} teaches the "
            f"model what {subject.metadata['subject']!r} means. Export it as a LoRA."
        )
    ((word, tensors),) = words.items()
    vectors = tensors["vectors"]
    _, _, sub = sub_tokenizer(clip)
    if vectors.shape[1] != sub.embedding_size:
        raise ValueError(
            f"subject does not fit this clip: its word {word!r} is {vectors.shape[1]} wide and the text encoder "
            f"{sub.embedding_size}. Use a checkpoint of the family it was trained on."
        )
    key = f"<{word}>" if word in sub.tokenizer.get_vocab() else word
    text = f"embedding of {len(vectors)} vector{'s' * (len(vectors) > 1)} for {word!r}{_rounded(precision)}"
    if key != word:
        text += f" ({key!r} in diffusers)"
    if subject.of("reference"):
        text += "; the attention to the picture is not in it"
    if subject.of("model") or subject.of("clip"):
        text += "; the changed weights are not in it, export those as a LoRA"
    about = description(subject, model, "textual-inversion", trigger=key)
    return Export(_cast({key: vectors}, precision), about, text)


def diffusers_lora(subject, model, clip, rank: int, precision: str = "fp32", step: Step | None = None) -> Export:
    """The subject for diffusers' `StableDiffusionPipeline.load_lora_weights`, in PEFT's key names.

    Low-rank updates stay exactly what they are, whatever the rank; of other matrices and convolutions it holds the
    nearest of that rank. Biases, norms and embedding tables have no place in such a file. All ranks in it are the same,
    filled up with zeros, and there is no alpha: versions of diffusers read anything else differently.

    Args:
        subject: a Subject with changes of weights.
        model: the MODEL it was trained on, or one of that family; only read.
        clip: that checkpoint's CLIP; only read.
        rank: of what is not low-rank already.
        precision: of the file: fp32, fp16 or bf16.
        step: told the progress.

    Raises:
        ValueError: the subject has no such form, or belongs to other models.
    """
    _patched(subject, model, clip, "a LoRA for diffusers")
    names = diffusers_names(model, clip)
    made, share, left_out = {}, Share(), 0
    for name, tensors in _changed(subject, step):
        change = _change(tensors)
        if change.ndim < 2 or name.endswith("_embedding.weight") or name not in names:
            share.lost(change)
            left_out += 1
            continue
        if "up" in tensors:
            share.whole(change)
            up, down = tensors["up"] * (float(tensors["alpha"]) / len(tensors["down"])), tensors["down"]
        else:
            up, down = share.part(factor(change, rank))
        made[names[name].removesuffix(".weight")] = up, down
    if not made:
        raise ValueError(
            "a LoRA for diffusers holds matrices, and this subject changes none: export it as diffusers weights."
        )
    common = max(len(down) for _, down in made.values())
    tensors = {}
    for module, factors in made.items():
        up, down = padded(factors, common)
        tensors |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    what = f"rank {common} keeps {share} of the change"
    if left_out:
        what += f" ({left_out} biases, norms and embedding tables have no place in it)"
    text = f"diffusers LoRA, {what}{_rounded(precision)}{_without_word(subject)}"
    return Export(_cast(tensors, precision), description(subject, model, "lora", implementation="diffusers"), text)


def diffusers_weights(subject, model, clip, precision: str = "fp32", step: Step | None = None) -> dict[str, Export]:
    """The whole networks with the subject in them, in the names of diffusers and transformers.

    Args:
        subject: a Subject with changes of weights.
        model: the MODEL that the training started from; only read.
        clip: that checkpoint's CLIP; only read.
        precision: of the files: fp32, fp16 or bf16.
        step: told the progress.

    Returns:
        `UNET` (for a `UNet2DConditionModel`) and, if the subject changes it, `TEXT_ENCODER` (for a `CLIPTextModel`).

    Raises:
        ValueError: the subject has no such form, belongs to other models, or is in this model already.
    """
    _check_not_in(subject, model, clip)
    patched_model, patched_clip = _patched(subject, model, clip, "weights for diffusers")
    names = diffusers_names(model, clip)
    parts = {UNET: ("unet", patched_model)}
    if subject.of("clip"):
        parts[TEXT_ENCODER] = ("text_encoder", patched_clip.patcher)
    wanted = [
        (file, patcher, ours, theirs.removeprefix(f"{part}."))
        for file, (part, patcher) in parts.items()
        for ours, theirs in names.items()
        if theirs.startswith(f"{part}.")
    ]
    tensors: dict[str, dict[str, Tensor]] = {file: {} for file in parts}
    for done, (file, patcher, ours, theirs) in enumerate(wanted):
        if step:
            step(done, len(wanted), theirs)
        tensors[file] |= _cast({theirs: current_weight(patcher, ours)}, precision)
    text = "diffusers weights of the " + " and ".join(part.replace("_", " ") for part, _ in parts.values())
    text += _rounded(precision) + _without_word(subject)
    kinds = {UNET: "unet", TEXT_ENCODER: "text-encoder"}
    return {
        file: Export(held, description(subject, model, kinds[file], implementation="diffusers"), text)
        for file, held in tensors.items()
    }


# --- What is checked


def _check_connected(model, clip) -> None:
    for name, given in (("model", model), ("clip", clip)):
        if given is None:
            raise ValueError(f"{name} is missing: connect the {name.upper()} that went into SuDe Fine-Tune.")


def _patched(subject, model, clip, form: str):
    """MODEL and CLIP with the subject; ValueError if it is no change of their weights."""
    _check_connected(model, clip)
    if subject.of("reference"):
        also = " and export its word as an embedding" if subject.of("token") else ""
        raise ValueError(
            f"{subject.metadata['method']} attends to its picture at every sampling step, which {form} cannot hold: "
            f"save the subject with SuDe Save Subject{also}."
        )
    if not subject.of("model") and not subject.of("clip"):
        instead = "export its word as an embedding" if subject.of("token") else "train it for more steps"
        raise ValueError(f"this subject changes no weight, so {form} would be empty: {instead}.")
    return apply_subject(model, clip, subject)


def _check_not_in(subject, model, clip) -> None:
    """Raises ValueError if the subject's changes are among the patches of these models."""
    _check_connected(model, clip)
    for network, patcher in (("model", model), ("clip", clip.patcher)):
        for name, tensors in subject.of(network).items():
            mine = tensors["diff"] if "diff" in tensors else tensors["up"]
            if any(_holds(value, mine) for _, value, *_ in patcher.patches.get(name, ())):
                raise ValueError(
                    f"this {network} has the subject in it already and would get it twice: connect the MODEL and CLIP "
                    "that went into SuDe Fine-Tune, not those that came out."
                )


def _holds(patch, tensor: Tensor) -> bool:
    """Whether a ComfyUI patch, ("diff", (tensor,)) or an adapter, begins with this tensor."""
    held = patch[-1] if isinstance(patch, tuple) else getattr(patch, "weights", ())
    first = held[0] if isinstance(held, tuple | list) and held else None
    return isinstance(first, Tensor) and first.shape == tensor.shape and torch.equal(first.to(tensor), tensor)


# --- What is written


def _changed(subject, step: Step | None) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The changed weights, the UNet's first."""
    changed = [*subject.of("model").items(), *subject.of("clip").items()]
    for done, (name, tensors) in enumerate(changed):
        if step:
            step(done, len(changed), name)
        yield name, tensors


def _change(tensors: dict[str, Tensor]) -> Tensor:
    """What a subject adds to a weight."""
    if "diff" in tensors:
        return tensors["diff"]
    return tensors["up"] @ tensors["down"] * (float(tensors["alpha"]) / len(tensors["down"]))


def _cast(tensors: dict[str, Tensor], precision: str) -> dict[str, Tensor]:
    """The tensors in a precision, contiguous on the CPU; ValueError if a value is too large for it."""
    made = {}
    for key, tensor in tensors.items():
        dtype = torch.float32 if key.endswith(".alpha") else PRECISIONS[precision]
        made[key] = tensor.detach().to("cpu", dtype).contiguous()
        if dtype == torch.float16 and not made[key].isfinite().all():
            raise ValueError(f"precision fp16 cannot hold a value of {key}: choose bf16 or fp32.")
    return made


def _rounded(precision: str) -> str:
    return "" if precision == "fp32" else f", rounded to {precision}"


def _without_word(subject) -> str:
    words = ", ".join(map(repr, subject.of("token")))
    return f"; its word {words} is not in it, export that as an embedding" if words else ""
