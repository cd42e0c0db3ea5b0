"""The live panel on the training nodes, in both of ComfyUI's renderers: made-up snapshots and a real training."""

import json
import re
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from bench.comfy_client import ComfyClient
from bench.comfy_server import ComfyServer

from .conftest import READY, SETTINGS, UNBLOCK
from .snapshots import client_id, previews, send, snapshot

REPO = Path(__file__).resolve().parents[2]
PROMPTS = ["photo of a running sks dog", "photo of a sks dog wearing a hat"]
RENDERERS = {"classic": False, "nodes2": True}

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

# Counts the draws on the panels' canvases.
COUNT = """() => {
    if (window.drawn !== undefined) return
    window.drawn = 0
    const clear = CanvasRenderingContext2D.prototype.clearRect
    CanvasRenderingContext2D.prototype.clearRect = function (...given) {
        if (this.canvas.closest(".sude-plot")) window.drawn += 1
        return clear.apply(this, given)
    }
}"""


# Whether nothing of a panel is cut off, and the node reaches below it.
WHOLE = """e => {
    const box = e.getBoundingClientRect()
    const parts = [...e.children].filter(part => !part.hidden && !part.matches(".sude-hidden"))
    const node = app.graph.getNodeById(1)
    const bottom = (node.pos[1] + node.size[1] + app.canvas.ds.offset[1]) * app.canvas.ds.scale
    const canvas = document.querySelector("#graph-canvas").getBoundingClientRect()
    return parts.at(-1).getBoundingClientRect().bottom < box.bottom && box.bottom < canvas.top + bottom
}"""


@pytest.fixture(scope="module", params=RENDERERS)
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

    def note(message) -> None:
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
    assert not opened.errors
    elsewhere = [url for url in opened.requests if not re.match(r"https?://127\.0\.0\.1[:/]|data:|blob:", url)]
    assert not elsewhere, "requests to other servers"


def shot(page: Page, node: int | str = 1, step: int = 120, w_s: float = 0.4, **changes) -> dict:
    """A snapshot of a training that this page queued from the open workflow."""
    return snapshot(node, step=step, w_s=w_s, **{"client": page.client, "workflow": page.workflow, **changes})


def panel(page: Page, node: int = 1):
    """The panel of a node: in the order of the nodes."""
    return page.locator(".sude-panel:visible").nth(node - 1)


def test_a_snapshot_is_shown_on_its_node_and_on_no_other(tab: Page):
    send(tab, shot(tab, 1, 260, notice="The picture is small.", part=[2, 3]))
    shown = panel(tab)
    expect(shown.get_by_role("button", name="training 260/500 · part 2 of 3")).to_be_visible()
    bar = shown.get_by_role("progressbar")
    assert [bar.get_attribute(f"aria-value{end}") for end in ("min", "now", "max")] == ["0", "260", "500"]
    for text in ("3.21 steps/s", "1:15 left", "1:21 elapsed", "9.1 of 24.0 GB", "note: The picture is small."):
        expect(shown.get_by_text(text, exact=True)).to_be_visible()
    for name in ("L_sub", "validation", "L_sude", "still to inherit", "gate"):
        expect(shown.locator(".sude-legend").get_by_text(name, exact=True)).to_be_visible()
    expect(shown.get_by_role("img", name=re.compile("260 of 500 steps.*L_sub from 0.* validation 0.*step 250"))).to_be_visible()
    expect(shown.get_by_role("img", name=re.compile("L_sude from .*to inherit from .*gate from"))).to_be_visible()
    expect(panel(tab, 2)).to_have_text(re.compile("^Curves appear here during training"))
    assert tab.locator("[aria-live=polite]", has_text="training").first.text_content().endswith("training, part 2 of 3")

    send(tab, shot(tab, 1, 300, 0.0, state="failed", error="Out of memory.", can_finish=False))
    expect(shown.get_by_text("Out of memory.")).to_be_visible()
    expect(shown.locator("canvas:visible")).to_have_count(1)  # without SuDe there is one plot
    expect(shown.get_by_role("button", name="finish now")).to_be_hidden()
    send(tab, shot(tab, 1, 0, phase="drawing class images", curves={"every": 1}, line="", validation=[]))
    expect(shown.get_by_role("button", name="drawing class images 0/500")).to_be_visible()
    expect(shown.locator("canvas:visible")).to_have_count(0)


