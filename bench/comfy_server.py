"""Starts a ComfyUI with the pack, for `dev.py serve`, the demo, the benches and the tests. Standard library only.

Everything the server reads and writes lies in a base directory of ours (custom_nodes, models, input, output, database),
so the ComfyUI itself, which may be the user's, is left as it is.
"""

import contextlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

REPO = Path(__file__).resolve().parents[1]
WORK = REPO / ".work"
TOOLS = WORK / "tools"  # where dev.py puts development tools that the user's own environment lacks
PACK = "ComfyUI-SuDe"  # the name of the pack's folder in custom_nodes
START_SECONDS = 300  # a slow disk reads torch for the first time


class ServerError(RuntimeError):
    """ComfyUI could not be started; the message says why in one sentence."""


def comfyui_folder() -> Path:
    """The ComfyUI in use: COMFYUI_PATH, or the one that dev.py set up."""
    return Path(os.environ.get("COMFYUI_PATH") or WORK / "ComfyUI")


def device(python: Path) -> str:
    """What torch computes on in this Python: cuda, xpu, mps or cpu. Asked once on a machine, then remembered."""
    memory = WORK / "device.json"
    key = f"{platform.node()} {python}"
    known = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(memory.read_text(encoding="utf-8"))
    if key not in known:
        code = (
            "import torch; print('cuda' if torch.cuda.is_available() else 'xpu' if torch.xpu.is_available()"
            " else 'mps' if torch.backends.mps.is_available() else 'cpu')"
        )
        asked = subprocess.run([python, "-W", "ignore", "-c", code], capture_output=True, text=True)
        if asked.returncode:
            raise ServerError(
                f"torch does not work in {python}: {(asked.stderr.strip() or 'no message').splitlines()[-1]}"
            )
        known[key] = asked.stdout.split()[-1]
        memory.parent.mkdir(parents=True, exist_ok=True)
        memory.write_text(json.dumps(known), encoding="utf-8")
    return known[key]


def link(source: Path, target: Path) -> None:
    """Make `target` show `source`: a symbolic link, else a junction or hard link (Windows), else a copy."""
    if target.is_symlink() or target.is_file():
        target.unlink()
    elif target.is_dir():
        try:
            target.rmdir()  # a junction goes away as a link, without what it points at
        except OSError:
            shutil.rmtree(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError, NotImplementedError):
        target.symlink_to(source.resolve(), target_is_directory=source.is_dir())
        return
    if source.is_file():
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
        shutil.copy2(source, target)
        return
    junction = ["cmd", "/c", "mklink", "/J", str(target), str(source.resolve())]
    if os.name != "nt" or subprocess.run(junction, capture_output=True).returncode:
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(".git", ".venv", ".work", "__pycache__"))


def prepare_base(base: Path, pack: Path | None = REPO) -> Path:
    """Make a base directory for ComfyUI with the pack in custom_nodes (`pack=None`: leave custom_nodes as it is)."""
    for folder in ("custom_nodes", "input", "output", "models/checkpoints"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    if pack:
        link(pack, base / "custom_nodes" / PACK)
    return base


def port_is_free(port: int) -> bool:
    """Whether a server could listen on this port of this machine."""
    with socket.socket() as listener:
        if os.name != "nt":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class ComfyServer:
    """One ComfyUI process on a base directory made by `prepare_base`. Use it in a `with` statement.

    Args:
        base: the base directory.
        port: the port to listen on; a free one if not given.
        comfyui: the ComfyUI folder; `comfyui_folder()` if not given.
        python: the interpreter that runs it; the running one if not given.
        log: file that collects what the server prints; without it the server prints to the terminal.
        extra: further arguments for ComfyUI.

    Raises:
        ServerError: on entering, if the port is in use or the server ends (or hangs) before it answers.
    """

    def __init__(
        self,
        base: Path,
        *,
        port: int | None = None,
        comfyui: Path | None = None,
        python: Path | None = None,
        log: Path | None = None,
        extra: Sequence[str] = (),
    ) -> None:
        self.base = base.resolve()
        self.port = port or free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.comfyui = comfyui or comfyui_folder()
        self.python = python or Path(sys.executable)
        self.log = log
        self.extra = tuple(extra)
        self.process: subprocess.Popen | None = None

    def command(self) -> list[str]:
        """The command line that starts this server."""
        command = [self.python, "-u", self.comfyui / "main.py", "--base-directory", self.base, "--port", self.port]
        command += ["--disable-auto-launch", "--disable-api-nodes"]
        command += ["--database-url", f"sqlite:///{(self.base / 'comfyui.db').as_posix()}"]
        if device(self.python) == "cpu":
            command.append("--cpu")
        return [str(part) for part in (*command, *self.extra)]

    def environment(self) -> dict[str, str]:
        """Our environment without the tools that dev.py may have put in front of the user's packages."""
        paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        kept = os.pathsep.join(path for path in paths if path and Path(path) != TOOLS)
        return {**os.environ, "PYTHONPATH": kept, "PYTHONIOENCODING": "utf-8"}

    def answers(self) -> bool:
        """Whether the server answers requests."""
        try:
            with urllib.request.urlopen(f"{self.address}/system_stats", timeout=10) as response:
                return response.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def printed(self, start: int = 0) -> str:
        """What the server has printed into its log file, from byte `start` on."""
        if not self.log or not self.log.is_file():
            return ""
        with self.log.open("rb") as file:
            file.seek(start)
            return file.read().decode("utf-8", errors="replace")

    def __enter__(self) -> "ComfyServer":
        if not port_is_free(self.port):
            raise ServerError(
                f"Port {self.port} is in use: stop the program that uses it or choose another with --port."
            )
        with contextlib.ExitStack() as stack:
            output = stack.enter_context(self.log.open("wb")) if self.log else None
            self.process = subprocess.Popen(
                self.command(),
                cwd=self.comfyui,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
            )
        try:
            self.wait_until_it_answers()
        except BaseException:
            self.stop()
            raise
        return self

    def wait_until_it_answers(self) -> None:
        """Return as soon as the server answers."""
        end = time.monotonic() + START_SECONDS
        while not self.answers():
            where = f" (log: {self.log})" if self.log else ""
            if self.process.poll() is not None:
                last = [line for line in self.printed().splitlines() if line.strip()][-1:]
                raise ServerError(f"ComfyUI ended before it answered: {''.join(last) or 'see above'}{where}")
            if time.monotonic() > end:
                raise ServerError(f"ComfyUI did not answer within {START_SECONDS} s{where}")
            time.sleep(0.25)

    def stop(self) -> None:
        """End the server, gently first."""
        self.process.terminate()
        try:
            self.process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
