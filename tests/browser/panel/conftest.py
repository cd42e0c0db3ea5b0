"""One tab for all tests of the live panel, in each of ComfyUI's renderers."""

import json
import re
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect

from bench.comfy_client import ComfyClient
from bench.comfy_server import ComfyServer

from ..conftest import READY, SETTINGS, UNBLOCK
from .snapshots import RENDERERS, client_id

# Two training nodes and one that has no panel, alone on the canvas.
SETUP = """(id) => {
    app.canvas.setGraph(app.graph)
    app.graph.clear()
    for (const [type, left] of [["SuDeFineTune", 0], ["SuDeFineTune", 400], ["SuDeSaveSubject", 800]]) {
        const node = LiteGraph.createNode(type)
        node.pos = [left, 0]
        app.graph.add(node)
        if (type === "SuDeFineTune") node.setSize([360, node.size[1]])
    }
    app.graph.id = id
    app.canvas.ds.scale = 0.9
    app.canvas.ds.offset = [90, 60]
    app.canvas.setDirty(true, true)
}"""


@pytest.fixture(scope="package", params=RENDERERS)
def opened(request: pytest.FixtureRequest, browser: Browser, server: ComfyServer) -> Iterator[Page]:
    """ComfyUI in a tab, with one of its renderers; `errors` has what our scripts made the browser say."""
    settings = SETTINGS | {"Comfy.VueNodes.Enabled": RENDERERS[request.param], "Comfy.ColorPalette": "dark"}
    with ComfyClient(server.address) as client:
        for name, value in settings.items():
            client.request("POST", f"/settings/{name}", json.dumps(value).encode())
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.errors, page.requests, page.renderer = [], [], request.param
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("request", lambda asked: page.requests.append(asked.url))

    def note(message: ConsoleMessage) -> None:
        text = f"{message.text} ({message.location.get('url', '')})"
        if message.type in ("error", "warning") and "sude" in text.lower():
            page.errors.append(text)

    page.on("console", note)
    page.add_init_script(UNBLOCK)
    page.goto(server.address, wait_until="domcontentloaded")
    page.wait_for_function(READY)
    page.client = client_id(page)
    yield page
    context.close()
    with ComfyClient(server.address) as client:
        for name, value in (("Comfy.VueNodes.Enabled", False), ("Comfy.ColorPalette", "dark")):
            client.request("POST", f"/settings/{name}", json.dumps(value).encode())


@pytest.fixture
def tab(opened: Page, tmp_path: Path) -> Iterator[Page]:
    """The tab with two training nodes, 1 and 2, and SuDe Save Subject, 3."""
    opened.errors.clear()
    opened.requests.clear()
    opened.workflow = str(uuid.uuid4())
    opened.evaluate(SETUP, opened.workflow)
    expect(opened.locator(".sude-panel:visible")).to_have_count(2)
    yield opened
    opened.screenshot(path=tmp_path / "page.png")
    # ComfyUI opens its websocket before it loads extensions, and says that nobody listens to what comes in between.
    assert not [error for error in opened.errors if not error.startswith("Unhandled message")]
    elsewhere = [url for url in opened.requests if not re.match(r"https?://127\.0\.0\.1[:/]|data:|blob:", url)]
    assert not elsewhere, "requests to other servers"
