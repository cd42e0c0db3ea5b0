"""Through a real server: found again after a restart, the same latents from files, finish, interrupt, bad files."""

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from bench.comfy_client import ComfyClient, Result
from bench.comfy_server import ComfyServer, prepare_base
from comfy_sude import files
from tests import faults

TRAINING = {"baseline": "DreamBooth LoRA", "baseline.steps": 3, "baseline.train_text_encoder": False}
OPTIONS = {"resolution": 64, "gradient_checkpointing": False, "prior": "off"}
PROMPT = "photo of a running sks dog"


@pytest.fixture(scope="module")
def client(server: ComfyServer) -> Iterator[ComfyClient]:
    with ComfyClient(server.address) as connected:
        yield connected


@pytest.fixture(scope="module")
def picture(client: ComfyClient) -> str:
    data = io.BytesIO()
    Image.radial_gradient("L").resize((64, 64)).convert("RGB").save(data, "PNG")
    return client.upload_image("lasting.png", data.getvalue())


def training(client: ComfyClient, checkpoint: str, image: str, **changes) -> dict:
    """Checkpoint (1) and picture (2) -> SuDe Fine-Tune (3) -> saved subject (4); sampled latents (9)."""
    links = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "image": ["2", 0], "options": ["5", 0]}
    options = {name: changes.pop(name) for name in list(changes) if name in ("on_interrupt", "save_interval")}
    return {
        "1": client.node("CheckpointLoaderSimple", {"ckpt_name": checkpoint}),
        "2": client.node("LoadImage", {"image": image}),
        "3": client.node("SuDeFineTune", {**links, "category": "dog", **TRAINING, **changes}),
        "4": client.node("SuDeSaveSubject", {"subject": ["3", 2], "filename_prefix": "tests/spike"}),
        "5": client.node("SuDeTrainingOptions", {**OPTIONS, **options}),
        **sampling(client, "3"),
    }


