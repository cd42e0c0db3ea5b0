"""The panel can be read in both themes, costs little and draws only where it is looked at."""

import re
import sys
import time

import pytest
from playwright.sync_api import Page, expect

from bench.comfy_server import ComfyServer

from .snapshots import PROMPTS, panel, previews, send, shot

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
TEXTS = """e => [...e.querySelectorAll("*")]
    .filter(c => c.checkVisibility() && [...c.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()))
    .map(c => [c.textContent, getComputedStyle(c).color])"""


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
            const detail = { ...made, curves: { ...made.curves }, number: made.number + index, done: index % 500 }
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
    spent = tab.evaluate(script, [made, 300, 10_000, 100])
    after, frames = metrics(), (tab.evaluate("drawn") - drawn) / 2
    script_time = (after["ScriptDuration"] - before["ScriptDuration"]) / frames
    send(tab, shot(tab, 1, 490, number=made["number"] + 20_000))
    expect(panel(tab).get_by_role("button", name="training 490/500")).to_be_visible()
    nodes, heap = after["Nodes"] - before["Nodes"], (after["JSHeapUsedSize"] - before["JSHeapUsedSize"]) / 1e6
    with capsys.disabled():
        sys.stdout.write(
            f"\n{tab.renderer}: {spent * 1000:.0f} us to take a snapshot, {script_time * 1000:.1f} ms of script "
            f"a frame (of the whole page), {frames:.0f} frames; {nodes:+.0f} DOM nodes, {heap:+.2f} MB of heap\n"
        )
    assert 50 <= frames <= 200, "drawn once a frame, not once a snapshot"
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
    assert "101" in tab.locator(".sude-fold").first.text_content(), "nor written"
    tab.evaluate("app.canvas.ds.offset = [90, 60]; app.canvas.setDirty(true, true)")
    expect(panel(tab).get_by_role("button", name="training 102/500")).to_be_visible()
