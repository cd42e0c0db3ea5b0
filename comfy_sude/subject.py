"""Subject: the trained result as plain tensors and JSON metadata, in memory and as one file.

A file is a safetensors file with a checksum (`files.py`): tensors "network/name/part", the losses of every step as
"log/term/values", and in its metadata `sude.subject`, the JSON of `Subject.metadata`, and modelspec fields (Stability
AI's Model Metadata Standard 1.0.0) for tools that show what a file is.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from . import captions, files
from .log import TERMS, Log

FORMAT = 1  # of files; raised when older packs could not read them
METADATA = "sude.subject"
LARGEST_METADATA = 8_000_000  # characters of JSON
MOST_VECTORS = 32  # behind one word; the baselines' own bound
PARTS = {
    "model": ({"diff"}, {"up", "down", "alpha"}),
    "clip": ({"diff"}, {"up", "down", "alpha"}),
    "token": ({"vectors"},),
    "reference": ({"value"},),
    "log": ({"values"},),
}
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ARCHITECTURES = {"SD15": "stable-diffusion-v1", "SD20": "stable-diffusion-v2"}


@dataclass(frozen=True)
class Subject:
    """What a training learned, independent of the models it was learned on.

    Attributes:
        tensors: (network, name) -> tensors, fp32 on the CPU. ("model" or "clip", weight name) -> {"diff": trained minus
            incoming weight} or {"up", "down", "alpha"}; ("token", placeholder) -> {"vectors": [n, width]};
            ("reference", "latent" or "place.parameter") -> {"value"}.
        metadata: JSON values. "format"; "category", "identifier", "subject" (what names it in prompts), "captions"
            (pairs of subject's and category's); "method", "recipe", "steps" done, "losses" (means of the last 50);
            "example" {"sha256", "thumbnail": data URI}, "base" {"checkpoint", "sha256" of its UNet, "family",
            "prediction"}, "resolution", "versions", "trained" (UTC), and what the method's notes add.
        log: the losses of every step.
        story: how it came to be in this run: "500 steps in 60 s", "reused", ...; not part of a file.
    """

    tensors: dict[tuple[str, str], dict[str, Tensor]]
    metadata: dict
    log: Log
    story: str = field(default="", compare=False)

    def prompt(self, attribute: str = "", context: str = "") -> str:
        """A caption for the sampler in the template the subject was trained with: "photo of a running sks dog"."""
        return captions.prompt(self.metadata["subject"], attribute=attribute, context=context)

    def of(self, network: str) -> dict[str, dict[str, Tensor]]:
        """The tensors of one network by name."""
        return {name: tensors for (owner, name), tensors in self.tensors.items() if owner == network}

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for tensors in self.tensors.values() for t in tensors.values())

    def save(self, path: Path, precision: str = "fp32") -> float:
        """Write the subject's file, whole or not at all.

        Args:
            path: the file.
            precision: fp32 keeps every bit, fp16 and bf16 half the size.

        Returns:
            The relative error the precision makes: the norm of what is lost over the norm of what was learned.

        Raises:
            ValueError: a value does not fit the precision.
            OSError: the disk is full or does not take the file.
        """
        tensors, error = rounded(self.tensors, precision)
        files.write(path, *packed(Subject(tensors, self.metadata, self.log)))
        return error


def load(path: Path) -> Subject:
    """The subject in a file, in fp32.

    Raises:
        ValueError: it is damaged, of a newer format, or no subject's file; says which and what to do.
        OSError: it cannot be read.
    """
    if METADATA not in files.peek(path):
        files.read(path)  # says so if it is damaged
        raise ValueError(
            f"{path.name} is no subject of this pack: choose a file that SuDe Save Subject wrote (a LoRA is for Load "
            "LoRA)."
        )
    try:
        return unpacked(*files.read(path))
    except files.DamagedFile as error:
        raise ValueError(f"{error} Get the file again, or train the subject again.") from error
    except NewerFormat as error:
        raise ValueError(f"{path.name} {error}") from error
    except ValueError as error:
        raise ValueError(f"{path.name} holds no subject this pack can use: {error}") from error


class NewerFormat(ValueError):
    """A file from a later version of the pack."""


def rounded(tensors: Mapping, precision: str) -> tuple[dict, float]:
    """The tensors in a precision and the relative error of that; ValueError if a value is too large for it."""
    dtype = PRECISIONS[precision]
    result, lost, learned = {}, 0.0, 0.0
    for key, parts in tensors.items():
        result[key] = {part: tensor.to(dtype) for part, tensor in parts.items()}
        for part, tensor in parts.items():
            difference = (result[key][part].to(torch.float32) - tensor).double()
            lost += float(difference.pow(2).sum())
            if not math.isfinite(lost):
                raise ValueError(f"precision {precision} cannot hold a value of {key[1]}: choose bf16 or fp32.")
            learned += float(tensor.double().pow(2).sum())
    return result, math.sqrt(lost / learned) if learned else 0.0


def packed(subject: Subject) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A subject as a file's tensors and metadata."""
    about, log = subject.metadata, subject.log
    flat = {f"{n}/{name}/{part}": t for (n, name), parts in subject.tensors.items() for part, t in parts.items()}
    flat |= {f"log/{term}/values": torch.tensor(values, dtype=torch.float64) for term, values in log.values.items()}
    base = about.get("base", {})
    trigger = about["subject"]
    modelspec = {
        "sai_model_spec": "1.0.0",
        "architecture": f"{ARCHITECTURES.get(base.get('family'), 'stable-diffusion')}/sude-subject",
        "implementation": "https://github.com/comfyui-sude/ComfyUI-SuDe",
        "title": trigger,
        "description": f"{about['method']} + SuDe of one {about['category']}",
        "trigger_phrase": trigger,
        "usage_hint": f"photo of a running {trigger}",
        "prediction_type": base.get("prediction", ""),
        "resolution": "x".join([str(about["resolution"])] * 2) if "resolution" in about else "",
        "date": about.get("trained", ""),
        "thumbnail": about.get("example", {}).get("thumbnail", ""),
    }
    stated = {f"modelspec.{name}": value for name, value in modelspec.items() if value}
    document = {**about, "log": {"seconds": log.seconds, "labels": log.labels, "validation": log.validation}}
    return flat, {METADATA: json.dumps(document), **stated}


