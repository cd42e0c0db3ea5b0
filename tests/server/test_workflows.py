"""The shipped workflows on a real server: valid, the same in both formats, run by every client, stoppable, cached."""

import copy
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from comfy_cli.workflow_to_api import convert_ui_to_api
from safetensors.numpy import load_file, save_file

from bench.comfy_client import ComfyClient, Result
from bench.comfy_server import ComfyServer, link
from comfy_sude import files

REPO = Path(__file__).resolve().parents[2]
WORKFLOWS = REPO / "workflows"
NAMES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))

# The mini world's settings in the quick start: {node title: {input: value}}. Tune them in both files and here.
TRAINING = {
    "category": "dog",
    "baseline": "DreamBooth",
    "baseline.steps": 200,
    "baseline.learning_rate": 3e-5,
    "training_seed": 0,
}
SAMPLING = {"seed": 7, "steps": 20, "cfg": 4, "sampler_name": "euler", "scheduler": "normal"}
QUICKSTART = {
    "Load Checkpoint": {"ckpt_name": "miniworld.safetensors"},
    "The one picture": {"image": "spike.png"},
    "SuDe Training Options": {
        "precision": "fp32",
        "resolution": 0,
        "gradient_checkpointing": False,
        "prior": "class images",
        "prior.number": 16,
        "prior.steps": 20,
        "prior.cfg": 4,
        "prior.negative_prompt": "",
    },
    "SuDe Fine-Tune": {**TRAINING, "baseline.w_s": 0.4},
    "Size and number of pictures": {"width": 64, "height": 64},
    "KSampler, after": SAMPLING,
    "KSampler, before": SAMPLING,
}
PAPER = {  # spec of the released code: 500 steps at 1e-6, w_s 0.4; sampled by 50 steps of DDIM at CFG 10
    "baseline": "DreamBooth",
    "baseline.w_s": 0.4,
    "baseline.steps": 500,
    "baseline.learning_rate": 1e-6,
    "baseline.identifier": "sks",
}

SPIKE = "spike_00001_.safetensors"  # what reuse_subject names
SILENCE = 2.0  # seconds the node may say nothing
MIB = 1024**2


@pytest.fixture(scope="module")
def furnished(server: ComfyServer, checkpoint) -> str:
    """Puts what the workflows name into the server's folders: a small checkpoint and pictures under their names."""
    name = checkpoint("small")
    folder = server.base / "models" / "checkpoints"
    mini = folder / "miniworld.safetensors"
    mini.unlink(missing_ok=True)
    save_file(load_file(folder / name), mini, {"modelspec.resolution": "64x64"})  # as the mini world's file says
    link(mini, folder / "v1-5-pruned-emaonly-fp16.safetensors")
    shutil.copy(WORKFLOWS / "spike.png", server.base / "input" / "spike.png")
    shutil.copy(WORKFLOWS / "spike.png", server.base / "input" / "example.png")
    saved = server.base / "output" / "sude" / SPIKE
    if not saved.is_file():  # only to be named; the quick start saves a real one
        files.write(saved, {"x": torch.zeros(1)}, {})
    return name


def ui(name: str) -> dict:
    """A shipped workflow as the frontend saves it."""
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def api(name: str) -> dict:
    """A shipped workflow as the API takes it."""
    return json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))


def small(workflow: dict, **training: object) -> dict:
    """A copy of an API workflow that takes seconds: 64 px, few steps and class images."""
    quick = {
        "SuDeFineTune": {"baseline.steps": 2, **training},
        "SuDeSweep": {"baseline.steps": 2, **training},
        "SuDeTrainingOptions": {"resolution": 64, "prior.number": 2, "prior.steps": 1},
        "KSampler": {"steps": 1},
        "EmptyLatentImage": {"width": 64, "height": 64, "batch_size": 1},
    }
    workflow = copy.deepcopy(workflow)
    for node in workflow.values():
        node["inputs"].update(quick.get(node["class_type"], {}))
    return workflow


def nodes(workflow: dict, class_type: str) -> list[str]:
    """The identifiers of the nodes of one class."""
    return [name for name, node in workflow.items() if node["class_type"] == class_type]


