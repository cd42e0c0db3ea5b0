"""Safetensors files that are never half written, never silently damaged, and stay in the folder they belong to.

A file is written tensor by tensor to a temporary name, synced and renamed: a crash or a full disk leaves the old file
or none. It carries a checksum of everything in it, so that one flipped bit is noticed before it is used.
"""

import hashlib
import json
import os
import re
import secrets
import sys
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

CHECKSUM = "sude.sha256"
SUFFIX = ".safetensors"
TEMPORARY = ".tmp"
NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
LONGEST_NAME = 100  # characters of a file or folder name taken from a person; systems allow 255 bytes
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # not file names on Windows


class DamagedFile(ValueError):
    """A file that is truncated, altered or not written by `write`."""


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all; one tensor at a time is copied from its device.

    Args:
        path: the file, replaced if it exists; its folder is made.
        tensors: any device.
        metadata: the file's `__metadata__`; the checksum is added.

    Raises:
        OSError: the disk is full or does not take the file. Nothing is left of it.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # keeps every tensor aligned
    header: dict = {"__metadata__": {**metadata, CHECKSUM: "0" * 64}}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:60]}.{secrets.token_hex(6)}{TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            digest = _Digest(metadata)
            for name in order:
                data = tensors[name].detach().to("cpu").contiguous()
                file.write(digest.add(name, data))
            checksum = f'"{CHECKSUM}": "'.encode()
            file.seek(8 + text.index(checksum) + len(checksum))
            file.write(digest.hex().encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors (CPU, in memory of their own) and metadata of a file from `write`.

    Raises:
        DamagedFile: it is not exactly what `write` wrote.
        OSError: it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            expected = metadata.pop(CHECKSUM, None)
            mapped = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, MemoryError):
        raise
    except Exception as error:  # whatever the parser makes of broken bytes
        raise DamagedFile(f"{path.name} is damaged or no safetensors file ({error}).") from error
    tensors = {name: tensor.clone() for name, tensor in mapped.items()}  # outside: no memory is no damage
    if expected is None:
        raise DamagedFile(f"{path.name} carries no checksum of this pack.")
    digest = _Digest(metadata)
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        digest.add(name, tensors[name])
    if digest.hex() != expected:
        raise DamagedFile(f"{path.name} is damaged: its content does not match its checksum.")
    return tensors, metadata


def peek(path: Path) -> dict[str, str]:
    """A file's metadata, unverified; empty if it has none or cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError):
        return {}


class _Digest:
    """The checksum of metadata and tensors."""

    def __init__(self, metadata: Mapping[str, str]):
        self._hash = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())

    def add(self, name: str, data: Tensor) -> memoryview:
        """Add a contiguous CPU tensor; return its bytes."""
        content = memoryview(data.reshape(-1).view(torch.uint8).numpy()) if data.numel() else memoryview(b"")
        if sys.byteorder == "big" and data.element_size() > 1:
            raise OSError("safetensors files are little-endian, and this machine is not.")
        self._hash.update(json.dumps([name, NAMES.get(data.dtype, str(data.dtype)), list(data.shape)]).encode())
        self._hash.update(content)
        return content

    def hex(self) -> str:
        return self._hash.hexdigest()


def _sync(folder: Path) -> None:
    """Make a rename last through a power loss, where the system can."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some network file systems have no such call for folders
        pass
    finally:
        os.close(handle)


def free_path(folder: Path, prefix: str, suffix: str = SUFFIX) -> Path:
    """A new file inside `folder` for a name a person typed: "dogs/spike" gives dogs/spike_00001_.safetensors.

    Raises:
        ValueError: nothing of the name is left, or it leads out of the folder.
    """
    parts = [part for part in map(_tidy, re.split(r"[/\\]", prefix)) if part]
    if not parts:
        raise ValueError(f"filename_prefix is {prefix[:80]!r}, which names no file: type for example subjects/spike.")
    target = folder.joinpath(*parts[:-1])
    if not target.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"filename_prefix {prefix[:80]!r} leads out of {folder.name}: type a name inside it.")
    try:
        target.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"filename_prefix {prefix[:80]!r}: a part of it is a file, not a folder: change it.") from None
    counts = re.compile(rf"{re.escape(parts[-1])}_(\d+)_.*", re.IGNORECASE)
    taken = [int(found[1]) for found in map(counts.fullmatch, os.listdir(target)) if found]
    return target / f"{parts[-1]}_{max(taken, default=0) + 1:05}_{suffix}"


def _tidy(part: str) -> str:
    """One file or folder name any system takes, from what a person typed; empty if nothing is left."""
    part = unicodedata.normalize("NFC", part)
    part = "".join(c for c in part if unicodedata.category(c)[0] != "C" and c not in '<>:"|?*')
    while len(part) > LONGEST_NAME or len(part.encode()) > 2 * LONGEST_NAME:
        part = part[:-1]
    part = part.strip(" .")
    return f"_{part}" if RESERVED.fullmatch(part) else part


def within(folder: Path) -> Iterator[Path]:
    """Every finished file below a folder, in order; links that lead out of it are left out."""
    root = folder.resolve()
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(place) / name
            if path.suffix == SUFFIX and not name.startswith(".") and path.resolve().is_relative_to(root):
                yield path
