"""Runs the snippets of docs/api.md as a reader would: in a folder of their own, on a small copy of the quick start."""

import json
import os
import re
import shutil
import site
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from comfy_cli.workflow_to_api import convert_ui_to_api
from PIL import Image

from bench.comfy_client import ComfyClient
from bench.comfy_server import ComfyServer

REPO = Path(__file__).resolve().parents[2]
SMALL = {  # by class: what makes the quick start take seconds
    "SuDeTrainingOptions": {"resolution": 64, "prior.number": 2, "prior.steps": 1},
    "KSampler": {"steps": 1},
    "EmptyLatentImage": {"batch_size": 1},
}
TRAINER = "10"  # the node that the page ends early
LONG = 240  # seconds that one snippet may take on a busy machine


@dataclass(frozen=True)
class Snippet:
    """One fenced block of the page, under a heading of the second level."""

    section: str
    language: str
    code: str


def snippets(page: str) -> Iterator[Snippet]:
    """The fenced blocks of a page, in order."""
    section = language = ""
    lines: list[str] | None = None
    for line in page.splitlines():
        if line.startswith("```"):
            if lines is None:
                language, lines = line[3:].strip(), []
            else:
                yield Snippet(section, language, "\n".join(lines) + "\n")
                lines = None
        elif lines is not None:
            lines.append(line)
        elif line.startswith("## "):
            section = line[3:].replace("`", "")


class Reader:
    """Somebody who runs the page's snippets in a folder of their own.

    Args:
        folder: an empty one; becomes what the page calls the pack's folder.
        server: stands in for the page's http://127.0.0.1:8188.
        client: of that server.
        checkpoint: the name of a small checkpoint there.
        steps: of the training.
        seed: of the training; one that no other test uses, so that it is done.
    """

    def __init__(self, folder: Path, server: ComfyServer, client: ComfyClient, checkpoint: str, steps: int, seed: int):
        self.folder, self.server, self.client = folder, server, client
        self.infos = client.object_info()
        self.drawn = json.loads((REPO / "workflows" / "quickstart.json").read_text(encoding="utf-8"))
        self.workflow = json.loads((REPO / "workflows" / "api" / "quickstart.json").read_text(encoding="utf-8"))
        for node in self.drawn["nodes"]:
            if node["type"] == "SuDeFineTune":
                self.lighten(node["widgets_values"])
            changes = {**SMALL.get(node["type"], {}), "ckpt_name": checkpoint, "training_seed": seed}
            changes["baseline.steps"] = steps if str(node["id"]) == TRAINER else 2
            self.change(str(node["id"]), changes)
        for key, node in self.workflow.items():
            node["inputs"] = self.inputs(key)
        (folder / "workflows" / "api").mkdir(parents=True)
        self.write()
        Image.radial_gradient("L").resize((96, 80)).convert("RGB").save(folder / "photo.png")
        shutil.copy(REPO / "workflows" / "spike.png", server.base / "input" / "spike.png")
        self.environment = {
            **os.environ,
            "PYTHONIOENCODING": "utf-8",
            "DO_NOT_TRACK": "1",
            "HOME": str(folder),  # where comfy-cli keeps its notes
            "PYTHONUSERBASE": site.getuserbase(),
        }

    def lighten(self, values: list) -> None:
        """Train a LoRA of the UNet instead of everything: the same events in a fraction of the time."""
        options = self.infos["SuDeFineTune"]["input"]["required"]["baseline"][1]["options"]
        widgets = {option["key"]: option["inputs"]["required"] for option in options}
        start = values.index("DreamBooth")
        end = start + 1 + len(widgets["DreamBooth"])
        usual = {name: settings["default"] for name, (_, settings) in widgets["DreamBooth LoRA"].items()}
        given = dict(zip(widgets["DreamBooth"], values[start + 1 : end], strict=True))
        values[start:end] = ["DreamBooth LoRA", *{**usual, **given, "train_text_encoder": False}.values()]

    def change(self, key: str, changes: dict) -> None:
        """Set inputs of a node of the UI workflow; its values have no names, so each place is tried."""
        (values,) = (node.get("widgets_values") for node in self.drawn["nodes"] if str(node["id"]) == key)
        for name, value in changes.items():
            current = self.inputs(key)
            if current.get(name, value) == value:
                continue
            for place, old in enumerate(list(values)):
                values[place] = value
                if self.inputs(key) == {**current, name: value}:
                    break
                values[place] = old
            else:
                raise AssertionError(f"{name} of node {key} was not found in the UI workflow")

    def inputs(self, key: str) -> dict:
        """What a node of the UI workflow gets; nothing if it is none that runs, such as a note."""
        return convert_ui_to_api(self.drawn, self.infos).get(key, {}).get("inputs", {})

    def write(self) -> None:
        """Write the small workflow in both formats."""
        for path, workflow in {"api/quickstart.json": self.workflow, "quickstart.json": self.drawn}.items():
            (self.folder / "workflows" / path).write_text(json.dumps(workflow), encoding="utf-8")

    def here(self, code: str) -> str:
        """A snippet for this test's server: the one thing about it that is replaced."""
        return code.replace("127.0.0.1:8188", f"127.0.0.1:{self.server.port}").replace(
            "--port 8188", f"--port {self.server.port}"
        )

    def python(self, snippet: Snippet) -> str:
        """Save a snippet as the file that its first line names, run it, and return what it printed."""
        name = re.fullmatch(r"# (\w+\.py)", snippet.code.splitlines()[0])[1]
        (self.folder / name).write_text(self.here(snippet.code), encoding="utf-8")
        return self.run([sys.executable, name])

    def shell(self, snippet: Snippet) -> str:
        """Run a snippet in bash and return what it printed. Variables last from one to the next, as in a terminal."""
        tools = self.folder / "tools"
        if not tools.is_dir():  # the commands of this Python, whether or not it is on the PATH
            tools.mkdir()
            for name, command in {"python3": "", "comfy": " -m comfy_cli"}.items():
                (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{command} "$@"\n', encoding="utf-8")
                (tools / name).chmod(0o755)
        before = 'set -aeuo pipefail; if [ -f variables ]; then . ./variables; fi; PATH="$PWD/tools:$PATH"\n'
        return self.run(["bash", "-c", before + self.here(snippet.code) + "export -p > variables\n"])

    def run(self, command: list[str]) -> str:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            timeout=LONG,
        )
        assert done.returncode == 0, f"{command[-1]}\nended with {done.returncode}:\n{done.stdout}"
        return done.stdout

    def pictures(self) -> set[Path]:
        """What the server has saved."""
        return set((self.server.base / "output").rglob("*.png"))
