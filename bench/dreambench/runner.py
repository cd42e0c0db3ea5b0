"""Runs the cells that are not done yet, here or over a cluster, and keeps what they give: one process writes."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.comfy_server import comfyui_folder
from comfy_sude.scores import Models

from . import cluster
from .protocol import BASELINES, MULTIPLIERS, Cell, Protocol, cells, fingerprint
from .results import DONE, Results
from .studio import Job, Outcome, Studio, failed, write
from .subjects import Subject, lacking, photographs


@dataclass(frozen=True)
class Plan:
    """What is to be run.

    Attributes:
        protocol: how every cell is made.
        backbones: name -> checkpoint file.
        subjects: which.
        data: folder of their pictures.
        models: folder of the scoring models.
        output: folder of the results.
        baselines: of protocol.BASELINES.
        multipliers: of w_s, 0 for plain.
        seeds: of the trainings.
    """

    protocol: Protocol
    backbones: Mapping[str, Path]
    subjects: Sequence[Subject]
    data: Path
    models: Path
    output: Path
    baselines: Sequence[str] = BASELINES
    multipliers: Sequence[float] = MULTIPLIERS
    seeds: Sequence[int] = (0,)
    results: Results = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "results", Results(self.output / "results.jsonl"))

    def missing(self) -> list[str]:
        """All that is not there, each as a sentence."""
        found = []
        if not (comfyui_folder() / "main.py").is_file():
            found.append(f"{comfyui_folder()} is no ComfyUI: run this through dev.py, or set COMFYUI_PATH.")
        if not self.backbones:
            found.append("No checkpoint is given: --backbone SD1.4=FILE, once for each.")
        found += [
            f"There is no checkpoint {path} for {name}." for name, path in self.backbones.items() if not path.is_file()
        ]
        found += lacking(self.data, self.subjects)
        absent = Models([self.models]).missing(self.protocol.metrics)
        found += [f"The scoring model {name} is not in {self.models / name}." for name in absent]
        return found

    def jobs(self) -> dict[str, Job]:
        """Every cell's job by its key."""
        by_name = {subject.name: subject for subject in self.subjects}
        found = {}
        for cell in cells(self.backbones, by_name, self.baselines, self.multipliers, self.seeds):
            found[cell.key] = self.job(cell, by_name[cell.subject])
        return found

    def job(self, cell: Cell, subject: Subject) -> Job:
        """One cell's job."""
        checkpoint = self.backbones[cell.backbone]
        made = fingerprint(cell, subject, self.protocol, checkpoint.name)
        return Job(cell, subject, self.protocol, str(checkpoint.resolve()), made)

    def records(self) -> list[dict]:
        """The finished cells of this plan; ValueError if one was made in another way."""
        return list(self.results.done({key: job.fingerprint for key, job in self.jobs().items()}).values())

    def open(self) -> dict[str, Job]:
        """The jobs that are not done."""
        done = {record["key"] for record in self.records()}
        return {key: job for key, job in self.jobs().items() if key not in done}

    def pictures_of(self, subject: Subject) -> list[bytes]:
        """A subject's picture files, the one to train on first."""
        return [path.read_bytes() for path in photographs(self.data, subject, self.protocol.references)]


def run(plan: Plan, attempts: Iterator[tuple[Job, Outcome]], count: int) -> int:
    """Keep every outcome as it comes; returns how many cells are still open.

    Pictures are written before the record: a cell that counts as done has them.
    """
    open_cells, tried = set(plan.open()), 0
    for job, outcome in attempts:
        tried += 1
        if outcome.record["status"] == DONE:
            write(plan.output / "pictures", job, outcome.pictures)
            open_cells.discard(job.cell.key)
        plan.results.append(outcome.record)
        print(f"[{count - len(open_cells)}/{count}] {job.cell.key}: {told(outcome)}", flush=True)
    return len(open_cells)


def told(outcome: Outcome) -> str:
    """An outcome in a few words."""
    record = outcome.record
    if record["status"] != DONE:
        return f"failed: {record['error'].splitlines()[0][:300]}"
    flat = {metric: sum(map(sum, rows)) / sum(map(len, rows)) for metric, rows in record["scores"].items()}
    return f"{record['seconds']:.0f} s, " + ", ".join(f"{metric} {value:.1f}" for metric, value in flat.items())


def here(plan: Plan, base: Path) -> Iterator[tuple[Job, Outcome]]:
    """Every open cell, one after the other on this machine, each once: what fails is tried again by the next run."""
    with Studio(base, plan.models) as studio:
        for job in plan.open().values():
            yield job, studio.perform(job, plan.pictures_of(job.subject))


def over_cluster(
    plan: Plan, address: str, resources: Mapping[str, float], attempts: int
) -> Iterator[tuple[Job, Outcome]]:
    """Every open cell over a Ray cluster, as they end; what fails is tried again up to `attempts` times."""
    jobs = plan.open()
    with cluster.connected(address, resources) as ray:
        pictures = {name: ray.put(plan.pictures_of(subject)) for name, subject in subjects_of(jobs).items()}
        models = str(plan.models.resolve())
        tasks = {key: (job, pictures[job.subject.name], models) for key, job in jobs.items()}
        for key, result in cluster.spread(ray, cluster.make, tasks, resources, attempts, unfinished):
            lost = isinstance(result, Exception)
            yield jobs[key], failed(jobs[key], f"{type(result).__name__}: {result}") if lost else result


def subjects_of(jobs: Mapping[str, Job]) -> dict[str, Subject]:
    """The subjects of some jobs by name."""
    return {job.subject.name: job.subject for job in jobs.values()}


def unfinished(outcome: Outcome) -> bool:
    """Whether an outcome is no finished cell."""
    return outcome.record["status"] != DONE


def about(plan: Plan) -> dict:
    """What the results' table says of how they came about."""
    return {
        "protocol": dataclasses.asdict(plan.protocol),
        "backbones": {name: path.name for name, path in plan.backbones.items()},
        "seeds": list(plan.seeds),
        "multipliers": list(plan.multipliers),
    }
