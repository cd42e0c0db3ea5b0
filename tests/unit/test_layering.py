"""The method can be lifted out: its modules know neither ComfyUI nor who calls them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "comfy_sude"
METHOD = ("sude", "diffusion", "captions", "recipe")
COMFYUI = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "nodes", "server", "execution"}
ABOVE = {"baselines", "bench", "finetune", "host", "nodes", "resume", "subject", "train", "watch"}
WITHOUT_COMFYUI = (
    *METHOD, "data", "image_attention", "lowrank", "log", "train", "watch", "chart", "grid", "files", "store", "resume",
    "subject", "baselines", "score_models", "score_table", "scores",
)  # fmt: skip


def imported(path: Path) -> set[tuple[int, str]]:
    """(level, first part) of every import statement in a file, wherever it stands; level 1 is within the package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {(0, alias.name.split(".")[0]) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add((node.level, node.module.split(".")[0]))
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.level, alias.name) for alias in node.names}
    return found


def files(names) -> list[Path]:
    paths = [PACKAGE / f"{name}.py" for name in names] + [p for n in names for p in (PACKAGE / n).glob("**/*.py")]
    return [path for path in paths if path.is_file()]


@pytest.mark.parametrize("path", files(METHOD), ids=lambda path: path.stem)
def test_the_method_imports_nothing_that_calls_it(path):
    names = {name for level, name in imported(path) if level}
    assert not names & ABOVE


@pytest.mark.parametrize("path", files(WITHOUT_COMFYUI), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_host_and_nodes_import_comfyui(path):
    imports = imported(path)
    assert not {name for level, name in imports if level == 0} & COMFYUI
    assert not {name for level, name in imports if level} & {"host", "nodes", "finetune"}


def test_the_loss_imports_nothing_but_torch():
    assert {name for _, name in imported(PACKAGE / "sude.py")} <= {"torch", "typing"}


def test_each_module_imports_on_its_own_without_comfyui():
    program = f"""
import importlib, sys
sys.path.insert(0, {str(PACKAGE.parent)!r})
for name in {sorted(COMFYUI)!r}:
    sys.modules[name] = None  # importing it now fails, were it on the path or not
for module in {[name for name in WITHOUT_COMFYUI if files([name])]!r}:
    importlib.import_module("comfy_sude." + module)
    loaded = {{name.split(".")[1] for name in sys.modules if name.startswith("comfy_sude.")}}
    callers = {ABOVE!r} if module in {METHOD!r} else {{"finetune", "host", "nodes"}}
    assert not loaded & callers, (module, loaded & callers)
    for name in [name for name in sys.modules if name.split(".")[0] == "comfy_sude"]:
        del sys.modules[name]
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(sys.prefix))
    assert done.returncode == 0, done.stderr
