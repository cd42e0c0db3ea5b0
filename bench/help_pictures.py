"""Takes the pictures of the nodes for their help pages, web/docs/img/NODE.png, and the graphs' for thumbnails.

    python -m bench.help_pictures [NODE or workflow ...]

SuDe Fine-Tune is taken while it trains a LoRA of the mini world, SuDe Grid with what came of it, all others as they
are; SuDe Score's table is drawn with the paper's numbers. Needs the environment that dev.py sets up, and a Chromium.
"""

import argparse
import json
import re
from pathlib import Path

from PIL import Image
from playwright.sync_api import Locator, Page, expect

from bench.comfy_client import ComfyClient
from bench.comfy_server import REPO, WORK, ComfyServer, link, prepare_base
from bench.demo import CHECKPOINT
from bench.miniworld.expand import expand
from bench.pictures import SIDE, WORKFLOWS
from bench.workflows import READY, frontend
from comfy_sude.data import to_pil
from comfy_sude.score_table import Row, choose, draw

IMAGES = REPO / "web" / "docs" / "img"
PLAIN = (
    "SuDeTrainingOptions", "SuDePrompt", "SuDeSaveSubject", "SuDeLoadSubject", "SuDeApplySubject", "SuDeExportSubject",
    "SuDeStore", "SuDeSweep", "SuDeScore",
)  # fmt: skip
# Workflows whose thumbnails show the graph.
GRAPHS = ("compare_baselines", "sweep_ws", "truncation_ablation", "sd15_full", "sd15_lowvram")
COLORS = 128  # of a picture

# Sets widgets by node type, then by name.
SET = """changes => {
    for (const node of app.graph.nodes)
        for (const [name, value] of Object.entries(changes[node.type] ?? {})) {
            const widget = node.widgets.find((one) => one.name === name)
            widget.value = value
            widget.callback?.(value, app.canvas, node)
        }
}"""
FAST = {
    "SuDeFineTune": {"baseline": "DreamBooth LoRA"},
    "SuDeTrainingOptions": {
        "prior": "off", "preview_prompts": "photo of a running [subject]\nphoto of a [subject] in the snow",
        "preview_every": 15, "preview_limit": 50,
    },
}  # fmt: skip
PAPER_METRICS = ("CLIP-I", "DINO-I", "CLIP-T", "BLIP-T")
PAPER = {  # Source: paper, Table 1, DreamBooth on SD 1.4: 30 subjects x 5 prompts x 4 pictures
    "DreamBooth": (77.4, 59.7, 29.0, 42.1),
    "DreamBooth + SuDe": (77.4, 59.9, 29.5, 43.3),
}
TRAINING = {"SuDeFineTune": {"baseline.steps": 120, "baseline.learning_rate": 1e-3}}


def shoot(where: Locator, path: Path) -> None:
    """A small picture of an element."""
    path.parent.mkdir(parents=True, exist_ok=True)
    where.screenshot(path=path)
    Image.open(path).convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(path, optimize=True)


def show(page: Page, kind: str) -> Locator:
    """The node of a type, in the middle of the screen."""
    page.evaluate(
        """kind => {
            const found = app.graph.nodes.find((one) => one.type === kind)
            app.canvas.ds.scale = 1
            app.canvas.centerOnNode(found)
            app.canvas.deselectAll()
            app.canvas.setDirty(true, true)
        }""",
        kind,
    )
    page.wait_for_timeout(800)
    number = page.evaluate("kind => app.graph.nodes.find((one) => one.type === kind).id", kind)
    return page.locator(f"[data-node-id='{number}']")


def alone(page: Page, kind: str) -> None:
    """The picture of a node that stands alone."""
    page.evaluate(
        "kind => { app.graph.clear(); const node = LiteGraph.createNode(kind); app.graph.add(node); "
        "node.setSize([400, node.size[1]]) }",
        kind,
    )
    shoot(show(page, kind), IMAGES / f"{kind}.png")


