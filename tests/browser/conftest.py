"""Headless Chromium on the suite's one ComfyUI server.

The browser is the one named by CHROMIUM, else one found on the machine, else Playwright's. Without any the tests are
skipped, or fail where SUDE_REQUIRE_BROWSER is set (as in CI).
"""

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Browser, ConsoleMessage, Page, Playwright, expect, sync_playwright
from safetensors.numpy import load_file, save_file

from bench.comfy_client import ComfyClient
from bench.comfy_server import ComfyServer, link
from comfy_sude import files

REPO = Path(__file__).resolve().parents[2]

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
PLACES = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    r"C:\Program Files\Google\Chrome\Application\chrome.exe",
    r"C:\Program Files (x86)\Microsoft\Edge\Application\msedge.exe",
)
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# What a first-time user is asked; a test is not a first-time user.
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.InstalledVersion": "1.47.12", "Comfy.Workflow.Persist": False}
# The first workflow is open (until then the page may still replace what a test puts there) and our nodes are known.
READY = """!!(window.app?.extensionManager?.workflow?.activeWorkflow &&
    window.LiteGraph?.registered_node_types.SuDeFineTune)"""


def find_browser(playwright: Playwright) -> str | None:
    """The path of a Chromium-like browser, or None."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    return found or next(
        (place for place in (*PLACES, playwright.chromium.executable_path) if Path(place).exists()), None
    )


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One headless browser for all browser tests."""
    expect.set_options(timeout=30_000)  # milliseconds; the machine may be busy
    with sync_playwright() as playwright:
        path = find_browser(playwright)
        if not path:
            problem = "no Chromium was found: install one (Debian: apt install chromium) or set CHROMIUM to its path"
            if os.environ.get("SUDE_REQUIRE_BROWSER"):
                pytest.fail(problem)
            pytest.skip(problem)
        started = playwright.chromium.launch(executable_path=path, headless=True, args=list(FLAGS))
        yield started
        started.close()


# The frontend masks the page while it loads and removes the mask at the end of an animation. Where the page is ready
# before the animation, that end never comes (frontend 1.47.12), and the mask, on its way out, keeps taking the clicks.
UNBLOCK = """addEventListener("DOMContentLoaded", () => {
    const style = document.createElement("style");
    style.textContent = ".p-blockui-mask.p-overlay-mask-leave { display: none !important; }";
    document.head.append(style);
})"""


@pytest.fixture
def page(browser: Browser, server: ComfyServer, tmp_path: Path) -> Iterator[Page]:
    """A fresh tab with ComfyUI loaded and the pack's nodes registered; `page.errors` has uncaught errors and ours.

    A screenshot of its last moment is left as page.png in the test's temporary folder.
    """
    with ComfyClient(server.address) as client:
        for name, value in SETTINGS.items():
            client.request("POST", f"/settings/{name}", json.dumps(value).encode())
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    tab = context.new_page()
    tab.set_default_timeout(120_000)  # the machine may be busy
    tab.errors = []

    def note(message: ConsoleMessage) -> None:
        text = f"{message.text} ({message.location.get('url', '')})"
        if message.type == "error" and "sude" in text.lower():  # the stock page has complaints of its own
            tab.errors.append(text)

    tab.on("console", note)
    tab.on("pageerror", lambda error: tab.errors.append(str(error)))
    tab.add_init_script(UNBLOCK)
    tab.goto(server.address, wait_until="domcontentloaded")
    tab.wait_for_function(READY)
    yield tab
    tab.screenshot(path=tmp_path / "page.png")
    context.close()


# The desktop's drop: the browser's own events with a DataTransfer that holds the file.
DROP = """([name, text]) => {
    const transfer = new DataTransfer();
    transfer.items.add(new File([text], name, { type: "application/json" }));
    const canvas = document.querySelector("#graph-canvas");
    const box = canvas.getBoundingClientRect();
    const at = { clientX: box.left + box.width / 2, clientY: box.top + box.height / 2 };
    for (const kind of ["dragenter", "dragover", "drop"])
        canvas.dispatchEvent(new DragEvent(kind, { bubbles: true, cancelable: true, dataTransfer: transfer, ...at }));
}"""


@pytest.fixture(scope="module")
def furnished(server: ComfyServer, checkpoint) -> str:
    """The files that the workflows name: pictures, and the mini world or a small random checkpoint in its place."""
    folder = server.base / "models" / "checkpoints"
    mini = folder / "miniworld.safetensors"
    if mini.is_symlink() or mini.exists():
        mini.unlink()
    if (REPO / "bench" / "miniworld" / "miniworld.safetensors").is_file():
        from bench.demo import CHECKPOINT
        from bench.miniworld.expand import expand

        link(expand(CHECKPOINT), mini)
    else:
        save_file(load_file(folder / checkpoint("small")), mini, {"modelspec.resolution": "64x64"})
    link(mini, folder / "v1-5-pruned-emaonly-fp16.safetensors")
    for name in ("spike.png", "example.png"):
        shutil.copy(REPO / "workflows" / "spike.png", server.base / "input" / name)
    saved = server.base / "output" / "sude" / "spike_00001_.safetensors"
    if not saved.is_file():  # only to be named
        files.write(saved, {"x": torch.zeros(1)}, {})
    return mini.name


def wait_for_new_run(client: ComfyClient, before: set[str], seconds: float = 900) -> dict:
    """The history of the first run that is over and was not there before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for name, run in client.get("/history").items():
            if name not in before and run.get("status"):
                return run
        time.sleep(0.5)
    raise TimeoutError(f"no run ended within {seconds:.0f} s")
