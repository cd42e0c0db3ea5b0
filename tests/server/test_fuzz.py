"""Ten thousand hostile prompts: each is refused, fails in its node or runs, and the server is as well as before."""

import collections
import http.client
import itertools
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

from bench.comfy_client import ComfyClient, Result
from bench.comfy_server import ComfyServer

from .fuzz import MARK, NUMBERS, PATHS, STRUCTURES, TEXTS, Case, Fuzzer, marked, snapshot

REPO = Path(__file__).resolve().parents[2]
SEED = int(os.environ.get("SUDE_FUZZ_SEED", 20240310))
PROMPTS = int(os.environ.get("SUDE_FUZZ_PROMPTS", 10_000))
PLAIN = PROMPTS * 4 // 5  # of them without models, which are faster
BATCH = 100  # prompts between two looks at the queue
DRAIN_SECONDS = 60
WRITABLE = ("output", "temp", "user", "models")  # of the base folder


class Harvest:
    """What became of the prompts.

    Attributes:
        counts: (node, what happened) -> how often.
        untold: prompts whose node failed in other words than the pack's own although all its links were right.
    """

    def __init__(self, server: ComfyServer) -> None:
        self.server = server
        self.connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        self.counts: collections.Counter = collections.Counter()
        self.untold: list[str] = []

    def request(self, method: str, path: str, data: Any = None) -> tuple[int, Any]:
        """One request on the connection that is kept; the server may answer anything but nothing."""
        body = None if data is None else json.dumps(data)
        self.connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = self.connection.getresponse()
        text = answer.read()
        return answer.status, json.loads(text) if answer.status in (200, 400) else text

    def submit(self, cases: Iterable[Case]) -> None:
        """Send prompts, wait until the queue is empty and see how each one ended."""
        accepted: dict[str, Case] = {}
        for case in cases:
            status, answer = self.request("POST", "/prompt", {"prompt": case.prompt})
            if status == 200:
                accepted[answer["prompt_id"]] = case
            else:
                framed = bool(case.node)  # ComfyUI itself answers 500 to what is no dictionary of nodes
                assert status == 400 or (status == 500 and not framed), f"{status}: {answer}\n{shown(case)}"
                self.counts[case.node, "refused" if status == 400 else f"answered {status}"] += 1
        self.drain(list(accepted.values()))
        for name, case in accepted.items():
            self.file(case, self.request("GET", f"/history/{name}")[1][name]["status"])

    def drain(self, waiting: list[Case]) -> None:
        """Wait until nothing is left in the queue."""
        end = time.monotonic() + DRAIN_SECONDS
        while left := self.request("GET", "/prompt")[1]["exec_info"]["queue_remaining"]:
            assert self.server.process.poll() is None, "the server ended"
            if time.monotonic() > end:
                hung = waiting[-left] if left <= len(waiting) else None
                pytest.fail(f"{left} prompts are not done after {DRAIN_SECONDS} s, the first of them:\n{shown(hung)}")
            time.sleep(0.01)

    def file(self, case: Case, status: dict) -> None:
        """Count how a prompt ended."""
        error = dict(status["messages"]).get("execution_error")  # its status_str forgets a dependency cycle
        self.counts[case.node, f"failed: {error['exception_type']}" if error else "ran"] += 1
        if error and case.typed and error["exception_type"] != "ValueError":
            self.untold.append(f"{error['exception_type']}: {error['exception_message'][:300]}\n{shown(case)}")


def shown(case: Case | None) -> str:
    """A prompt in a failed test's message."""
    text = json.dumps(case.prompt["target"] if case and case.node else case and case.prompt)
    return text if len(text) < 3000 else f"{text[:3000]}..."


@pytest.fixture
def outside(server: ComfyServer) -> Path:
    """A folder beside the server's base, with canaries."""
    folder = server.base.parent / "outside"
    folder.mkdir()
    save_file({}, folder / "canary.safetensors")
    (folder / MARK).write_text("canary")
    return folder


def take(fuzzer: Fuzzer, number: int, harvest: Harvest) -> None:
    """Send this many of the fuzzer's prompts."""
    stream = itertools.islice(fuzzer, number)
    while batch := list(itertools.islice(stream, BATCH)):
        harvest.submit(batch)


