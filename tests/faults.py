"""What happens to a training when things go wrong, for real: `python dev.py bench faults`.

A real ComfyUI with the pack trains a small checkpoint again and again, and is killed, interrupted, run out of disk,
given damaged files and a second server on the same store. After each fault the same prompt is queued again; the subject
that comes out must have the bits of a training that nothing disturbed, and no more steps may be lost than were done
since the last save. Prints a table of what survived and writes it as JSON.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from PIL import Image

from bench.comfy_client import ComfyClient, Result
from bench.comfy_server import WORK, ComfyServer, prepare_base
from comfy_sude import files, subject
from comfy_sude.store import Store, tensor_hash

REPO = Path(__file__).resolve().parents[1]
PHASES = ("looking", "drawing", "encoding", "training", "keeping")
STEPS = 40
INTERVAL = 1.0  # seconds between two saves
SLACK = 4.0  # a busy machine's slow saves come less often (a twentieth of the time), and texts come late
CHECKPOINT = "faults.safetensors"
JOBS = ("interrupt", "disk", "two")


@dataclass
class Row:
    """One kind of fault: how often, how often the right subject came out afterwards, and what it cost."""

    fault: str
    tried: int = 0
    survived: int = 0
    most_steps_lost: int = 0
    most_seconds_lost: float = 0.0
    wrong: list[str] = field(default_factory=list)


@dataclass
class Moment:
    """What a training had reached when the fault struck."""

    steps: int = 0
    seconds_a_step: float = 0.0
    phase: str = ""
    started: int | None = None  # the step the training began at; all of them if it was found whole


class World:
    """A base directory, the workflow, and what an undisturbed training makes of it."""

    def __init__(self, base: Path):
        self.base = prepare_base(base)
        checkpoint = self.base / "models" / "checkpoints" / CHECKPOINT
        if not checkpoint.is_file():
            comfyui = ComfyServer(self.base).comfyui
            command = [sys.executable, str(REPO / "tests" / "tiny.py"), str(checkpoint), "abs"]
            environment = {**os.environ, "PYTHONPATH": str(comfyui)}
            subprocess.run(command, env=environment, check=True, capture_output=True)
        Image.radial_gradient("L").resize((64, 64)).convert("RGB").save(self.base / "input" / "subject.png")
        self.store = self.base / "user" / "sude"
        self.count = 0
        self.truth = ""

    @contextlib.contextmanager
    def server(self, *extra: str) -> Iterator[ComfyServer]:
        """A server on this base; it may be dead already at the end."""
        self.count += 1
        with ComfyServer(self.base, log=self.base / f"server{self.count % 8}.log", extra=extra) as server:
            yield server

    def workflow(self, client: ComfyClient, steps: int = STEPS, **changes) -> dict:
        """Checkpoint and picture -> SuDe Fine-Tune (3) -> SuDe Save Subject (4)."""
        options = {
            "resolution": 64, "gradient_checkpointing": False, "prior": "class images", "prior.number": 16,
            "prior.steps": 2, "prior.cfg": 1.0, "save_interval": INTERVAL,
        }  # fmt: skip
        training = {"baseline": "DreamBooth LoRA", "baseline.steps": steps, "baseline.train_text_encoder": False}
        links = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "image": ["2", 0], "options": ["5", 0]}
        return {
            "1": client.node("CheckpointLoaderSimple", {"ckpt_name": CHECKPOINT}),
            "2": client.node("LoadImage", {"image": "subject.png"}),
            "3": client.node("SuDeFineTune", {**links, "category": "dog", **training, **changes}),
            "4": client.node("SuDeSaveSubject", {"subject": ["3", 2], "filename_prefix": f"run{time.time_ns()}"}),
            "5": client.node("SuDeTrainingOptions", options),
        }

    def outcome(self) -> str:
        """Hash of what the newest saved subject learned."""
        newest = max(files.within(self.base / "output" / "sude"), key=lambda path: path.stat().st_mtime_ns)
        tensors, _ = files.read(newest)
        return tensor_hash(sorted(tensors.items()))

    def forget(self) -> None:
        """An empty store."""
        for path in self.store.glob("*"):
            path.unlink()


def run(client: ComfyClient, workflow: dict, phase: str = "", strike: Callable[[str], None] | None = None):
    """Queue a workflow; strike at a random moment once a phase was reached. The result (None if the server died)."""
    moment, struck, stamps = Moment(), threading.Event(), []

    def listen(prompt_id: str, kind: str, data: dict) -> None:
        if kind != "text":
            return
        text = data["text"]
        moment.phase = text.split(" ")[0]
        if "reused" in text:
            moment.started = STEPS
        if text.startswith("training "):
            moment.steps = int(text.split(" ")[1].split("/")[0])
            if moment.started is None:
                moment.started = moment.steps
            stamps.append((time.monotonic(), moment.steps))
            if stamps[-1][1] > stamps[0][1]:
                moment.seconds_a_step = (stamps[-1][0] - stamps[0][0]) / (stamps[-1][1] - stamps[0][1])
        if strike and not struck.is_set() and moment.phase.startswith(phase):
            struck.set()
            lengths = {"training": 6.0, "drawing": 2.0, "encoding": 1.0}
            threading.Timer(random.uniform(0, lengths.get(phase, 0.3)), strike, [prompt_id]).start()

    try:
        return client.submit(workflow, on_event=listen), moment
    except Exception:  # the server hung up
        return None, moment


def resumed_at(result: Result) -> int:
    """The step a training went on from; all of them if it was found whole."""
    said = " ".join(text for _, text in result.texts)
    if "reused" in said or "3" in result.cached:
        return STEPS
    return int(said.split("resumed at step ")[1].split(" ")[0].rstrip(",;")) if "resumed at step" in said else 0


def lose(row: Row, moment: Moment, started: int, name: str) -> bool:
    """Enter how much was done in vain before a fault; whether that is more than a save's interval."""
    lost = max(0, moment.steps - started)
    seconds = lost * moment.seconds_a_step
    row.most_steps_lost = max(row.most_steps_lost, lost)
    row.most_seconds_lost = max(row.most_seconds_lost, round(seconds, 2))
    if seconds > INTERVAL + SLACK:
        row.wrong.append(f"{name}: {lost} steps ({seconds:.1f} s) lost")
        return True
    return False


