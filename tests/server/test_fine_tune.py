"""The main job over the API of a real server: train on one picture, prompt, sample; cached, refused, interrupted."""

import io
from collections.abc import Iterator

import pytest
from PIL import Image

from bench.comfy_client import ComfyClient, Result
from bench.comfy_server import ComfyServer

SMALL = {
    "resolution": 64,
    "gradient_checkpointing": False,
    "prior": "class images",
    "prior.number": 2,
    "prior.steps": 1,
    "prior.cfg": 1.0,
}

LORA = {"baseline": "DreamBooth LoRA", "baseline.steps": 2, "baseline.train_text_encoder": False}


@pytest.fixture(scope="module")
def client(server: ComfyServer) -> Iterator[ComfyClient]:
    """One client for all tests here, so that they can share a training."""
    with ComfyClient(server.address) as connected:
        yield connected


@pytest.fixture(scope="module")
def picture(client: ComfyClient) -> str:
    """A picture of a subject, uploaded."""
    image = Image.radial_gradient("L").resize((64, 64)).convert("RGB")
    data = io.BytesIO()
    image.save(data, "PNG")
    return client.upload_image("subject.png", data.getvalue())


def workflow(client: ComfyClient, checkpoint: str, image: str, training: dict | None = None, seed: int = 1) -> dict:
    """Checkpoint and picture -> SuDe Fine-Tune (3) -> prompt (4) -> KSampler (7) -> SaveImage (9)."""
    inputs = {
        "model": ["1", 0],
        "clip": ["1", 1],
        "vae": ["1", 2],
        "image": ["2", 0],
        "options": ["10", 0],
        "category": "dog",
        "baseline": "DreamBooth",
        "baseline.steps": 3,
        **(training or {}),
    }
    sampling = {"seed": seed, "steps": 2, "sampler_name": "euler", "scheduler": "normal"}
    return {
        "1": client.node("CheckpointLoaderSimple", {"ckpt_name": checkpoint}),
        "2": client.node("LoadImage", {"image": image}),
        "3": client.node("SuDeFineTune", inputs),
        "4": client.node("SuDePrompt", {"subject": ["3", 2], "attribute": "running", "context": "on the beach"}),
        "5": client.node("CLIPTextEncode", {"clip": ["3", 1], "text": ["4", 0]}),
        "6": client.node("CLIPTextEncode", {"clip": ["3", 1], "text": ""}),
        "7": client.node(
            "KSampler",
            {"model": ["3", 0], "positive": ["5", 0], "negative": ["6", 0], "latent_image": ["11", 0], **sampling},
        ),
        "8": client.node("VAEDecode", {"samples": ["7", 0], "vae": ["1", 2]}),
        "9": client.node("SaveImage", {"images": ["8", 0], "filename_prefix": "fine_tune"}),
        "10": client.node("SuDeTrainingOptions", SMALL),
        "11": client.node("EmptyLatentImage", {"width": 64, "height": 64}),
        "12": client.node("PreviewAny", {"source": ["4", 0]}),
    }


@pytest.fixture(scope="module")
def trained(client: ComfyClient, checkpoint, picture: str) -> Result:
    """A whole run that went well: DreamBooth, UNet and text encoder."""
    result = client.submit(workflow(client, checkpoint(), picture))
    assert result.error is None, result.error
    return result


def pixels(client: ComfyClient, result: Result) -> bytes:
    """What the run's picture shows."""
    return Image.open(io.BytesIO(client.view(result.images("9")[0]))).convert("RGB").tobytes()


def test_one_picture_becomes_a_model_that_samples(client: ComfyClient, trained: Result):
    assert len(pixels(client, trained)) == 64 * 64 * 3


def test_dreambooth_lora_samples_too(client: ComfyClient, checkpoint, picture: str):
    result = client.submit(workflow(client, checkpoint(), picture, LORA))
    assert result.error is None, result.error
    assert len(pixels(client, result)) == 64 * 64 * 3


def test_the_prompt_is_the_training_caption_with_the_attribute_before_the_identifier(trained: Result):
    assert trained.outputs["12"]["text"] == ["photo of a running sks dog on the beach"]


def test_the_chart_is_shown_on_the_node(client: ComfyClient, trained: Result):
    chart = Image.open(io.BytesIO(client.view(trained.images("3")[0])))
    assert chart.width > 200 and chart.height > 200


def test_progress_and_text_arrive_while_it_trains(trained: Result):
    assert [value for node, value, most in trained.progress if node == "3" and value == most]
    assert any("training 3/3" in text for node, text in trained.texts if node == "3")


def test_another_sampling_seed_does_not_train_again(client: ComfyClient, checkpoint, picture: str):
    first = client.submit(workflow(client, checkpoint(), picture, LORA, seed=1))
    second = client.submit(workflow(client, checkpoint(), picture, LORA, seed=2))
    assert first.error is None and second.error is None
    assert "7" in second.ran and "3" in second.cached
    assert pixels(client, first) != pixels(client, second)


def test_the_same_seed_gives_the_same_picture_after_another_training(client: ComfyClient, checkpoint, picture: str):
    seen = []
    for seed in (3, 4, 3):
        result = client.submit(
            workflow(client, checkpoint(), picture, {**LORA, "training_seed": seed, "retrain": True})
        )
        seen.append(pixels(client, result))
        client.free()  # the server forgets its results, so the third run starts from nothing
    assert seen[0] == seen[2] and seen[0] != seen[1]


def test_an_interrupt_stops_the_training_and_leaves_the_server_usable(client: ComfyClient, checkpoint, picture: str):
    def stop(prompt_id: str, kind: str, data: dict) -> None:
        if kind == "text" and "training" in data["text"]:
            client.interrupt(prompt_id)

    long = {**LORA, "baseline.steps": 5000, "training_seed": 9}
    result = client.submit(workflow(client, checkpoint(), picture, long), on_event=stop)
    assert result.error.kind == "interrupted"
    assert result.seconds < 60
    assert client.submit(workflow(client, checkpoint(), picture)).error is None


BAD = {
    "an empty category": ({"category": "  "}, "category"),
    "a category that holds the identifier": ({"category": "sks dog"}, "identifier"),
    "no baseline": ({"baseline": ""}, "baseline"),
    "an unknown baseline": ({"baseline": "Textual Inversion"}, "baseline"),
    "a negative w_s": ({"baseline.w_s": -1.0}, "w_s"),
    "no steps": ({"baseline.steps": 0}, "steps"),
}


@pytest.mark.parametrize("mistake", sorted(BAD))
def test_bad_input_is_named_before_any_training(client: ComfyClient, checkpoint, picture: str, mistake: str):
    change, word = BAD[mistake]
    result = client.submit(workflow(client, checkpoint(), picture, change))
    assert result.error is not None and result.error.node == "3", result
    assert word in result.error.message
    assert not any("training" in text for _, text in result.texts)


@pytest.mark.parametrize(
    ("variant", "word"), [("noclip", "clip"), ("inpaint", "inpaint"), ("sdxl", "clip")], ids=lambda value: value
)
def test_a_checkpoint_that_cannot_be_trained_is_refused(
    client: ComfyClient, checkpoint, picture: str, variant: str, word: str
):
    result = client.submit(workflow(client, checkpoint(variant), picture))
    assert result.error is not None
    assert word in result.error.message.lower()
