"""DreamBench: the paper's Table 1 through a real ComfyUI, cell by cell: `python dev.py bench dreambench [run] ...`.

--smoke                                                 every part once, minutes on a CPU; the numbers mean nothing
--backbone SD1.4=FILE --data FOLDER --models FOLDER     the published run; goes on where it was
table | plots                                           only those, from the results there are
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import transformers

from bench.comfy_server import WORK, ServerError

from . import cluster, plots, runner, smoke, table
from .protocol import BASELINES, MULTIPLIERS, Protocol
from .runner import Plan
from .studio import Job, Outcome
from .subjects import load


class BenchError(RuntimeError):
    """Why the bench cannot go on, for the person at the keyboard."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="dev.py bench dreambench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", default="run", choices=("run", "table", "plots", "check"), help="run")
    parser.add_argument("--smoke", action="store_true", help="on the mini world, with random scoring models")
    parser.add_argument(
        "--backbone", action="append", default=[], metavar="NAME=FILE", help="a checkpoint, as SD1.4=FILE"
    )
    parser.add_argument("--data", type=Path, help="dataset/ of google/dreambooth: <subject>/00.jpg ...")
    parser.add_argument("--models", type=Path, default=WORK / "score_models", help="folder of the scoring models")
    parser.add_argument("--output", type=Path, help="folder of results, pictures, table and plots")
    parser.add_argument("--subjects", help="some of the 30, separated by commas")
    parser.add_argument("--baselines", help=f"some of: {', '.join(BASELINES)}")
    parser.add_argument("--seeds", default="0", help="of the trainings, separated by commas")
    parser.add_argument("--references", default="all", choices=("all", "first"), help="pictures to compare with")
    parser.add_argument(
        "--ray", metavar="ADDRESS", help="fan the cells out over this Ray cluster (auto: the local one)"
    )
    parser.add_argument(
        "--cell-resources", default=cluster.NEEDED, metavar="NAME=N,...", help="that a cell asks Ray for"
    )
    parser.add_argument("--attempts", type=int, default=3, help="that a cell has in one run over a cluster")
    return parser.parse_args(arguments)


def choose(options: argparse.Namespace) -> Plan:
    """The plan that the command line asks for; BenchError for what it gets wrong."""
    baselines = names(options.baselines, BASELINES, "--baselines")
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", options.seeds):
        raise BenchError(f"--seeds is {options.seeds!r}, but it must be whole numbers separated by commas: 0,1,2.")
    seeds = list(dict.fromkeys(int(seed) for seed in options.seeds.split(",")))
    output = options.output or WORK / ("dreambench-smoke" if options.smoke else "dreambench")
    if options.smoke:
        return smoke.plan(output, options.data, baselines=baselines, seeds=seeds)
    subjects = load()
    chosen = names(options.subjects, tuple(subjects), "--subjects")
    backbones = {}
    for given in options.backbone:
        name, _, path = given.partition("=")
        if not path:
            raise BenchError(f"--backbone is {given!r}, but it must be NAME=FILE, as in SD1.4=sd-v1-4.safetensors.")
        backbones[name] = Path(path)
    return Plan(
        Protocol(references=options.references),
        backbones,
        [subjects[name] for name in chosen],
        options.data or WORK / "dreambench-data",
        options.models,
        output,
        baselines,
        MULTIPLIERS,
        seeds,
    )


def names(text: str | None, known: tuple[str, ...], option: str) -> tuple[str, ...]:
    """The names in a text, or all that are known."""
    given = tuple(part.strip() for part in text.split(",")) if text else known
    wrong = [name for name in given if name not in known]
    if wrong:
        raise BenchError(f"{option} has {', '.join(wrong)}, but there are only: {', '.join(known)}.")
    return given


def attempts(plan: Plan, options: argparse.Namespace) -> Iterator[tuple[Job, Outcome]]:
    """The open cells, here or over the cluster."""
    if options.ray:
        return runner.over_cluster(plan, options.ray, cluster.read_resources(options.cell_resources), options.attempts)
    return runner.here(plan, WORK / "dreambench-base")


def check(plan: Plan, options: argparse.Namespace) -> None:
    """BenchError that names all that is missing at once."""
    missing = plan.missing()
    if options.ray:
        try:
            cluster.load_ray()
        except cluster.ClusterError as error:
            missing.append(str(error))
    if missing:
        raise BenchError("\n".join(["not everything is there:", *(f"  - {line}" for line in missing)]))


def report(plan: Plan, what: str) -> None:
    """Write table.md and table.json, plots, or both."""
    records = plan.records()
    if not records:
        raise BenchError(f"{plan.results.path} has no finished cell of this run.")
    rows = table.rows(records, [one for one in plan.multipliers if one], len(plan.seeds))
    title = f"DreamBench, {smoke.WARNING}" if smoke.BACKBONE in plan.backbones else "DreamBench"
    if what != "plots":
        seeds = ", ".join(map(str, plan.seeds))
        notes = [f"{len(records)} of {len(plan.jobs())} cells; training seeds {seeds}."]
        text = table.as_text(rows, title, notes)
        (plan.output / "table.md").write_text(text, encoding="utf-8")
        told = json.dumps(table.as_values(rows, runner.about(plan)), indent=1)
        (plan.output / "table.json").write_text(told + "\n", encoding="utf-8")
        print(text)
    if what != "table":
        for path in plots.write(plan.output, title, rows, table.points(records, len(plan.seeds))):
            print(path)


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line says; 1 if cells are left that failed."""
    options = parse(arguments)
    transformers.utils.logging.disable_progress_bar()
    plan = choose(options)
    left = 0
    if options.what in ("run", "check"):
        check(plan, options)
        print(f"{len(plan.open())} of {len(plan.jobs())} cells to do; results: {plan.results.path}", flush=True)
    if options.what == "check":
        return 0
    if options.what == "run":
        left = runner.run(plan, attempts(plan, options), len(plan.jobs()))
    report(plan, options.what)
    if left:
        print(f"{left} cells failed or are left: run the same again.")
    return 1 if left else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (BenchError, cluster.ClusterError, ServerError, ValueError) as problem:
        sys.exit(f"dreambench: {problem}")
    except KeyboardInterrupt:
        sys.exit(130)
