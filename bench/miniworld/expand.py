"""The shipped narrow weights <-> the full checkpoint in Stable Diffusion 1.5's format.

Shipped: the UNet at width 160, the codec without its zero channels and 35 token rows, fp16. The full file has the UNet
at width 320, the whole TAESD and a CLIP-L text model drawn from its seed, so that ComfyUI loads it as any SD1.5 model.
Needs numpy, torch and safetensors, not ComfyUI.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from . import text, unet, vae

NARROW_FILE = Path(__file__).with_name("miniworld.safetensors")
HASH_KEY = "tensors_sha256"  # in the narrow file's metadata: what the full file must contain
METADATA = {
    "modelspec.sai_model_spec": "1.0.0",
    "modelspec.architecture": "stable-diffusion-v1",
    "modelspec.implementation": "sgm",
    "modelspec.title": "ComfyUI-SuDe mini world",
    "modelspec.description": "A tiny text-to-image model of a drawn world: eight categories, eight attributes.",
    "modelspec.resolution": "64x64",
    "modelspec.prediction_type": "epsilon",
    "modelspec.license": "Apache-2.0",
}
log = logging.getLogger(__name__)


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """sha256 over names, types, shapes and bytes of tensors, in the order of their names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        total.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file under a temporary name, then rename it, so that no half file is ever seen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(tensors, part, metadata)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def assemble(narrow: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Narrow tensors (`unet.*`, `vae.*`, `rows`) -> every tensor of the full checkpoint, fp16."""
    parts = {
        kind: {name.removeprefix(kind): weight for name, weight in narrow.items() if name.startswith(kind)}
        for kind in ("unet.", "vae.")
    }
    full = {f"model.diffusion_model.{name}": weight for name, weight in unet.widen(parts["unet."]).items()}
    full.update({f"first_stage_model.{name}": weight for name, weight in vae.widen(parts["vae."]).items()})
    clip = text.seeded_weights()
    clip[text.PREFIX + "embeddings.token_embedding.weight"][list(text.TRAINED_IDS)] = narrow["rows"].half()
    full.update({f"cond_stage_model.transformer.{name}": weight for name, weight in clip.items()})
    return {name: weight.half().contiguous() for name, weight in full.items()}


def shrink(
    net: dict[str, torch.Tensor], codec: dict[str, torch.Tensor], rows: torch.Tensor, path: Path = NARROW_FILE
) -> None:
    """Write the narrow file from a trained UNet, codec and token rows, with the hash of what it expands to."""
    narrow = {f"unet.{name}": weight for name, weight in net.items()}
    narrow.update({f"vae.{name}": weight for name, weight in codec.items()})
    narrow["rows"] = rows
    narrow = {name: weight.detach().cpu().half().contiguous() for name, weight in narrow.items()}
    write(path, narrow, {**METADATA, HASH_KEY: digest(assemble(narrow))})


def is_valid(path: Path, expected: str) -> bool:
    """Whether `path` is a readable file with just the tensors that hash to `expected`."""
    try:
        return path.is_file() and digest(read(path)[0]) == expected
    except (SafetensorError, OSError):
        return False


def expand(path: str | Path, source: str | Path = NARROW_FILE) -> Path:
    """Write the full checkpoint (335 MB) to `path`, unless it is there and intact; returns the path.

    Raises FileNotFoundError without the narrow file, ValueError where it is damaged or this machine's numpy draws
    another text encoder than the one the UNet was trained with.
    """
    path, source = Path(path), Path(source)
    if not source.is_file():
        raise FileNotFoundError(
            f"{source} is missing: get it from the repository or run `python -m bench.miniworld build`."
        )
    try:
        narrow, metadata = read(source)
    except SafetensorError as error:
        raise ValueError(f"{source} is not a readable safetensors file ({error}): get it again.") from error
    expected = metadata.get(HASH_KEY)
    if expected is None:
        raise ValueError(f"{source} carries no {HASH_KEY}: it is not a mini world file.")
    if is_valid(path, expected):
        log.info("%s is already there and intact", path)
        return path
    full = assemble(narrow)
    found = digest(full)
    if found != expected:
        raise ValueError(
            f"The mini world expanded from {source} has sha256 {found[:16]}..., expected {expected[:16]}...: "
            "the file is damaged, or this version of numpy draws other random numbers. Get the file again."
        )
    write(path, full, {**METADATA, "tensors_sha256": expected})
    return path
