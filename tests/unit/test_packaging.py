"""pyproject.toml and the files beside it, as the Registry, ComfyUI-Manager and dev.py read them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import dev

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no TOML reader")

REPO = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))
# Source: comfy_cli/registry/config_parser.py; a single unknown one voids all.
ACCELERATORS = {"NVIDIA CUDA", "AMD ROCm", "Intel Arc", "Apple Metal"}


def test_the_name_and_version_are_what_the_registry_accepts():
    name, version = PROJECT["project"]["name"], PROJECT["project"]["version"]
    assert re.fullmatch(r"[a-z][a-z0-9-]{0,98}", name) and "comfyui" not in name
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert f"## {version}" in (REPO / "CHANGELOG.md").read_text(encoding="utf-8")


def test_nothing_is_installed_beside_what_comfyui_brings():
    assert PROJECT["project"]["dependencies"] == []
    lines = (REPO / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert all(line.startswith("#") for line in lines if line.strip())


def test_the_development_tools_never_replace_torch():
    names = {
        re.match(r"[\w-]+", wanted).group().lower() for wanted in PROJECT["project"]["optional-dependencies"]["dev"]
    }
    assert not names & {"torch", "torchvision", "torchaudio", "accelerate", "peft"}  # the last two bring torch along


def test_dev_py_reads_the_same_tools_as_an_installer():
    assert dev.dev_requirements() == PROJECT["project"]["optional-dependencies"]["dev"]


def test_the_classifiers_are_those_the_registry_knows():
    for classifier in PROJECT["project"]["classifiers"]:
        kind, _, value = classifier.partition(" :: ")
        assert kind in {"Operating System", "Environment"}
        assert kind != "Environment" or value.removeprefix("GPU :: ") in ACCELERATORS


def test_the_registry_entry_is_complete():
    comfy = PROJECT["tool"]["comfy"]
    assert comfy["DisplayName"] == "ComfyUI-SuDe" and comfy["PublisherId"]
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])
    repository = PROJECT["project"]["urls"]["Repository"].removeprefix("https://github.com/")
    prefix = f"https://raw.githubusercontent.com/{repository}/main/"
    assert comfy["Icon"].startswith(prefix)
    assert (REPO / comfy["Icon"].removeprefix(prefix)).is_file(), "the icon is not in the repository"
    assert "web" not in comfy, "WEB_DIRECTORY alone: with both, ComfyUI loads every script twice"


def test_the_registrys_own_check_finds_nothing():
    pytest.importorskip("comfy_cli")
    command = [sys.executable, "-m", "comfy_cli", "--skip-prompt", "--no-enable-telemetry", "node", "validate"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "arning" not in done.stdout + done.stderr


def test_no_file_of_the_project_names_this_machine():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    home = re.escape(str(Path.home())) if len(str(Path.home())) > 5 else None
    pattern = re.compile("|".join(filter(None, [re.escape(str(REPO)) + r"\b", home])))
    for name in filter(None, listed.stdout.decode().split("\0")):
        path = REPO / name
        if path.suffix in {".py", ".md", ".toml", ".json", ".js", ".txt", ""} and path.is_file():
            assert not pattern.search(path.read_text(encoding="utf-8", errors="replace")), f"{name} holds a local path"


def test_ruff_is_clean():
    pytest.importorskip("ruff")
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--quiet", "."], cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