def by_title(workflow: dict, title: str) -> dict:
    """The inputs of the node with this title."""
    (inputs,) = (node["inputs"] for node in workflow.values() if node["_meta"]["title"] == title)
    return inputs


def literal(workflow: dict, value: object) -> object:
    """An input's value, also when a primitive node gives it."""
    return workflow[value[0]]["inputs"]["value"] if isinstance(value, list) else value


# --- The files -------------------------------------------------------------------------------------------------------


def test_every_workflow_is_shipped_in_both_formats():
    assert set(NAMES) == {
        "quickstart", "compare_baselines", "sweep_ws", "reuse_subject", "truncation_ablation", "attribute_and_context",
        "sd15_full", "sd15_lowvram",
    }  # fmt: skip
    assert NAMES == sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json"))


@pytest.mark.parametrize("name", NAMES)
def test_both_formats_are_the_same_graph(client: ComfyClient, furnished: str, name: str):
    converted = convert_ui_to_api(ui(name), client.object_info())
    shipped = api(name)
    assert converted.keys() == shipped.keys()
    for node in shipped:
        assert converted[node]["class_type"] == shipped[node]["class_type"]
        assert converted[node]["inputs"] == shipped[node]["inputs"], shipped[node]["_meta"]["title"]


@pytest.mark.parametrize("name", NAMES)
def test_the_server_accepts_every_workflow_as_it_is(client: ComfyClient, furnished: str, name: str):
    for workflow in (api(name), convert_ui_to_api(ui(name), client.object_info())):
        status, answer = client.post("/prompt", {"prompt": workflow, "client_id": "validation"})
        assert status == 200 and not answer["node_errors"], answer
        client.post("/queue", {"delete": [answer["prompt_id"]]})
        stop(client, answer["prompt_id"])


def stop(client: ComfyClient, prompt_id: str) -> None:
    """Interrupt a run until the server's queue is empty: an interrupt at a run's very start is lost in ComfyUI."""
    end = time.monotonic() + 120
    while any(client.get("/queue").values()):
        assert time.monotonic() < end, "the server did not stop"
        client.interrupt(prompt_id)
        time.sleep(0.5)


@pytest.mark.parametrize("title", sorted(QUICKSTART))
def test_the_quick_start_has_the_mini_worlds_settings(title: str):
    workflow = api("quickstart")
    inputs = {
        name: literal(workflow, value) for name, value in by_title(workflow, title).items() if name in QUICKSTART[title]
    }
    assert inputs == QUICKSTART[title]


def test_the_quick_start_draws_before_and_after_alike():
    workflow = api("quickstart")
    after, before = (by_title(workflow, f"KSampler, {label}") for label in ("after", "before"))
    assert (after.pop("model"), before.pop("model")) == (["10", 0], ["1", 0]), "the trained model, the incoming one"
    assert all(after[name] == before[name] for name in after if name not in ("positive", "negative"))
    assert by_title(workflow, "Prompt, before")["text"] == "photo of a running dog"


def test_the_ablation_differs_only_in_the_truncation():
    workflow = api("truncation_ablation")
    first, second = (dict(workflow[node]["inputs"]) for node in nodes(workflow, "SuDeFineTune"))
    options = [dict(workflow[inputs.pop("options")[0]]["inputs"]) for inputs in (first, second)]
    assert [one.pop("truncation") for one in options] == [True, False]
    assert first == second and options[0] == options[1]


def test_the_sweep_has_the_papers_multipliers_and_the_quick_starts_training_among_its_own():
    workflow, quick = api("sweep_ws"), by_title(api("quickstart"), "SuDe Fine-Tune")
    sweep = by_title(workflow, "SuDe Sweep")
    assert sweep["multipliers"] == "0, 0.5, 1, 2"
    assert {name: sweep[name] for name in quick} == quick, "what quickstart trained is found again"
    context = by_title(api("attribute_and_context"), "SuDe Sweep")
    assert context["multipliers"] == "1" and {name: context[name] for name in quick} == quick


