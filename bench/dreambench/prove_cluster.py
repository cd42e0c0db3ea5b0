"""Proves `--ray` on one machine: the smoke run over a local cluster of three raylets, one killed in mid-run.

    python -m bench.dreambench.prove_cluster [--baselines ViCo] [--subjects 2] [--compare RESULTS.jsonl]

Needs ray (README.md). Each machine is a raylet with one processor, each cell a ComfyUI of its own. What must hold: the
killed machine's cell was made by another, every cell is there exactly once with its pictures, the killed machine's
ComfyUI ended with it, and nothing is left to do. `--compare`: and the scores are those of a run without a cluster.
"""

import argparse
import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from . import cluster, runner, smoke
from .results import DONE, FAILED, Results
from .studio import LIFELINE, Job, Outcome

MACHINES = 3
RESOURCES = {"CPU": 1.0}


def comfyuis(machine) -> list[psutil.Process]:
    """The ComfyUI processes below a machine's raylet."""
    found = []
    for child in psutil.Process(machine.all_processes["raylet"][0].process.pid).children(recursive=True):
        try:
            if str(LIFELINE) in child.cmdline():
                found.append(child)
        except psutil.Error:  # it ended meanwhile
            continue
    return found


def kill_one(made) -> list[psutil.Process]:
    """Kill a machine as soon as one has a ComfyUI running for some seconds; that machine's ComfyUI processes."""
    while True:
        for machine in list(made.worker_nodes):
            running = [one for one in comfyuis(machine) if time.time() - one.create_time() > 5]
            if running:
                print(
                    f"killing the machine {machine.node_id[:8]}, whose ComfyUI is process {running[0].pid}", flush=True
                )
                made.remove_node(machine, allow_graceful=False)
                return running
        time.sleep(0.5)


def watched(attempts: Iterator[tuple[Job, Outcome]], made, lost: list) -> Iterator[tuple[Job, Outcome]]:
    """The attempts as they come; after the first one a machine is killed."""
    for number, attempt in enumerate(attempts):
        yield attempt
        if not number:
            lost += kill_one(made)


def main() -> int:
    """Run it; 0 if all holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--baselines", default="ViCo", help="of the smoke run, separated by commas")
    parser.add_argument("--subjects", type=int, default=2, help="how many of the smoke run's")
    parser.add_argument("--compare", type=Path, help="results of a smoke run without a cluster")
    options = parser.parse_args()
    os.environ["RAY_worker_niceness"] = "0"  # Ray's workers give way to all others by default: here they would starve
    ray = cluster.load_ray()
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory() as folder:
        plan = smoke.plan(Path(folder), baselines=tuple(options.baselines.split(",")))
        plan = dataclasses.replace(plan, subjects=plan.subjects[: options.subjects])
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for _ in range(MACHINES):
            made.add_node(num_cpus=1)
        lost: list[psutil.Process] = []
        try:
            attempts = watched(runner.over_cluster(plan, made.address, RESOURCES, 3), made, lost)
            left = runner.run(plan, attempts, len(plan.jobs()))
        finally:
            made.shutdown()
        records = plan.results.read()
        done = [record["key"] for record in records if record["status"] == DONE]
        failures = [record for record in records if record["status"] == FAILED]
        pictures = {
            key: len(list((plan.output / "pictures" / job.cell.folder).iterdir())) for key, job in plan.jobs().items()
        }
        held = {
            "no cell is left": left == 0 and not plan.open(),
            "every cell is there exactly once": sorted(done) == sorted(plan.jobs()),
            "a cell was lost with its machine and told so": any("Error" in one["error"] for one in failures),
            "what was lost was made by another machine": {one["key"] for one in failures} <= set(done),
            "the killed machine's ComfyUI ended with it": bool(lost) and not any(one.is_running() for one in lost),
            "every cell has its pictures": set(pictures.values()) == {len(smoke.PROMPTS) * plan.protocol.pictures},
        }
        if options.compare:
            alone = Results(options.compare).done()
            pairs = [(record, alone[record["key"]]) for record in plan.records()]
            held["the scores are those of a run without a cluster"] = all(
                close(one["scores"], other["scores"]) for one, other in pairs
            )
        print(f"ray {ray.__version__}: {len(done)} cells done, {len(failures)} attempts lost")
        for failure in failures:
            print(f"  {failure['key']}: {failure['error'].splitlines()[0][:160]}")
        for claim, true in held.items():
            print(f"{'holds' if true else 'DOES NOT HOLD'}: {claim}")
    return 0 if all(held.values()) else 1


def close(one: dict, other: dict, within: float = 0.05) -> bool:
    """Whether two cells' scores are alike, to so many points."""
    return all(
        abs(a - b) <= within
        for metric in one
        for row, row_other in zip(one[metric], other[metric], strict=True)
        for a, b in zip(row, row_other, strict=True)
    )


if __name__ == "__main__":
    sys.exit(main())
