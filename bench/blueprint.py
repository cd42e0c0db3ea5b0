"""Builds the subgraph blueprint in the real frontend: subgraphs/Subject from one photo.json.

    python -m bench.blueprint

Needs the environment that dev.py sets up, and a Chromium.
"""

import json
import tempfile
from pathlib import Path

from playwright.sync_api import Page

from bench.comfy_server import REPO, prepare_base
from bench.workflows import READY, frontend

NAME = "Subject from one photo"
PATH = REPO / "subgraphs" / f"{NAME}.json"
DESCRIPTION = (
    "Trains your subject from one photo (SuDe Fine-Tune) and writes its prompt: connect MODEL, positive and negative "
    "to a KSampler. Open it for the baseline and w_s."
)
SHOWN = {"SuDeFineTune": ["category"], "SuDePrompt": ["attribute", "context"]}  # widgets on the outside

# Nodes inside, with one outside for each connection that is to lead out; the outer ones are left behind.
BUILD = """async ([name, shown]) => {
    const graph = app.graph
    graph.clear()
    const make = (type, x, y, title) => {
        const node = LiteGraph.createNode(type)
        graph.add(node)
        node.pos = [x, y]
        if (title) node.title = title
        return node
    }
    const connect = (source, slot, target, input) => {
        if (!source.connect(slot, target, target.findInputSlot(input))) throw new Error(input)
    }
    const checkpoint = make("CheckpointLoaderSimple", -600, 0), image = make("LoadImage", -600, 200)
    const options = make("SuDeTrainingOptions", -600, 600)
    const trainer = make("SuDeFineTune", 0, 0), prompt = make("SuDePrompt", 480, 0)
    const positive = make("CLIPTextEncode", 860, 0, "Prompt")
    const negative = make("CLIPTextEncode", 860, 240, "Negative prompt")
    const sampler = make("KSampler", 1400, 0), saver = make("SuDeSaveSubject", 1400, 500)
    const other = make("CLIPTextEncode", 1400, 800)
    trainer.setSize([400, trainer.size[1]])
    for (const [slot, input] of ["model", "clip", "vae"].entries()) connect(checkpoint, slot, trainer, input)
    connect(image, 0, trainer, "image")
    connect(options, 0, trainer, "options")
    connect(trainer, 2, prompt, "subject")
    connect(trainer, 1, positive, "clip")
    connect(prompt, 0, positive, "text")
    connect(trainer, 1, negative, "clip")
    connect(trainer, 0, sampler, "model")
    connect(trainer, 1, other, "clip")
    connect(trainer, 2, saver, "subject")
    connect(positive, 0, sampler, "positive")
    connect(negative, 0, sampler, "negative")
    await new Promise((done) => setTimeout(done, 500))
    const { node, subgraph } = graph.convertToSubgraph(new Set([trainer, prompt, positive, negative]))
    subgraph.name = node.title = name
    for (const input of [...subgraph.inputs])
        if (!["model", "clip", "vae", "image", "options"].includes(input.name)) subgraph.removeInput(input)
    node.properties.proxyWidgets = subgraph.nodes.flatMap((one) =>
        (shown[one.type] ?? []).map((widget) => [String(one.id), widget]))
    await app.loadGraphData(JSON.parse(JSON.stringify(graph.serialize())))
    await new Promise((done) => setTimeout(done, 1500))
    return app.graph.serialize()
}"""


def build(page: Page) -> dict:
    """The blueprint: one node that is the subgraph, and the subgraph."""
    saved = page.evaluate(BUILD, [NAME, SHOWN])
    (inside,) = saved["definitions"]["subgraphs"]
    (node,) = (one for one in saved["nodes"] if one["type"] == inside["id"])
    names = iter(("positive", "negative"))
    for slot, output in enumerate(inside["outputs"]):
        if output["type"] == "CONDITIONING":
            name = next(names)
            for socket in (output, node["outputs"][slot]):
                socket.pop("localized_name", None)
                socket["name"] = socket["label"] = name
    for socket in node["inputs"]:
        socket["link"] = None
    for socket in node["outputs"]:
        socket["links"] = []
    inside |= {"category": "training/SuDe", "description": DESCRIPTION}
    node |= {"pos": [0, 0], "title": NAME}
    return {
        "revision": 0,
        "last_node_id": node["id"],
        "last_link_id": 0,
        "nodes": [node],
        "links": [],
        "version": 0.4,
        "definitions": {"subgraphs": [inside]},
        "extra": {},
    }


def main() -> int:
    """Write the file."""
    with tempfile.TemporaryDirectory() as folder, frontend(prepare_base(Path(folder))) as (page, _, server):
        page.goto(server.address, wait_until="domcontentloaded")
        page.wait_for_function(READY, timeout=120_000)
        PATH.parent.mkdir(exist_ok=True)
        PATH.write_text(json.dumps(build(page), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
