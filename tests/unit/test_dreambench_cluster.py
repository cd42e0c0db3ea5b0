"""DreamBench's tasks over a local Ray cluster of several machines' processes, one of which is killed in mid-run.

Ray is an extra of the bench: without it these tests are skipped.
"""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.dreambench import cluster

ray = pytest.importorskip("ray", reason="ray is an extra of the bench, not of the tests")
TASKS = 6


@pytest.fixture(scope="module")
def machines() -> Iterator[object]:
    """A head without processors, and three machines of one processor each."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # workers would starve beside other tests
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for _ in range(3):
            made.add_node(num_cpus=1)
        yield made
        made.shutdown()


def mark(number: int, folder: str) -> int:
    """Leave a file that says which process works on this number, take a while, and square it."""
    Path(folder, f"{number}_{os.getpid()}").write_text(ray.get_runtime_context().get_node_id(), encoding="utf-8")
    time.sleep(4)
    return number**2


def fail_once(folder: str) -> str:
    """Say "failed" the first time and "done" the second."""
    tried = Path(folder, "tried")
    if tried.exists():
        return "done"
    tried.write_text("", encoding="utf-8")
    return "failed"


def stop_itself() -> None:
    """End the worker as a lack of memory would."""
    os.kill(os.getpid(), signal.SIGKILL)


def never(_: object) -> bool:
    return False


def just_started(folder: Path) -> str:
    """The machine on which the next task starts."""
    while True:
        for path in folder.iterdir():
            if time.time() - path.stat().st_mtime < 1 and (machine := path.read_text("utf-8")):
                return machine
        time.sleep(0.05)


def test_no_cluster_at_the_address_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(cluster.ClusterError, match="no Ray cluster answers at auto"):
        with cluster.connected("auto", {"CPU": 1}):
            pass


def test_a_task_that_fails_is_tried_again_and_each_attempt_is_told(machines, tmp_path: Path):
    with cluster.connected(machines.address, {"CPU": 1}) as connected:
        tasks = {"only": (str(tmp_path),)}
        got = list(cluster.spread(connected, fail_once, tasks, {"CPU": 1}, 3, lambda result: result == "failed"))
        assert got == [("only", "failed"), ("only", "done")]
        (tmp_path / "tried").unlink()
        got = list(cluster.spread(connected, fail_once, tasks, {"CPU": 1}, 1, lambda result: result == "failed"))
        assert got == [("only", "failed")]


def test_a_task_whose_worker_always_dies_ends_after_its_attempts(machines):
    with cluster.connected(machines.address, {"CPU": 1}) as connected:
        got = list(cluster.spread(connected, stop_itself, {"only": ()}, {"CPU": 1}, 2, never))
    assert [key for key, _ in got] == ["only", "only"] and all(isinstance(result, Exception) for _, result in got)


def test_a_cluster_without_a_machine_for_a_cell_is_refused_at_once(machines):
    with pytest.raises(cluster.ClusterError, match="none of the cluster's 4 machines has 1 GPU"):
        with cluster.connected(machines.address, {"GPU": 1}):
            pass


def test_tasks_of_a_machine_that_is_killed_are_done_by_the_others(machines, tmp_path: Path):
    tasks = {str(number): (number, str(tmp_path)) for number in range(TASKS)}
    got, killed = [], ""
    with cluster.connected(machines.address, {"CPU": 1}) as connected:
        for key, result in cluster.spread(connected, mark, tasks, {"CPU": 1}, 3, never):
            got.append((key, result))
            if not killed:
                killed = just_started(tmp_path)
                (lost,) = [one for one in machines.worker_nodes if one.node_id == killed]
                machines.remove_node(lost, allow_graceful=False)
    right = {key: result for key, result in got if not isinstance(result, Exception)}
    assert right == {str(number): number**2 for number in range(TASKS)}
    assert len(got) > TASKS, "no attempt was lost with the machine"
    assert sorted(key for key, result in got if not isinstance(result, Exception)) == sorted(tasks)
