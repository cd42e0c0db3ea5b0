"""The content-addressed store on disk: what was computed once from the same inputs is read back, not computed again.

One checked safetensors file per entry (`files.py`), named by its kind and the hash of what it was made from. Several
processes may use one folder: entries appear by renaming and never change, so a reader has the whole entry or none.
"""

import contextlib
import hashlib
import json
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import files

GIGABYTE = 1e9
LITTER_SECONDS = 600  # a temporary file untouched for so long belongs to a process that is no more


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


@dataclass(frozen=True)
class Entry:
    """One file of the store: its kind ("subject", "state", "class_images"), size in bytes and time of last use."""

    path: Path
    kind: str
    bytes: int
    used: float


class Store:
    """Entries under one folder, made when first written to.

    Args:
        folder: where they are.
        limit: bytes they may take together; the longest unused go first. 0 stores nothing.
    """

    def __init__(self, folder: Path, limit: float = 20 * GIGABYTE):
        self.folder, self.limit = Path(folder), limit

    def path(self, kind: str, name: str) -> Path:
        """Where an entry is or would be."""
        return self.folder / f"{kind}-{name}{files.SUFFIX}"

    def get(self, kind: str, name: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """Tensors and metadata of an entry; None if there is none or it cannot be read. A damaged one is removed."""
        path = self.path(kind, name)
        if not path.is_file():
            return None
        try:
            entry = files.read(path)
            os.utime(path)  # its last use
            return entry
        except files.DamagedFile as error:
            logging.warning("SuDe: a stored file is not used: %s", error)
            remove(path)
        except OSError as error:  # gone between two calls, or a passing fault: left alone
            logging.warning("SuDe: %s cannot be read (%s)", path.name, error)
        return None

    def put(self, kind: str, name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bool:
        """Make room by the limit and write an entry, atomically; whether it is there now.

        A disk that is full or does not take it costs this entry and nothing else, and so does one above the limit.
        """
        path = self.path(kind, name)
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        if size > self.limit or self.limit <= 0:
            return False
        self.make_room(self.limit - size, keep=path)
        try:
            files.write(path, tensors, metadata or {})
        except OSError as error:
            logging.warning("SuDe: %s could not be written (%s): make room on that disk.", path, error)
            return False
        return True

    def remove(self, kind: str, name: str) -> None:
        """Remove an entry, if it is there."""
        remove(self.path(kind, name))

    def entries(self, kind: str = "") -> list[Entry]:
        """What there is (of one kind), the longest unused first."""
        found = []
        for path in self.folder.glob(f"{kind or '*'}-*{files.SUFFIX}"):
            with contextlib.suppress(OSError):  # gone meanwhile
                status = path.stat()
                found.append(Entry(path, path.name.split("-")[0], status.st_size, status.st_mtime))
        return sorted(found, key=lambda entry: entry.used)

    def used(self) -> int:
        """Bytes of all entries."""
        return sum(entry.bytes for entry in self.entries())

    def make_room(self, target: float, keep: Path | None = None) -> None:
        """Remove the longest unused entries until all but `keep` take no more than `target` bytes together."""
        for litter in self.folder.glob(f".*{files.TEMPORARY}"):
            with contextlib.suppress(OSError):
                if time.time() - litter.stat().st_mtime > LITTER_SECONDS:
                    litter.unlink()
        others = [entry for entry in self.entries() if entry.path != keep]
        total = sum(entry.bytes for entry in others)
        for entry in others:
            if total <= target:
                break
            if remove(entry.path):
                logging.info("SuDe: %s removed from the store, the longest unused", entry.path.name)
                total -= entry.bytes


def remove(path: Path) -> bool:
    """Remove a file that another process may be using; whether it is gone."""
    try:
        path.unlink(missing_ok=True)
    except OSError:  # Windows, while it is open elsewhere
        return False
    return True
