"""A subject's file: every bit back, and nothing but a clear error from a file that is not one."""

import json
import random

import pytest
import torch

from comfy_sude import files, subject
from comfy_sude.subject import Subject
from comfy_sude.train import TERMS, Log

ABOUT = {
    "format": 1,
    "category": "dog",
    "identifier": "<new1>",
    "subject": "<new1> dog",
    "method": "ViCo",
    "recipe": {"seed": 0},
    "steps": 2,
    "base": {"checkpoint": "a.safetensors", "family": "SD15", "prediction": "eps", "sha256": "0"},
    "reference": {"heads": {"output_blocks.1.1": 8}, "unconditional": True},
    "resolution": 512,
    "trained": "2026-11-26T00:00:00+00:00",
}


def made() -> Subject:
    g = torch.Generator().manual_seed(0)
    tensors = {
        ("model", "diffusion_model.a.weight"): {"diff": torch.randn(3, 4, generator=g)},
        ("clip", "clip_l.b.weight"): {
            "up": torch.randn(3, 2, generator=g), "down": torch.randn(2, 5, generator=g), "alpha": torch.tensor(4.0),
        },
        ("token", "<a/b>"): {"vectors": torch.randn(2, 6, generator=g)},
        ("reference", "latent"): {"value": torch.randn(1, 4, 2, 2, generator=g)},
        ("reference", "output_blocks.1.1.norm1.weight"): {"value": torch.randn(6, generator=g)},
    }  # fmt: skip
    values = {term: [0.1 + 0.2, 1 / 3] for term in (*TERMS, "l_attention")}
    return Subject(tensors, json.loads(json.dumps(ABOUT)), Log(values, 1.5, {"l_attention": "L_att"}))


def equal(a: Subject, b: Subject) -> bool:
    pairs = [(a.tensors[k][p], b.tensors.get(k, {}).get(p)) for k in a.tensors for p in a.tensors[k]]
    return a.tensors.keys() == b.tensors.keys() and all(y is not None and torch.equal(x, y) for x, y in pairs)


def test_a_file_gives_every_bit_back(tmp_path):
    path = tmp_path / "a.safetensors"
    assert made().save(path) == 0.0
    found = subject.load(path)
    assert equal(found, made()) and found.metadata == ABOUT and found.log == made().log
    assert list(found.log.values) == [*TERMS, "l_attention"]
    shown = files.peek(path)
    assert shown["modelspec.architecture"] == "stable-diffusion-v1/sude-subject"
    assert shown["modelspec.trigger_phrase"] == "<new1> dog" and shown["modelspec.resolution"] == "512x512"


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_keeps_the_log_and_says_the_error(tmp_path, precision):
    path = tmp_path / "a.safetensors"
    error = made().save(path, precision)
    found = subject.load(path)
    assert 1e-5 < error < 1e-2 and not equal(found, made()) and found.log == made().log


def test_a_value_too_large_for_fp16_is_named(tmp_path):
    large = made()
    large.tensors["model", "diffusion_model.a.weight"]["diff"][0, 0] = 1e6
    with pytest.raises(ValueError, match="fp16 cannot hold a value of diffusion_model.a.weight: choose bf16"):
        large.save(tmp_path / "a.safetensors", "fp16")
    assert not list(tmp_path.iterdir())
    assert large.save(tmp_path / "a.safetensors", "bf16") < 1e-2


def test_a_newer_format_asks_for_an_update(tmp_path):
    tensors, metadata = subject.packed(made())
    newer = {**json.loads(metadata[subject.METADATA]), "format": 2}
    path = tmp_path / "a.safetensors"
    files.write(path, tensors, {subject.METADATA: json.dumps(newer)})
    with pytest.raises(ValueError, match=r"a.safetensors has format 2.*update the pack"):
        subject.load(path)


def test_what_a_later_version_may_add_does_not_hurt(tmp_path):
    tensors, metadata = subject.packed(made())
    more = {**json.loads(metadata[subject.METADATA]), "mood": ["good"]}
    files.write(tmp_path / "a.safetensors", tensors, {subject.METADATA: json.dumps(more), "else": "x"})
    assert equal(subject.load(tmp_path / "a.safetensors"), made())


TENSORS = {
    "an unknown network": {"vae/x/diff": torch.zeros(2)},
    "an unknown part": {"model/x/weight": torch.zeros(2)},
    "no parts at all": {"x": torch.zeros(2)},
    "half a low-rank update": {"model/x/up": torch.zeros(2, 1)},
    "ranks that differ": {
        "model/x/up": torch.zeros(2, 1), "model/x/down": torch.zeros(2, 2), "model/x/alpha": torch.ones(1),
    },
    "integers": {"model/x/diff": torch.zeros(2, dtype=torch.int64)},
    "too many vectors": {"token/x/vectors": torch.zeros(33, 4)},
    "a word of nothing": {"token//vectors": torch.zeros(1, 4)},
    "a flat latent": {"reference/latent/value": torch.zeros(4)},
    "a log of another length": {"log/l_sub/values": torch.zeros(7, dtype=torch.float64)},
    "a log of two dimensions": {"log/l_sub/values": torch.zeros(2, 2, dtype=torch.float64)},
}  # fmt: skip


@pytest.mark.parametrize("what", TENSORS)
def test_tensors_no_subject_has_are_refused(tmp_path, what):
    tensors, metadata = subject.packed(made())
    files.write(tmp_path / "a.safetensors", {**tensors, **TENSORS[what]}, metadata)
    with pytest.raises(ValueError, match="a.safetensors holds no subject this pack can use"):
        subject.load(tmp_path / "a.safetensors")


ODD = [None, True, 0, -1, 1e308, "x", "", [], {}, [[]], {"a": 1}, "x" * 10_000]


def test_metadata_of_any_shape_is_an_error_in_words_or_harmless(tmp_path):
    tensors, metadata = subject.packed(made())
    document = json.loads(metadata[subject.METADATA])
    random.seed(0)
    tried = [{**document, name: value} for name in document for value in ODD]
    tried += [{k: v for k, v in document.items() if k != name} for name in document]
    tried += [{**document, "reference": {**ABOUT["reference"], key: odd}} for key in ABOUT["reference"] for odd in ODD]
    tried += ODD
    refused = 0
    for one in tried:
        try:
            found = subject.unpacked(dict(tensors), {subject.METADATA: json.dumps(one)})
        except ValueError:
            refused += 1
            continue
        assert isinstance(found.prompt("running"), str) and equal(found, made())
    assert refused > 100
    for text in ("", "{", "[" * 100_000, "\ud800", "1" * 10_000, '{"format": 1e999}', "NaN"):
        with pytest.raises(ValueError):
            subject.unpacked(dict(tensors), {subject.METADATA: text})
