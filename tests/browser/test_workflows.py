"""The shipped workflow files in the real frontend: dropped on the page, loaded whole, changed, queued, looked at."""

import json
from pathlib import Path

import pytest
from playwright.sync_api import Page

from bench.comfy_client import ComfyClient

from .conftest import DROP, wait_for_new_run

REPO = Path(__file__).resolve().parents[2]
WORKFLOWS = REPO / "workflows"
NAMES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
NODES = (
    "SuDeFineTune", "SuDeTrainingOptions", "SuDePrompt", "SuDeSaveSubject", "SuDeLoadSubject", "SuDeApplySubject",
    "SuDeExportSubject", "SuDeStore", "SuDeSweep", "SuDeGrid", "SuDeScore",
)  # fmt: skip
FRONTEND_ONLY = {"MarkdownNote"}

# Everything in view.
SHOW_ALL = """() => {
    const boxes = app.graph.nodes.map((node) => node.getBounding());
    const [left, top] = [0, 1].map((i) => Math.min(...boxes.map((box) => box[i])));
    const [right, bottom] = [0, 1].map((i) => Math.max(...boxes.map((box) => box[i] + box[i + 2])));
    const scale = Math.min(1800 / (right - left), 940 / (bottom - top));
    app.canvas.ds.scale = scale;
    app.canvas.ds.offset = [80 / scale - left, 110 / scale - top];
    app.canvas.setDirty(true, true);
}"""


@pytest.fixture
def wide(page: Page) -> Page:
    """A page as large as a usual screen."""
    page.set_viewport_size({"width": 1920, "height": 1080})
    return page


def drop(page: Page, name: str) -> dict:
    """Drop a shipped file on the page; returns what is in it."""
    text = (WORKFLOWS / f"{name}.json").read_text(encoding="utf-8")
    workflow = json.loads(text)
    page.evaluate("app.graph.clear()")
    page.evaluate(DROP, [f"{name}.json", text])
    page.wait_for_function("count => app.graph.nodes.length === count", arg=len(workflow["nodes"]))
    page.wait_for_timeout(1000)  # dialogs about what is missing come after the graph
    return workflow


def name_of(node: dict) -> str:
    """A node's identifier and title; the file only has a title that differs from the node's own name."""
    return f"{node['id']} {node.get('title', node['type'])}"


@pytest.mark.parametrize("name", NAMES)
def test_a_dropped_file_is_loaded_whole(wide: Page, furnished: str, name: str):
    wide.reload(wait_until="domcontentloaded")  # so that the page knows the pictures and checkpoints of `furnished`
    wide.wait_for_function("window.LiteGraph?.registered_node_types.SuDeFineTune && !!window.app?.graph")
    wide.errors.clear()
    workflow = drop(wide, name)
    now = {node["id"]: node for node in wide.evaluate("app.graph.serialize()")["nodes"]}
    for node in workflow["nodes"]:
        assert now[node["id"]]["type"] == node["type"]
        assert (now[node["id"]].get("widgets_values") or []) == (node.get("widgets_values") or []), node
    assert wide.evaluate("app.graph.serialize().links.length") == len(workflow["links"])
    assert wide.evaluate("app.graph.serialize().groups.length") == len(workflow["groups"])
    registered = set(wide.evaluate("Object.keys(LiteGraph.registered_node_types)"))
    assert {node["type"] for node in workflow["nodes"]} <= registered
    assert "missing" not in wide.inner_text("body").lower()
    assert not [error for error in wide.errors if "Failed to load resource" not in error], wide.errors


@pytest.mark.parametrize("name", NAMES)
def test_what_the_page_queues_is_the_shipped_api_file(wide: Page, furnished: str, name: str):
    drop(wide, name)
    queued = wide.evaluate("(async () => (await app.graphToPrompt()).output)()")
    assert queued == json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_no_node_lies_on_another_and_groups_hold_their_nodes(name: str):
    workflow = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    boxes = {}
    for node in workflow["nodes"]:
        (x, y), (width, height) = node["pos"], node["size"]
        boxes[name_of(node)] = (x, y - 30, x + width, y + height)  # the title bar stands above
    titles = sorted(boxes)
    for index, first in enumerate(titles):
        for second in titles[index + 1 :]:
            a, b = boxes[first], boxes[second]
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], f"{first} lies on {second}"
    groups = [group["bounding"] for group in workflow["groups"]]
    for node in workflow["nodes"]:
        x, y, right, bottom = boxes[name_of(node)]
        inside = [g for g in groups if g[0] <= x and g[1] <= y and right <= g[0] + g[2] and bottom <= g[1] + g[3]]
        assert len(inside) == (0 if node["type"] in FRONTEND_ONLY else 1), name_of(node)