def sampling(client: ComfyClient, source: str) -> dict:
    """Stock nodes from a MODEL and CLIP to a file with the sampled latents (9)."""
    settings = {"seed": 3, "steps": 2, "sampler_name": "euler", "scheduler": "normal"}
    links = {"model": [source, 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["10", 0]}
    return {
        "6": client.node("CLIPTextEncode", {"clip": [source, 1], "text": PROMPT}),
        "7": client.node("CLIPTextEncode", {"clip": [source, 1], "text": ""}),
        "8": client.node("KSampler", {**links, **settings}),
        "9": client.node("SaveLatent", {"samples": ["8", 0], "filename_prefix": "lasting"}),
        "10": client.node("EmptyLatentImage", {"width": 64, "height": 64}),
    }


def loading(client: ComfyClient, checkpoint: str, name: str, **strength) -> dict:
    """Checkpoint (1) and file (2) -> SuDe Apply Subject (3) -> sampled latents (9)."""
    links = {"model": ["1", 0], "clip": ["1", 1], "subject": ["2", 0]}
    return {
        "1": client.node("CheckpointLoaderSimple", {"ckpt_name": checkpoint}),
        "2": client.node("SuDeLoadSubject", {"subject_file": name}),
        "3": client.node("SuDeApplySubject", {**links, **strength}),
        **sampling(client, "3"),
    }


def latents(base: Path, result: Result) -> torch.Tensor:
    assert result.error is None, result.error
    (found,) = result.outputs["9"]["latents"]
    return load_file(base / "output" / found["subfolder"] / found["filename"])["latent_tensor"]


def newest(base: Path) -> str:
    folder = base / "output" / "sude"
    path = max(files.within(folder), key=lambda path: path.stat().st_mtime_ns)
    return path.relative_to(folder).as_posix()


def said(result: Result, node: str = "3") -> str:
    return " | ".join(text for name, text in result.texts if name == node)


def test_nothing_is_trained_again_after_another_workflow_and_a_restart_and_the_file_gives_the_same_bits(
    comfyui: Path, server: ComfyServer, checkpoint, tmp_path: Path
):
    name = checkpoint()
    base = prepare_base(tmp_path / "base")
    shutil.copy(server.base / "models" / "checkpoints" / name, base / "models" / "checkpoints" / name)
    Image.radial_gradient("L").resize((64, 64)).convert("RGB").save(base / "input" / "spike.png")
    with ComfyServer(base, comfyui=comfyui, log=tmp_path / "1.log") as first, ComfyClient(first.address) as client:
        trained = client.submit(training(client, name, "spike.png"))
        expected, subject = latents(base, trained), newest(base)
        assert "training 3/3" in said(trained)
        other = client.submit(training(client, name, "spike.png", training_seed=7))
        assert not torch.equal(latents(base, other), expected)
        client.free()
        again = client.submit(training(client, name, "spike.png"))
        assert "training" not in said(again).replace("nothing trained", "") and "reused" in said(again)
        assert torch.equal(latents(base, again), expected)
    with ComfyServer(base, comfyui=comfyui, log=tmp_path / "2.log") as second, ComfyClient(second.address) as client:
        again = client.submit(training(client, name, "spike.png"))
        assert "3" in again.ran and "reused, nothing trained" in said(again)
        assert not any(node == "3" and most == 3 for node, _, most in again.progress)
        assert torch.equal(latents(base, again), expected)
        loaded = client.submit(loading(client, name, subject))
        assert torch.equal(latents(base, loaded), expected), "the file is not what was trained"
        assert Image.open(io.BytesIO(client.view(loaded.images("2")[0]))).size == (128, 128)
        off = client.submit(loading(client, name, subject, strength_model=0.0, strength_clip=0.0))
        assert not torch.equal(latents(base, off), expected)


def test_a_killed_server_goes_on_where_it_was(tmp_path: Path, comfyui: Path):
    world = faults.World(tmp_path / "base")
    faults.undisturbed(world)
    for row in (faults.kills(world, "training", 1), faults.damages(world, 40), faults.damages_served(world, 2)):
        assert row.tried and row.survived == row.tried, row


def test_retrain_trains(server: ComfyServer, client: ComfyClient, checkpoint, picture: str):
    first = client.submit(training(client, checkpoint(), picture, training_seed=31))
    again = client.submit(training(client, checkpoint(), picture, training_seed=31, retrain=True))
    assert "training 3/3" in said(again) and "reused" not in said(again)
    assert torch.equal(latents(server.base, first), latents(server.base, again))


def test_finish_ends_the_training_and_the_graph_goes_on(
    server: ComfyServer, client: ComfyClient, checkpoint, picture: str
):
    answers = []

    def finish(_: str, kind: str, data: dict) -> None:
        if kind == "text" and data["text"].startswith("training ") and not data["text"].startswith("training 0/"):
            if not answers:
                answers.extend(client.post("/sude/finish", {"node": node}) for node in ("4", 3))

    long = training(client, checkpoint(), picture, training_seed=32, **{"baseline.steps": 5000})
    result = client.submit(long, on_event=finish)
    assert [status for status, _ in answers] == [404, 200]
    latents(server.base, result)
    assert "done · stopped after" in said(result) and "of 5000 steps" in said(result)
    assert client.post("/sude/finish", {"node": "3"})[0] == 404


def test_finish_listens_to_this_servers_pages_only(client: ComfyClient):
    import http.client

    def post(headers: dict, body: bytes = b'{"node": "3"}') -> int:
        connection = http.client.HTTPConnection(client.host, timeout=30)
        connection.request("POST", "/sude/finish", body, headers)
        return connection.getresponse().status

    json_type = {"Content-Type": "application/json"}
    assert post({**json_type, "Origin": f"http://{client.host}"}) == 404
    assert post({**json_type, "Origin": "http://evil.example"}) == 403
    assert post({**json_type, "Sec-Fetch-Site": "cross-site"}) == 403
    assert post({"Content-Type": "text/plain"}) == 415
    for body in (b"", b"{", b"[]", b'{"node": null}', b'{"node": true}', b'{"node": ["3"]}', b"\xff\xfe"):
        assert post(json_type, body) == 400, body


@pytest.mark.parametrize("choice", ["keep", "discard"])
def test_an_interrupted_training_goes_on_or_starts_over(
    server: ComfyServer, client: ComfyClient, checkpoint, picture: str, choice: str
):
    def stop(prompt_id: str, kind: str, data: dict) -> None:
        if kind == "text" and data["text"].startswith("training ") and not data["text"].startswith("training 0/"):
            client.interrupt(prompt_id)

    seed = {"keep": 33, "discard": 34}[choice]
    wanted = training(client, checkpoint(), picture, training_seed=seed, on_interrupt=choice, **{"baseline.steps": 60})
    stopped = client.submit(wanted, on_event=stop)
    assert stopped.error is not None and stopped.error.kind == "interrupted"
    result = client.submit(wanted)
    assert ("resumed at step" in said(result)) == (choice == "keep")
    again = client.submit(
        training(client, checkpoint(), picture, training_seed=seed, retrain=True, **{"baseline.steps": 60})
    )
    assert torch.equal(latents(server.base, result), latents(server.base, again))


def bad_files(folder: Path, good: Path) -> dict[str, tuple[str, list[str]]]:
    """Files no subject should be loaded from: name -> what the message must say."""
    folder.mkdir(parents=True, exist_ok=True)
    content = good.read_bytes()
    flipped = bytearray(content)
    flipped[-5] ^= 4
    (folder / "flipped.safetensors").write_bytes(flipped)
    (folder / "truncated.safetensors").write_bytes(content[:-100])
    (folder / "nothing.safetensors").write_bytes(b"")
    tensors, metadata = files.read(good)
    about = json.loads(metadata["sude.subject"])
    files.write(folder / "newer.safetensors", tensors, {"sude.subject": json.dumps({**about, "format": 2})})
    files.write(folder / "lora.safetensors", tensors, {"format": "pt"})
    weird = {**tensors, "model/x/diff": torch.zeros(3)}
    files.write(folder / "weird.safetensors", weird, {"sude.subject": json.dumps(about)})
    other = {**about, "base": {**about["base"], "family": "SD20"}}
    files.write(folder / "family.safetensors", tensors, {"sude.subject": json.dumps(other)})
    files.write(folder / "deep.safetensors", tensors, {"sude.subject": "[" * 100_000})
    return {
        "flipped": ("2", ["flipped.safetensors", "damaged", "again"]),
        "truncated": ("2", ["truncated.safetensors", "damaged"]),
        "nothing": ("2", ["nothing.safetensors", "damaged"]),
        "newer": ("2", ["format 2", "update"]),
        "lora": ("2", ["no subject of this pack", "Load LoRA"]),
        "weird": ("3", ["does not fit this model", "model/x".split("/")[1]]),
        "family": ("3", ["family SD20", "family SD15"]),
        "deep": ("2", ["metadata"]),
    }


def test_a_bad_file_is_named_with_what_to_do_and_harms_nothing(
    server: ComfyServer, client: ComfyClient, checkpoint, picture: str
):
    client.submit(training(client, checkpoint(), picture, training_seed=35))
    good = server.base / "output" / "sude" / newest(server.base)
    for name, (node, words) in bad_files(server.base / "models" / "sude", good).items():
        result = client.submit(loading(client, checkpoint(), f"{name}.safetensors [models]"))
        assert result.error is not None and result.error.node == node, (name, result.error)
        assert all(word in result.error.message for word in words), (name, result.error.message)
    missing = client.submit(loading(client, checkpoint(), "../../x.safetensors"))
    assert missing.error.kind == "rejected"
    shutil.rmtree(server.base / "models" / "sude")


def test_an_uploaded_subject_can_be_chosen(server: ComfyServer, client: ComfyClient, checkpoint, picture: str):
    trained = client.submit(training(client, checkpoint(), picture, training_seed=36))
    content = (server.base / "output" / "sude" / newest(server.base)).read_bytes()
    boundary = "x123"
    body = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="mine.safetensors"\r\n\r\n'.encode()
        + content
        + f'\r\n--{boundary}\r\nContent-Disposition: form-data; name="subfolder"\r\n\r\nsude\r\n'
        f"--{boundary}--\r\n".encode()
    )
    status, _ = client.request("POST", "/upload/image", body, f"multipart/form-data; boundary={boundary}")
    assert status == 200
    result = client.submit(loading(client, checkpoint(), "mine.safetensors [input]"))
    assert torch.equal(latents(server.base, result), latents(server.base, trained))


def test_the_store_says_what_it_holds(server: ComfyServer, client: ComfyClient, checkpoint, picture: str):
    graph = {"1": client.node("SuDeStore"), "2": client.node("PreviewAny", {"source": ["1", 0]})}
    before = client.submit(graph).outputs["2"]["text"][0]
    client.submit(training(client, checkpoint(), picture, training_seed=37))
    after = client.submit(graph).outputs["2"]["text"][0]
    count = [int(text.split(" ", 1)[0]) for text in (before, after)]
    assert count[1] == count[0] + 1 and "finished trainings" in after and str(server.base / "user" / "sude") in after
