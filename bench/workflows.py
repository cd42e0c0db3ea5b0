"""Builds the shipped workflows in the real frontend: workflows/NAME.json, workflows/api/NAME.json.

    python -m bench.workflows [NAME ...]

Needs the environment that dev.py sets up, and a Chromium. Widgets are set and nodes connected as a person would, so
what is written is what the page itself saves.
"""

import argparse
import contextlib
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from bench.comfy_client import ComfyClient
from bench.comfy_server import REPO, ComfyServer, prepare_base
from bench.workflow_plans import Plan
from bench.workflow_plans_more import plans
from comfy_sude import files

WORKFLOWS = REPO / "workflows"
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.InstalledVersion": "1.47.12", "Comfy.Workflow.Persist": False}
READY = """!!(window.app?.extensionManager?.workflow?.activeWorkflow && LiteGraph.registered_node_types.SuDeFineTune)"""

# Builds a plan on the open canvas. Nodes stand 60 px apart, blocks 100 px below those above them.
BUILD = """async plan => {
    const graph = app.graph
    graph.clear()
    const made = {}
    for (const [number, wanted] of Object.entries(plan.nodes)) {
        const node = LiteGraph.createNode(wanted.type)
        if (!node) throw new Error(`no node ${wanted.type}`)
        node.id = Number(number)
        graph.add(node)
        if (wanted.title) node.title = wanted.title
        for (const [name, value] of Object.entries(wanted.widgets)) {
            const widget = node.widgets.find((one) => one.name === name)
            if (!widget) throw new Error(`${wanted.type} has no widget ${name}`)
            widget.value = value
            widget.callback?.(value, app.canvas, node)
        }
        made[number] = node
    }
    for (const [number, wanted] of Object.entries(plan.nodes))
        for (const [input, [source, slot]] of Object.entries(wanted.inputs)) {
            const place = made[number].findInputSlot(input)
            if (place < 0) throw new Error(`${wanted.type} has no input ${input}`)
            if (!made[source].connect(slot, made[number], place)) throw new Error(`${number}.${input}: not ${source}`)
        }
    await new Promise((done) => setTimeout(done, 500))
    const bottoms = []
    plan.blocks.forEach((block, index) => {
        const top = block.under.length ? Math.max(...block.under.map((one) => bottoms[one])) + 160 : 0
        let x = block.x, bottom = top
        for (const column of block.columns) {
            let y = top, width = 0
            for (const number of column) {
                const node = made[number], least = node.computeSize(), wanted = plan.nodes[number].size ?? [400, 0]
                node.setSize([Math.max(wanted[0], 200), Math.max(wanted[1], least[1])])
                node.pos = [x, y]
                y += node.size[1] + 70
                width = Math.max(width, node.size[0])
            }
            bottom = Math.max(bottom, y - 70)
            x += width + 60
        }
        bottoms.push(bottom)
        if (!block.title) return
        const group = new LiteGraph.LGraphGroup(block.title)
        group.pos = [block.x - 20, top - 90]
        group.size = [x - 60 - block.x + 40, bottom - top + 110]
        graph.add(group)
    })
    graph.id = plan.id
    const saved = graph.serialize()
    const { output } = await app.graphToPrompt()
    return { saved, output }
}"""


@contextlib.contextmanager
def frontend(base: Path) -> Iterator[tuple[Page, ComfyClient, ComfyServer]]:
    """A real frontend on a server whose folders have what the workflows name."""
    for name in ("miniworld", "v1-5-pruned-emaonly-fp16"):
        checkpoint = base / "models" / "checkpoints" / f"{name}.safetensors"
        if not checkpoint.exists():  # only to be named
            files.write(checkpoint, {}, {})
    for name in ("spike.png", "example.png"):
        shutil.copy(WORKFLOWS / "spike.png", base / "input" / name)
    files.write(base / "output" / "sude" / "spike_00001_.safetensors", {}, {})
    with ComfyServer(base, log=base / "server.log") as server, ComfyClient(server.address) as client:
        for name, value in SETTINGS.items():
            client.request("POST", f"/settings/{name}", json.dumps(value).encode())
        with sync_playwright() as playwright:
            path = shutil.which("chromium") or shutil.which("google-chrome") or playwright.chromium.executable_path
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page(viewport={"width": 1920, "height": 1080})
            yield page, client, server
            browser.close()


def build(page: Page, server: ComfyServer, plan: Plan) -> tuple[dict, dict]:
    """The workflow as the page saves it and as it queues it."""
    page.goto(server.address, wait_until="domcontentloaded")  # a page remembers widgets' values by the nodes' numbers
    page.wait_for_function(READY, timeout=120_000)
    described = dataclasses.asdict(plan)
    for block, shown in zip(plan.blocks, described["blocks"], strict=True):
        shown["under"] = [plan.blocks.index(one) for one in block.under]
    made = page.evaluate(BUILD, described)
    saved = {name: value for name, value in made["saved"].items() if value is not None}
    return {**saved, "extra": {}}, made["output"]


def lines(content: dict) -> str:
    """JSON with a line for each entry and each item of an entry, so that differences can be read."""
    entries = []
    for name, value in content.items():
        items = value if isinstance(value, list) else []
        inside = ",\n".join(f"    {json.dumps(item, ensure_ascii=False)}" for item in items)
        text = f"[\n{inside}\n  ]" if items else json.dumps(value, ensure_ascii=False)
        entries.append(f"  {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def main() -> int:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    wanted = parser.parse_args().names
    with tempfile.TemporaryDirectory() as folder, frontend(prepare_base(Path(folder))) as (page, _, server):
        for plan in plans():
            if wanted and plan.name not in wanted:
                continue
            saved, queued = build(page, server, plan)
            for path, content in ((f"{plan.name}.json", saved), (f"api/{plan.name}.json", queued)):
                (WORKFLOWS / path).write_text(lines(content), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
