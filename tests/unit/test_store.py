"""The store: same inputs find the same entry, others find none, no crash leaves half an entry, it stays small."""

import multiprocessing
import os
import time

import pytest
import torch

from comfy_sude import files, store
from comfy_sude.store import Store

TENSORS = {"images": torch.arange(12, dtype=torch.uint8).view(3, 4), "scale": torch.tensor(0.5)}


def size(count: int) -> dict:
    return {"x": torch.zeros(count, dtype=torch.uint8)}


def used(entries: Store) -> list[str]:
    return [entry.path.stem for entry in entries.entries()]


def test_what_was_put_is_what_is_got(tmp_path):
    assert Store(tmp_path / "new" / "folder").put("kind", "entry", TENSORS, {"caption": "photo of a dog"})
    found, metadata = Store(tmp_path / "new" / "folder").get("kind", "entry")
    assert found.keys() == TENSORS.keys() and metadata == {"caption": "photo of a dog"}
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    assert Store(tmp_path / "new" / "folder").get("other", "entry") is None


def test_an_entry_that_was_never_put_is_none_and_makes_no_folder(tmp_path):
    assert Store(tmp_path / "cache").get("kind", "entry") is None
    assert not Store(tmp_path / "cache").entries() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("damage", [b"", b"not a safetensors file", None])
def test_a_damaged_entry_is_computed_again_instead_of_failing(tmp_path, damage):
    entries = Store(tmp_path)
    entries.put("kind", "entry", TENSORS)
    path = entries.path("kind", "entry")
    path.write_bytes(path.read_bytes()[:-5] if damage is None else damage)
    assert entries.get("kind", "entry") is None
    assert not path.exists()
    entries.put("kind", "entry", TENSORS)
    assert entries.get("kind", "entry") is not None


def test_an_entry_for_which_there_is_no_memory_is_not_taken_for_damaged(tmp_path, monkeypatch):
    entries = Store(tmp_path)
    entries.put("kind", "entry", TENSORS)

    def full(tensor):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "clone", full)
        with pytest.raises(RuntimeError, match="allocate memory"):
            entries.get("kind", "entry")
    assert entries.get("kind", "entry") is not None


def test_a_second_put_replaces_the_first(tmp_path):
    entries = Store(tmp_path)
    entries.put("kind", "entry", {"x": torch.zeros(2)})
    entries.put("kind", "entry", {"x": torch.ones(3)})
    assert torch.equal(entries.get("kind", "entry")[0]["x"], torch.ones(3))


def test_a_full_disk_leaves_the_old_entry_and_no_litter(tmp_path, monkeypatch, caplog):
    entries = Store(tmp_path)
    entries.put("kind", "entry", {"x": torch.zeros(2)})

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    assert not entries.put("kind", "entry", {"x": torch.ones(2)})
    assert "No space left" in caplog.text
    assert torch.equal(entries.get("kind", "entry")[0]["x"], torch.zeros(2))
    assert [path.name for path in tmp_path.iterdir()] == ["kind-entry.safetensors"]


def test_the_longest_unused_go_first_and_the_new_one_stays(tmp_path):
    entries = Store(tmp_path, limit=5400)
    for index, name in enumerate("abc"):
        entries.put("kind", name, size(1000))
        os.utime(entries.path("kind", name), (index, index))
    assert entries.get("kind", "a") is not None  # used just now: b is the longest unused
    entries.put("kind", "d", size(2500))
    assert used(entries) == ["kind-c", "kind-a", "kind-d"] and entries.used() <= 5400


def test_what_is_larger_than_the_limit_is_not_stored_and_costs_nothing(tmp_path):
    entries = Store(tmp_path, limit=3000)
    entries.put("kind", "a", size(1000))
    assert not entries.put("kind", "b", size(4000))
    assert used(entries) == ["kind-a"]


def test_no_room_at_all_keeps_nothing(tmp_path):
    assert not Store(tmp_path, limit=0).put("kind", "a", size(1))
    assert not list(tmp_path.iterdir())


def test_litter_of_a_killed_process_is_removed_and_that_of_a_living_one_is_not(tmp_path):
    dead, alive = tmp_path / f".dead{files.TEMPORARY}", tmp_path / f".alive{files.TEMPORARY}"
    dead.write_bytes(b"half")
    alive.write_bytes(b"half")
    old = time.time() - store.LITTER_SECONDS - 1
    os.utime(dead, (old, old))
    Store(tmp_path).put("kind", "a", size(1))
    assert not dead.exists() and alive.exists()


def scribble(folder: str, rounds: int, failures) -> None:
    """What one of several processes does: write and read the same entries under a limit that holds only some."""
    entries = Store(folder, limit=40_000)
    for index in range(rounds):
        name = str(index % 5)
        value = torch.full((10_000,), int(name), dtype=torch.uint8)
        entries.put("kind", name, {"x": value})
        found = entries.get("kind", str((index + 2) % 5))
        if found is not None and not torch.equal(found[0]["x"], torch.full_like(value, (index + 2) % 5)):
            failures.put(f"round {index}: a wrong value")


def test_several_processes_on_one_folder_never_read_a_wrong_entry(tmp_path):
    context = multiprocessing.get_context("spawn")
    failures = context.Queue()
    processes = [context.Process(target=scribble, args=(str(tmp_path), 60, failures)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert failures.empty(), failures.get()
    assert Store(tmp_path).used() < 60_000 and not list(tmp_path.glob(f".*{files.TEMPORARY}"))


def test_the_key_does_not_depend_on_the_order_and_changes_with_any_value():
    assert store.key(a=1, b={"c": "x", "d": 2.0}) == store.key(b={"d": 2.0, "c": "x"}, a=1)
    keys = [store.key(a=1), store.key(a=2), store.key(b=1), store.key(a="1"), store.key(a=[1]), store.key(a=None)]
    assert len(set(keys)) == len(keys)


def test_the_hash_of_weights_sees_names_types_shapes_and_every_byte():
    x = torch.arange(6, dtype=torch.float32)
    nudged = x.clone()
    nudged[3] = torch.nextafter(nudged[3], torch.tensor(9.0))
    variants = [
        [("w", x)],
        [("v", x)],
        [("w", x.view(2, 3))],
        [("w", x.view(torch.int32))],
        [("w", nudged)],
        [("w", x), ("v", x)],
        [("w", x.half())],
        [("w", x[:0])],
        [],
    ]
    hashes = [store.tensor_hash(named) for named in variants]
    assert len(set(hashes)) == len(hashes)
    assert store.tensor_hash([("w", x.clone())]) == hashes[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.uint8, torch.bool, torch.int64])
def test_weights_of_any_type_and_layout_hash_by_value(dtype):
    x = torch.eye(3, 4).to(dtype)
    assert store.tensor_hash([("w", x.t().contiguous().t())]) == store.tensor_hash([("w", x)])
    assert store.tensor_hash([("w", x[0, 0])])
