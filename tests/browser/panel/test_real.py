"""A real training, watched on its panel while it runs."""

import re
import time
from pathlib import Path

from playwright.sync_api import Page, expect

from bench.comfy_client import ComfyClient

from ..conftest import READY
from .snapshots import RENDERERS, expect_idle, panel

REPO = Path(__file__).resolve().parents[3]


def running_step(page: Page, least: int = 1) -> tuple[int, int]:
    """(node, step) of the training that some panel shows, once it has done so many steps."""
    script = """least => [...document.querySelectorAll(".sude-panel")].map((e, index) =>
        [index + 1, Number(e.querySelector(".sude-fold").textContent.match(/training ([0-9]+)/)?.[1] ?? -1)])
        .find(([, step]) => step >= least)"""
    return tuple(page.wait_for_function(script, arg=least, timeout=180_000).json_value())


def test_a_real_training_is_watched_reloaded_and_finished_and_another_follows(
    opened: Page, client: ComfyClient, checkpoint, tmp_path: Path
):
    image = client.upload_image("panel.png", (REPO / "workflows" / "spike.png").read_bytes())
    small = {"resolution": 64, "gradient_checkpointing": False, "prior": "off", "preview_every": 5, "preview_steps": 1}
    links = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "image": ["2", 0], "options": ["5", 0]}
    method = {"baseline": "DreamBooth LoRA", "baseline.steps": 5000, "baseline.train_text_encoder": False}
    seeds = [730 + list(RENDERERS).index(opened.renderer), 740 + list(RENDERERS).index(opened.renderer)]
    graph = {
        "1": client.node("CheckpointLoaderSimple", {"ckpt_name": checkpoint()}),
        "2": client.node("LoadImage", {"image": image}),
        "5": client.node("SuDeTrainingOptions", small),
    }
    for node, seed in zip(("3", "4"), seeds, strict=True):
        graph[node] = client.node("SuDeFineTune", {**links, "category": "dog", "training_seed": seed, **method})
        save = {"subject": [node, 2], "filename_prefix": f"tests/panel{seed}"}
        graph[f"1{node}"] = client.node("SuDeSaveSubject", save)
    opened.errors.clear()
    opened.evaluate("graph => app.loadApiJson(graph, 'live')", graph)
    place = """() => { for (const node of app.graph.nodes) node.pos = ({ 3: [0, 0], 4: [420, 0] })[node.id] ?? [900, 0]
        app.canvas.ds.scale = 0.7; app.canvas.ds.offset = [140, 80]; app.canvas.setDirty(true, true) }"""
    opened.evaluate(place)
    saved = opened.evaluate("app.graph.serialize()")
    before = set(client.get("/history"))
    opened.evaluate("app.queuePrompt(0)")
    first, step = running_step(opened, 7)
    expect(panel(opened, first).locator("canvas:visible")).to_have_count(2)
    expect_idle(panel(opened, 3 - first))

    opened.reload(wait_until="domcontentloaded")
    opened.wait_for_function(READY)
    opened.evaluate("saved => app.loadGraphData(saved)", saved)
    again, later = running_step(opened, step)
    assert again == first and later >= step
    plot = panel(opened, first).locator("canvas").first
    covered = int(re.search(r"over (\d+) of 5000", plot.get_attribute("aria-label"))[1])
    assert covered >= step, "the curves have what came before the page was left"
    running_step(opened, later + 2)  # and it goes on
    expect(panel(opened, first).locator(".sude-shot img").first).to_be_visible()
    fold = panel(opened, first).locator(".sude-fold")
    fold.click()
    expect(panel(opened, first).locator("canvas:visible")).to_have_count(0)
    fold.click()
    expect(panel(opened, first).locator("canvas:visible")).to_have_count(2)

    for node in (first, 3 - first):
        assert running_step(opened)[0] == node
        panel(opened, node).get_by_role("button", name="finish now").click()
        done = panel(opened, node).get_by_role("button", name="finished", exact=True)
        expect(done).to_be_visible(timeout=120_000)
    expect(panel(opened, first).get_by_text(re.compile(r"\d+ (of 5000 )?steps"))).to_be_visible()
    end = time.monotonic() + 60
    while not (new := set(client.get("/history")) - before):
        assert time.monotonic() < end, "the run did not end"
        time.sleep(0.2)
    assert client.get("/history")[new.pop()]["status"]["status_str"] == "success"
    # History has the end of a run before the page has heard of it.
    found = """() => {
        const loader = app.graph.nodes.find(n => n.type === "SuDeLoadSubject")
        if (loader) return loader.widgets.find(w => w.name === "subject_file").value
        app.graph.getNodeById(13).widgets.find(w => w.name === "open saved subject").callback()
        return null
    }"""
    chosen = opened.wait_for_function(found, polling=500).json_value()
    assert chosen == f"tests/panel{seeds[0]}_00001_.safetensors"
    opened.screenshot(path=tmp_path / "page.png")
    # ComfyUI opens its websocket before it loads extensions, and says that nobody listens to what comes in between.
    assert not [error for error in opened.errors if not error.startswith("Unhandled message")]