# Makes what is on the canvas quick: few steps, small pictures, a LoRA of the UNet in the place of DreamBooth.
# The seed is the test's own: what an earlier one ran with the same inputs would come out of ComfyUI's cache unseen.
SHRINK = """(seed) => {
    const quick = {
        "baseline.steps": 2, "baseline.views": 2, "baseline.train_text_encoder": false, "prior.number": 2,
        "prior.steps": 1, resolution: 64, width: 64, height: 64, preview_every: 0, training_seed: seed,
    };
    for (const node of app.graph.nodes) {
        const set = (name, value) => {
            const widget = node.widgets?.find((one) => one.name === name);
            if (!widget) return;
            widget.value = value;
            widget.callback?.(value, app.canvas, node);
        };
        const baseline = node.widgets?.find((one) => one.name === "baseline")?.value;
        // Another baseline comes with its own w_s; two nodes made equal by that would be run once.
        const w_s = node.widgets?.find((one) => one.name === "baseline.w_s")?.value;
        if (baseline === "DreamBooth") set("baseline", "DreamBooth LoRA");
        set("baseline.w_s", w_s);
        for (const [name, value] of Object.entries(quick)) set(name, value);
        if (node.type === "KSampler") set("steps", 2);
    }
}"""
PICTURES = "id => (app.graph.getNodeById(id).imgs ?? []).map(image => [image.naturalWidth, image.naturalHeight])"
# A node loads its pictures when it is drawn, large enough for pictures.
NEAR = "id => { app.canvas.ds.scale = 0.8; app.canvas.centerOnNode(app.graph.getNodeById(id)) }"
PANEL = "id => app.graph.getNodeById(id).widgets.find(w => w.name === 'sude_live').element.textContent"
# (trainings, rows of the grid, columns of the grid) of each workflow
MADE = {
    "quickstart": (1, 2, 4),
    "compare_baselines": (6, 6, 2),
    "sweep_ws": (4, 4, 3),
    "truncation_ablation": (2, 2, 4),
    "attribute_and_context": (1, 3, 3),
    "sd15_full": (1, 2, 2),
    "sd15_lowvram": (1, 2, 2),
}


def test_every_workflow_is_run_here():
    assert set(NAMES) == {*MADE, "reuse_subject"}, "reuse_subject: tests/browser/test_session.py"


@pytest.mark.parametrize("name", MADE)
def test_a_workflow_is_queued_and_shows_what_it_made(
    wide: Page, client: ComfyClient, furnished: str, tmp_path: Path, name: str
):
    workflow = drop(wide, name)
    wide.evaluate(SHRINK, NAMES.index(name))
    before = set(client.get("/history"))
    wide.get_by_test_id("queue-button").click()
    run = wait_for_new_run(client, before)
    assert run["status"]["status_str"] == "success", run["status"]

    trainings, rows, columns = MADE[name]
    seen = 0
    for node in workflow["nodes"]:
        wide.evaluate(NEAR, node["id"])
        if node["type"] in ("SuDeFineTune", "SuDeSweep"):
            wide.wait_for_function(f"id => ({PICTURES})(id).length > 0 && ({PICTURES})(id)[0][0] > 0", arg=node["id"])
            charts = wide.evaluate(PICTURES, node["id"])
            assert {width for width, _ in charts} == {900}
            seen += len(charts)
            wide.wait_for_function(f"id => ({PANEL})(id).includes('2 steps')", arg=node["id"])
        if node["type"] == "SuDeGrid":
            wide.wait_for_function(f"id => ({PICTURES})(id).length > 0 && ({PICTURES})(id)[0][0] > 0", arg=node["id"])
            ((width, height),) = wide.evaluate(PICTURES, node["id"])
            side = 384 if name.startswith("sd15") else 192
            assert columns * side <= width < columns * side + 260 and rows * side <= height < rows * side + 160
    assert seen == trainings
    wide.evaluate(SHOW_ALL)
    wide.wait_for_timeout(1000)
    wide.screenshot(path=tmp_path / f"{name}.png")
    assert not wide.errors


@pytest.mark.parametrize("node", NODES)
def test_the_nodes_help_opens_beside_it(wide: Page, furnished: str, tmp_path: Path, node: str):
    drop(wide, "quickstart")
    wide.evaluate(
        """kind => {
            const found = app.graph.nodes.find((node) => node.type === kind) ?? LiteGraph.createNode(kind);
            if (!found.graph) app.graph.add(found);
            app.canvas.selectNode(found);
        }""",
        node,
    )
    wide.get_by_test_id("info-button").click()
    page = (REPO / "web" / "docs" / f"{node}.md").read_text(encoding="utf-8")
    heading = [line[3:] for line in page.splitlines() if line.startswith("## ")][-1]
    wide.get_by_role("heading", name=heading, exact=True).wait_for()
    wide.get_by_role("heading", name="Common mistakes", exact=True).wait_for()
    wide.screenshot(path=tmp_path / f"{node}.png")
