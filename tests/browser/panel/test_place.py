"""A training is shown where it belongs: page, workflow, subgraph, after undo; and a saved subject is found again."""

import json
import uuid

from playwright.sync_api import Page, expect

from .snapshots import expect_idle, panel, send, shot


def test_what_belongs_to_others_is_not_shown(tab: Page):
    send(tab, shot(tab, 1, client="someone else"), shot(tab, 1, client=None), shot(tab, 3), shot(tab, "7:1"))
    expect_idle(panel(tab))
    send(tab, shot(tab, 1, workflow=str(uuid.uuid4())))
    expect_idle(panel(tab))
    newer, older = shot(tab, 1, 90), shot(tab, 1, 91)
    older["number"], newer["number"] = newer["number"], older["number"]
    send(tab, newer, older)
    expect(panel(tab).get_by_role("button", name="training 90/500")).to_be_visible()
    expect_idle(panel(tab, 2))


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
    expect_idle(panel(tab))


def answer(page: Page, *snapshots: dict) -> None:
    """What GET /sude/trainings says from now on."""
    page.unroute("**/sude/trainings")
    page.route("**/sude/trainings", lambda route: route.fulfill(json={"trainings": list(snapshots)}))


def test_a_workflow_that_is_opened_shows_what_the_server_knows_and_a_lost_training_says_so(tab: Page):
    saved = tab.evaluate("app.graph.serialize()")
    answer(tab, shot(tab, 2, 333), *(shot(tab, node, 4, client="someone else") for node in (1, 2)))
    tab.evaluate("saved => app.loadGraphData(saved)", saved)
    expect(panel(tab, 2).get_by_role("button", name="training 333/500")).to_be_visible()
    expect_idle(panel(tab))

    other = {**saved, "id": str(uuid.uuid4())}
    tab.evaluate("other => app.loadGraphData(other)", other)  # another workflow with a node 2
    expect(tab.locator(".sude-panel.sude-idle:visible")).to_have_count(2)
    tab.evaluate("saved => app.loadGraphData(saved)", saved)
    expect(panel(tab, 2).get_by_role("button", name="training 333/500")).to_be_visible()

    answer(tab)  # the server was started anew
    tab.evaluate("window.comfyAPI.api.api.dispatchCustomEvent('reconnected')")
    expect(panel(tab, 2).get_by_text("The server knows no more of this training")).to_be_visible()
    expect(panel(tab, 2).get_by_role("button", name="lost", exact=True)).to_be_visible()
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


def test_a_saved_subject_is_opened_in_a_loader(tab: Page):
    press = "app.graph.getNodeById(3).widgets.find(w => w.name === 'open saved subject').callback()"
    tab.evaluate(press)
    expect(tab.get_by_text("Nothing was saved by this node yet").first).to_be_visible()
    saved = {
        "filename": "dog_00001_.safetensors",
        "subfolder": "sude/a",
        "type": "output",
        "choice": "a/dog_00001_.safetensors",
    }
    executed = {"node": "3", "display_node": "3", "prompt_id": "x", "output": {"sude_saved": [saved]}}
    tab.evaluate("detail => window.comfyAPI.api.api.dispatchCustomEvent('executed', detail)", executed)
    loaders = "app.graph.nodes.filter(n => n.type === 'SuDeLoadSubject')"
    for _ in range(2):  # added, then found again
        tab.evaluate("app.canvas.deselectAll?.()")
        tab.evaluate(press)
        found = tab.evaluate(
            f"{loaders}.map(n => [n.widgets.find(w => w.name === 'subject_file').value, n.selected === true])"
        )
        assert found == [[saved["choice"], True]]
    overlaps = """() => { const [a, b] = [app.graph.getNodeById(3), app.graph.nodes.at(-1)]
        return a.pos[0] + a.size[0] > b.pos[0] && a.pos[1] + a.size[1] > b.pos[1] }"""
    assert not tab.evaluate(overlaps)
    assert "open saved subject" not in json.dumps(tab.evaluate("app.graphToPrompt().then(made => made.output)"))
    assert "open saved subject" not in json.dumps(tab.evaluate("app.graph.serialize()"))
