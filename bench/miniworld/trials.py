"""Many trials: worker processes of one thread each, one JSON line a finished trial, what is there is not run again."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

from bench import records

from .trial import PICTURES, Judges, Setting, run

log = logging.getLogger(__name__)


def rows(path: Path) -> list[dict]:
    """Every judgement of every trial of a file ({"setting", "rows"} a line), with what was trained."""
    return [trial["setting"] | row for trial in records.read(path) for row in trial["rows"]]


def name(setting: dict) -> str:
    """What makes two trials the same."""
    return json.dumps(setting, sort_keys=True)


def missing(settings: Iterable[Setting], path: Path) -> list[Setting]:
    """Those that the file does not have."""
    known = {name(trial["setting"]) for trial in records.read(path)}
    return [setting for setting in settings if name(setting.key()) not in known]


_state: dict = {}


def _begin() -> None:
    from .learner import World

    torch.set_num_threads(1)
    _state.update(world=World.load(), judges=Judges(), class_images={})


def _work(job: tuple[Setting, int]) -> dict:
    setting, pictures = job
    began = time.perf_counter()
    found = run(setting, _state["world"], _state["judges"], _state["class_images"], pictures)
    return {"setting": setting.key(), "rows": found, "seconds": round(time.perf_counter() - began, 1)}


def run_all(
    settings: Iterable[Setting], path: Path, workers: int | None = None, pictures: int = PICTURES
) -> Iterator[dict]:
    """Run what the file lacks, append each trial to it as it ends, and yield it."""
    jobs = [(setting, pictures) for setting in missing(settings, path)]
    count = min(workers or os.cpu_count() or 1, len(jobs))
    if not jobs:
        return
    # an executor, not a Pool: that one starts workers that cannot begin again and again for ever
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _begin)
    try:
        for done, future in enumerate(as_completed([pool.submit(_work, job) for job in jobs]), 1):
            trial = future.result()
            records.append(path, trial)
            log.info("trial %d of %d, %.0f s", done, len(jobs), trial["seconds"])
            yield trial
    finally:
        pool.shutdown(cancel_futures=True)
