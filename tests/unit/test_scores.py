"""The scores are the published formulas, computed here again from the models' own forward passes and torchvision."""

import gc
import math
import shutil
import socket
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode
from transformers import (
    AutoTokenizer,
    BlipForImageTextRetrieval,
    CLIPModel,
    Dinov2Model,
    ViTModel,
)

from bench import score_models
from comfy_sude.score_models import BLIP, CLIP, DINO, DINOV2
from comfy_sude.scores import METRICS, MissingModel, Models, best, drift, evaluate, strip_identifier

BICUBIC = InterpolationMode.BICUBIC
OPENAI = T.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET = T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SEEN_BY = {
    "CLIP": T.Compose([T.Resize(224, BICUBIC), T.CenterCrop(224), T.ToTensor(), OPENAI]),
    "DINO": T.Compose([T.Resize(256, BICUBIC), T.CenterCrop(224), T.ToTensor(), IMAGENET]),
    "BLIP": T.Compose([T.Resize((384, 384), BICUBIC), T.ToTensor(), OPENAI]),
}
TEXTS = ["photo of a running dog", "photo of a dog, on the beach at night", "a cat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return score_models.build(tmp_path_factory.mktemp("scores"))


@pytest.fixture(autouse=True)
def no_cache_and_no_network(monkeypatch, tmp_path_factory):
    """The hub's cache of whoever runs this is not looked into, and the network is not there."""

    def refused(*_):
        raise AssertionError("the pack tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    empty = str(tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", empty)
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", empty, raising=False)  # of older versions


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    """[3, H, W, 3] smooth and different ones, neither square nor of a size that a model asks for."""
    rough = torch.rand(3, 3, 6, 9, generator=torch.Generator().manual_seed(1))
    smooth = torch.nn.functional.interpolate(rough, (301, 437), mode="bilinear")
    return (smooth * 255).round().div(255).movedim(1, -1)


@pytest.fixture(scope="module")
def references() -> torch.Tensor:
    """[2, H, W, 3]"""
    rough = torch.rand(2, 3, 5, 4, generator=torch.Generator().manual_seed(2))
    smooth = torch.nn.functional.interpolate(rough, (520, 260), mode="bilinear")
    return (smooth * 255).round().div(255).movedim(1, -1)


def pil(pictures: torch.Tensor) -> list:
    return [T.functional.to_pil_image(picture.movedim(-1, 0)) for picture in pictures]


def unit(vectors: torch.Tensor) -> torch.Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True)


@torch.no_grad()
def expected(metric: str, folder: Path, pictures, references, texts) -> list[float]:
    """The metric's formula, one picture, reference and text at a time."""
    if metric in ("CLIP-I", "CLIP-T"):
        model, see = CLIPModel.from_pretrained(folder / CLIP), SEEN_BY["CLIP"]
        tokenizer = AutoTokenizer.from_pretrained(folder / CLIP)
        if metric == "CLIP-T":
            scale = model.logit_scale.exp()
            return [
                100 * (model(tokenizer(text, return_tensors="pt").input_ids, see(one)[None]).logits_per_image / scale)
                for one, text in zip(pil(pictures), texts, strict=True)
            ]
        words = tokenizer("x", return_tensors="pt").input_ids

        def embed(image):
            return model(words, see(image)[None]).image_embeds[0]

        squashed = [embed(one.resize((512, 512), 3)) for one in pil(references)]
        return [100 * sum(unit(embed(one)) @ unit(real) for real in squashed) / 2 for one in pil(pictures)]
    if metric == "BLIP-T":
        model, see = BlipForImageTextRetrieval.from_pretrained(folder / BLIP), SEEN_BY["BLIP"]
        tokenizer = AutoTokenizer.from_pretrained(folder / BLIP)
        return [
            100 * model(tokenizer(text, return_tensors="pt").input_ids, see(one)[None], use_itm_head=False).itm_score
            for one, text in zip(pil(pictures), texts, strict=True)
        ]
    if metric == "DINO-I":
        model = ViTModel.from_pretrained(folder / DINO, add_pooling_layer=False)
    else:
        model = Dinov2Model.from_pretrained(folder / DINOV2)
    see = SEEN_BY["DINO"]
    classes = [
        unit(model(torch.stack([see(one) for one in pil(group)])).last_hidden_state[:, 0])
        for group in (pictures, references)
    ]
    return list(100 * (classes[0] @ classes[1].T).mean(1))