def test_the_node_grows_for_the_panel_and_is_never_made_smaller(tab: Page, server: ComfyServer):
    size = "app.graph.getNodeById(1).size[1]"
    before = tab.evaluate(size)
    film = previews(server.base, [50, 100], PROMPTS)
    send(tab, shot(tab, 1, 100, previews=film))
    tab.wait_for_function(f"{size} > {before} + 300")
    expect(panel(tab).locator("img")).to_have_count(4)
    tab.wait_for_function(f"({WHOLE})(document.querySelector('.sude-panel'))")
    grown = tab.evaluate(size)
    fold = panel(tab).get_by_role("button", name="training 100/500")
    fold.press("Enter")
    expect(fold).to_have_attribute("aria-expanded", "false")
    expect(panel(tab).locator("canvas:visible")).to_have_count(0)
    tab.wait_for_function("document.querySelector('.sude-panel').offsetHeight < 80")
    least = grown if tab.renderer == "classic" else before  # Nodes 2.0 goes back to the size the person gave
    assert tab.evaluate(size) >= least
    fold.press("Enter")
    expect(panel(tab).locator("canvas:visible")).to_have_count(2)
    tab.evaluate("app.graph.getNodeById(2).setSize([380, 1500])")
    send(tab, shot(tab, 2, 100))
    assert tab.evaluate("app.graph.getNodeById(2).size[1]") == 1500


def test_neither_the_workflow_nor_the_prompt_has_the_panel(tab: Page):
    send(tab, shot(tab, 1))
    assert tab.evaluate("app.graph.getNodeById(1).widgets.at(-1).name") == "sude_live"
    saved = tab.evaluate("app.graph.getNodeById(1).serialize()")
    assert "sude_live" not in json.dumps(saved) and "synthetic" not in json.dumps(saved)
    plain = tab.evaluate("app.graph.getNodeById(1).widgets.filter(w => w.serialize !== false).map(w => w.value)")
    assert saved["widgets_values"][: len(plain)] == plain and not any(saved["widgets_values"][len(plain) :])
    prompt = json.dumps(tab.evaluate("app.graphToPrompt().then(made => made.output)"))
    assert '"training_seed"' in prompt and "sude_live" not in prompt and "finish now" not in prompt


def test_the_values_of_a_step_are_read_by_keys_and_pointer(tab: Page):
    made = shot(tab, 1, 100)
    send(tab, made)
    readout = panel(tab).locator(".sude-readout")
    expect(readout).to_contain_text("step 100")
    plot = panel(tab).locator("canvas").first
    plot.press("Home")
    expect(readout).to_contain_text("step 1 ")
    plot.press("ArrowRight")
    expect(readout).to_contain_text("step 2 ")
    expect(readout).to_contain_text(f"gate {round(100 * made['curves']['gate'][1])}%")
    plot.press("Escape")
    expect(readout).to_contain_text("step 100")
    box = plot.bounding_box()
    tab.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + box["height"] / 2)
    expect(readout).not_to_contain_text("step 100")
    step = int(re.search(r"step (\d+)", readout.inner_text())[1])
    assert 20 < step < 80
    expect(readout).to_contain_text(f"L_sub {made['curves']['l_sub'][step - 1]:.3g}")


def test_a_preview_opens_and_is_walked_through_by_keys(tab: Page, server: ComfyServer):
    film = previews(server.base, list(range(25, 276, 25)), PROMPTS) | {"note": "one preview takes 40 s"}
    send(tab, shot(tab, 1, 280, previews=film))
    expect(panel(tab).get_by_text("previews: 6% of the time (limit 10%) · one preview takes 40 s")).to_be_visible()
    last = panel(tab).get_by_role("button", name=f"{PROMPTS[0]}, step 275")
    strip = panel(tab).get_by_role("group", name="Previews")
    tab.wait_for_function("document.querySelector('.sude-strip').scrollLeft > 100")
    seen = "(e, s) => e.getBoundingClientRect().right <= s.getBoundingClientRect().right + 1"
    assert last.evaluate(seen, strip.element_handle()), "the newest picture is in sight"
    last.press("Enter")
    dialog = tab.get_by_role("dialog", name="Preview")
    expect(dialog.get_by_role("img", name=f"{PROMPTS[0]}, step 275")).to_be_visible()
    tab.keyboard.press("ArrowLeft")
    expect(dialog.get_by_role("img", name=f"{PROMPTS[0]}, step 250")).to_be_visible()
    tab.keyboard.press("ArrowDown")
    expect(dialog.get_by_role("img", name=f"{PROMPTS[1]}, step 250")).to_be_visible()
    assert dialog.get_by_role("img").evaluate("e => e.decode().then(() => e.naturalWidth)") == 64
    tab.keyboard.press("Escape")
    expect(dialog).to_have_count(0)
    expect(last).to_be_focused()
    picture = last.locator("img").element_handle()
    more = previews(server.base, list(range(50, 301, 25)), PROMPTS)
    send(tab, shot(tab, 1, 300, previews=more))
    expect(panel(tab).get_by_role("button", name=f"{PROMPTS[0]}, step 300")).to_be_visible()
    assert picture.evaluate("e => e.isConnected"), "a picture that stays is not loaded again"
    expect(panel(tab).locator(".sude-shot")).to_have_count(22)


