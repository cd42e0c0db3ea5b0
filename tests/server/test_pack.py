"""The pack as ComfyUI sees it: loaded, complete, documented, and the same when installed from the published archive."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bench.comfy_client import ComfyClient
from bench.comfy_server import PACK, ComfyServer, prepare_base

REPO = Path(__file__).resolve().parents[2]
NODES = {
    "SuDeFineTune", "SuDeTrainingOptions", "SuDePrompt", "SuDeSaveSubject", "SuDeLoadSubject", "SuDeApplySubject",
    "SuDeExportSubject", "SuDeStore", "SuDeSweep", "SuDeGrid", "SuDeScore",
}  # fmt: skip


def import_failure(log: str) -> str:
    """The traceback of a custom node that ComfyUI could not import, or nothing."""
    if "IMPORT FAILED" not in log:
        return ""
    traceback = re.search(r"Traceback.*?Cannot import[^\n]*", log, re.DOTALL)
    return traceback.group() if traceback else log


def test_the_pack_is_loaded_without_an_error(server: ComfyServer):
    log = server.printed()
    assert not import_failure(log)
    assert re.search(rf"seconds: .*{PACK}$", log, re.MULTILINE), "ComfyUI did not list the pack among its custom nodes"


def test_the_server_offers_every_node(client: ComfyClient):
    assert NODES <= set(client.object_info())


def test_the_fine_tune_node_has_the_inputs_that_workflows_rely_on(client: ComfyClient):
    info = client.object_info("SuDeFineTune")["SuDeFineTune"]
    required, optional = info["input"]["required"], info["input"].get("optional", {})
    assert {"model", "clip", "vae", "image", "category", "training_seed"} <= set(required)
    assert {"class_images", "options"} <= set(optional)
    baselines = {**required, **optional}["baseline"][1]["options"]
    inputs = {option["key"]: set(option["inputs"]["required"]) for option in baselines}
    common = {"w_s", "steps", "learning_rate", "identifier"}
    assert common <= inputs["DreamBooth"]
    assert common | {"rank", "alpha", "train_text_encoder"} <= inputs["DreamBooth LoRA"]
    assert common | {"initializer", "vectors", "augmentation", "views"} <= inputs["Custom Diffusion"]
    assert common | {"initializer", "vectors", "token_learning_rate", "unconditional_image"} <= inputs["ViCo"]
    assert [option["key"] for option in baselines] == ["DreamBooth", "DreamBooth LoRA", "Custom Diffusion", "ViCo"]
    assert info["output"] == ["MODEL", "CLIP", "SUDE_SUBJECT"]
    assert not info["output_node"]


def test_the_prompt_node_makes_a_string_from_a_subject(client: ComfyClient):
    info = client.object_info("SuDePrompt")["SuDePrompt"]
    inputs = {**info["input"]["required"], **info["input"].get("optional", {})}
    assert {"subject", "attribute", "context"} <= set(inputs)
    assert inputs["subject"][0] == "SUDE_SUBJECT"
    assert info["output"] == ["STRING"]


def test_the_options_node_fits_the_fine_tune_node(client: ComfyClient):
    info = client.object_info("SuDeTrainingOptions")["SuDeTrainingOptions"]
    assert info["output"] == ["SUDE_OPTIONS"]
    names = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    expected = "precision resolution batch_size optimizer gradient_checkpointing prior truncation t0 reference flip fit"
    assert set(expected.split()) <= set(names)


@pytest.mark.parametrize("node", sorted(NODES))
def test_every_input_and_output_says_what_it_is_for(client: ComfyClient, node: str):
    info = client.object_info(node)[node]
    for group in (info["input"].get("required", {}), info["input"].get("optional", {})):
        for name, (kind, *settings) in group.items():
            assert settings and settings[0].get("tooltip"), f"{node}.{name} ({kind}) has no tooltip"
            for option in settings[0].get("options") or []:
                for sub_group in option["inputs"].values() if isinstance(option, dict) else []:
                    for sub_name, (_, *sub_settings) in sub_group.items():
                        assert sub_settings and sub_settings[0].get("tooltip"), f"{node}.{name}.{sub_name}: no tooltip"
    assert all(info["output_tooltips"]), f"an output of {node} has no tooltip"
    assert info["display_name"] != node and info["description"]


def test_the_published_archive_works_in_a_fresh_comfyui(comfyui: Path, tmp_path: Path, packed: Path):
    base = prepare_base(tmp_path / "base", pack=None)
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(base / "custom_nodes" / "sude")  # where the Registry's installers put it
    with ComfyServer(base, comfyui=comfyui, log=tmp_path / "server.log") as fresh:
        assert not import_failure(fresh.printed())
        with ComfyClient(fresh.address) as client:
            assert NODES <= set(client.object_info())


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What would be published: `comfy node pack` of a copy of the files that git tracks."""
    copy = tmp_path_factory.mktemp("pack")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, check=True).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (REPO / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((REPO / name).read_bytes())
    subprocess.run(["git", "init", "-q"], cwd=copy, check=True)
    subprocess.run(["git", "add", "--all", "--force"], cwd=copy, check=True)
    comfy = [sys.executable, "-m", "comfy_cli", "--skip-prompt", "--no-enable-telemetry"]
    done = subprocess.run([*comfy, "node", "pack"], cwd=copy, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0 and "arning" not in done.stdout + done.stderr, done.stdout + done.stderr
    (archive,) = copy.glob("*.zip")
    return archive


def test_only_run_time_files_are_published(packed: Path):
    with zipfile.ZipFile(packed) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    files = {"__init__.py", "pyproject.toml", "requirements.txt", "LICENSE", "README.md", "CHANGELOG.md"}
    assert files <= tops
    assert tops <= files | {"comfy_sude", "web", "locales", "workflows", "subgraphs"}


def test_the_shipped_workflows_name_only_nodes_that_exist(client: ComfyClient):
    known = set(client.object_info()) | {"Note", "MarkdownNote", "Reroute", "PrimitiveNode"}
    for path in (REPO / "workflows").rglob("*.json"):
        workflow = json.loads(path.read_text(encoding="utf-8"))
        if "nodes" in workflow:
            subgraphs = workflow.get("definitions", {}).get("subgraphs", [])
            nodes = [node["type"] for graph in (workflow, *subgraphs) for node in graph["nodes"]]
            used = set(nodes) - {graph["id"] for graph in subgraphs}
        else:
            used = {node["class_type"] for node in workflow.values()}
        assert used <= known, f"{path.name} names {used - known}"