@pytest.mark.parametrize("metric", METRICS)
def test_each_metric_is_its_published_formula(metric, folder, pictures, references):
    found = evaluate(pictures, references, TEXTS, Models([folder]), [metric])
    wanted = [float(value) for value in expected(metric, folder, pictures, references, TEXTS)]
    assert list(found) == [metric] and len(found[metric]) == 3
    assert found[metric] == pytest.approx(wanted, abs=2e-3)
    assert max(wanted) - min(wanted) > 0.5, "different pictures, different scores: else this shows nothing"


def test_all_metrics_together_are_those_alone_whatever_else_is_in_the_batch(folder, pictures, references):
    models = Models([folder])
    together = evaluate(pictures, references, TEXTS, models)
    assert tuple(together) == METRICS
    for index in range(3):
        alone = evaluate(pictures[index : index + 1], references, TEXTS[index : index + 1], models)
        for metric in METRICS:
            assert alone[metric][0] == pytest.approx(together[metric][index], abs=2e-3), metric


def test_it_runs_under_comfyuis_inference_mode_and_gives_the_same(folder, pictures, references):
    plain = evaluate(pictures, references, TEXTS, Models([folder]))
    with torch.inference_mode():
        inside = evaluate(pictures.clone(), references.clone(), TEXTS, Models([folder]))
    assert inside == plain


def test_pictures_may_differ_in_size_and_be_more_than_a_batch(folder, pictures, references):
    many = [pictures[0], pictures[1, :90, :70]] * 10
    found = evaluate(many, references, [], Models([folder]), ["DINO-I"])["DINO-I"]
    assert len(found) == 20 and found[:2] == pytest.approx(found[-2:], abs=1e-4) and found[0] != found[1]


def test_a_picture_of_itself_is_the_whole_of_fidelity(folder, pictures):
    square = pictures[:1, :224, :224]
    found = evaluate(square, square, [], Models([folder]), ["DINO-I", "DINOv2-I"])
    assert [value for values in found.values() for value in values] == pytest.approx([100, 100], abs=1e-3)


def test_a_missing_model_says_what_to_get_and_where_to_put_it(folder, tmp_path, pictures, references):
    shutil.copytree(folder / CLIP, tmp_path / CLIP)
    models = Models([tmp_path])
    assert models.missing(METRICS) == [DINO, DINOV2, BLIP] and models.missing(["CLIP-I", "CLIP-T"]) == []
    with pytest.raises(MissingModel) as error:
        evaluate(pictures, references, TEXTS, models, ["CLIP-T", "BLIP-T"])
    assert f"{BLIP} into {tmp_path / BLIP}" in str(error.value) and "nothing is downloaded" in str(error.value)
    assert CLIP not in str(error.value) and not models._loaded, "said before the first model is loaded"


