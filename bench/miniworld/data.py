"""Pictures of random individuals in bulk, rendered once and kept as one safetensors file."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from .world import ATTRIBUTES, CATEGORIES, random_subject, render

PLAIN_SHARE = 0.2  # of the pictures have no attribute; the others one of eight, evenly
CHUNK = 500
log = logging.getLogger(__name__)


def _chunk(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    pictures = np.empty((CHUNK, 64, 64, 3), np.uint8)
    labels = np.empty((CHUNK, 2), np.int64)
    for i in range(CHUNK):
        category = int(rng.integers(len(CATEGORIES)))
        attribute = 0 if rng.random() < PLAIN_SHARE else 1 + int(rng.integers(len(ATTRIBUTES)))
        name = ATTRIBUTES[attribute - 1] if attribute else None
        pictures[i] = render(CATEGORIES[category], name, random_subject(rng))
        labels[i] = category, attribute
    return pictures, labels


def in_chunks(
    make: Callable[[int], tuple[np.ndarray, np.ndarray]], count: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures and labels of `count` (a multiple of CHUNK) renders; `make` makes CHUNK of them from a seed."""
    with multiprocessing.get_context("spawn").Pool(min(8, os.cpu_count() or 1)) as pool:
        chunks = pool.map(make, range(seed, seed + count // CHUNK), chunksize=1)
    x, y = (torch.from_numpy(np.concatenate(part)) for part in zip(*chunks, strict=True))
    return x, y


def pictures(count: int, cache: Path, seed: int = 100) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` renders (a multiple of 500), from `cache` if it is there.

    Returns (uint8 [N, 64, 64, 3], int64 [N, 2] of category index and attribute index, 0 = no attribute).
    """
    if cache.is_file():
        stored = load_file(cache)
        if len(stored["pictures"]) == count:
            return stored["pictures"], stored["labels"]
    x, y = in_chunks(_chunk, count, seed)
    cache.parent.mkdir(parents=True, exist_ok=True)
    save_file({"pictures": x, "labels": y}, cache)
    log.info("rendered %d pictures into %s", count, cache)
    return x, y
