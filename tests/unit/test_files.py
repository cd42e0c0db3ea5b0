"""Files: whole or not there, damage noticed, names that stay in their folder, readable by the safetensors library."""

import json
import os
import random

import pytest
import torch
from safetensors import safe_open

from comfy_sude import files

DTYPES = sorted(files.NAMES, key=str)
TENSORS = {
    "weights": torch.arange(300, dtype=torch.float32).view(3, 100),
    "half/ü": torch.arange(7, dtype=torch.float16),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "empty": torch.zeros(0, 4),
    "number": torch.tensor(2.5, dtype=torch.float64),
}
METADATA = {"sude.sha256x": "near", "quote": '"sude.sha256": "', "empty": ""}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_is_written_as_the_library_reads_it(tmp_path, dtype):
    path = tmp_path / "a.safetensors"
    x = torch.eye(3, 5).to(dtype)
    files.write(path, {"x": x.t(), "y": x[1]}, {})
    with safe_open(path, framework="pt") as file:
        assert torch.equal(file.get_tensor("x"), x.t()) and torch.equal(file.get_tensor("y"), x[1])
    assert same(files.read(path)[0], {"x": x.t().contiguous(), "y": x[1]})


def test_what_was_written_is_what_is_read(tmp_path):
    path = tmp_path / "new" / "a.safetensors"
    files.write(path, TENSORS, METADATA)
    found, metadata = files.read(path)
    assert same(found, TENSORS) and metadata == METADATA
    assert files.peek(path).items() >= METADATA.items()
    assert [entry.name for entry in path.parent.iterdir()] == ["a.safetensors"]
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(TENSORS)


def test_what_was_read_does_not_depend_on_the_file_any_more(tmp_path):
    path = tmp_path / "a.safetensors"
    files.write(path, TENSORS, {})
    found, _ = files.read(path)
    with path.open("r+b") as file:
        file.seek(-400, os.SEEK_END)
        file.write(bytes(400))
    assert same(found, TENSORS)


def test_every_flipped_bit_and_every_truncation_is_noticed(tmp_path):
    path, broken = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    files.write(path, TENSORS, METADATA)
    content = path.read_bytes()
    random.seed(1)
    places = [random.randrange(8 * len(content)) for _ in range(400)] + list(range(8 * 8))
    for place in places:
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        broken.write_bytes(changed)
        try:
            found, metadata = files.read(broken)
        except files.DamagedFile:
            continue
        assert same(found, TENSORS) and metadata == METADATA, place
    for length in [0, 1, 7, 8, 9, len(content) - 1, *(random.randrange(len(content)) for _ in range(50))]:
        broken.write_bytes(content[:length])
        with pytest.raises(files.DamagedFile):
            files.read(broken)
    broken.write_bytes(content + b"\0")
    with pytest.raises(files.DamagedFile):
        files.read(broken)


def test_a_file_of_another_program_is_told_from_ours(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2)}, tmp_path / "lora.safetensors", {"format": "pt"})
    with pytest.raises(files.DamagedFile, match="no checksum"):
        files.read(tmp_path / "lora.safetensors")
    with pytest.raises(OSError):
        files.read(tmp_path / "missing.safetensors")
    assert files.peek(tmp_path / "missing.safetensors") == {}


def test_a_header_that_promises_more_than_the_file_has_allocates_nothing(tmp_path):
    path = tmp_path / "a.safetensors"
    for shape, end in (([10**12], 4 * 10**12), ([2**40, 2**40], 8), ([10**6], 4)):
        header = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
        with pytest.raises(files.DamagedFile):
            files.read(path)
    path.write_bytes((2**60).to_bytes(8, "little") + b"{}")
    with pytest.raises(files.DamagedFile):
        files.read(path)


def test_a_crash_in_the_middle_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    files.write(path, {"x": torch.zeros(2)}, {})
    monkeypatch.setattr(files._Digest, "add", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        files.write(path, {"x": torch.ones(2)}, {})
    monkeypatch.undo()
    assert torch.equal(files.read(path)[0]["x"], torch.zeros(2)) and len(list(tmp_path.iterdir())) == 1


# --- Names

NAMES = {
    "spike": "spike_00001_.safetensors",
    "dogs/spike": "dogs/spike_00001_.safetensors",
    "dogs\\spike": "dogs/spike_00001_.safetensors",
    "../../spike": "spike_00001_.safetensors",
    "/etc/spike": "etc/spike_00001_.safetensors",
    "C:\\spike": "C/spike_00001_.safetensors",
    "..\\..\\a/./b": "a/b_00001_.safetensors",
    "con": "_con_00001_.safetensors",
    "NUL.txt/x": "_NUL.txt/x_00001_.safetensors",
    "a\0b\nc\u202ed": "abcd_00001_.safetensors",
    " . spike . ": "spike_00001_.safetensors",
    "sp?i<k>e*|": "spike_00001_.safetensors",
    "Шпик 犬": "Шпик 犬_00001_.safetensors",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_typed_name_becomes_a_file_inside_the_folder(tmp_path, name):
    path = files.free_path(tmp_path / "out", name)
    assert path.relative_to(tmp_path / "out").as_posix() == NAMES[name]
    path.write_bytes(b"")
    assert files.free_path(tmp_path / "out", name).name.endswith("_00002_.safetensors")


@pytest.mark.parametrize("name", ["", " ", "..", "../..", "///", "\0", "???"])
def test_a_name_of_which_nothing_is_left_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="filename_prefix"):
        files.free_path(tmp_path, name)


def test_a_very_long_name_is_cut_to_what_a_disk_takes(tmp_path):
    for name in ("x" * 5000, "犬" * 5000, "a/" * 20 + "b"):
        files.free_path(tmp_path, name).write_bytes(b"")


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    (tmp_path / "outside").mkdir()
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "outside", target_is_directory=True)
    with pytest.raises(ValueError, match="leads out"):
        files.free_path(folder, "link/spike")
    (tmp_path / "outside" / "x.safetensors").write_bytes(b"")
    (folder / "y.safetensors").symlink_to(tmp_path / "outside" / "x.safetensors")
    (folder / "z.safetensors").write_bytes(b"")
    assert [path.name for path in files.within(folder)] == ["z.safetensors"]


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "dogs").write_bytes(b"")
    with pytest.raises(ValueError, match="file, not a folder"):
        files.free_path(tmp_path, "dogs/spike")
