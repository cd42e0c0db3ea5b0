"""The arithmetic of DreamBench's table: means, differences, the choice of w_s, intervals, the paper's numbers."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from bench.dreambench import plots, table
from bench.dreambench.protocol import Cell


def finished(subject: str, multiplier: float, seed: int = 0, **means) -> dict:
    """A record of two prompts with four pictures each, which lie 1 below and above the given means."""
    scores = {metric: [[mean - 1, mean + 1, mean - 1, mean + 1]] * 2 for metric, mean in means.items()}
    cell = dataclasses.asdict(Cell("SD1.4", subject, "DreamBooth", multiplier, seed))
    return {"cell": cell, "scores": {metric.replace("_", "-"): rows for metric, rows in scores.items()}}


def row(rows: list[table.Row], method: str) -> table.Row:
    (found,) = [one for one in rows if one.method == method]
    return found


CASE = [
    finished("dog", 0.0, DINO_I=60, BLIP_T=40), finished("dog", 0.5, DINO_I=59.5, BLIP_T=43),
    finished("dog", 1.0, DINO_I=60, BLIP_T=42), finished("dog", 2.0, DINO_I=50, BLIP_T=49),
    finished("vase", 0.0, DINO_I=70, BLIP_T=30), finished("vase", 0.5, DINO_I=70, BLIP_T=29),
    finished("vase", 1.0, DINO_I=69, BLIP_T=28), finished("vase", 2.0, DINO_I=68.9, BLIP_T=35),
    finished("cat", 0.0, DINO_I=10, BLIP_T=10), finished("cat", 1.0, DINO_I=11, BLIP_T=13),
]  # fmt: skip


def test_means_and_differences_are_over_the_subjects_that_are_complete():
    rows = table.rows(CASE, (0.5, 1.0, 2.0))
    plain, sude, best = (row(rows, method) for method in (table.PLAIN, table.SUDE, table.BEST))
    assert plain.subjects == sude.subjects == ("dog", "vase", "cat") and best.subjects == ("dog", "vase")
    assert plain.mean["DINO-I"].value == pytest.approx(140 / 3) and plain.difference == {}
    assert sude.mean["BLIP-T"].value == pytest.approx((42 + 28 + 13) / 3)
    assert sude.difference["BLIP-T"].value == pytest.approx((2 - 2 + 3) / 3)
    assert (sude.difference["BLIP-T"].low, sude.difference["BLIP-T"].high) == pytest.approx((-2, 3))


def test_the_best_is_chosen_by_alignment_within_a_point_of_fidelity():
    best = row(table.rows(CASE, (0.5, 1.0, 2.0)), table.BEST)
    # the dog's 2 loses the subject, so 0.5; the vase's 2 is 1.1 below, so plain
    assert best.chosen == {0.0: 1, 0.5: 1, 1.0: 0, 2.0: 0}
    assert best.mean["BLIP-T"].value == pytest.approx((43 + 30) / 2)
    assert best.difference["BLIP-T"].value == pytest.approx((3 + 0) / 2)


def test_held_out_reports_pictures_that_were_not_chosen_by():
    lucky = finished("dog", 1.0, DINO_I=60, BLIP_T=0)
    lucky["scores"]["BLIP-T"] = [[50, 50, 10, 10]] * 2  # the first half of the pictures looks better than plain's
    case = [finished("dog", 0.0, DINO_I=60, BLIP_T=40), finished("dog", 0.5, DINO_I=60, BLIP_T=30), lucky]
    rows = table.rows(case, (0.5, 1.0))
    assert row(rows, table.BEST).mean["BLIP-T"].value == pytest.approx(40)  # plain: 30 on average is worse
    held_out = row(rows, table.HELD_OUT)
    assert held_out.chosen == {0.0: 1, 0.5: 0, 1.0: 1}
    assert held_out.mean["BLIP-T"].value == pytest.approx((10 + 40) / 2)


def test_training_seeds_are_averaged_within_a_subject():
    case = [finished("dog", m, seed, DINO_I=60 + seed, BLIP_T=40 + m) for m in (0.0, 1.0) for seed in (0, 1)]
    case.append(finished("vase", 0.0, 0, DINO_I=0, BLIP_T=0))  # of one seed only
    rows = table.rows(case, (1.0,), seeds=2)
    assert [one.method for one in rows] == [table.PLAIN, table.SUDE], "there is nothing to choose the best of"
    assert rows[0].subjects == ("dog",) and rows[0].mean["DINO-I"].value == pytest.approx(60.5)


def test_the_bootstrap_gives_the_same_interval_every_time_and_the_right_one():
    samples = np.random.default_rng(5).normal(3, 2, 200)
    found = table.bootstrap(samples)
    assert found == table.bootstrap(samples) and found.value == pytest.approx(samples.mean())
    error = samples.std(ddof=1) / 200**0.5
    assert (found.low, found.high) == pytest.approx((found.value - 1.96 * error, found.value + 1.96 * error), abs=0.02)
    assert table.bootstrap([4.0]) == table.Interval(4, 4, 4)


def test_the_papers_numbers_and_how_far_ours_are_from_them_stand_in_the_table():
    case = [finished("dog", m, CLIP_I=78, DINO_I=60, CLIP_T=29, BLIP_T=42 + m) for m in (0.0, 1.0)]
    rows = table.rows(case, (1.0,))
    listed = table.as_values(rows, {"seeds": [0]})["rows"]
    assert listed[1]["paper"] == {"CLIP-I": 77.4, "DINO-I": 59.9, "CLIP-T": 29.5, "BLIP-T": 43.3}
    assert listed[1]["paper_difference"] == pytest.approx(
        {"CLIP-I": 0.6, "DINO-I": 0.1, "CLIP-T": -0.5, "BLIP-T": -0.3}
    )
    json.dumps(listed)
    text = table.as_text(rows, "DreamBench")
    lines = [line for line in text.splitlines() if line.startswith(("| paper |", "| ours less"))]
    assert [[cell.strip() for cell in line.split("|")[3:7]] for line in lines[2:]] == [
        ["77.4", "59.9", "29.5", "43.3"],
        ["+0.6", "+0.1", "-0.5", "-0.3"],
    ]


def test_plots_are_drawn_of_whatever_is_there(tmp_path: Path):
    rows = table.rows(CASE, (0.5, 1.0, 2.0))
    files = plots.write(tmp_path, "some cells", rows, table.points(CASE))
    assert [file.name for file in files] == ["attribute_fidelity.png", "differences.png"]
    assert all(file.stat().st_size > 1000 for file in files)
    alone = [finished("dog", 0.0, CLIP_T=30)]
    assert plots.write(tmp_path, "one cell", table.rows(alone, ()), table.points(alone)) == []
