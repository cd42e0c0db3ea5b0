"""The pack's buttons in the real frontend: a training finished early, a subject uploaded; none is saved."""

import time
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Page

from bench.comfy_client import ComfyClient
from bench.comfy_server import ComfyServer
from comfy_sude import files

from .test_frontend import create

REPO = Path(__file__).resolve().parents[2]
TRAINING = {"baseline": "DreamBooth LoRA", "baseline.steps": 5000, "baseline.train_text_encoder": False}


@pytest.fixture
def picture(client: ComfyClient) -> str:
    """A picture of a subject, uploaded."""
    return client.upload_image("button.png", (REPO / "workflows" / "spike.png").read_bytes())


def button(page: Page, label: str) -> str:
    """The script for a button of `node`."""
    return f"node.widgets.find(w => w.type === 'button' && w.name === '{label}')"


def test_the_buttons_are_last_and_in_neither_workflow_nor_prompt(page: Page):
    own = {
        "SuDeFineTune": ["finish now", "sude_live"],  # and the panel
        "SuDeLoadSubject": ["upload a subject"],
        "SuDeSaveSubject": ["open saved subject"],
    }
    for kind, names in own.items():
        create(page, kind)
        assert page.evaluate("count => node.widgets.slice(-count).map(w => w.name)", len(names)) == names
        saved = page.evaluate("node.serialize().widgets_values")
        assert len([value for value in saved if value is not None]) == page.evaluate("node.widgets.length") - len(names)
        prompt = page.evaluate("app.graphToPrompt().then(made => made.output)")
        assert not [name for name in names if name in str(prompt)]
    assert not page.errors


def test_values_survive_saving_and_loading_beside_a_button_and_another_baseline(page: Page):
    create(page, "SuDeFineTune")
    page.evaluate(
        """() => {
            const set = (name, value) => { node.widgets.find(w => w.name === name).value = value }
            set("baseline", "ViCo"); set("training_seed", 77); set("retrain", true); set("baseline.steps", 123)
        }"""
    )
    page.evaluate("app.loadGraphData(JSON.parse(JSON.stringify(app.graph.serialize())))")
    page.wait_for_function("app.graph.nodes.length === 1")
    values = dict(page.evaluate("app.graph.nodes[0].widgets.map(w => [w.name, w.value])"))
    assert values["baseline"] == "ViCo" and values["training_seed"] == 77 and values["retrain"] is True
    assert values["baseline.steps"] == 123
    assert page.evaluate("app.graph.nodes[0].widgets.filter(w => w.type === 'button').length") == 1


def test_finish_now_ends_a_training_and_the_workflow_goes_on(page: Page, client: ComfyClient, checkpoint, picture):
    options = {"resolution": 64, "gradient_checkpointing": False, "prior": "off"}
    links = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "image": ["2", 0], "options": ["5", 0]}
    graph = {
        "1": client.node("CheckpointLoaderSimple", {"ckpt_name": checkpoint()}),
        "2": client.node("LoadImage", {"image": picture}),
        "3": client.node("SuDeFineTune", {**links, "category": "dog", "training_seed": 91, **TRAINING}),
        "4": client.node("SuDeSaveSubject", {"subject": ["3", 2], "filename_prefix": "tests/button"}),
        "5": client.node("SuDeTrainingOptions", options),
    }
    before = set(client.get("/history"))
    page.evaluate("graph => app.loadApiJson(graph, 'finish')", graph)
    page.wait_for_function("app.graph.nodes.some(n => n.type === 'SuDeFineTune')")
    page.evaluate("window.node = app.graph.nodes.find(n => n.type === 'SuDeFineTune')")
    page.evaluate("app.queuePrompt(0)")
    end = time.monotonic() + 200
    while not set(client.get("/history")) - before:
        assert time.monotonic() < end, "the training did not end"
        page.evaluate(f"{button(page, 'finish now')}.callback()")  # 404 and a toast until it trains
        time.sleep(1)
    (name,) = set(client.get("/history")) - before
    run = client.get("/history")[name]
    assert run["status"]["status_str"] == "success", run["status"]
    page.get_by_text("the workflow goes on with what was learned").first.wait_for()


def test_a_file_is_uploaded_and_chosen(page: Page, server: ComfyServer, tmp_path: Path):
    path = tmp_path / "given.safetensors"
    files.write(path, {"x": torch.zeros(2)}, {})
    create(page, "SuDeLoadSubject")
    with page.expect_file_chooser() as chooser:
        page.evaluate(f"{button(page, 'upload a subject')}.callback()")
    chooser.value.set_files(path)
    page.wait_for_function("node.widgets.find(w => w.name === 'subject_file').value === 'given.safetensors [input]'")
    assert (server.base / "input" / "sude" / "given.safetensors").read_bytes() == path.read_bytes()
    (tmp_path / "other.txt").write_text("x")
    with page.expect_file_chooser() as chooser:
        page.evaluate(f"{button(page, 'upload a subject')}.callback()")
    chooser.value.set_files(tmp_path / "other.txt")
    page.get_by_text("other.txt is no .safetensors file").first.wait_for()
    assert page.evaluate("node.widgets.find(w => w.name === 'subject_file').value") == "given.safetensors [input]"