def unpacked(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Subject:
    """A subject from a file's tensors and metadata, which may come from a stranger.

    Raises:
        NewerFormat: of a later version of the pack.
        ValueError: what does not hang together.
    """
    about = _document(metadata.get(METADATA, ""))
    log = about.pop("log")
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        network, _, rest = full.partition("/")
        name, _, part = rest.rpartition("/")
        found.setdefault((network, name), {})[part] = tensor
    values = {}
    for (network, name), parts in list(found.items()):
        _check_parts(network, name, parts)
        if network == "log":
            values[name] = found.pop((network, name))["values"].tolist()
    if not set(TERMS) <= values.keys() or len({len(series) for series in values.values()}) != 1:
        raise ValueError("its log is not whole.")
    if any(network == "reference" for network, _ in found):
        _check_reference(about.get("reference"), ("reference", "latent") in found)
    found = {key: {part: tensor.to(torch.float32) for part, tensor in parts.items()} for key, parts in found.items()}
    order = [*TERMS, *(term for term in values if term not in TERMS)]
    values = {term: values[term] for term in order}
    return Subject(found, about, Log(values, log["seconds"], log["labels"], _validation(log)))


def _validation(log: dict) -> list[tuple[int, float]]:
    """The pairs of step and validation value in a file's log; none if there are no such pairs in it."""
    pairs = log.get("validation")
    numbers = isinstance(pairs, list) and all(
        isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], int) and isinstance(pair[1], int | float)
        for pair in pairs
    )
    return [(step, float(value)) for step, value in pairs] if numbers else []


def _document(text: str) -> dict:
    """The metadata's JSON with everything in it that this pack reads."""
    if len(text) > LARGEST_METADATA:
        raise ValueError("its metadata is too large.")
    try:
        about = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its metadata is no JSON ({type(error).__name__}).") from error
    if not isinstance(about, dict) or not isinstance(about.get("format"), int):
        raise ValueError("its metadata names no format.")
    if about["format"] > FORMAT:
        raise NewerFormat(
            f"has format {about['format']}, and this version of ComfyUI-SuDe reads formats up to {FORMAT}: update the "
            "pack."
        )
    kinds = {"category": str, "identifier": str, "subject": str, "method": str, "recipe": dict, "log": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(about.get(name), kind)]
    log = about.get("log")
    if not wrong and not (isinstance(log.get("seconds"), int | float) and isinstance(log.get("labels"), dict)):
        wrong = ["log"]
    if wrong:
        raise ValueError(f"its metadata lacks {', '.join(wrong)}.")
    if not isinstance(about.get("base", {}), dict):
        raise ValueError("its metadata lacks base.")
    return about


def _check_parts(network: str, name: str, parts: dict[str, Tensor]) -> None:
    """Raises ValueError for tensors no subject has, or of shapes that do not go together."""
    where = f"{network} {name[:80]!r}"
    if parts.keys() not in PARTS.get(network, ()):
        raise ValueError(f"{where} has parts {sorted(parts)[:5]}, which are unknown.")
    if any(not tensor.is_floating_point() for tensor in parts.values()):
        raise ValueError(f"{where} does not hold floating-point numbers.")
    shapes = {part: tuple(tensor.shape) for part, tensor in parts.items()}
    good = True
    if "up" in parts:
        up, down = shapes["up"], shapes["down"]
        good = len(up) == len(down) == 2 and up[1] == down[0] > 0 and parts["alpha"].numel() == 1
    elif network == "token":
        vectors = shapes["vectors"]
        good = len(vectors) == 2 and 1 <= vectors[0] <= MOST_VECTORS and bool(name) and not name.isspace()
    elif network == "log":
        good = len(shapes["values"]) == 1
    elif (network, name) == ("reference", "latent"):
        good = len(shapes["value"]) == 4 and 0 not in shapes["value"]
    if not good:
        raise ValueError(f"{where} has impossible shapes ({', '.join(map(str, shapes.values()))}).")


def _check_reference(settings, has_latent: bool) -> None:
    """Raises ValueError unless everything on the attention to a picture is there."""
    heads = settings.get("heads") if isinstance(settings, dict) else None
    whole = has_latent and isinstance(heads, dict) and isinstance(settings.get("unconditional"), bool)
    if not whole or not all(isinstance(count, int) and count > 0 for count in heads.values()):
        raise ValueError("its attention to its picture is not whole.")
