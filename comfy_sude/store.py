"""The content-addressed store on disk: what was computed once from the same inputs is read back, not computed again.

One safetensors file per entry, named by the hash of what it was made from; written to a temporary file and renamed, so
a crash leaves either the whole entry or none.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def key(**inputs) -> str:
    """Hash of JSON-able inputs; any difference gives another key."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def tensor_hash(named_tensors) -> str:
    """Hash of (name, tensor) pairs: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in named_tensors:
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {data.dtype} {tuple(data.shape)}".encode())
        digest.update(data.flatten().view(torch.uint8).numpy().data if data.numel() else b"")
    return digest.hexdigest()


class Store:
    """Entries under one folder, made when first written to."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def get(self, name: str) -> dict[str, Tensor] | None:
        """The tensors of an entry, or None if there is none or it is damaged."""
        path = self._path(name)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}
        except SafetensorError:  # truncated, bit-flipped in its header or foreign; never for a passing read error
            path.unlink(missing_ok=True)
            return None

    def put(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        """Write an entry, atomically."""
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            save_file(tensors, temporary, metadata)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"