def judge(row: Row, world: World, result: Result | None, moment: Moment | None, name: str) -> None:
    """Enter what came out after a fault."""
    row.tried += 1
    if result is None or result.error is not None:
        row.wrong.append(f"{name}: {'the server died' if result is None else result.error.message[:200]}")
        return
    if world.outcome() != world.truth:
        row.wrong.append(f"{name}: another result")
        return
    if moment is not None and lose(row, moment, resumed_at(result), name):
        return
    row.survived += 1


def undisturbed(world: World) -> None:
    """The truth."""
    with world.server() as server, ComfyClient(server.address) as client:
        result, _ = run(client, world.workflow(client))
        assert result is not None and result.error is None, result
        world.truth = world.outcome()


def kills(world: World, phase: str, times: int) -> Row:
    """kill -9 at random moments of a phase, again and again, until each training is whole after all."""
    row = Row(f"kill -9 while {phase}")
    world.forget()
    since: list[Moment] = []  # the kills of this training, the last one last
    while row.tried < times or since:
        with world.server() as server, ComfyClient(server.address) as client:
            workflow = world.workflow(client)
            strike = (lambda _, server=server: server.process.kill()) if row.tried + len(since) < times else None
            result, moment = run(client, workflow, phase, strike)
            if since and moment.started is not None:
                lose(row, since[-1], moment.started, f"{phase} {row.tried + len(since)}")
            if result is None:
                since.append(moment)
                server.process.wait()
                continue
            whole = result.error is None and world.outcome() == world.truth
            row.tried += len(since)
            row.survived += len(since) if whole else 0
            if not whole:
                row.wrong.append(f"{phase}: another result after {len(since)} kills, or {result.error}")
            since = []
            world.forget()
            if strike is not None:  # it came too late: the timer may still strike
                server.process.kill()
    return row