def real(client: ComfyClient, checkpoint: str, seed: int = 0) -> dict[str, dict]:
    """Nodes that train a subject in a second."""
    training = {"baseline": "DreamBooth LoRA", "baseline.steps": 1, "baseline.rank": 1, "training_seed": seed}
    training["baseline.train_text_encoder"] = False
    options = {"resolution": 64, "prior": "off", "gradient_checkpointing": False}
    links = {"model": ["load", 0], "clip": ["load", 1], "vae": ["load", 2], "image": ["picture", 0]}
    return {
        "picture": client.node("EmptyImage", {"width": 64, "height": 64}),
        "options": client.node("SuDeTrainingOptions", options),
        "load": client.node("CheckpointLoaderSimple", {"ckpt_name": checkpoint}),
        "train": client.node("SuDeFineTune", {**links, "options": ["options", 0], **training}),
    }


def prompted(client: ComfyClient, graph: dict[str, dict]) -> Result:
    """Run a graph's training and a prompt with its subject."""
    words = client.node("SuDePrompt", {"subject": ["train", 2], "attribute": "red", "context": ""})
    return client.submit({**graph, "words": words, "show": client.node("PreviewAny", {"source": ["words", 0]})})


def test_ten_thousand_hostile_prompts_leave_the_server_and_the_disk_as_they_were(
    server: ComfyServer, client: ComfyClient, checkpoint, outside: Path
):
    graph = real(client, checkpoint())
    assert prompted(client, graph).error is None
    writable = [server.base / name for name in WRITABLE]
    unwatched = (*writable, server.log, *server.base.glob("comfyui.db*"), server.base / "custom_nodes")
    before = snapshot(server.base.parent, *unwatched)
    elsewhere = {folder: marked(folder, deep) for folder, deep in places(server).items()}
    harvest = Harvest(server)
    started = time.monotonic()

    plain = {name: graph[name] for name in ("picture", "options")}
    sources = {"IMAGE": ["picture", 0], "SUDE_OPTIONS": ["options", 0]}
    take(Fuzzer(client.object_info(), SEED, outside, plain, sources), PLAIN, harvest)
    sources |= {"MODEL": ["load", 0], "CLIP": ["load", 1], "VAE": ["load", 2], "SUDE_SUBJECT": ["train", 2]}
    take(Fuzzer(client.object_info(), SEED + 1, outside, graph, sources), PROMPTS - PLAIN, harvest)

    logging.info("%d prompts in %.0f s, seed %d", PROMPTS, time.monotonic() - started, SEED)
    for (node, outcome), count in sorted(harvest.counts.items()):
        logging.info("%-24s %-40s %d", node or "no frame", outcome, count)
    assert sum(harvest.counts.values()) == PROMPTS
    assert snapshot(server.base.parent, *unwatched) == before, "something outside the server's folders changed"
    assert {folder: marked(folder, deep) for folder, deep in places(server).items()} == elsewhere
    result = prompted(client, real(client, checkpoint(), seed=1))
    assert result.error is None and result.outputs["show"]["text"] == ["photo of a red sks dog"]
    nodes = {name for name in client.object_info() if name.startswith("SuDe")}
    executed = {node for node, outcome in harvest.counts if outcome != "refused"}
    assert executed >= nodes, "some nodes were never reached"
    assert {node for node, outcome in harvest.counts if outcome == "ran"} >= {"SuDePrompt", "SuDeTrainingOptions"}
    assert not harvest.untold, f"{len(harvest.untold)} errors without words for the user, for example\n" + "\n".join(
        harvest.untold[:5]
    )


def test_the_route_that_ends_a_training_takes_anything(server: ComfyServer):
    harvest = Harvest(server)
    values = (*NUMBERS, *TEXTS, *PATHS, *STRUCTURES)
    for body in (*values, *({"node": value} for value in values), {}, {"node": "1", "": NUMBERS}):
        status, _ = harvest.request("POST", "/sude/finish", body)
        assert status in (400, 404), f"{status}: {json.dumps(body)[:300]}"


def places(server: ComfyServer) -> dict[Path, bool]:
    """Where else a file could land, and whether it could lie deeper: the code, and the folders that paths begin at."""
    deep = dict.fromkeys((server.comfyui, REPO / "comfy_sude", REPO / "web"), True)
    shallow = (Path("/"), Path.home(), Path.cwd(), REPO, Path(tempfile.gettempdir()), Path("/dev"), Path("/etc"))
    return {**dict.fromkeys(shallow, False), **deep}
