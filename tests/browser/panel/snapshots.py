"""Made-up snapshots of a training, as the server sends them, for tests of the panel that shows them."""

import io
import itertools
import math
import random
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from playwright.sync_api import Locator, Page, expect

POINTS = 200
PROMPTS = ["photo of a running sks dog", "photo of a sks dog wearing a hat"]
RENDERERS = {"classic": False, "nodes2": True}  # and whether it is Nodes 2.0
numbers = itertools.count(1)


def curves(done: int, w_s: float = 0.4) -> dict[str, Any]:
    """Falling, noisy curves over `done` steps."""
    chance = random.Random(3)
    every = max(1, 2 ** math.ceil(math.log2(max(1, done) / POINTS)))
    count = -(-done // every)
    fall = [math.exp(-2.5 * index / max(1, count)) for index in range(count)]
    made = {"every": every, "l_sub": [0.03 + 0.12 * f * chance.uniform(0.4, 1.7) for f in fall]}
    if w_s:
        made["l_sude"] = [0.9 * f * chance.uniform(0.3, 1.6) for f in fall]
        made["gap"] = [0.02 * (f - 0.15) * chance.uniform(0.5, 1.5) for f in fall]
        made["gate"] = [min(1.0, max(0.0, 0.15 + 0.8 * f + chance.uniform(-0.15, 0.15))) for f in fall]
    return made


def snapshot(node: str | int, client: str | None, step: int = 120, w_s: float = 0.4, **changes: Any) -> dict[str, Any]:
    """A training of 500 steps after `step` of them, with `changes`."""
    made = {
        "id": "synthetic", "number": next(numbers), "node": str(node), "client": client, "prompt": None,
        "workflow": None, "title": f"DreamBooth of 'dog', w_s {w_s:g}", "part": None, "state": "running",
        "phase": "training", "done": step, "total": 500, "line": "loss 0.0123 · gate 45% open · 3.21 steps/s",
        "notice": "", "error": "", "elapsed": step / 3.2, "rate": 3.21, "left": (500 - step) / 3.2,
        "memory": [9.1e9, 24e9], "can_finish": True, "w_s": w_s, "steps": 500, "curves": curves(step, w_s),
        "validation": [[at, 0.04 + 0.05 * math.exp(-at / 150)] for at in range(0, step + 1, 50)],
        "previews": None,
    }  # fmt: skip
    return made | changes


def shot(page: Page, node: int | str = 1, step: int = 120, w_s: float = 0.4, **changes) -> dict:
    """A snapshot of a training that this page queued from the open workflow."""
    return snapshot(node, step=step, w_s=w_s, **{"client": page.client, "workflow": page.workflow, **changes})


def previews(base: Path, steps: list[int], prompts: list[str]) -> dict[str, Any]:
    """A filmstrip whose pictures lie in the temp folder of the server with this base directory."""
    folder, shots = base / "temp" / "sude", []
    folder.mkdir(parents=True, exist_ok=True)
    for step in steps:
        names = [f"synthetic_{step}_{row}.png" for row in range(len(prompts))]
        for row, name in enumerate(names):
            (folder / name).write_bytes(picture(step, row))
        shots.append({"step": step, "pictures": [{"filename": n, "subfolder": "sude", "type": "temp"} for n in names]})
    return {"prompts": prompts, "every": 50, "share": 0.06, "limit": 0.1, "note": "", "shots": shots}


def picture(step: int, row: int) -> bytes:
    """A ball on a ground: clearer with each step."""
    image = Image.new("RGB", (64, 64), (200 - row * 60, 190, 150 + row * 50))
    size = 10 + step // 30
    ImageDraw.Draw(image).ellipse((32 - size, 32 - size, 32 + size, 32 + size), fill=(180, 60 + row * 90, 60))
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


FINISHED = {
    "state": "finished", "phase": "done", "done": 1, "total": 1, "line": "500 steps in 160 s", "rate": None,
    "left": None, "memory": None, "can_finish": False,
}  # fmt: skip


def send(page: Page, *snapshots: dict[str, Any]) -> None:
    """Let the page receive snapshots as if the server had sent them, and draw the last."""
    page.evaluate(
        """async (given) => {
            for (const detail of given) window.comfyAPI.api.api.dispatchCustomEvent("sude.training", detail)
            for (let frame = 0; frame < 3; frame++) await new Promise(requestAnimationFrame)
        }""",
        list(snapshots),
    )


def client_id(page: Page) -> str:
    """What the page calls itself towards the server."""
    page.wait_for_function("window.comfyAPI.api.api.clientId")
    return page.evaluate("window.comfyAPI.api.api.clientId")


def panel(page: Page, node: int = 1) -> Locator:
    """The panel of a node: in the order of the nodes."""
    return page.locator(".sude-panel:visible").nth(node - 1)


def expect_idle(shown: Locator) -> None:
    """A panel has nothing to show."""
    expect(shown.get_by_text("Curves appear here during training.")).to_be_visible()
    expect(shown.get_by_role("progressbar")).to_be_hidden()
