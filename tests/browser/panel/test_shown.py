"""What the panel shows of a training, by made-up snapshots: text, curves, previews, the size of the node."""

import json
import re

from playwright.sync_api import Page, expect

from bench.comfy_server import ComfyServer

from .snapshots import PROMPTS, expect_idle, panel, previews, send, shot

# Whether nothing of a panel is cut off, and the node reaches below it.
WHOLE = """e => {
    const box = e.getBoundingClientRect()
    const parts = [...e.children].filter(part => !part.hidden && !part.matches(".sude-hidden"))
    const node = app.graph.getNodeById(1)
    const bottom = (node.pos[1] + node.size[1] + app.canvas.ds.offset[1]) * app.canvas.ds.scale
    const canvas = document.querySelector("#graph-canvas").getBoundingClientRect()
    return parts.at(-1).getBoundingClientRect().bottom < box.bottom && box.bottom < canvas.top + bottom
}"""


def test_a_snapshot_is_shown_on_its_node_and_on_no_other(tab: Page):
    send(tab, shot(tab, 1, 260, notice="The picture is small.", part=[2, 3]))
    shown = panel(tab)
    expect(shown.get_by_role("button", name="training 260/500", exact=True)).to_be_visible()
    bar = shown.get_by_role("progressbar")
    assert [bar.get_attribute(f"aria-value{end}") for end in ("min", "now", "max")] == ["0", "260", "500"]
    for text in (
        "2 of 3: DreamBooth of 'dog', w_s 0.4",
        "3.21 steps/s",
        "1:15 left",
        "1:21 elapsed",
        "9.1 of 24.0 GB",
        "note: The picture is small.",
    ):
        expect(shown.get_by_text(text, exact=True)).to_be_visible()
    for name in ("L_sub", "validation", "L_sude", "still to inherit", "gate"):
        expect(shown.locator(".sude-legend").get_by_text(name, exact=True)).to_be_visible()
    expect(
        shown.get_by_role("img", name=re.compile("260 of 500 steps.*L_sub from 0.* validation 0.*step 250"))
    ).to_be_visible()
    expect(shown.get_by_role("img", name=re.compile("L_sude from .*to inherit from .*gate from"))).to_be_visible()
    expect_idle(panel(tab, 2))
    assert shown.locator("[aria-live=polite]").first.text_content() == "2 of 3: DreamBooth of 'dog', w_s 0.4: training"

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
    more = previews(server.base, list(range(25, 301, 25)), PROMPTS)
    send(tab, shot(tab, 1, 300, previews=more))
    newest = panel(tab).get_by_role("button", name=f"{PROMPTS[0]}, step 300")
    expect(newest).to_be_visible()
    assert newest.evaluate(seen, strip.element_handle()), "and so is the next newest one"
    assert picture.evaluate("e => e.isConnected"), "a picture that stays is not loaded again"
    expect(panel(tab).locator(".sude-shot")).to_have_count(24)


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