def test_the_comparison_trains_the_papers_baselines_alike_but_for_sude():
    workflow = api("compare_baselines")
    trainings = [dict(workflow[node]["inputs"]) for node in nodes(workflow, "SuDeFineTune")]
    presets = {"DreamBooth": 0.4, "Custom Diffusion": 2.0, "ViCo": 1.5}
    for baseline, w_s in presets.items():
        plain, sude = (inputs for inputs in trainings if inputs["baseline"] == baseline)
        assert (plain.pop("baseline.w_s"), sude.pop("baseline.w_s")) == (0, w_s)
        assert plain == sude
    assert len(trainings) == 6 and len(nodes(workflow, "SaveImage")) == 1
    samplers = [workflow[node]["inputs"] for node in nodes(workflow, "KSampler")]
    shared = [{name: inputs[name] for name in (*SAMPLING, "latent_image")} for inputs in samplers]
    assert len(samplers) == 6 and all(settings == shared[0] for settings in shared)


def test_the_stable_diffusion_workflow_has_the_papers_settings():
    workflow = api("sd15_full")
    inputs = by_title(workflow, "SuDe Fine-Tune")
    assert {name: inputs[name] for name in PAPER} == PAPER
    sampler = by_title(workflow, "KSampler, after")
    found = [sampler[name] for name in ("steps", "cfg", "sampler_name", "scheduler")]
    assert found == [50, 10, "ddim", "ddim_uniform"]
    options = by_title(workflow, "SuDe Training Options")
    assert [options[f"prior.{name}"] for name in ("number", "steps", "cfg", "w_r")] == [50, 50, 10, 2]
    negative = by_title(workflow, "Negative prompt, after")["text"]
    assert negative == options["prior.negative_prompt"] == "monochrome, lowres, bad anatomy, worst quality, low quality"


def test_the_workflow_for_small_gpus_saves_memory():
    workflow = api("sd15_lowvram")
    assert by_title(workflow, "SuDe Fine-Tune")["baseline"] == "DreamBooth LoRA"
    options = by_title(workflow, "SuDe Training Options")
    assert options["precision"] == "bf16" and options["gradient_checkpointing"] is True


# --- Running ---------------------------------------------------------------------------------------------------------


def check_quickstart(workflow: dict, result: Result, client: ComfyClient) -> None:
    """Both pictures and both charts are there."""
    assert result.error is None, result.error
    for node in (*nodes(workflow, "SaveImage"), *nodes(workflow, "SuDeFineTune")):
        assert client.view(result.images(node)[0])[:4] == b"\x89PNG"


def test_the_quick_start_runs_as_a_plain_prompt_and_is_cached_the_second_time(client: ComfyClient, furnished: str):
    workflow = small(api("quickstart"))
    check_quickstart(workflow, client.submit(workflow), client)
    again = client.submit(workflow)
    assert again.error is None
    assert not set(nodes(workflow, "SuDeFineTune")) & set(again.ran)
    assert set(nodes(workflow, "SuDeFineTune")) <= set(again.cached)
    assert not any("training" in text for _, text in again.texts)


def test_what_the_quick_start_saved_is_drawn_again_without_training(
    server: ComfyServer, client: ComfyClient, furnished: str
):
    first = small(api("quickstart"), training_seed=51)
    check_quickstart(first, client.submit(first), client)
    saved = max((server.base / "output" / "sude").glob("spike_*"), key=lambda path: path.stat().st_mtime_ns)
    workflow = small(api("reuse_subject"))
    assert not nodes(workflow, "SuDeFineTune") and {"SuDeLoadSubject", "SuDeApplySubject", "SuDePrompt"} <= {
        node["class_type"] for node in workflow.values()
    }
    workflow[nodes(workflow, "SuDeLoadSubject")[0]]["inputs"]["subject_file"] = saved.name
    again = client.submit(workflow)
    assert again.error is None, again.error
    (picture,) = again.images(nodes(workflow, "SaveImage")[0])
    assert client.view(picture)[:4] == b"\x89PNG"


