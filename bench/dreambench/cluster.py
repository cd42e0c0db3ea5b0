"""Fans tasks out over a Ray cluster; only the driver keeps results. Ray is an extra of this bench (README.md).

Every machine needs this repository, its environment, the checkpoint and the scoring models under the same paths.
Pictures travel through Ray, both ways. A task whose worker or machine is lost is tried again, on another.
"""

import contextlib
import importlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from bench.comfy_server import REPO, WORK, comfyui_folder

from .studio import Job, Outcome, Studio

NEEDED = "GPU=1"  # of each cell


class ClusterError(RuntimeError):
    """Why the cluster cannot be used, in one sentence."""


def load_ray():
    """The ray package; ClusterError if it is not installed."""
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ClusterError(
            f"--ray needs the package ray, which is an extra of this bench ({error}): install what pyproject.toml "
            "lists under dreambench into this environment, on every machine of the cluster."
        ) from error


def read_resources(text: str) -> dict[str, float]:
    """ "GPU=1,CPU=4" as numbers; ValueError for anything else."""
    found = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = part.partition("=")
        try:
            found[name.strip()] = float(number)
        except ValueError:
            raise ValueError(
                f"--cell-resources has {part!r}, but each part must be NAME=NUMBER, as in GPU=1,CPU=4."
            ) from None
    return found


@contextlib.contextmanager
def connected(address: str, resources: Mapping[str, float]) -> Iterator[object]:
    """The ray package, connected to a cluster that has a machine for one task.

    Args:
        address: of the cluster's head, "HOST:6379", or "auto".
        resources: of one task.

    Raises:
        ClusterError: no ray, no such cluster, or no machine that is large enough.
    """
    ray = load_ray()
    paths = [str(REPO), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "COMFYUI_PATH": str(comfyui_folder())}
    try:
        ray.init(address=address, runtime_env={"env_vars": environment}, log_to_driver=False, logging_level="warning")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(f"no Ray cluster answers at {address}: {error}") from error
    try:
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(all(one.get(name, 0) >= least for name, least in resources.items()) for one in machines):
            wanted = ", ".join(f"{least:g} {name}" for name, least in resources.items())
            raise ClusterError(
                f"none of the cluster's {len(machines)} machines has {wanted} for a cell: change --cell-resources."
            )
        yield ray
    finally:
        ray.shutdown()


def spread(
    ray,
    work: Callable,
    tasks: Mapping[str, tuple],
    resources: Mapping[str, float],
    attempts: int,
    went_wrong: Callable[[object], bool],
) -> Iterator[tuple[str, object]]:
    """Run a function on every task's arguments; yields (key, result) of each attempt as it ends, in any order.

    Args:
        ray: from `connected`.
        work: a function of a module that the machines can import.
        tasks: key -> arguments; Ray's references are resolved.
        resources: that each task asks for.
        attempts: that a task has.
        went_wrong: whether a result counts as a failure. A `RayError` as result always does: the worker or its machine
            was lost, or the function raised.
    """
    asked = dict(resources)
    options = {"num_cpus": asked.pop("CPU", 1), "num_gpus": asked.pop("GPU", 0), "resources": asked, "max_retries": 0}
    remote = ray.remote(work).options(**options)
    tries = dict.fromkeys(tasks, 1)
    pending = {remote.remote(*arguments): key for key, arguments in tasks.items()}
    while pending:
        (ready,), _ = ray.wait(list(pending), num_returns=1)
        key = pending.pop(ready)
        try:
            result = ray.get(ready)
        except ray.exceptions.RayError as error:
            result = error
        if (isinstance(result, Exception) or went_wrong(result)) and tries[key] < attempts:
            tries[key] += 1
            pending[remote.remote(*tasks[key])] = key
        del ready
        yield key, result


def make(job: Job, photographs: Sequence[bytes], models: str) -> Outcome:
    """Make one cell on the machine this runs on, with a ComfyUI of its own."""
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    with contextlib.ExitStack() as stack:
        if gpu:  # Ray gives a GPU to one task at a time, so its class images and trainings can be kept
            base = WORK / "dreambench-machines" / f"gpu-{gpu.replace(',', '-')}"
        else:
            base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dreambench-")))
        studio = stack.enter_context(Studio(base, models))
        return studio.perform(job, photographs)