def test_finish_now_asks_for_the_node_and_only_where_there_is_something_to_finish(tab: Page):
    asked = []
    tab.route("**/sude/finish", lambda route: (asked.append(route.request.post_data_json), route.fulfill(json={})))
    send(tab, shot(tab, 1, phase="preparing", can_finish=False))
    button = panel(tab).get_by_role("button", name="finish now")
    expect(button).to_be_disabled()
    send(tab, shot(tab, 1))
    button.press("Enter")
    expect(panel(tab).get_by_role("button", name="finishing …")).to_be_disabled()
    assert asked == [{"node": "1"}]
    tab.unroute("**/sude/finish")


def test_what_belongs_to_others_is_not_shown(tab: Page):
    idle = re.compile("^Curves appear here")
    send(tab, shot(tab, 1, client="someone else"), shot(tab, 1, client=None), shot(tab, 3), shot(tab, "7:1"))
    expect(panel(tab)).to_have_text(idle)
    send(tab, shot(tab, 1, workflow=str(uuid.uuid4())))
    expect(panel(tab)).to_have_text(idle)
    newer, older = shot(tab, 1, 90), shot(tab, 1, 91)
    older["number"], newer["number"] = newer["number"], older["number"]
    send(tab, newer, older)
    expect(panel(tab).get_by_role("button", name="training 90/500")).to_be_visible()
    expect(panel(tab, 2)).to_have_text(idle)


def test_a_training_inside_a_subgraph_is_shown_there(tab: Page):
    tab.evaluate(
        """() => {
            const { subgraph, node } = app.graph.convertToSubgraph(new Set([app.graph.getNodeById(2)]))
            window.outer = node
            app.canvas.openSubgraph(subgraph, node)
        }"""
    )
    inner = tab.evaluate("`${outer.id}:${outer.subgraph.nodes.find(n => n.type === 'SuDeFineTune').id}`")
    assert ":" in inner
    send(tab, shot(tab, inner, 77))
    expect(tab.locator(".sude-panel:visible").get_by_role("button", name="training 77/500")).to_be_visible()
    tab.evaluate("app.canvas.setGraph(app.rootGraph ?? app.graph)")
    expect(tab.locator(".sude-panel:visible")).to_have_count(1)
    expect(panel(tab)).to_have_text(re.compile("^Curves appear here"))


def answer(page: Page, *snapshots: dict) -> None:
    """What GET /sude/trainings says from now on."""
    page.unroute("**/sude/trainings")
    page.route("**/sude/trainings", lambda route: route.fulfill(json={"trainings": list(snapshots)}))


def test_a_workflow_that_is_opened_shows_what_the_server_knows_and_a_lost_training_says_so(tab: Page):
    saved = tab.evaluate("app.graph.serialize()")
    answer(tab, shot(tab, 2, 333), shot(tab, 1, client="someone else"))
    tab.evaluate("saved => app.loadGraphData(saved)", saved)
    expect(panel(tab, 2).get_by_role("button", name="training 333/500")).to_be_visible()
    expect(panel(tab)).to_have_text(re.compile("^Curves appear here"))

    other = {**saved, "id": str(uuid.uuid4())}
    tab.evaluate("other => app.loadGraphData(other)", other)  # another workflow with a node 2
    expect(tab.locator(".sude-panel.sude-idle:visible")).to_have_count(2)
    tab.evaluate("saved => app.loadGraphData(saved)", saved)
    expect(panel(tab, 2).get_by_role("button", name="training 333/500")).to_be_visible()

    answer(tab)  # the server was started anew
    tab.evaluate("window.comfyAPI.api.api.dispatchCustomEvent('reconnected')")
    expect(panel(tab, 2).get_by_text("The server knows no more of this training")).to_be_visible()
    send(tab, shot(tab, 2, 5, number=1, id="after the restart"))
    expect(panel(tab, 2).get_by_role("button", name="training 5/500")).to_be_visible()
    tab.unroute("**/sude/trainings")


