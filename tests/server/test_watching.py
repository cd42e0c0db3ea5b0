"""What a page gets to know of a training, and SuDe Sweep with SuDe Grid, over the API of a real server."""

import io
import json
import time

import pytest
from PIL import Image

from bench.comfy_client import ComfyClient

from .test_fine_tune import LORA, workflow

FIELDS = {
    "id", "number", "node", "client", "prompt", "workflow", "title", "part", "state", "phase", "done", "total", "line",
    "notice", "error", "elapsed", "rate", "left", "memory", "can_finish", "w_s", "steps", "curves", "validation",
    "previews",
}  # fmt: skip
FEW = {"resolution": 64, "gradient_checkpointing": False, "prior": "off"}


@pytest.fixture
def picture(client: ComfyClient) -> str:
    """A picture of a subject, uploaded."""
    data = io.BytesIO()
    Image.radial_gradient("L").resize((64, 64)).convert("RGB").save(data, "PNG")
    return client.upload_image("watched.png", data.getvalue())


def training(client: ComfyClient, checkpoint: str, picture: str, options: dict | None = None, **values) -> dict:
    """A workflow that trains, up to SuDe Fine-Tune's subject."""
    whole = workflow(client, checkpoint, picture, {**LORA, **values})
    kept = {name: whole[name] for name in ("1", "2", "3", "4", "12")}
    kept["10"] = client.node("SuDeTrainingOptions", {**FEW, **(options or {})})
    return kept


def follow(client: ComfyClient, graph: dict, act=lambda data: None):
    """Submit a workflow; its result and the snapshots that came."""
    seen = []

    def on_event(_, kind, data):
        if kind == "sude.training":
            seen.append(data)
            act(data)

    return client.submit(graph, on_event=on_event), seen


def test_a_training_is_seen_from_its_first_phase_to_its_end(client: ComfyClient, checkpoint, picture):
    options = {
        "preview_every": 3, "preview_limit": 100, "preview_steps": 1, "preview_prompts": "photo of a [subject]\na cat",
    }  # fmt: skip
    graph = training(client, checkpoint(), picture, options, training_seed=301, **{"baseline.steps": 7})
    result, seen = follow(client, graph)
    assert result.error is None, result.error
    assert all(data.keys() == FIELDS for data in seen)
    assert [data["number"] for data in seen] == sorted({data["number"] for data in seen})
    assert {data["id"] for data in seen} == {seen[0]["id"]} and {data["node"] for data in seen} == {"3"}
    phases = list(dict.fromkeys(data["phase"] for data in seen))
    assert phases[:2] == ["starting", "looking for an earlier result"] and phases[-1] == "done"
    assert {"encoding the example", "training", "taking the result"} <= set(phases)
    assert any(data["can_finish"] for data in seen if data["phase"] == "training")

    last = seen[-1]
    assert last["state"] == "finished" and not last["can_finish"] and last["steps"] == 7
    assert last["title"] == "DreamBooth LoRA of 'dog', w_s 0.4" and "7 steps in" in last["line"]
    curves = last["curves"]
    assert [len(curves[term]) for term in ("l_sub", "l_sude", "gap", "gate", "l_prior")] == [7, 7, 7, 7, 0]
    assert curves["every"] == 1 and all(0 <= value <= 1 for value in curves["gate"])
    assert [step for step, _ in last["validation"]] == [0, 7]
    previews = last["previews"]
    assert previews["prompts"] == ["photo of a sks dog", "a cat"] and 0 < previews["share"] < 1
    assert [shot["step"] for shot in previews["shots"]] == [3, 6]
    for shot in previews["shots"]:
        pictures = [Image.open(io.BytesIO(client.view(picture))) for picture in shot["pictures"]]
        assert [one.size for one in pictures] == [(64, 64)] * 2
        assert pictures[0].format == "JPEG"

    (known,) = [data for data in client.get("/sude/trainings")["trainings"] if data["id"] == last["id"]]
    assert {**known, "number": 0} == {**last, "number": 0}, "a page that was reloaded sees the same"


def test_a_page_that_comes_late_is_told_what_there_is(client: ComfyClient, checkpoint, picture):
    late = []

    def look(data):
        if data["phase"] == "training" and data["done"] >= 3 and not late:
            late.extend(client.get("/sude/trainings")["trainings"])

    graph = training(client, checkpoint(), picture, training_seed=302, **{"baseline.steps": 12, "baseline.w_s": 0})
    _, seen = follow(client, graph, look)
    (found,) = [data for data in late if data["id"] == seen[0]["id"]]
    assert found["state"] == "running" and len(found["curves"]["l_sub"]) >= 3
    assert [found["curves"][term] for term in ("l_sude", "gap", "gate")] == [[], [], []], "a plain training has none"


def test_how_it_ended_is_seen_too(client: ComfyClient, checkpoint, picture):
    graph = training(client, checkpoint(), picture, training_seed=303, **{"baseline.steps": 400})
    result, seen = follow(
        client, graph, lambda data: client.interrupt() if data["phase"] == "training" and data["done"] else None
    )
    assert result.error.kind == "interrupted" and seen[-1]["state"] == "stopped"

    graph["3"]["inputs"]["category"] = "very " * 90
    result, seen = follow(client, graph)
    assert result.error.kind == "failed"
    assert seen[-1]["state"] == "failed" and "shorten category" in seen[-1]["error"]


