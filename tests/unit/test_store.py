"""The store: same inputs find the same entry, anything else finds none, a crash leaves no half entry."""

import pytest
import torch

from comfy_sude import store
from comfy_sude.store import Store

TENSORS = {"images": torch.arange(12, dtype=torch.uint8).view(3, 4), "scale": torch.tensor(0.5)}


def test_what_was_put_is_what_is_got(tmp_path):
    Store(tmp_path / "new" / "folder").put("entry", TENSORS, {"caption": "photo of a dog"})
    found = Store(tmp_path / "new" / "folder").get("entry")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


def test_an_entry_that_was_never_put_is_none_and_makes_no_folder(tmp_path):
    assert Store(tmp_path / "cache").get("entry") is None
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("damage", [b"", b"not a safetensors file", None])
def test_a_damaged_entry_is_computed_again_instead_of_failing(tmp_path, damage):
    entries = Store(tmp_path)
    entries.put("entry", TENSORS)
    path = tmp_path / "entry.safetensors"
    path.write_bytes(path.read_bytes()[:-5] if damage is None else damage)
    assert entries.get("entry") is None
    assert not path.exists()
    entries.put("entry", TENSORS)
    assert entries.get("entry") is not None


def test_a_second_put_replaces_the_first(tmp_path):
    entries = Store(tmp_path)
    entries.put("entry", {"x": torch.zeros(2)})
    entries.put("entry", {"x": torch.ones(3)})
    assert torch.equal(entries.get("entry")["x"], torch.ones(3))


def test_a_crash_while_writing_leaves_the_old_entry_and_no_litter(tmp_path, monkeypatch):
    entries = Store(tmp_path)
    entries.put("entry", {"x": torch.zeros(2)})

    def crash(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(store, "save_file", crash)
    with pytest.raises(OSError, match="disk full"):
        entries.put("entry", {"x": torch.ones(2)})
    assert torch.equal(entries.get("entry")["x"], torch.zeros(2))
    assert [path.name for path in tmp_path.iterdir()] == ["entry.safetensors"]


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