def test_the_panel_comes_back_with_undo(tab: Page):
    send(tab, shot(tab, 1, 44))
    saved = tab.evaluate("app.graph.serialize()")
    for step in (45, 46):  # what undo does; Nodes 2.0 then keeps what it shows for a node of the same id
        tab.evaluate("saved => app.loadGraphData(saved, false, false)", saved)
        send(tab, shot(tab, 1, step))
        expect(panel(tab).get_by_role("button", name=f"training {step}/500")).to_be_visible()


def contrast(first: list[float], second: list[float]) -> float:
    """Source: WCAG 2.2, contrast ratio."""

    def luminance(color: list[float]) -> float:
        parts = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color[:3]]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def rgb(css: str) -> list[float]:
    """The numbers of rgb(1, 2, 3); half see-through is not expected."""
    numbers = [float(number) for number in re.findall(r"[\d.]+", css)]
    assert len(numbers) == 3 or numbers[3] == 1, css
    return numbers[:3]


# Every element of the panel with text of its own, with its color; the colors of the curves that the canvases show.
TEXTS = """e => [...e.querySelectorAll("*")].filter(c => c.checkVisibility() &&
    [...c.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())).map(c => [c.textContent, getComputedStyle(c).color])"""
CURVES = """e => {
    const shown = new Set()
    for (const canvas of e.querySelectorAll("canvas")) {
        const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data
        for (let i = 0; i < pixels.length; i += 4) if (pixels[i + 3] === 255) shown.add(pixels.slice(i, i + 3).join())
    }
    return ["l_sub", "validation", "l_sude", "gap", "gate"].map(name => {
        const color = e.style.getPropertyValue(`--sude-${name}`)
        return [name, color, shown.has(color.match(/[\\d.]+/g).slice(0, 3).join())]
    })
}"""


def test_text_and_curves_stand_out_in_dark_and_light(tab: Page, server: ComfyServer):
    film = previews(server.base, [50, 100], PROMPTS) | {"note": "the next at step 300"}
    send(tab, shot(tab, 1, 250, previews=film, notice="A note.", error="An error."))
    backgrounds = []
    for theme in ("light", "dark"):
        tab.evaluate("name => app.extensionManager.setting.set('Comfy.ColorPalette', name)", theme)
        before = backgrounds[-1:] or [None]
        look = "e => getComputedStyle(e).backgroundColor"
        end = time.monotonic() + 20
        while (found := panel(tab).evaluate(look)) == before[0] and time.monotonic() < end:
            time.sleep(0.1)
        send(tab)
        backgrounds.append(panel(tab).evaluate(look))
        background = rgb(found)
        texts = panel(tab).evaluate(TEXTS)
        assert len(texts) > 20
        for text, color in texts:
            assert contrast(rgb(color), background) >= 4.5, (theme, text, color)
        for name, color, drawn in panel(tab).evaluate(CURVES):
            assert contrast(rgb(color), background) >= 3, (theme, name, color)
            assert drawn, f"{name} is not drawn in {theme}"
    assert contrast(*map(rgb, backgrounds)) > 7, "the panel follows the theme"


