"""The client that the demo, the benches and the other server tests rely on, against stock nodes."""

import io
import json

from PIL import Image

from bench.comfy_client import ComfyClient


def picture(width: int = 64, color: int = 0xFF8800) -> dict:
    """A workflow that shows a plain picture."""
    size = {"width": width, "height": 64, "batch_size": 1, "color": color}
    return {
        "1": {"class_type": "EmptyImage", "inputs": size},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "client"}},
    }


def test_a_workflow_is_followed_to_its_picture(client: ComfyClient):
    result = client.submit(picture(color=0x102030))
    assert result.error is None
    assert result.ran == ["1", "2"] and result.cached == []
    image = Image.open(io.BytesIO(client.view(result.images("2")[0])))
    assert image.getpixel((0, 0)) == (0x10, 0x20, 0x30)
    assert client.history(result.prompt_id)["status"]["status_str"] == "success"


def test_the_same_workflow_again_is_seen_as_cached(client: ComfyClient):
    client.submit(picture(color=0x405060))
    again = client.submit(picture(color=0x405060))
    assert "1" in again.cached and "1" not in again.ran


def test_the_workflow_travels_in_the_picture(client: ComfyClient):
    result = client.submit(picture(color=0x99), extra_data={"extra_pnginfo": {"workflow": {"nodes": [], "links": []}}})
    image = Image.open(io.BytesIO(client.view(result.images("2")[0])))
    assert json.loads(image.text["prompt"]) and json.loads(image.text["workflow"]) == {"nodes": [], "links": []}


def test_a_workflow_that_is_refused_says_which_node_and_why(client: ComfyClient):
    result = client.submit(picture(width=0))
    assert result.error.kind == "rejected" and result.error.node == "1"
    assert "width" in result.error.message


def test_a_node_that_fails_is_named_with_its_message(client: ComfyClient):
    workflow = {
        "1": client.node("RegexReplace", {"string": "text", "regex_pattern": "(", "replace": ""}),
        "2": client.node("PreviewAny", {"source": ["1", 0]}),
    }
    result = client.submit(workflow)
    assert result.error.kind == "failed" and result.error.node == "1"
    assert "unterminated subpattern" in result.error.message


def test_an_unknown_checkpoint_is_refused_by_name(client: ComfyClient):
    workflow = {
        "1": client.node("CheckpointLoaderSimple", {"ckpt_name": "missing.safetensors"}),
        "2": client.node("EmptyLatentImage"),
        "3": client.node("VAEDecode", {"samples": ["2", 0], "vae": ["1", 2]}),
        "4": client.node("PreviewImage", {"images": ["3", 0]}),
    }
    result = client.submit(workflow)
    assert result.error.kind == "rejected" and result.error.node == "1"
    assert "missing.safetensors" in result.error.message


def test_a_node_gets_the_defaults_of_its_widgets(client: ComfyClient):
    sampler = client.node("KSampler", {"steps": 3})["inputs"]
    assert sampler["steps"] == 3
    assert sampler["cfg"] == 8.0 and sampler["denoise"] == 1.0 and sampler["sampler_name"] and "model" not in sampler


def test_an_uploaded_picture_can_be_loaded(client: ComfyClient):
    data = io.BytesIO()
    Image.new("RGB", (64, 64), (1, 2, 3)).save(data, "PNG")
    name = client.upload_image("client_upload.png", data.getvalue())
    workflow = picture()
    workflow["1"] = {"class_type": "LoadImage", "inputs": {"image": name}}
    result = client.submit(workflow)
    assert result.error is None
    assert Image.open(io.BytesIO(client.view(result.images("2")[0]))).getpixel((5, 5)) == (1, 2, 3)
