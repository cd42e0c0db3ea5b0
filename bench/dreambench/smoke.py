"""The smoke run: every part once, on the mini world and with random scoring models. Its numbers mean nothing.

Trainings of a few steps, pictures of 64 px of a few sampling steps, prompts of the mini world's own words.
"""

import dataclasses
from pathlib import Path

from PIL import Image

from bench import score_models
from bench.demo import CHECKPOINT
from bench.miniworld import world
from bench.miniworld.expand import expand
from comfy_sude.scores import Models

from .protocol import BASELINES, Guidance, Protocol
from .runner import Plan
from .subjects import FIRST, Subject, load

BACKBONE = "miniworld"
WARNING = "smoke run: random scoring models and trainings of two steps, the numbers mean nothing"
DRAWN = ("spike", "polly")  # of the mini world's subjects
PHOTOGRAPHED = ("dog", "teapot")  # DreamBench's subjects of categories that it knows
PROMPTS = ("photo of a running {S*}", "photo of a {S*} in the snow")
STEPS = {"baseline.steps": 2}
SMALL = {"resolution": 64, "gradient_checkpointing": False}
CLASS_IMAGES = {"prior": "class images", "prior.number": 2, "prior.steps": 2, "prior.cfg": 4.0}
PROTOCOL = Protocol(
    pictures=2,
    sampling_steps=3,
    size=64,
    guidance=dict.fromkeys(BASELINES, Guidance(4.0)),
    training={
        "DreamBooth": {**STEPS, "baseline.learning_rate": 3e-5},
        "Custom Diffusion": {**STEPS, "baseline.views": 4, "baseline.learning_rate": 1e-4},
        "ViCo": STEPS,
    },
    options={
        "DreamBooth": {**SMALL, **CLASS_IMAGES},
        "Custom Diffusion": {**SMALL, **CLASS_IMAGES},
        "ViCo": SMALL,
    },
)


def plan(output: Path, data: Path | None = None, **changes: object) -> Plan:
    """Makes what the smoke run needs below the output folder, and its plan.

    Args:
        output: folder of the results.
        data: DreamBench's pictures; without them the mini world draws some.
        changes: to the plan, as "baselines".
    """
    models = output / "score_models"
    if Models([models]).missing(PROTOCOL.metrics):
        score_models.build(models)
    if data:
        known = load()
        subjects = [dataclasses.replace(known[name], prompts=PROMPTS, own=len(PROMPTS)) for name in PHOTOGRAPHED]
    else:
        data = output / "data"
        subjects = [draw(data, name) for name in DRAWN]
    return Plan(PROTOCOL, {BACKBONE: expand(CHECKPOINT)}, subjects, data, models, output, **changes)


def draw(data: Path, name: str) -> Subject:
    """One of the mini world's subjects, drawn into a folder of DreamBench's layout: as it is, and with a hat."""
    category, looks = world.SUBJECTS[name]
    folder = data / name
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(world.render(category, None, looks)).save(folder / FIRST, quality=95)
    Image.fromarray(world.render(category, "wearing a hat", looks)).save(folder / "01.jpg", quality=95)
    return Subject(name, category, PROMPTS, own=len(PROMPTS))
