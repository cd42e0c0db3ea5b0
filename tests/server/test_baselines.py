"""Every baseline over the API of a real server, with and without SuDe, on the mini world and on SD1.5's own blocks."""

import io
from collections.abc import Iterator

import pytest
from PIL import Image

from bench.comfy_client import ComfyClient, Result
from bench.comfy_server import ComfyServer, link

BASELINES = ("DreamBooth", "Custom Diffusion", "ViCo")
# Each training: what differs from the preset, by the node's identifier in the graph.
TRAININGS = {
    "plain": ({"baseline.w_s": 0.0}, {}),
    "preset": ({}, {}),
    "untruncated": ({}, {"truncation": False}),
}
SMALL = {"resolution": 64, "gradient_checkpointing": False}
CLASS_IMAGES = {"prior": "class images", "prior.number": 2, "prior.steps": 1, "prior.cfg": 1.0}
PROMPTS = {
    "DreamBooth": "photo of a running sks dog",
    "Custom Diffusion": "photo of a running <new1> dog",
    "ViCo": "photo of a running *",
}


@pytest.fixture(scope="module")
def client(server: ComfyServer) -> Iterator[ComfyClient]:
    """One client for all tests here."""
    with ComfyClient(server.address) as connected:
        yield connected


@pytest.fixture(scope="module")
def picture(client: ComfyClient) -> str:
    """A picture of a subject, uploaded."""
    data = io.BytesIO()
    Image.radial_gradient("L").resize((64, 64)).convert("RGB").save(data, "PNG")
    return client.upload_image("baselines.png", data.getvalue())


@pytest.fixture(scope="module")
def weights(server: ComfyServer, checkpoint):
    """The checkpoints by name: the mini world, and random weights in SD1.5's 12 + 1 + 12 blocks."""

    def find(name: str) -> str:
        if name == "blocks":
            return checkpoint("blocks")
        from bench.demo import CHECKPOINT
        from bench.miniworld.expand import expand

        link(expand(CHECKPOINT), server.base / "models" / "checkpoints" / "the_miniworld.safetensors")
        return "the_miniworld.safetensors"

    return find


def workflow(client: ComfyClient, checkpoint: str, image: str, baseline: str, trainings: dict) -> dict:
    """Checkpoint and picture -> one SuDe Fine-Tune a training -> prompt -> KSampler -> SaveImage."""
    flow = {
        "checkpoint": client.node("CheckpointLoaderSimple", {"ckpt_name": checkpoint}),
        "picture": client.node("LoadImage", {"image": image}),
        "latent": client.node("EmptyLatentImage", {"width": 64, "height": 64}),
    }
    for name, (changes, options) in trainings.items():
        prior = {"prior": "preset"} if baseline == "ViCo" else CLASS_IMAGES
        flow[f"{name} options"] = client.node("SuDeTrainingOptions", {**SMALL, **prior, **options})
        views = {"baseline.views": 4} if baseline == "Custom Diffusion" else {}
        inputs = {
            **{key: ["checkpoint", slot] for slot, key in enumerate(("model", "clip", "vae"))},
            "image": ["picture", 0],
            "options": [f"{name} options", 0],
            "category": "dog",
            "baseline": baseline,
            "baseline.steps": 2,
            "baseline.learning_rate": 1e-4,
            **views,
            **changes,
        }
        flow[name] = client.node("SuDeFineTune", inputs)
        flow[f"{name} prompt"] = client.node("SuDePrompt", {"subject": [name, 2], "attribute": "running"})
        flow[f"{name} text"] = client.node("PreviewAny", {"source": [f"{name} prompt", 0]})
        encoded = {}
        for half, text in (("positive", [f"{name} prompt", 0]), ("negative", "")):
            flow[f"{name} {half}"] = client.node("CLIPTextEncode", {"clip": [name, 1], "text": text})
            encoded[half] = [f"{name} {half}", 0]
        sampling = {"seed": 1, "steps": 2, "sampler_name": "euler", "scheduler": "normal", "cfg": 4.0}
        flow[f"{name} sampler"] = client.node(
            "KSampler", {"model": [name, 0], "latent_image": ["latent", 0], **encoded, **sampling}
        )
        flow[f"{name} decoded"] = client.node(
            "VAEDecode", {"samples": [f"{name} sampler", 0], "vae": ["checkpoint", 2]}
        )
        flow[f"{name} saved"] = client.node("SaveImage", {"images": [f"{name} decoded", 0]})
    return flow


def pixels(client: ComfyClient, result: Result, node: str) -> bytes:
    """What a node's picture shows."""
    return Image.open(io.BytesIO(client.view(result.images(node)[0]))).convert("RGB").tobytes()


@pytest.mark.parametrize("name", ["miniworld", "blocks"])
@pytest.mark.parametrize("baseline", BASELINES)
def test_every_baseline_trains_plain_with_sude_and_without_truncation(
    client: ComfyClient, weights, picture: str, baseline: str, name: str
):
    result = client.submit(workflow(client, weights(name), picture, baseline, TRAININGS))
    assert result.error is None, result.error
    seen = {training: pixels(client, result, f"{training} saved") for training in TRAININGS}
    assert len(seen["plain"]) == 64 * 64 * 3
    assert seen["plain"] != seen["untruncated"], "SuDe's gate was always open, and nothing is different"
    for training in TRAININGS:
        assert result.outputs[f"{training} text"]["text"] == [PROMPTS[baseline]]
        said = [text for node, text in result.texts if node == training]
        assert any("training 2/2" in text for text in said)
        assert any("gate" in text for text in said) == (training != "plain")
        if baseline == "ViCo":
            blocks = "4, 6, 8, 10" if name == "blocks" else ", ".join(map(str, MINI_WORLD_BLOCKS))
            assert any(f"attention to the picture in output blocks {blocks}" in text for text in said)
            assert any("attention 0." in text for text in said), "the baseline's own term is not in the text"


MINI_WORLD_BLOCKS = (1,)


@pytest.mark.parametrize(
    ("baseline", "change", "options", "said"),
    [
        ("Custom Diffusion", {"baseline.identifier": "photo"}, {}, "is a word of the training caption"),
        ("Custom Diffusion", {"baseline.identifier": "my dog"}, {}, "take one word such as <new1>"),
        ("Custom Diffusion", {"baseline.initializer": " "}, {}, "initializer is empty"),
        ("Custom Diffusion", {"baseline.vectors": 32, "category": "very big dog " * 20}, {}, "75 tokens"),
        ("ViCo", {}, {"prior": "class images"}, "ViCo leaves the model as it is and has nothing to preserve"),
        ("ViCo", {"baseline.identifier": "(x)"}, {}, "which prompts use for other things"),
    ],
)
def test_what_cannot_be_trained_is_named_before(
    client: ComfyClient, checkpoint, picture: str, baseline: str, change: dict, options: dict, said: str
):
    flow = workflow(client, checkpoint("small"), picture, baseline, {"bad": (change, options)})
    result = client.submit(flow)
    assert result.error is not None and result.error.node == "bad", result
    assert said in result.error.message
    assert not any("training" in text or "drawing" in text for _, text in result.texts)


def test_vico_on_a_checkpoint_without_places_says_so(client: ComfyClient, checkpoint, picture: str):
    flow = workflow(client, checkpoint("abs"), picture, "ViCo", {"bad": ({}, {})})
    result = client.submit(flow)
    assert result.error is not None and "no cross-attention in its decoder" in result.error.message
