"""The scoring models on ComfyUI's device, with room made for them and given back."""

from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management

from ..score_models import Models
from .folders import score_folders
from .progress import Progress

ROOM = 3 * 1024**3  # bytes: all four models in fp32 take 2.0 GB, a batch of pictures less than 1 GB


@contextmanager
def scoring_models(report: Progress) -> Iterator[Models]:
    """Models from ComfyUI's folders for one scoring; they and their memory are gone afterwards, however it ends."""

    def say(done: int, total: int, line: str) -> None:
        if not done:
            report.phase(line, total)
        report.step(done, "")

    device = comfy.model_management.get_torch_device()
    comfy.model_management.free_memory(ROOM, device)
    models = Models(score_folders(), device, say)
    try:
        yield models
    finally:
        models.free()
        comfy.model_management.soft_empty_cache()
