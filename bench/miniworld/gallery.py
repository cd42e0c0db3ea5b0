"""What the protocol's trainings draw, as one labelled picture: numbers are to be believed only with a look at it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .learner import Learner, World
from .protocol import FAMILIES, SEEDS, setting
from .trial import GUIDANCE, SAMPLING_STEPS, SEED, individual, recipe
from .world import ATTRIBUTES, prompt, render

SUBJECT = ("cat", 102)  # where plain training loses the category most often
SHOWN = (
    ("DreamBooth, caption without category", "plain"),
    ("DreamBooth, caption without category", "SuDe 1"),
    ("DreamBooth, caption without category", "plain, category in the prompt"),
    ("Custom Diffusion", "plain"),
    ("Custom Diffusion", "SuDe 2"),
    ("Custom Diffusion", "SuDe 2, no truncation"),
)
CELL, ZOOM, HEAD, LEFT = 64, 2, 26, 250


def rows(subject: tuple[str, int] = SUBJECT, seed: int = SEEDS[0], step_of: int = -2) -> list[tuple[str, np.ndarray]]:
    """Label and pictures [1 + attributes, 64, 64, 3] of every variant shown, at its step `step_of`."""
    world, found = World.load(), []
    families = {family.title: family for family in FAMILIES}
    for title, name in SHOWN:
        variant = next(v for v in families[title].variants if v.name == name)
        wanted = setting(families[title], variant, subject, seed)
        learner = Learner(world, recipe(wanted), individual(subject[1]))
        step = wanted.evaluate_at[step_of]
        learner.train_to(step)
        named = f"{learner.named} {subject[0]}" if wanted.ask_category else learner.named
        captions = [prompt(named, attribute) for attribute in (None, *ATTRIBUTES)]
        drawn = learner.sample(captions, 1, SEED, SAMPLING_STEPS, GUIDANCE)
        found.append((f"{title}\n{name}, step {step}", (drawn * 255).round().to(torch.uint8).numpy()))
    return found


def draw(path: Path, subject: tuple[str, int] = SUBJECT) -> Path:
    """Write the sheet: the example and renders of what is asked for on top, then a row a variant."""
    category, number = subject
    truth = [render(category, attribute, individual(number)) for attribute in (None, *ATTRIBUTES)]
    sheet = [("the example, and as it\nshould be (renders)", np.stack(truth)), *rows(subject)]
    side = CELL * ZOOM
    image = Image.new("RGB", (LEFT + (side + 4) * len(truth), HEAD + (side + 4) * len(sheet)), (255, 255, 255))
    canvas, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    for column, name in enumerate(("plain", *ATTRIBUTES)):
        canvas.text((LEFT + column * (side + 4) + side / 2, 6), name, (40, 40, 40), font, "ma")
    for line, (label, pictures) in enumerate(sheet):
        top = HEAD + line * (side + 4)
        canvas.multiline_text((8, top + side / 2 - 16), label.replace(", caption", ",\ncaption"), (40, 40, 40), font)
        for column, picture in enumerate(pictures):
            cell = Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)
            image.paste(cell, (LEFT + column * (side + 4), top))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path
