"""The pack in the real frontend: nodes, their changing widgets, and a workflow file dropped on the page and queued."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Page

from bench.comfy_client import ComfyClient

from .conftest import DROP, wait_for_new_run

REPO = Path(__file__).resolve().parents[2]

# Makes a loaded workflow small: the tiny checkpoint and picture, few steps, small pictures, set in the widgets.
SHRINK = """([checkpoint, image]) => {
    const small = {
        ckpt_name: checkpoint, image: image, "baseline.steps": 2, "baseline.train_text_encoder": false,
        resolution: 64, "prior.number": 2, "prior.steps": 1, width: 64, height: 64,
    };
    for (const node of app.graph.nodes) {
        const baseline = node.widgets?.find(widget => widget.name === "baseline");
        if (baseline) baseline.value = "DreamBooth LoRA";
        for (const widget of node.widgets ?? []) {
            if (widget.name in small) widget.value = small[widget.name];
            if (node.type === "KSampler" && widget.name === "steps") widget.value = 1;
        }
    }
}"""


def widgets(page: Page, node: str = "window.node") -> dict[str, object]:
    """The widgets of a node and their values."""
    return dict(page.evaluate(f"{node}.widgets.map(w => [w.name, w.value])"))


def create(page: Page, kind: str) -> None:
    """Put a node on an empty canvas; the page's script has it as `node`."""
    page.evaluate(f"app.graph.clear(); window.node = LiteGraph.createNode('{kind}'); app.graph.add(window.node)")


def drop(page: Page, name: str, workflow: dict) -> None:
    """Drop a workflow file on the page and wait until its SuDe Fine-Tune node is there."""
    page.evaluate("app.graph.clear()")
    page.evaluate(DROP, [name, json.dumps(workflow)])
    page.wait_for_function("app.graph.nodes.some(n => n.type === 'SuDeFineTune')")


def test_the_page_loads_without_an_error_of_ours(page: Page):
    assert not page.errors


@pytest.mark.parametrize(
    "kind", ["SuDeFineTune", "SuDeTrainingOptions", "SuDePrompt", "SuDeSaveSubject", "SuDeExportSubject"]
)
def test_a_node_can_be_created(page: Page, kind: str):
    create(page, kind)
    assert widgets(page)
    assert page.evaluate("node.title").startswith("SuDe ")
    assert not page.errors


def test_the_choice_of_the_baseline_brings_its_own_settings(page: Page):
    create(page, "SuDeFineTune")
    before = widgets(page)
    assert before["baseline"] == "DreamBooth" and "baseline.rank" not in before
    page.evaluate("node.widgets.find(w => w.name === 'baseline').value = 'DreamBooth LoRA'")
    after = widgets(page)
    assert {"baseline.rank", "baseline.alpha", "baseline.train_text_encoder", "baseline.w_s"} <= set(after)
    assert after["baseline.learning_rate"] != before["baseline.learning_rate"], "each baseline has its own preset"


# What each baseline asks for beside what all of them do.
OWN_SETTINGS = {
    "DreamBooth": set(),
    "DreamBooth LoRA": {"rank", "alpha", "train_text_encoder"},
    "Custom Diffusion": {
        "scale_learning_rate", "initializer", "vectors", "augmentation", "views", "loss_norm", "sude_mask",
    },
    "ViCo": {
        "token_learning_rate", "initializer", "vectors", "templates", "attention_weight", "sude_blocks",
        "unconditional_image",
    },
}  # fmt: skip
PRESETS = {
    "DreamBooth": (0.4, 500, 1e-6, "sks"),
    "DreamBooth LoRA": (0.4, 500, 1e-4, "sks"),
    "Custom Diffusion": (2.0, 500, 1e-5, "<new1>"),
    "ViCo": (1.5, 400, 1e-5, "*"),
}


def test_each_baseline_shows_its_own_settings_and_no_others(page: Page):
    create(page, "SuDeFineTune")
    common = ("w_s", "steps", "learning_rate", "identifier")
    for baseline, own in OWN_SETTINGS.items():
        page.evaluate("name => node.widgets.find(w => w.name === 'baseline').value = name", baseline)
        shown = {k.removeprefix("baseline."): v for k, v in widgets(page).items() if k.startswith("baseline.")}
        assert set(shown) == {*common, *own}, baseline
        assert tuple(shown[name] for name in common) == pytest.approx(PRESETS[baseline]), baseline


def test_small_learning_rates_survive_saving_and_loading(page: Page):
    create(page, "SuDeFineTune")
    page.evaluate("node.widgets.find(w => w.name === 'baseline.learning_rate').value = 3e-7")
    page.evaluate("(async () => { await app.loadGraphData(app.graph.serialize()) })()")
    found = widgets(page, "app.graph.nodes.find(n => n.type === 'SuDeFineTune')")
    assert found["baseline.learning_rate"] == pytest.approx(3e-7)
    assert found["baseline.w_s"] == pytest.approx(0.4)


def test_the_training_seed_stays_as_it_is_when_queued(page: Page):
    create(page, "SuDeFineTune")
    assert not [name for name in widgets(page) if name.startswith("control_")]


def test_a_dropped_workflow_file_is_queued_and_trains(page: Page, client: ComfyClient, checkpoint):
    """The shipped quick start, made small: its file is dropped on the page, and Queue does the rest."""
    path = REPO / "workflows" / "quickstart.json"
    if not path.is_file():
        pytest.skip("workflows/quickstart.json is not there yet")
    data = io.BytesIO()
    Image.radial_gradient("L").resize((64, 64)).convert("RGB").save(data, "PNG")
    name, image = checkpoint(), client.upload_image("dropped.png", data.getvalue())
    drop(page, path.name, json.loads(path.read_text(encoding="utf-8")))
    page.evaluate(SHRINK, [name, image])
    assert not page.errors
    prompt = page.evaluate("(async () => JSON.stringify((await app.graphToPrompt()).output))()")
    trainers = [node for node in json.loads(prompt).values() if node["class_type"] == "SuDeFineTune"]
    assert trainers and all(node["inputs"]["baseline.steps"] == 2 for node in trainers)
    before = set(client.get("/history"))
    page.evaluate("(async () => { await app.queuePrompt(0, 1) })()")
    history = wait_for_new_run(client, before)
    assert history["status"]["status_str"] == "success", history["status"]
    assert any(output.get("images") for output in history["outputs"].values())
