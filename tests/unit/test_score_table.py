"""The table of scores says what was measured, and which row is best and why."""

import json

import pytest
import torch

from comfy_sude.score_table import BACKGROUND, BAD, CHOSEN, GOOD, Row, choose, draw, rows, text, values

LABELS = ["plain", "plain", "w_s 0.4", "w_s 0.4", "plain"]
SCORES = {"DINO-I": [60.0, 62.0, 60.5, 60.1, 58.0], "BLIP-T": [40.0, 41.0, 44.0, 46.0, 42.0]}
RULE = {"alignment": "BLIP-T", "fidelity": "DINO-I"}


def table(**pairs: tuple[float, float]) -> list[Row]:
    """Rows of DINO-I and BLIP-T."""
    metrics = ("DINO-I", "BLIP-T")
    return [
        Row(label, 4, dict(zip(metrics, pair, strict=True)), dict.fromkeys(metrics, 0.5))
        for label, pair in pairs.items()
    ]


def has(picture: torch.Tensor, color: tuple[int, int, int]) -> bool:
    """Whether a picture has a colour."""
    return bool(((picture * 255).round() == torch.tensor(color)).all(-1).any())


def test_rows_are_means_and_standard_errors_of_their_labels_pictures():
    plain, tuned = rows(LABELS, SCORES)
    assert (plain.label, plain.count, tuned.label, tuned.count) == ("plain", 3, "w_s 0.4", 2)
    assert plain.mean == {"DINO-I": 60.0, "BLIP-T": 41.0} and tuned.mean["BLIP-T"] == 45.0
    assert plain.error["DINO-I"] == pytest.approx(2 / 3**0.5) and tuned.error["BLIP-T"] == pytest.approx(1.0)
    (single,) = rows(["one"], {"CLIP-T": [30.0]})
    assert single.error == {"CLIP-T": 0.0}


def test_the_text_has_every_mean_in_its_column_and_the_rule():
    found = rows(LABELS, SCORES)
    lines = text(found, choose(found, fidelity_within=1, plain_label="plain", **RULE)).splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["pictures", "DINO-I", "BLIP-T"],
        ["plain", "3", "60.0", "41.0"],
        ["w_s", "0.4", "2", "60.3", "45.0", "best"],
    ]
    assert lines[0].index("BLIP-T") + 6 == lines[1].index("41.0") + 4 == lines[2].index("45.0") + 4
    assert lines[3] == "best: w_s 0.4, the highest BLIP-T of those with DINO-I of at least 59.0 (plain less 1)"
    assert len(text(found).splitlines()) == 3, "nothing chosen, no rule"


def test_without_a_plain_label_the_most_faithful_row_takes_its_part():
    found = table(a=(50, 44), b=(60, 40), c=(59.5, 42))
    choice = choose(found, fidelity_within=1, plain_label="", **RULE)
    assert (choice.plain, choice.best) == ("b", "c")
    assert choose(found, fidelity_within=20, plain_label="", **RULE).best == "a"
    assert choose(found[:1], fidelity_within=1, plain_label="", **RULE) is None, "one row is no choice"


def test_the_values_are_json():
    found = rows(LABELS, SCORES)
    document = json.loads(json.dumps(values(found, choose(found, fidelity_within=1, plain_label="plain", **RULE))))
    assert document["rows"][1]["mean"] == {"DINO-I": pytest.approx(60.3), "BLIP-T": 45.0}
    assert document["choice"] == {"best": "w_s 0.4", "plain": "plain", "within": 1, **RULE}
    assert values(found)["choice"] is None


def test_the_picture_marks_the_best_and_what_rose_and_fell():
    found = table(plain=(60, 40), up=(60, 44), lost=(40, 50))
    picture = draw(found, choose(found, fidelity_within=1, plain_label="plain", **RULE))[0]
    assert all(has(picture, color) for color in (BACKGROUND, CHOSEN, GOOD, BAD))
    assert picture.dtype == torch.float32 and 0 <= picture.min() and picture.max() <= 1
    alone = draw(found[:1])[0]
    assert not any(has(alone, color) for color in (CHOSEN, GOOD, BAD))
    assert alone.shape[0] < picture.shape[0]


def test_long_labels_and_many_rows_stay_in_the_picture():
    short = draw(table(a=(1, 2)))
    found = [Row("very long label " * 20 + str(index), 1, {"CLIP-T": 1.0}, {"CLIP-T": 0.0}) for index in range(30)]
    picture = draw(found, choose(found, "CLIP-T", "CLIP-T", 1, found[0].label))
    assert picture.shape[1] > 10 * short.shape[1] // 3 and picture.shape[2] < 1100
    edge = (picture[0, :, -8:] * 255).round()
    assert (edge == torch.tensor(BACKGROUND)).all(), "nothing is drawn over the edge"
    assert ((picture[0, -12:] * 255).round() == torch.tensor(BACKGROUND)).all()