def test_the_page_is_told_which_of_its_workflows_it_is(client: ComfyClient, checkpoint, picture):
    graph = training(client, checkpoint(), picture, training_seed=304)
    status, answer = client.post(
        "/prompt",
        {"prompt": graph, "client_id": "nobody", "extra_data": {"extra_pnginfo": {"workflow": {"id": "a-b-c"}}}},
    )
    assert status == 200, answer
    for _ in range(600):
        if client.history(answer["prompt_id"]):
            break
        time.sleep(0.2)
    (found,) = [data for data in client.get("/sude/trainings")["trainings"] if data["prompt"] == answer["prompt_id"]]
    assert (found["workflow"], found["client"], found["state"]) == ("a-b-c", "nobody", "finished")


def test_a_snapshot_stays_small(client: ComfyClient):
    trainings = client.get("/sude/trainings")["trainings"]
    assert 1 <= len(trainings) <= 17
    assert max(len(json.dumps(data)) for data in trainings) < 40_000


# --- SuDe Sweep and SuDe Grid


def sweep(client: ComfyClient, checkpoint: str, picture: str, **values) -> dict:
    """Checkpoint -> SuDe Sweep (3) -> one prompt and sampler -> SuDe Grid (9)."""
    whole = workflow(client, checkpoint, picture)
    inputs = {name: value for name, value in whole["3"]["inputs"].items() if not name.startswith("baseline")}
    whole["3"] = client.node("SuDeSweep", {**inputs, **LORA, "prompts": "a running [subject]\na [subject]", **values})
    whole["5"]["inputs"]["text"] = ["3", 4]
    whole["6"]["inputs"]["clip"] = ["1", 1]
    whole["9"] = client.node(
        "SuDeGrid", {"images": ["8", 0], "row_labels": ["3", 3], "column_labels": ["3", 4], "title": "w_s"}
    )
    whole["10"] = client.node("SuDeTrainingOptions", FEW)
    whole["12"] = client.node("PreviewAny", {"source": ["3", 3]})
    del whole["4"]
    return whole


def test_a_sweep_trains_each_strength_once_and_the_grid_shows_all(client: ComfyClient, checkpoint, picture):
    graph = sweep(client, checkpoint(), picture, training_seed=311, multipliers="0, 1;2")
    result, seen = follow(client, graph)
    assert result.error is None, result.error
    parts = list(dict.fromkeys((*data["part"], data["title"].split()[-1]) for data in seen if data["part"]))
    assert parts == [(1, 3, "0"), (2, 3, "0.4"), (3, 3, "0.8")]
    assert [text for text in (d["line"] for d in seen if d["phase"] == "done") if "2 steps in" in text]
    charts = [Image.open(io.BytesIO(client.view(image))).size for image in result.images("3")]
    assert len(charts) == 3
    (shown,) = result.images("9")
    picture_size = Image.open(io.BytesIO(client.view(shown))).size
    assert picture_size[0] > 2 * 192 and picture_size[1] > 3 * 192, "three rows of two"

    again, seen = follow(client, sweep(client, checkpoint(), picture, training_seed=311, multipliers="2,0.5"))
    assert again.error is None
    lines = [data["line"] for data in seen if data["phase"] == "done"]
    assert lines[0].startswith("reused, nothing trained") and lines[-1].startswith("2 steps in")


def test_a_sweep_and_a_single_training_share_the_store(client: ComfyClient, checkpoint, picture):
    single = training(client, checkpoint(), picture, training_seed=312, **{"baseline.w_s": 0.8})
    result, _ = follow(client, single)
    assert result.error is None
    graph = sweep(client, checkpoint(), picture, training_seed=312, multipliers="2")
    result, seen = follow(client, {name: node for name, node in graph.items() if name in ("1", "2", "3", "10", "12")})
    assert result.error is None
    assert seen[-1]["line"].startswith("reused, nothing trained")


@pytest.mark.parametrize(
    "values, message",
    [
        ({"multipliers": "0.5, often"}, "multipliers holds 'often'"),
        ({"multipliers": "-1"}, "multipliers holds '-1'"),
        ({"multipliers": "nan"}, "multipliers holds 'nan'"),
        ({"multipliers": " , "}, "multipliers has 0 numbers"),
        ({"multipliers": ",".join(map(str, range(30)))}, "multipliers has 30 numbers"),
        ({"multipliers": "1, 1000", "baseline.w_s": 900.0}, "w_s is 900000"),
    ],
)
def test_multipliers_that_cannot_be_used_are_refused_before_training(
    client: ComfyClient, checkpoint, picture, values, message
):
    result, seen = follow(client, sweep(client, checkpoint(), picture, training_seed=313, **values))
    assert result.error.kind == "failed" and message in result.error.message
    assert not [data for data in seen if data["phase"] == "training"]


def test_a_grid_takes_batches_from_several_sockets_as_rows(client: ComfyClient):
    graph = {
        str(index): client.node("EmptyImage", {"width": 64, "height": 64, "batch_size": 3, "color": index * 0x202020})
        for index in (1, 2)
    }
    graph["3"] = client.node(
        "SuDeGrid",
        {"images": ["1", 0], "images_2": ["2", 0], "row_labels": "before\nafter", "cell": 64},
    )
    result = client.submit(graph)
    assert result.error is None, result.error
    width, height = Image.open(io.BytesIO(client.view(result.images("3")[0]))).size
    assert 3 * 64 < width < 3 * 64 + 120 and 2 * 64 < height < 2 * 64 + 60