class Trap:
    """Leaves a trace when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_folder_with_a_pickle_only_is_refused_and_the_pickle_not_opened(folder, tmp_path, pictures, references):
    shutil.copytree(folder / DINO, tmp_path / DINO)
    (tmp_path / DINO / "model.safetensors").unlink()
    torch.save({"a": Trap(tmp_path / "sprung")}, tmp_path / DINO / "pytorch_model.bin")
    with pytest.raises(MissingModel, match=f"{DINO} .there is only a pickle of it"):
        evaluate(pictures, references, [], Models([tmp_path]), ["DINO-I"])
    assert not (tmp_path / "sprung").exists()


def test_models_are_found_where_the_hubs_cache_keeps_them(folder, tmp_path, pictures, references):
    repository = tmp_path / ("models--" + DINO.replace("/", "--"))
    shutil.copytree(folder / DINO, repository / "snapshots" / "abc123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123")
    there = evaluate(pictures, references, [], Models([tmp_path / "nowhere", tmp_path]), ["DINO-I"])
    assert there == evaluate(pictures, references, [], Models([folder]), ["DINO-I"])


def test_half_a_model_is_refused_instead_of_filled_with_random_numbers(folder, tmp_path, pictures, references):
    shutil.copytree(folder / DINO, tmp_path / DINO)
    weights = load_file(tmp_path / DINO / "model.safetensors")
    weights.pop("layernorm.weight")
    save_file(weights, tmp_path / DINO / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks 1 weights of {DINO}, for example layernorm.weight: download it again"):
        evaluate(pictures, references, [], Models([tmp_path]), ["DINO-I"])


@pytest.mark.parametrize(
    "file, content", [("model.safetensors", b"\x10" * 64), ("config.json", b"{not json")], ids=["weights", "config"]
)
def test_damaged_files_are_named(folder, tmp_path, pictures, references, file, content):
    shutil.copytree(folder / DINO, tmp_path / DINO)
    (tmp_path / DINO / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"{DINO} in .* cannot be loaded .*: download it again"):
        evaluate(pictures, references, [], Models([tmp_path]), ["DINO-I"])


def test_models_are_loaded_when_needed_once_and_let_go_of(folder, pictures, references):
    models = Models([folder])
    assert not models._loaded
    evaluate(pictures, references, TEXTS, models, ["CLIP-I", "CLIP-T"])
    assert list(models._loaded) == [CLIP]
    loaded = models._loaded[CLIP][0]
    evaluate(pictures, references, TEXTS, models, ["CLIP-T"])
    assert models._loaded[CLIP][0] is loaded
    gone = weakref.ref(loaded)
    del loaded
    models.free()
    gc.collect()
    assert gone() is None
    assert evaluate(pictures, references, TEXTS, models, ["CLIP-T"]), "and loaded again when asked again"


def test_the_report_follows_every_batch_and_may_stop_it(folder, pictures, references):
    said = []
    evaluate(pictures, references, [], Models([folder], report=lambda *line: said.append(line)), ["DINO-I"])
    assert said == [(0, 1, f"loading {DINO}"), (0, 3, DINO), (0, 2, DINO)]

    def stop(*_):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        evaluate(pictures, references, [], Models([folder], report=stop), ["DINO-I"])


@pytest.mark.parametrize(
    "given, message",
    [
        ({"metrics": ["CLIP-I", "FID"]}, "'FID' is no metric here: choose of CLIP-I, DINO-I"),
        ({"texts": ["one"]}, "3 pictures and 1 texts: give one text for each"),
        ({"pictures": []}, "no pictures"),
        ({"references": []}, "no reference picture"),
    ],
)
def test_what_cannot_be_scored_is_said_before_anything_is_loaded(given, message, tmp_path, pictures, references):
    whole = {"pictures": pictures, "references": references, "texts": TEXTS, "metrics": METRICS, **given}
    with pytest.raises(ValueError, match=message):
        evaluate(models=Models([tmp_path]), **whole)


def test_drift_is_none_for_the_same_pictures_and_grows_with_the_difference(folder, pictures):
    models = Models([folder])
    same = drift(pictures, pictures.clone(), models)
    assert same == pytest.approx({"CLIP-I": 100, "DINO-I": 100, "DINOv2-I": 100, "pixels": 0}, abs=1e-3)
    little, much = (drift(pictures.roll(shift, 2), pictures, models) for shift in (4, 150))
    assert 0 < little["pixels"] < much["pixels"]
    assert all(100 > little[metric] > much[metric] for metric in METRICS[:3])


def test_drift_compares_pairs(folder, pictures):
    found = drift(pictures, pictures.flip(0), Models([folder]), ["DINO-I"])
    pairs = [
        evaluate(pictures[i : i + 1], pictures[2 - i : 3 - i], [], Models([folder]), ["DINO-I"])["DINO-I"][0]
        for i in range(3)
    ]
    assert found["DINO-I"] == pytest.approx(sum(pairs) / 3, abs=1e-3)
    assert found["pixels"] == pytest.approx(100 * (pictures - pictures.flip(0)).abs().mean().item(), rel=1e-5)
    assert drift(pictures, pictures, Models([]), []) == {"pixels": 0.0}, "pixels need no model"
    with pytest.raises(ValueError, match="drift compares pairs"):
        drift(pictures, pictures[:2], Models([folder]))
    with pytest.raises(ValueError, match="is no metric here"):
        drift(pictures, pictures, Models([folder]), ["CLIP-T"])


@pytest.mark.parametrize(
    "text, identifier, category, expected",
    [
        ("photo of a running sks dog", "sks", "dog", "photo of a running dog"),
        ("photo of a running sks dog", "sks", "", "photo of a running dog"),
        ("photo of a running <new1> dog on the beach", "<new1>", "dog", "photo of a running dog on the beach"),
        ("photo of a running *", "*", "dog", "photo of a running dog"),
        ("photo of a running *", "*", "", "photo of a running"),
        ("* next to a dog", "*", "dog", "dog next to a dog"),
        ("photo of a sks running dog", "sks", "dog", "photo of a running dog"),
        ("two SKS dogs and an sks dog", "sks", "dog", "two dogs and an dog"),
        ("photo of sks", "sks", "teddy bear", "photo of teddy bear"),
        ("a sks teddy  bear, sks, running", "sks", "teddy bear", "a teddy bear, teddy bear, running"),
        ("sks, running", "sks", "", "running"),
        ("photo of a <new1>, running", "<new1>", "", "photo of a, running"),
        ("the sksdog is no identifier", "sks", "dog", "the sksdog is no identifier"),
        ("S* playing", "S*", "cat", "cat playing"),
        ("photo of a dog", "sks", "dog", "photo of a dog"),
        ("photo of  a dog", "", "dog", "photo of a dog"),
        ("a sks-like hot sks dog", "sks", "dog", "a dog -like hot dog"),
    ],
)
def test_scoring_texts_lose_the_identifier_and_keep_the_subject(text, identifier, category, expected):
    assert strip_identifier(text, identifier, category) == expected


SWEEP = {
    "plain": {"DINO-I": 60.0, "BLIP-T": 42.0, "CLIP-T": 29.0},
    "half": {"DINO-I": 59.5, "BLIP-T": 43.0, "CLIP-T": 29.5},
    "once": {"DINO-I": 58.0, "BLIP-T": 45.0, "CLIP-T": 29.2},
    "twice": {"DINO-I": 40.0, "BLIP-T": 50.0, "CLIP-T": 33.0},
}


@pytest.mark.parametrize(
    "within, attribute, expected",
    [
        (0, "BLIP-T", "plain"),  # all others are less faithful
        (1, "BLIP-T", "half"),
        (2, "BLIP-T", "once"),  # exactly at the bound counts
        (2, "CLIP-T", "half"),
        (20, "BLIP-T", "twice"),
    ],
)
def test_the_best_has_the_most_attribute_among_those_that_are_still_the_subject(within, attribute, expected):
    assert best(SWEEP, "plain", within, attribute) == expected


def test_ties_go_to_fidelity_then_to_the_earlier_one():
    equal = {"DINO-I": 60.0, "BLIP-T": 42.0}
    assert best({"a": equal, "plain": equal, "b": equal}, "plain", 1) == "a"
    assert best({"plain": equal, "b": {**equal, "DINO-I": 60.5}, "c": {**equal, "DINO-I": 59.5}}, "plain", 1) == "b"


def test_what_is_no_number_never_wins():
    broken = {"DINO-I": math.nan, "BLIP-T": 90.0}
    assert best({"a": broken, "plain": {"DINO-I": 60.0, "BLIP-T": 1.0}}, "plain", 50) == "plain"
    assert best({"plain": broken, "a": SWEEP["half"]}, "plain", 5) == "plain", "nothing to compare fidelity with"


@pytest.mark.parametrize(
    "given, message",
    [
        ({"plain": "w_s 0"}, "'w_s 0' is not among: plain, half, once, twice"),
        ({"fidelity": "CLIP-I"}, "plain has no CLIP-I"),
        ({"within": -1}, "within is -1"),
        ({"within": math.nan}, "within is nan"),
    ],
)
def test_a_rule_that_cannot_be_applied_is_an_error(given, message):
    with pytest.raises(ValueError, match=message):
        best(**{"candidates": SWEEP, "plain": "plain", "within": 1, **given})


def test_the_small_models_are_the_same_for_a_seed(folder, tmp_path):
    again, other = (score_models.build(tmp_path / str(seed), seed) for seed in (0, 1))
    for name in (CLIP, DINO, DINOV2, BLIP):
        files = [path.joinpath(name, "model.safetensors").read_bytes() for path in (folder, again, other)]
        assert files[0] == files[1] != files[2]
