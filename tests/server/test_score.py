"""SuDe Score behind SuDe Sweep on a real server, with small random models in its models folder."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench import score_models
from bench.comfy_client import ComfyClient, Failure
from bench.comfy_server import ComfyServer, link, prepare_base
from comfy_sude.score_models import BLIP, DINO
from comfy_sude.scores import METRICS, Models, evaluate

from .test_fine_tune import LORA, workflow

SEED = 411  # of the training; no other test uses it
SHOWN = {"table": 0, "json": 2, "best": 3, "best_index": 4}  # outputs that are text, by slot


@pytest.fixture(scope="module")
def client(server: ComfyServer) -> Iterator[ComfyClient]:
    """One client for all tests here, so that they can share a sweep."""
    with ComfyClient(server.address) as connected:
        yield connected


@pytest.fixture(scope="module")
def models(server: ComfyServer) -> Path:
    """The scoring models, where the server looks for them."""
    return score_models.build(server.base / "models" / "sude_scores")


@pytest.fixture(scope="module")
def picture(client: ComfyClient) -> str:
    """A picture of a subject, uploaded."""
    data = io.BytesIO()
    Image.radial_gradient("L").resize((64, 64)).convert("RGB").save(data, "PNG")
    return client.upload_image("scored.png", data.getvalue())


@pytest.fixture
def graph(client: ComfyClient, checkpoint, picture: str, models: Path) -> dict:
    """Checkpoint -> SuDe Sweep (3) of two w_s and two prompts -> sampler, two pictures each -> SuDe Score (20)."""
    whole = workflow(client, checkpoint(), picture)
    inputs = {name: value for name, value in whole["3"]["inputs"].items() if not name.startswith("baseline")}
    prompts = {"multipliers": "0, 1", "prompts": "photo of a running [subject]\nphoto of a [subject] in the snow"}
    whole["3"] = client.node("SuDeSweep", {**inputs, **LORA, **prompts, "training_seed": SEED})
    whole["5"]["inputs"]["text"] = ["3", 4]
    whole["6"]["inputs"]["clip"] = ["1", 1]
    whole["9"] = client.node("PreviewImage", {"images": ["8", 0]})
    whole["10"] = client.node(
        "SuDeTrainingOptions", {"resolution": 64, "gradient_checkpointing": False, "prior": "off"}
    )
    for node in whole.values():
        if node["class_type"] == "EmptyLatentImage":
            node["inputs"].update(width=64, height=64, batch_size=2)
    links = {"images": ["8", 0], "example": ["2", 0], "subject": ["3", 2], "prompts": ["3", 4], "labels": ["3", 3]}
    whole["20"] = client.node("SuDeScore", {**links, "metrics": ", ".join(METRICS)})
    for name, slot in SHOWN.items():
        whole[name] = client.node("PreviewAny", {"source": ["20", slot]})
    return {name: node for name, node in whole.items() if name not in ("4", "12")}


def refused(client: ComfyClient, graph: dict, **changes) -> Failure:
    """Why SuDe Score did not score."""
    graph["20"]["inputs"].update(changes)
    result = client.submit(graph)
    assert result.error is not None and result.error.node == "20", result.error
    assert not [text for _, text in result.texts if "loading" in text], "models were loaded before it was refused"
    return result.error


def pixels(data: bytes) -> torch.Tensor:
    """[H, W, 3] of a picture file."""
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).float() / 255


def test_a_sweep_is_scored_by_label_and_the_best_is_named(client: ComfyClient, graph, models):
    result = client.submit(graph)
    assert result.error is None, result.error
    said = {name: result.outputs[name]["text"][0] for name in SHOWN}
    document = json.loads(said["json"])
    assert [(row["label"], row["pictures"]) for row in document["rows"]] == [("w_s 0 (plain)", 4), ("w_s 0.4", 4)]
    assert [one["text"] for one in document["scored"]] == [
        "photo of a running dog", "photo of a running dog", "photo of a dog in the snow", "photo of a dog in the snow",
    ] * 2  # fmt: skip

    drawn = [pixels(client.view(image)) for image in result.images("9")]
    example = pixels(client.view({"filename": "scored.png", "subfolder": "", "type": "input"}))
    wanted = evaluate(drawn, [example], [one["text"] for one in document["scored"]], Models([models]))
    for metric in METRICS:
        values = [one[metric] for one in document["scored"]]
        assert values == pytest.approx(wanted[metric], abs=1.0), metric  # preview files cut off what is below 1/255
        for row, part in zip(document["rows"], (values[:4], values[4:]), strict=True):
            assert row["mean"][metric] == pytest.approx(sum(part) / 4)

    plain, tuned = (row["mean"] for row in document["rows"])
    better = tuned["BLIP-T"] > plain["BLIP-T"] and tuned["DINO-I"] >= plain["DINO-I"] - 1
    best = "w_s 0.4" if better else "w_s 0 (plain)"
    assert (said["best"], said["best_index"]) == (best, "2" if better else "0")
    assert document["choice"]["best"] == best and document["best_index"] == int(said["best_index"])
    head, *_, rule = said["table"].splitlines()
    assert head.split() == ["pictures", *METRICS] and rule.startswith(f"best: {best}, the highest BLIP-T of those with")
    (shown,) = result.images("20")
    width, height = Image.open(io.BytesIO(client.view(shown))).size
    assert 600 < width < 1200 and 200 < height < 400
    texts = [text for node, text in result.texts if node == "20"]
    assert any(f"loading {BLIP}" in text for text in texts) and texts[-1].startswith("done · best: ")


def test_a_single_batch_needs_no_labels_and_image_metrics_no_prompts(client: ComfyClient, graph):
    graph["20"]["inputs"].update(prompts="", labels="", metrics="dino-i; CLIP-I")
    result = client.submit(graph)
    assert result.error is None, result.error
    document = json.loads(result.outputs["json"]["text"][0])
    assert [(row["label"], row["pictures"], list(row["mean"])) for row in document["rows"]] == [
        ("all pictures", 8, ["DINO-I", "CLIP-I"])
    ]
    assert document["choice"] is None and result.outputs["best"]["text"] == ["all pictures"]


def test_a_sweep_without_plain_training_is_compared_with_its_most_faithful_label(client: ComfyClient, graph):
    graph["20"]["inputs"].update(labels="one\none\ntwo\ntwo")  # plain_label stays as it is
    result = client.submit(graph)
    assert result.error is None, result.error
    document = json.loads(result.outputs["json"]["text"][0])
    faithful = max(document["rows"], key=lambda row: row["mean"]["DINO-I"])["label"]
    assert result.outputs["table"]["text"][0].splitlines()[-1].endswith(f"({faithful} less 1)")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompts": "one\ntwo\nthree"}, "prompts has 3 lines, but images has 4 entries with 8 pictures: give one"),
        ({"labels": "one\ntwo\nthree"}, "labels has 3 lines, but images has 4 entries with 8 pictures"),
        ({"prompts": ""}, "prompts is empty, or one of them is"),
        ({"subject": "spike"}, "subject is a str: connect SuDe Fine-Tune, SuDe Sweep or SuDe Load Subject"),
        ({"metrics": "CLIP-I, FID"}, "metrics holds 'FID', but each must be one of CLIP-I, DINO-I, DINOv2-I"),
        ({"metrics": " , "}, "metrics is empty"),
        ({"metrics": "CLIP-I, CLIP-T"}, "alignment is BLIP-T, which metrics does not name"),
        ({"plain_label": "w_s 0"}, "plain_label is 'w_s 0', but labels has w_s 0 (plain), w_s 0.4: add 0"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_a_model_is_loaded(client: ComfyClient, graph, changes, message):
    assert message in refused(client, graph, **changes).message


def test_a_missing_model_is_named_with_the_folder_it_belongs_into(client: ComfyClient, graph, server, models):
    (models / DINO).rename(models / "elsewhere")
    try:
        error = refused(client, graph)
    finally:
        (models / "elsewhere").rename(models / DINO)
    place = server.base / "models" / "sude_scores" / DINO
    assert f"get {DINO} into {place}. Each needs" in error.message
    assert error.details["exception_type"] == "ValueError", "what the page shows before the message"


def test_models_are_found_in_the_folders_of_extra_model_paths(
    server: ComfyServer, comfyui: Path, checkpoint, models: Path, tmp_path: Path
):
    name = checkpoint()
    base = prepare_base(tmp_path / "base")
    link(server.base / "models" / "checkpoints" / name, base / "models" / "checkpoints" / name)
    listed = tmp_path / "extra.yaml"
    listed.write_text(f"elsewhere:\n  base_path: {models.parent.as_posix()}\n  sude_scores: {models.name}\n")
    extra = ("--extra-model-paths-config", str(listed))
    with (
        ComfyServer(base, comfyui=comfyui, log=tmp_path / "log", extra=extra) as own,
        ComfyClient(own.address) as client,
    ):
        data = io.BytesIO()
        Image.radial_gradient("L").resize((64, 64)).convert("RGB").save(data, "PNG")
        trained = workflow(client, name, client.upload_image("extra.png", data.getvalue()), LORA)
        graph = {node: trained[node] for node in ("1", "2", "3")}
        graph["10"] = client.node("SuDeTrainingOptions", {"resolution": 64, "prior": "off"})
        links = {"images": ["2", 0], "example": ["2", 0], "subject": ["3", 2]}
        graph["20"] = client.node("SuDeScore", {**links, "metrics": "DINO-I"})
        graph["table"] = client.node("PreviewAny", {"source": ["20", 0]})
        result = client.submit(graph)
        assert result.error is None, result.error
        assert result.outputs["table"]["text"][0].split() == ["pictures", "DINO-I", "all", "pictures", "1", "100.0"]


def test_a_score_can_be_stopped(client: ComfyClient, graph):
    graph["20"]["inputs"]["fidelity_within"] = 7.5  # not cached

    def stop(_, kind, data):
        if kind == "progress_state" and "20" in data["nodes"]:
            client.interrupt()

    result = client.submit(graph, on_event=stop)
    assert result.error is not None and result.error.kind == "interrupted"
    assert client.submit(graph).error is None, "and done the next time"
