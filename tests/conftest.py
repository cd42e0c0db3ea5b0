"""What every part of the suite shares: where ComfyUI is, one real server for all who need one, its log on failure.

Nothing here puts ComfyUI on the path: tests/unit must pass without it.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.comfy_client import ComfyClient
from bench.comfy_server import ComfyServer, comfyui_folder, prepare_base
from comfy_sude.store import GIGABYTE, Store

REPO = Path(__file__).resolve().parents[1]
SERVER = pytest.StashKey[ComfyServer]()
LOG_START = pytest.StashKey[int]()


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """The ComfyUI folder; the tests that need it are skipped where there is none."""
    folder = comfyui_folder()
    if not (folder / "main.py").is_file():
        pytest.skip("ComfyUI is not set up: run the tests with `python dev.py test`")
    return folder


@pytest.fixture(scope="session")
def server(comfyui: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator:
    """A running ComfyUI with the pack, on a base directory of its own: one for the whole suite."""
    base = prepare_base(tmp_path_factory.mktemp("server"))
    port = int(os.environ.get("SUDE_TEST_PORT", 0)) or None
    with ComfyServer(base, port=port, comfyui=comfyui, log=base / "server.log") as running:
        request.config.stash[SERVER] = running
        yield running
        del request.config.stash[SERVER]


@pytest.fixture(autouse=True)
def small_store(request: pytest.FixtureRequest) -> Iterator[None]:
    """Keep what the tests' trainings leave on disk small."""
    yield
    server = request.config.stash.get(SERVER, None)
    if server and "server" in request.fixturenames:
        Store(server.base / "user" / "sude").make_room(2 * GIGABYTE)


@pytest.fixture
def client(server: ComfyServer) -> Iterator[ComfyClient]:
    """A client of the server with its own websocket."""
    with ComfyClient(server.address) as connected:
        yield connected


@pytest.fixture(scope="session")
def checkpoint(server: ComfyServer) -> Callable[[str], str]:
    """Makes small random checkpoints in the server's models folder; returns the name to give to the loader."""
    made: dict[str, str] = {}

    def make(variant: str = "abs") -> str:
        if variant not in made:
            name = f"tiny_{variant}.safetensors"
            path = server.base / "models" / "checkpoints" / name
            # In a process of its own: it imports ComfyUI, which must not be on this one's path.
            command = [sys.executable, str(REPO / "tests" / "tiny.py"), str(path), variant]
            environment = {**os.environ, "PYTHONPATH": str(server.comfyui)}
            subprocess.run(command, env=environment, check=True, capture_output=True)
            made[variant] = name
        return made[variant]

    return make


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Remember where the server's log stands when a test starts."""
    server = item.config.stash.get(SERVER, None)
    item.stash[LOG_START] = server.log.stat().st_size if server else 0
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Show what the server printed during a test that failed."""
    report = yield
    server = item.config.stash.get(SERVER, None)
    if report.failed and server and "server" in item.fixturenames:
        report.sections.append(("ComfyUI's log during this test", server.printed(item.stash[LOG_START])[-20_000:]))
    return report


def pytest_report_header() -> str:
    """Say which ComfyUI and Python are under test."""
    return f"ComfyUI: {comfyui_folder()} (Python {sys.version.split()[0]})"