def trained(page: Page) -> None:
    """SuDe Fine-Tune in mid-training, then SuDe Grid with its pictures."""
    page.evaluate(
        "workflow => app.loadGraphData(workflow)", json.loads((WORKFLOWS / "quickstart.json").read_text("utf-8"))
    )
    page.wait_for_timeout(2000)
    page.evaluate(SET, FAST)
    page.evaluate(SET, TRAINING)
    page.get_by_test_id("queue-button").click()
    trainer = show(page, "SuDeFineTune")
    panel = trainer.get_by_role("region", name="Training")
    expect(panel).to_contain_text(re.compile(r"training (8[5-9]|9\d|10\d)/120"), timeout=1_200_000)
    shoot(trainer, IMAGES / "SuDeFineTune.png")
    expect(panel).to_contain_text("finished", timeout=600_000)
    grid = show(page, "SuDeGrid")
    expect(grid.locator("img").first).to_be_visible(timeout=120_000)
    page.wait_for_timeout(2000)
    shoot(grid, IMAGES / "SuDeGrid.png")


def table() -> None:
    """The table of SuDe Score with the paper's own numbers, of which it gives no spread."""
    rows = [
        Row(label, 600, dict(zip(PAPER_METRICS, means, strict=True)), dict.fromkeys(PAPER_METRICS, 0.0))
        for label, means in PAPER.items()
    ]
    choice = choose(rows, "BLIP-T", "DINO-I", 1.0, next(iter(PAPER)))
    to_pil(draw(rows, choice)[0]).quantize(COLORS, dither=Image.Dither.NONE).save(
        IMAGES / "SuDeScore-table.png", optimize=True
    )


def graph(page: Page, name: str) -> None:
    """A workflow's thumbnail: its graph."""
    page.evaluate(
        "workflow => app.loadGraphData(workflow)", json.loads((WORKFLOWS / f"{name}.json").read_text("utf-8"))
    )
    page.wait_for_timeout(3000)
    page.evaluate(
        """() => {
            const boxes = app.graph.nodes.map((node) => node.getBounding())
            const [left, top] = [0, 1].map((i) => Math.min(...boxes.map((box) => box[i])))
            const [right, bottom] = [0, 1].map((i) => Math.max(...boxes.map((box) => box[i] + box[i + 2])))
            const scale = Math.min(1000 / (right - left), 1000 / (bottom - top))
            app.canvas.ds.scale = scale
            app.canvas.ds.offset = [960 / scale - (left + right) / 2, 540 / scale - (top + bottom) / 2]
            app.canvas.setDirty(true, true)
        }"""
    )
    page.wait_for_timeout(1500)
    path = WORK / "graph.png"
    page.screenshot(path=path, clip={"x": 440, "y": 20, "width": 1040, "height": 1040})
    Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(
        WORKFLOWS / f"{name}.jpg", quality=85
    )


def main() -> int:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    wanted = parser.parse_args().names or [*PLAIN, *GRAPHS, "SuDeFineTune"]
    base = prepare_base(WORK / "help-pictures")
    link(expand(CHECKPOINT), base / "models" / "checkpoints" / "miniworld.safetensors")
    with frontend(base) as (page, client, server):
        start(page, client, server)
        for name in wanted:
            if name in PLAIN:
                alone(page, name)
                if name == "SuDeScore":
                    table()
            elif name in GRAPHS:
                graph(page, name)
            elif name == "SuDeFineTune":
                trained(page)
    return 0


def start(page: Page, client: ComfyClient, server: ComfyServer) -> None:
    """Open ComfyUI with Nodes 2.0."""
    client.request("POST", "/settings/Comfy.VueNodes.Enabled", b"true")
    page.set_default_timeout(120_000)
    page.set_viewport_size({"width": 1920, "height": 1500})
    page.goto(server.address, wait_until="domcontentloaded")
    page.wait_for_function(READY)


if __name__ == "__main__":
    raise SystemExit(main())