def interrupts(world: World, times: int) -> Row:
    """Interrupts at random moments of random phases, on one server that must live on."""
    row = Row("interrupt")
    with world.server() as server, ComfyClient(server.address) as client:
        for index in range(times):
            world.forget()
            client.free()
            phase = random.choice(PHASES)
            result, moment = run(client, world.workflow(client), phase, lambda prompt: client.interrupt(prompt))
            stopped = result is not None and (result.error is None or result.error.kind == "interrupted")
            again, _ = run(client, world.workflow(client))
            judge(row, world, again if stopped else None, moment, f"{index} in {moment.phase} {moment.steps}")
    return row


def full_disk(world: World, times: int) -> Row | None:
    """The store on a file system with too little room. Needs the right to mount; None without it."""
    row = Row("disk full while it trains")
    for index in range(times):
        world.forget()
        size = 200 + 150 * index  # KiB: room for nothing, for class images, for a state but no second one
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(world.store)]
        if os.name == "nt" or subprocess.run(mount, capture_output=True).returncode:
            return None
        try:
            with world.server() as server, ComfyClient(server.address) as client:
                result, _ = run(client, world.workflow(client))
                told = result is not None and any("could not be" in text for _, text in result.texts)
                judge(row, world, result, None, f"{size} KiB")
                if not told:
                    row.survived -= 1
                    row.wrong.append(f"{size} KiB: the person was not told")
        finally:
            subprocess.run(["umount", str(world.store)], check=True)
    return row


def damaged(path: Path, target: Path, how: str) -> None:
    """A copy of a file with some of its bits lost."""
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[: random.randrange(len(content))]
    elif how == "header bit":
        content[random.randrange(min(len(content), 8 + int.from_bytes(content[:8], "little")))] ^= (
            1 << random.randrange(8)
        )
    elif how == "bit":
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    elif how == "zeroed":
        start = random.randrange(len(content))
        content[start : start + 4096] = bytes(len(content[start : start + 4096]))
    target.write_bytes(content)