def test_the_quick_starts_file_runs_with_comfy_run(
    server: ComfyServer, client: ComfyClient, furnished: str, tmp_path: Path
):
    workflow = ui("quickstart")
    changes = {  # widgets_values has no names: old value -> new one, at the place of the old
        "SuDeFineTune": {200: 2},
        "SuDeTrainingOptions": {16: 2, 20: 1},
        "KSampler": {20: 1},
        "SaveImage": {},
    }
    for node in workflow["nodes"]:
        for old, new in changes.get(node["type"], {}).items():
            node["widgets_values"][node["widgets_values"].index(old)] = new
        if node["type"] == "SaveImage":
            node["widgets_values"] = ["by_comfy_run/after"]
    file = tmp_path / "quickstart.json"
    file.write_text(json.dumps(workflow), encoding="utf-8")
    comfy = [sys.executable, "-m", "comfy_cli", "--skip-prompt", "--no-enable-telemetry", "run"]
    place = ["--host", "127.0.0.1", "--port", str(server.port)]
    done = subprocess.run(
        [*comfy, "--workflow", str(file), "--wait", *place],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((server.base / "output" / "by_comfy_run").glob("after_*.png"))) == 4


# --- While it runs ---------------------------------------------------------------------------------------------------


def test_the_node_is_never_silent_for_long(client: ComfyClient, furnished: str):
    workflow = small(api("quickstart"), training_seed=21)
    workflow[nodes(workflow, "SuDeTrainingOptions")[0]]["inputs"]["prior.image_seed"] = 21  # drawn anew
    trainers = nodes(workflow, "SuDeFineTune")
    running, heard = None, 0.0
    silences: list[tuple[float, str]] = []
    phase = ""

    def listen(_: str, kind: str, data: dict) -> None:
        nonlocal running, heard, phase
        now = time.monotonic()
        if running:
            silences.append((now - heard, phase))
        if kind == "executing":
            running = data["node"] if data["node"] in trainers else None
        if kind == "text":
            phase = data["text"]
        heard = now

    result = client.submit(workflow, on_event=listen)
    assert result.error is None, result.error
    said = {text.split(" ")[0] for _, text in result.texts}
    assert {"drawing", "encoding", "copying", "training", "taking"} <= said
    assert max(silences) <= (SILENCE, ""), sorted(silences)[-5:]


def test_an_interrupt_stops_within_a_step_and_gives_the_memory_back(
    server: ComfyServer, client: ComfyClient, furnished: str
):
    process = psutil.Process(server.process.pid)
    usual = small(api("sd15_full"), training_seed=22)
    assert client.submit(usual).error is None
    client.free()
    before = settled(process)
    asked: list[str] = []

    def stop(prompt_id: str, kind: str, data: dict) -> None:
        if kind == "text" and data["text"].startswith("training 2/") and not asked:
            asked.append(data["text"])
            client.interrupt(prompt_id)

    long = small(usual, training_seed=23)
    long[nodes(long, "SuDeFineTune")[0]]["inputs"]["baseline.steps"] = 5000
    result = client.submit(long, on_event=stop)
    assert result.error is not None and result.error.kind == "interrupted"
    steps = [value for node, value, most in result.progress if most == 5000]
    assert asked and max(steps) <= 4, "more than one step was done after the interrupt was asked for"
    client.free()
    after = settled(process, before + 200 * MIB)
    # one fp32 copy of this checkpoint's networks is 520 MiB, and training holds four times that
    assert after - before < 200 * MIB, f"{(after - before) / MIB:.0f} MiB more than before the interrupted training"
    assert client.submit(small(api("sd15_full"), training_seed=24)).error is None


def settled(process: psutil.Process, enough: int = 0) -> int:
    """The resident memory in bytes once it no longer falls (the server frees it between prompts)."""
    lowest, since = process.memory_info().rss, time.monotonic()
    while time.monotonic() - since < 3 and lowest > enough:
        time.sleep(0.2)
        rss = process.memory_info().rss
        if rss < lowest - MIB:
            lowest, since = rss, time.monotonic()
    return lowest
