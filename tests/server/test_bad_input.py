"""What cannot be trained is refused before any step, with a message that names the input, the fault and the remedy."""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from bench.comfy_client import ComfyClient, Failure
from bench.comfy_server import ComfyServer, link, prepare_base

TRAINER = "3"


@pytest.fixture(scope="module")
def host(server: ComfyServer, comfyui: Path, checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """A server of its own with the pack, a node that makes unusable pictures, and every kind of checkpoint."""
    base = prepare_base(tmp_path_factory.mktemp("bad"))
    link(Path(__file__).with_name("bad_pictures"), base / "custom_nodes" / "bad_pictures")
    folder = base / "models" / "checkpoints"
    for variant in ("abs", "inpaint", "noclip", "sdxl"):
        name = checkpoint(variant)
        link(server.base / "models" / "checkpoints" / name, folder / name)
    whole = load_file(folder / "tiny_abs.safetensors")
    save_file(
        {k: v for k, v in whole.items() if not k.startswith("first_stage_model.")}, folder / "tiny_novae.safetensors"
    )
    with ComfyServer(base, comfyui=comfyui, log=base / "server.log") as running:
        yield running


@pytest.fixture
def client(host: ComfyServer) -> Iterator[ComfyClient]:
    """A client of that server."""
    with ComfyClient(host.address) as connected:
        yield connected


def upload(client: ComfyClient, image: Image.Image, name: str) -> str:
    """Put a picture into the server's input folder."""
    data = io.BytesIO()
    image.save(data, "PNG")
    return client.upload_image(name, data.getvalue())


def workflow(client: ComfyClient, training: dict | None = None, options: dict | None = None, **model: str) -> dict:
    """A graph that trains two steps, but for what is wrong in it.

    Args:
        client: of the server.
        training: inputs of SuDe Fine-Tune to change; None removes one.
        options: inputs of SuDe Training Options to change.
        model: "model", "clip" or "vae" from another checkpoint than the good one.
    """
    small = {"resolution": 64, "gradient_checkpointing": False, "prior": "off", **(options or {})}
    flow = {
        "2": client.node("EmptyImage", {"width": 64, "height": 64, "color": 0x3366CC}),
        "4": client.node("SuDeTrainingOptions", small),
        "5": client.node("PreviewAny", {"source": ["6", 0]}),
        "6": client.node("SuDePrompt", {"subject": [TRAINER, 2]}),
    }
    sources = {}
    for slot, name in enumerate(("model", "clip", "vae")):
        loader = f"load {model.get(name, 'abs')}"
        flow[loader] = client.node(
            "CheckpointLoaderSimple", {"ckpt_name": f"tiny_{model.get(name, 'abs')}.safetensors"}
        )
        sources[name] = [loader, slot]
    inputs = {"image": ["2", 0], "options": ["4", 0], "category": "dog", "baseline": "DreamBooth", "baseline.steps": 2}
    trainer = client.node("SuDeFineTune", {**sources, **inputs, **(training or {})})
    trainer["inputs"] = {name: value for name, value in trainer["inputs"].items() if value is not None}
    return {**flow, TRAINER: trainer}


def refused(client: ComfyClient, flow: dict, node: str = TRAINER) -> Failure:
    """Why the server did not train; fails if it did, or if another node is blamed."""
    result = client.submit(flow)
    assert result.error is not None, "it was not refused"
    assert result.error.node == node, result.error
    assert not any("training" in text or "drawing" in text for _, text in result.texts), (
        "something was trained or drawn"
    )
    assert result.error.kind == "rejected" or result.error.details["exception_type"] == "ValueError", result.error
    return result.error


def check(error: Failure, *said: str) -> None:
    """The message says all of this."""
    missing = [part for part in said if part not in error.message]
    assert not missing, f"{missing} not in: {error.message}"


def test_what_the_other_tests_spoil_trains_when_it_is_left_alone(client: ComfyClient):
    result = client.submit(workflow(client))
    assert result.error is None
    assert any("training 2/2" in text for _, text in result.texts)


# --- Words and numbers -----------------------------------------------------------------------------------------------

NAN, INFINITE = float("nan"), float("inf")
VALUES = {
    "an empty category": ({"category": "  "}, ["category", "empty", "for example dog"]),
    "a category that holds the identifier": (
        {"category": "sks dog"},
        ["category 'sks dog'", "holds the identifier 'sks'", "give the plain kind of thing"],
    ),
    "a category that holds it in capitals": ({"category": "my SKS dog"}, ["category", "holds the identifier"]),
    "an empty identifier": ({"baseline.identifier": " "}, ["identifier", "empty", "for example sks"]),
    "a category that is too long": ({"category": "very big dog " * 40}, ["category", "75 tokens", "shorten"]),
    "an unknown baseline": (
        {"baseline": "Textual Inversion"},
        ["baseline", "no known baseline is chosen", "Choose one of: DreamBooth, DreamBooth LoRA"],
    ),
    "an empty baseline": ({"baseline": ""}, ["baseline", "no known baseline is chosen", "Choose one of: DreamBooth"]),
    "no baseline at all": ({"baseline": None}, ["baseline"]),
    "no number of steps": ({"baseline.steps": None}, ["steps"]),
    "a negative w_s": ({"baseline.w_s": -0.4}, ["w_s", "-0.4", "0.0"]),
    "w_s that is not a number": ({"baseline.w_s": NAN}, ["w_s", "nan", "a number from 0 to 1000", "the preset is 0.4"]),
    "an infinite w_s": ({"baseline.w_s": INFINITE}, ["w_s", "inf", "1000"]),
    "w_s in words": ({"baseline.w_s": "much"}, ["w_s", "much"]),
    "no steps": ({"baseline.steps": 0}, ["steps", "0", "1"]),
    "negative steps": ({"baseline.steps": -5}, ["steps", "-5"]),
    "a learning rate that is not a number": (
        {"baseline.learning_rate": NAN},
        ["learning_rate", "nan", "preset is 1e-06"],
    ),
}


@pytest.mark.parametrize("mistake", sorted(VALUES))
def test_a_wrong_value_is_named(client: ComfyClient, mistake: str):
    change, said = VALUES[mistake]
    error = refused(client, workflow(client, change))
    whole = f"{error.message} {error.details.get('node_errors', '')}"
    assert not [part for part in said if part not in whole], whole


OPTIONS = {
    "an unknown prior": ({"prior": "magic"}, "4", ["prior", "no known prior is chosen", "class images, distillation"]),
    "no prior": ({"prior": None}, "4", ["prior"]),
    "a resolution that is too small": ({"resolution": 32}, TRAINER, ["resolution is 32", "multiple of 8 from 64 on"]),
    "a resolution between two cells": ({"resolution": 100}, TRAINER, ["resolution is 100", "multiple of 8"]),
    "an unknown sampler": (
        {"prior": "class images", "prior.sampler": "guess"}, "4", ["sampler", "guess"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", sorted(OPTIONS))
def test_a_wrong_option_is_named(client: ComfyClient, mistake: str):
    change, node, said = OPTIONS[mistake]
    flow = workflow(client, options=change)
    flow["4"]["inputs"] = {name: value for name, value in flow["4"]["inputs"].items() if value is not None}
    check(refused(client, flow, node), *said)


# --- Pictures --------------------------------------------------------------------------------------------------------

PICTURES = {
    "empty": ["empty batch", "connect at least one picture"],
    "nan": ["not finite", "load the picture again"],
    "infinite": ["not finite", "load the picture again"],
    "two channels": ["(1, 64, 64, 2)", "IMAGE batch", "Load Image"],
    "no batch": ["(64, 64, 3)", "IMAGE batch", "Load Image"],
    "latent": ["dict", "IMAGE batch", "Load Image"],
}


@pytest.mark.parametrize("kind", sorted(PICTURES))
@pytest.mark.parametrize("name", ["image", "class_images"])
def test_an_unusable_picture_is_named(client: ComfyClient, name: str, kind: str):
    flow = workflow(client, {name: ["9", 0]}, {"prior": "class images"})
    flow["9"] = {"class_type": "BadPicture", "inputs": {"kind": kind}}
    error = refused(client, flow)
    check(error, *PICTURES[kind])
    assert error.message.startswith(f"{name} ")


@pytest.mark.parametrize("name", ["image", "class_images"])
@pytest.mark.parametrize("size", [(63, 200), (200, 63), (1, 1)])
def test_a_picture_that_is_too_small_is_named(client: ComfyClient, name: str, size: tuple[int, int]):
    flow = workflow(client, {name: ["9", 0]}, {"prior": "class images"})
    flow["9"] = client.node("EmptyImage", {"width": size[0], "height": size[1]})
    check(refused(client, flow), f"{name} is {size[0]} x {size[1]} px", "at least 64 px", "use a larger picture")


def test_something_else_than_pictures_as_class_images_is_rejected(client: ComfyClient):
    flow = workflow(client, {"class_images": ["load abs", 0]}, {"prior": "class images"})
    check(refused(client, flow), "class_images", "MODEL")


@pytest.mark.parametrize("prior", ["off", "distillation"])
def test_class_images_that_would_not_be_used_are_named(client: ComfyClient, prior: str):
    flow = workflow(client, {"class_images": ["2", 0]}, {"prior": prior})
    check(refused(client, flow), "class_images", f"'{prior}'", "disconnect them or set the prior to 'class images'")


def test_a_picture_with_an_alpha_channel_trains_as_if_on_white(client: ComfyClient):
    transparent = Image.new("RGBA", (64, 64), (200, 30, 30, 0))
    transparent.paste((200, 30, 30, 255), (16, 16, 48, 48))
    on_white = Image.new("RGB", (64, 64), "white")
    on_white.paste((200, 30, 30), (16, 16, 48, 48))
    losses = []
    for image, name in ((transparent, "transparent.png"), (on_white, "on_white.png")):
        flow = workflow(client)
        flow["2"] = client.node("LoadImage", {"image": upload(client, image, name)})
        flow["8"] = client.node("JoinImageWithAlpha", {"image": ["2", 0], "alpha": ["2", 1]})
        flow[TRAINER]["inputs"]["image"] = ["8", 0]
        flow[TRAINER]["inputs"]["retrain"] = True  # the two are one picture to the store as well
        if image is on_white:
            del flow["8"]
            flow[TRAINER]["inputs"]["image"] = ["2", 0]
        result = client.submit(flow)
        assert result.error is None, result.error
        losses += [text.split("·")[1] for _, text in result.texts if "training 2/2" in text]
    assert losses[0] == losses[1]


# --- Models ----------------------------------------------------------------------------------------------------------

MODELS: dict[str, tuple[dict[str, str], list[str]]] = {
    "no text encoder": ({"clip": "noclip"}, ["clip is missing", "no text encoder", "connect a CLIP loader"]),
    "no VAE": ({"vae": "novae"}, ["vae is missing", "connect a Load VAE node"]),
    "another family": ({"model": "sdxl"}, ["model is of the family", "does not train yet", "SD1.x or SD2.x"]),
    "an inpainting UNet": (
        {"model": "inpaint"},
        ["inpainting", "9 input channels", "load the plain text-to-image checkpoint"],
    ),
}


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_a_model_that_cannot_be_trained_is_named(client: ComfyClient, kind: str):
    sources, said = MODELS[kind]
    check(refused(client, workflow(client, **sources)), *said)


@pytest.mark.parametrize("name", ["model", "clip", "vae", "image", "category"])
def test_a_missing_connection_is_named(client: ComfyClient, name: str):
    check(refused(client, workflow(client, {name: None})), "Required input is missing", name)


def test_the_node_trains_again_after_all_these_refusals(client: ComfyClient):
    refused(client, workflow(client, {"category": ""}))
    assert client.submit(workflow(client, {"training_seed": 3})).error is None