def damages(world: World, times: int) -> Row:
    """Damaged states and subjects, read as the pack reads them: refused, or whole after all; never a wrong value."""
    row = Row("damaged file read")
    folder = world.base / "damaged"
    folder.mkdir(exist_ok=True)
    store = Store(folder)
    kept = [entry.path for kind in ("state", "subject") for entry in Store(world.store).entries(kind)]
    saved = next(files.within(world.base / "output" / "sude"))
    whole = {path: files.read(path) for path in (*kept, saved)}
    for index in range(times):
        how = ("truncated", "bit", "header bit", "zeroed")[index % 4]
        source = (*kept, saved)[index // 4 % (len(kept) + 1)]
        row.tried += 1
        try:
            if source == saved:
                target = folder / "saved.safetensors"
                damaged(source, target, how)
                found = subject.packed(subject.load(target))
                expected = subject.packed(subject.unpacked(*whole[source]))
            else:
                damaged(source, store.path("entry", "x"), how)
                found, expected = store.get("entry", "x"), whole[source]
        except ValueError:
            found = None
        except Exception as error:  # anything else would reach the person as a traceback
            row.wrong.append(f"{how} {source.name}: {type(error).__name__}: {error}")
            continue
        same = found is not None and found[1] == expected[1] and found[0].keys() == expected[0].keys()
        same = same and all(torch.equal(value, expected[0][name]) for name, value in found[0].items())
        if found is None or same:
            row.survived += 1
        else:
            row.wrong.append(f"{how} {source.name}: a wrong value was loaded")
    shutil.rmtree(folder)
    return row


def damages_served(world: World, times: int) -> Row:
    """Damaged states and results in the store of a running server: trained again, to the right result."""
    row = Row("damaged file in the store of a server")
    with world.server() as server, ComfyClient(server.address) as client:
        for index in range(times):
            client.free()
            entries = Store(world.store).entries(("subject", "state")[index % 2])
            if index % 2:  # the state, with the result gone
                for entry in Store(world.store).entries("subject"):
                    entry.path.unlink()
            for entry in entries:
                damaged(entry.path, entry.path, ("bit", "truncated", "zeroed")[index % 3])
            again, _ = run(client, world.workflow(client))
            judge(row, world, again, None, str(index))
    return row


def two_servers(world: World, times: int) -> Row:
    """Two servers train the same on one store at the same time; one of them is killed now and then."""
    row = Row("two servers on one store")
    other = World(world.base.parent / (world.base.name + "2"))
    other.truth = world.truth
    if not other.store.is_symlink():
        other.store.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(other.store, ignore_errors=True)
        other.store.symlink_to(world.store)
    for index in range(times):
        world.forget()
        with world.server() as first, other.server() as second:
            with ComfyClient(first.address) as a, ComfyClient(second.address) as b:
                results: dict[str, Result | None] = {}

                def train(name, place, client, results=results):
                    results[name] = run(client, place.workflow(client))[0]

                threads = [threading.Thread(target=train, args=x) for x in (("a", world, a), ("b", other, b))]
                for thread in threads:
                    thread.start()
                if index % 2:
                    time.sleep(random.uniform(3, 15))
                    second.process.kill()
                for thread in threads:
                    thread.join()
                judge(row, world, results["a"], None, f"{index} first")
                if index % 2 == 0:
                    judge(row, other, results["b"], None, f"{index} second")
    return row


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| Fault | Tried | Survived | Most lost |", "|---|---|---|---|"]
    for row in rows:
        lost = f"{row.most_steps_lost} steps ({row.most_seconds_lost:.1f} s)" if row.most_steps_lost else "nothing"
        lines.append(f"| {row.fault} | {row.tried} | {row.survived} | {lost} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Do it all; 0 if nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="in each phase")
    parser.add_argument("--interrupts", type=int, default=20)
    parser.add_argument("--files", type=int, default=500, help="damaged files read")
    parser.add_argument("--base", type=Path, default=WORK / "faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=["files", "server", *JOBS, *PHASES], help="some of the faults")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    options = parser.parse_args(arguments)
    random.seed(options.seed)
    world = World(options.base)
    world.forget()
    undisturbed(world)
    jobs: dict[str, Callable[[], Row | None]] = {
        "files": lambda: damages(world, options.files),
        "server": lambda: damages_served(world, max(2, options.kills)),
        "interrupt": lambda: interrupts(world, options.interrupts),
        "disk": lambda: full_disk(world, 4),
        "two": lambda: two_servers(world, 4),
        **{phase: lambda phase=phase: kills(world, phase, options.kills) for phase in PHASES},
    }
    rows: list[Row] = []
    if options.only and options.json and options.json.is_file():  # the others' rows stay
        rows = [Row(**row) for row in json.loads(options.json.read_text(encoding="utf-8"))]
    for name, job in jobs.items():
        if options.only and name not in options.only:
            continue
        began = time.monotonic()
        row = job()
        if row is None:
            print("(a file system of limited size could not be mounted: the full disk was not tried)", flush=True)
            continue
        rows = [one for one in rows if one.fault != row.fault] + [row]
        print(f"{row.fault}: {row.survived} of {row.tried} in {time.monotonic() - began:.0f} s {row.wrong}", flush=True)
        if options.json:
            options.json.write_text(json.dumps([asdict(one) for one in rows], indent=1) + "\n", encoding="utf-8")
    print(table(rows))
    return int(any(row.wrong or row.survived < row.tried for row in rows))


if __name__ == "__main__":
    sys.exit(main())
