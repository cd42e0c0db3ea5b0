"""DreamBench's cells through a ComfyUI of its own: made, scored, kept, tried again, and told in a table."""

import dataclasses
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from bench.dreambench import runner, smoke, table
from bench.dreambench.results import DONE, FAILED
from bench.dreambench.studio import Studio
from comfy_sude.scores import METRICS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("comfyui")]


@pytest.fixture
def plan(tmp_path: Path) -> runner.Plan:
    """Two cells of the smoke run."""
    whole = smoke.plan(tmp_path / "output", baselines=("ViCo",), multipliers=(0.0, 1.0))
    return dataclasses.replace(whole, subjects=whole.subjects[:1])


def test_cells_are_made_as_a_user_would_and_a_run_survives_what_fails(plan: runner.Plan, tmp_path: Path):
    assert plan.missing() == []
    plain, sude = plan.jobs().values()
    elsewhere = dataclasses.replace(sude, checkpoint=str(tmp_path / "gone.safetensors"))
    with Studio(tmp_path / "base", plan.models) as studio:

        def make():
            yield plain, studio.perform(plain, plan.pictures_of(plain.subject))
            studio.server.process.kill()
            studio.server.process.wait()
            yield sude, studio.perform(elsewhere, plan.pictures_of(sude.subject))

        assert runner.run(plan, make(), 2) == 1
        first, second = plan.results.read()
        assert (first["status"], second["status"]) == (DONE, FAILED) and "gone.safetensors" in second["error"]
        assert set(plan.open()) == {sude.cell.key}

        # the next run makes what failed, with a server in place of the one that died
        again = ((job, studio.perform(job, plan.pictures_of(job.subject))) for job in plan.open().values())
        assert runner.run(plan, again, 2) == 0
        assert not list((tmp_path / "base" / "output").rglob("*.png")), "pictures are kept twice"
    made = plan.records()
    assert [record["w_s"] for record in made] == [0.0, 1.5] and made[0]["scores"] != made[1]["scores"]
    assert made[0]["prompts"] == ["photo of a running *", "photo of a * in the snow"] and made[0]["references"] == 2
    for record in made:
        assert list(record["scores"]) == list(METRICS)
        assert all([len(values) for values in rows] == [2, 2] for rows in record["scores"].values())
        assert "2/2" in record["training"] or "2 steps" in record["training"], record["training"]
    picture = plan.output / "pictures" / "miniworld" / "spike" / "vico_ws1_seed0" / "1_1.png"
    shown = Image.open(io.BytesIO(picture.read_bytes()))
    assert shown.size == (64, 64)
    asked = json.loads(shown.info["prompt"])
    assert {node["class_type"] for node in asked.values()} >= {"SuDeFineTune", "KSampler", "SaveImage"}
    assert asked["sampler 1"]["inputs"]["sampler_name"] == "ddim"
    rows = table.rows(made, (1.0,))
    assert [row.method for row in rows] == [table.PLAIN, table.SUDE] and rows[0].subjects == ("spike",)

    # nothing is left to do, so no server is started
    assert list(runner.here(plan, tmp_path / "untouched")) == [] and plan.open() == {}
    assert not (tmp_path / "untouched" / "server.log").exists()
