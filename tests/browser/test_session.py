"""A whole session as a person has it, by clicks and keys in Nodes 2.0."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from bench.comfy_client import ComfyClient
from bench.comfy_server import ComfyServer

from .conftest import READY, wait_for_new_run

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """The person's own picture."""
    path = tmp_path / "my dog.png"
    Image.open(REPO / "workflows" / "spike.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    return path


@pytest.fixture
def screen(page: Page, server: ComfyServer) -> Iterator[Page]:
    """A large screen with Nodes 2.0."""
    set_all(server, True)
    page.set_viewport_size({"width": 1920, "height": 1080})
    reload(page)
    yield page
    set_all(server, False)


def set_all(server: ComfyServer, value: bool) -> None:
    """Switch on what a person has and the other tests do without: Nodes 2.0, and the workflow still there tomorrow."""
    with ComfyClient(server.address) as client:
        for name in ("Comfy.VueNodes.Enabled", "Comfy.Workflow.Persist"):
            client.request("POST", f"/settings/{name}", json.dumps(value).encode())


def reload(page: Page) -> None:
    """Reload and wait for ComfyUI."""
    page.reload(wait_until="domcontentloaded")
    page.wait_for_function(READY)


def open_template(page: Page, name: str, kind: str) -> None:
    """Open one of the pack's templates."""
    page.get_by_role("button", name="Templates").first.click()
    page.get_by_text("ComfyUI-SuDe").first.click()
    card = page.get_by_test_id(f"template-workflow-{name}")
    picture = card.locator("img").first
    expect(picture).to_be_visible()
    page.wait_for_function("image => image.naturalWidth > 0", arg=picture.element_handle())
    card.click()
    page.wait_for_function("kind => app.graph.nodes.some(node => node.type === kind)", arg=kind)


def node(page: Page, title: str) -> Locator:
    """A node, brought to the middle of the screen at a size where everything can be read."""
    page.evaluate(
        """title => {
            const found = app.graph.nodes.find((one) => one.title === title)
            app.canvas.ds.scale = 0.8
            app.canvas.centerOnNode(found)
            app.canvas.setDirty(true, true)
        }""",
        title,
    )
    page.wait_for_timeout(500)
    number = page.evaluate("title => app.graph.nodes.find((one) => one.title === title).id", title)
    return page.locator(f"[data-node-id='{number}']")


def write(where: Locator, name: str, value: str) -> None:
    """Type into a widget."""
    field = where.get_by_label(name, exact=True)
    field.fill(value)
    field.press("Enter")
    field.blur()


def choose(page: Page, where: Locator, name: str, value: str) -> None:
    """Choose from a list."""
    where.get_by_role("combobox", name=name, exact=True).click()
    page.get_by_role("option", name=value, exact=True).click()


def number(where: Locator, name: str, value: object) -> None:
    """Type into a widget for numbers, which is found beside its label."""
    row = where.get_by_test_id("node-widget").filter(has=where.page.get_by_text(name, exact=True))
    row.locator("input").click(force=True)  # what takes the click lies above it, and gives it the focus
    page = where.page
    page.keyboard.press("ControlOrMeta+A")
    page.keyboard.type(str(value))
    page.keyboard.press("Enter")
    expect(row.locator("input")).to_have_value(re.compile(rf"^{value}(\.0+)?$"))


def test_a_whole_session(screen: Page, client: ComfyClient, furnished: str, photo: Path, tmp_path: Path):
    page = screen
    open_template(page, "quickstart", "SuDeFineTune")
    # the photo, its category, the baseline, what it should do
    node(page, "The one picture").get_by_label("Upload").set_input_files(photo)
    write(node(page, "Category: what it shows"), "value", "cat")
    options = node(page, "SuDe Training Options")
    choose(page, options, "prior", "off")
    options.get_by_label("preview_prompts").fill("photo of a running [subject]")
    number(options, "preview_every", 3)
    number(options, "preview_limit", 100)
    number(options, "preview_steps", 2)
    trainer = node(page, "SuDe Fine-Tune")
    choose(page, trainer, "baseline", "DreamBooth LoRA")
    number(trainer, "steps", 4000)
    write(node(page, "SuDe Prompt"), "attribute", "flying")
    for title in ("KSampler, after", "KSampler, before"):
        number(node(page, title), "steps", 2)
    assert page.evaluate("app.graph.nodes.find(n => n.title === 'The one picture').widgets[0].value") == "my dog.png"

    # run, watch, stop early
    before = set(client.get("/history"))
    page.get_by_test_id("queue-button").click()
    trainer = node(page, "SuDe Fine-Tune")
    panel = trainer.get_by_role("region", name="Training")
    expect(panel).to_contain_text("training", timeout=180_000)
    expect(panel.get_by_role("button", name="photo of a running sks cat").first).to_be_visible(timeout=180_000)
    page.screenshot(path=tmp_path / "watching.png")
    reload(page)  # in mid-training
    page.wait_for_function("app.graph.nodes.some(node => node.type === 'SuDeFineTune')")
    trainer = node(page, "SuDe Fine-Tune")
    panel = trainer.get_by_role("region", name="Training")
    expect(panel).to_contain_text(re.compile(r"\b\d+/4000"), timeout=60_000)
    panel.get_by_role("button", name="finish now").click()
    run = wait_for_new_run(client, before)
    assert run["status"]["status_str"] == "success", run["status"]
    expect(panel).to_contain_text("stopped after")
    page.screenshot(path=tmp_path / "stopped.png")

    # the grid
    grid = node(page, "All pictures")
    expect(grid.locator("img").first).to_be_visible()
    page.wait_for_function("image => image.naturalWidth > 700", arg=grid.locator("img").first.element_handle())
    page.screenshot(path=tmp_path / "grid.png")

    # it was saved: open it where it is
    saved = node(page, "Keep the subject")
    saved.get_by_role("button", name="open saved subject").click()
    page.wait_for_function("app.graph.nodes.some(node => node.type === 'SuDeLoadSubject')")
    name = page.evaluate("app.graph.nodes.find(n => n.type === 'SuDeLoadSubject').widgets[0].value")
    assert name.startswith("spike_")

    # another day: the subject again, without training
    reload(page)
    open_template(page, "reuse_subject", "SuDeLoadSubject")
    choose(page, node(page, "The subject, trained before"), "subject_file", name)
    write(node(page, "SuDe Prompt"), "attribute", "flying")
    number(node(page, "KSampler"), "steps", 2)
    before = set(client.get("/history"))
    page.get_by_test_id("queue-button").click()
    run = wait_for_new_run(client, before)
    assert run["status"]["status_str"] == "success", run["status"]
    result = node(page, "Result")
    expect(result.locator("img").first).to_be_visible()
    page.screenshot(path=tmp_path / "reused.png")
    assert not page.errors