def test_ten_thousand_snapshots_leave_nothing_behind(tab: Page, capsys: pytest.CaptureFixture):
    session = tab.context.new_cdp_session(tab)
    session.send("Performance.enable")

    def metrics() -> dict[str, float]:
        session.send("HeapProfiler.collectGarbage")
        return {item["name"]: item["value"] for item in session.send("Performance.getMetrics")["metrics"]}

    script = """async ([made, from, count, each]) => {
        let spent = 0
        for (let index = from; index < from + count; index++) {
            const detail = { ...structuredClone(made), number: made.number + index, done: index % 500 }
            const began = performance.now()
            window.comfyAPI.api.api.dispatchCustomEvent("sude.training", detail)
            spent += performance.now() - began
            if (index % each === 0) await new Promise(requestAnimationFrame)
        }
        await new Promise(requestAnimationFrame)
        return spent / count
    }"""
    made = shot(tab, 1, 500)
    tab.evaluate(COUNT)
    tab.evaluate(script, [made, 0, 300, 3])  # what is made once is made
    before, drawn = metrics(), tab.evaluate("drawn")
    spent = tab.evaluate(script, [made, 300, 10_000, 40])
    after, frames = metrics(), (tab.evaluate("drawn") - drawn) / 2
    script_time = (after["ScriptDuration"] - before["ScriptDuration"]) / frames
    send(tab, shot(tab, 1, 490, number=made["number"] + 20_000))
    expect(panel(tab).get_by_role("button", name="training 490/500")).to_be_visible()
    nodes, heap = after["Nodes"] - before["Nodes"], (after["JSHeapUsedSize"] - before["JSHeapUsedSize"]) / 1e6
    with capsys.disabled():
        print(
            f"\n{tab.renderer}: {spent * 1000:.0f} us to take a snapshot, {script_time * 1000:.1f} ms of script a drawn "
            f"frame (the whole page), {frames:.0f} frames; {nodes:+.0f} DOM nodes, {heap:+.2f} MB of heap"
        )
    assert 200 <= frames <= 400, "drawn once a frame, not once a snapshot"
    assert abs(nodes) < 100 and heap < 2
    assert spent < 2 and script_time < 0.1  # generous: the machine may be busy


def test_nothing_is_drawn_while_folded_out_of_sight_or_at_rest(tab: Page):
    tab.evaluate(COUNT)

    def drawn_by(*snapshots: dict) -> int:
        tab.wait_for_timeout(300)
        before = tab.evaluate("drawn")
        send(tab, *snapshots)
        tab.wait_for_timeout(300)
        return tab.evaluate("drawn") - before

    assert drawn_by(shot(tab, 1, 100)) > 0
    assert drawn_by() == 0
    panel(tab).get_by_role("button", name="training 100/500").click()
    assert drawn_by(shot(tab, 1, 101)) == 0
    panel(tab).get_by_role("button", name="training 101/500").click()
    tab.evaluate("app.canvas.ds.offset = [5000, 5000]; app.canvas.setDirty(true, true)")
    assert drawn_by(shot(tab, 1, 102)) == 0
    tab.evaluate("app.canvas.ds.offset = [90, 60]; app.canvas.setDirty(true, true)")
    expect(panel(tab).get_by_role("button", name="training 102/500")).to_be_visible()


def test_a_saved_subject_is_opened_in_a_loader(tab: Page):
    press = "app.graph.getNodeById(3).widgets.find(w => w.name === 'open saved subject').callback()"
    tab.evaluate(press)
    expect(tab.get_by_text("Nothing was saved by this node yet").first).to_be_visible()
    saved = {"filename": "dog_00001_.safetensors", "subfolder": "sude/a", "type": "output", "choice": "a/dog_00001_.safetensors"}
    executed = {"node": "3", "display_node": "3", "prompt_id": "x", "output": {"sude_saved": [saved]}}
    tab.evaluate("detail => window.comfyAPI.api.api.dispatchCustomEvent('executed', detail)", executed)
    loaders = "app.graph.nodes.filter(n => n.type === 'SuDeLoadSubject')"
    for _ in range(2):  # added, then found again
        tab.evaluate("app.canvas.deselectAll?.()")
        tab.evaluate(press)
        found = tab.evaluate(f"{loaders}.map(n => [n.widgets.find(w => w.name === 'subject_file').value, n.selected === true])")
        assert found == [[saved["choice"], True]]
    overlaps = """() => { const [a, b] = [app.graph.getNodeById(3), app.graph.nodes.at(-1)]
        return a.pos[0] + a.size[0] > b.pos[0] && a.pos[1] + a.size[1] > b.pos[1] }"""
    assert not tab.evaluate(overlaps)
    assert "open saved subject" not in json.dumps(tab.evaluate("app.graphToPrompt().then(made => made.output)"))
    assert "open saved subject" not in json.dumps(tab.evaluate("app.graph.serialize()"))


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
    expect(panel(opened, 3 - first)).to_have_text(re.compile("^Curves appear here"))

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
    saver = "app.graph.getNodeById(13).widgets.find(w => w.name === 'open saved subject').callback()"
    opened.evaluate(saver)
    chosen = "app.graph.nodes.find(n => n.type === 'SuDeLoadSubject')?.widgets.find(w => w.name === 'subject_file').value"
    opened.wait_for_function(f"{chosen} === 'tests/panel{seeds[0]}_00001_.safetensors'")
    opened.screenshot(path=tmp_path / "page.png")
    assert not opened.errors
