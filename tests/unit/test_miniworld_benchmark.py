"""The mini world as a benchmark: curves and intervals, judges, the quick learner, trials that resume, the protocol."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import claims, records
from bench.miniworld import curves, report, text, trials
from bench.miniworld.identity import UNSEEN, load_identity
from bench.miniworld.learner import METHODS, Learner, TextModel, Words, World
from bench.miniworld.protocol import FAMILIES, PLAIN, SEEDS, SUBJECTS
from bench.miniworld.protocol import trials as protocol_trials
from bench.miniworld.trial import HoldingTrainer, Judges, Setting, individual, recipe, run
from bench.miniworld.world import ATTRIBUTES, CATEGORIES, random_subject, render

RESULTS = Path(__file__).parents[2] / "bench" / "results" / "miniworld"
pytestmark = pytest.mark.usefixtures("one_thread", "like_comfyuis_executor")


# --- Curves ----------------------------------------------------------------------------------------------------------


def rows(speed: float, lift: float = 0.0, noise: float = 0.0, subjects: int = 6, seeds: int = 3) -> list[dict]:
    """Trials whose alignment falls as identity rises; `speed` moves along the curve, `lift` moves the curve."""
    rng, found = np.random.default_rng(3), []
    for subject in range(subjects):
        for seed in range(seeds):
            shift = noise * rng.standard_normal()
            for step in (1, 2, 3, 4, 5):
                identity = 0.1 + 0.15 * speed * step
                value = {"identity": identity, "aligned": 1 - identity + lift + shift}
                found.append({"category": "dog", "individual": subject, "seed": seed, "step": step, **value})
    return found


def test_a_method_that_only_learns_more_slowly_gains_nothing_at_equal_identity():
    slow, fast = curves.runs(rows(0.7)), curves.runs(rows(1.0))
    assert curves.at_step(slow, fast, 5, "aligned").value == pytest.approx(0.225)
    found = curves.at_equal(slow, fast)
    assert found.value == pytest.approx(0, abs=1e-9)
    assert found.low == pytest.approx(0, abs=1e-9) and found.high == pytest.approx(0, abs=1e-9)


def test_a_lifted_curve_is_found_with_an_interval_around_the_truth():
    found = curves.at_equal(curves.runs(rows(1.0, 0.1, 0.05)), curves.runs(rows(0.8)))
    assert found.low < 0.1 < found.high
    assert found.clear
    assert found.n == 18


def test_curves_without_a_common_identity_have_no_difference():
    apart = [row | {"identity": row["identity"] + 5} for row in rows(1.0)]
    found = curves.at_equal(curves.runs(apart), curves.runs(rows(1.0)))
    assert np.isnan(found.value)
    assert found.plain()["value"] is None
    assert not found.clear


@pytest.mark.parametrize(("level", "expected"), [(0.0, 1.0), (0.25, 0.75), (1.0, 0.5), (2.0, np.nan)])
def test_reading_a_curve_takes_its_first_crossing(level: float, expected: float):
    x, y = np.array([0.0, 0.5, 0.3, 1.0]), np.array([1.0, 0.5, 0.9, 0.5])
    assert curves.at(np.array([level]), x, y)[0] == pytest.approx(expected, nan_ok=True)


def test_resampling_draws_subjects_first_and_is_the_same_every_time():
    units = sorted(curves.runs(rows(1.0)))
    drawn = curves.resamples(units, 200)
    assert drawn == curves.resamples(units, 200)
    assert {len(chosen) for chosen in drawn} == {18}
    subjects = np.mean([len({unit[0] for unit in chosen}) for chosen in drawn])
    assert 3.5 < subjects < 4.5  # 6 x (1 - (5/6)^6) = 3.99; single rows instead of subjects would give 5.8


def test_rows_that_do_not_belong_together_are_refused():
    some = rows(1.0)
    with pytest.raises(ValueError, match="twice"):
        curves.runs([*some, some[0]])
    with pytest.raises(ValueError, match="different steps"):
        curves.runs(some[:-1])


# --- Judges ----------------------------------------------------------------------------------------------------------


def test_the_identity_judge_tells_a_subject_from_others_on_renders_it_never_saw():
    rng, own, other = np.random.default_rng(991), [], []
    subjects = [random_subject(rng) for _ in range(40)]
    shown = [attribute for attribute in (None, *ATTRIBUTES) if attribute != UNSEEN]
    drawn = [render(CATEGORIES[i % 8], shown[i % len(shown)], subject) for i, subject in enumerate(subjects)]
    reading = load_identity().read(torch.from_numpy(np.stack(drawn)))
    for i in range(len(subjects)):
        own.append(reading.score(subjects[i])[i].item())
        other.append(reading.score(subjects[i - 1])[i].item())
    published = json.loads((Path(report.__file__).with_name("identity.json")).read_text())["scores of renders"]
    assert np.mean(own) == pytest.approx(published["own"]["score"], abs=0.06)
    assert np.mean(other) == pytest.approx(published["other"]["score"], abs=0.08)


# --- The quick learner -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world() -> World:
    """The shipped narrow networks."""
    return World.load()


def test_captions_are_encoded_as_the_checkpoint_was_trained_with(world: World):
    captions = ["", "photo of a dog", "photo of a caged sks dog", "photo of a cat wearing a hat"]
    words = Words(TextModel(world.rows))
    assert [words.tokens(c) for c in captions] == [text.tokenize(c) for c in captions]
    tokens = torch.tensor([text.tokenize(c) for c in captions])
    expected = text.Encoder(text.seeded_weights())(tokens, world.rows)
    torch.testing.assert_close(words(captions).detach(), expected)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_leaves_the_world_as_it_was(method: str, world: World):
    setting = Setting("dog", 7, method, w_s=0.4, learning_rate=1e-3, prior=0.0, evaluate_at=(2,))
    before = {name: w.clone() for name, w in world.unet.state_dict().items()}
    learner = Learner(world, recipe(setting), individual(7))
    noise = dict(count=1, seed=1, steps=2, guidance=2.0)
    first = learner.sample([learner.named], **noise)
    learner.train_to(2)
    assert learner.steps == 2
    assert learner.trainer.log.values["l_sude"][-1] != 0 or learner.trainer.log.values["gate"][-1] == 0
    assert all(torch.equal(before[name], w) for name, w in world.unet.state_dict().items())
    again = Learner(world, recipe(setting), individual(7))
    assert torch.equal(again.sample([again.named], **noise), first)
    again.train_to(2)
    trained = [p for group in learner.trainer.optimizer.param_groups for p in group["params"]]
    repeated = [p for group in again.trainer.optimizer.param_groups for p in group["params"]]
    assert all(torch.equal(a, b) for a, b in zip(trained, repeated, strict=True))
    assert method == "ViCo" or not torch.equal(learner.sample([learner.named], **noise), first)


def test_only_bare_captions_leave_the_category_out(world: World):
    for method, expected in (("DreamBooth", "photo of a sks dog"), ("DreamBooth, bare", "photo of a sks")):
        learner = Learner(world, recipe(Setting("dog", 7, method, prior=0.0)), individual(7))
        assert learner.baseline.subject_caption == expected
        assert learner.baseline.category_caption == "photo of a dog"


# --- Trials ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_trials_go_on_where_they_stopped(tmp_path: Path):
    file = tmp_path / "trials.jsonl"
    settings = [Setting("dog", 5, "DreamBooth, bare", prior=0.0, evaluate_at=(1, 2), seed=seed) for seed in (0, 1)]
    done = list(trials.run_all(settings[:1], file, 1, pictures=1))
    assert [row["step"] for row in done[0]["rows"]] == [1, 2]
    assert all(0 <= row["aligned"] <= row["attribute"] <= 1 for row in done[0]["rows"])
    with file.open("a") as torn:
        torn.write('{"setting": {"cat')
    assert [setting.seed for setting in trials.missing(settings, file)] == [1]
    ran = list(trials.run_all(settings, file, 1, pictures=1))
    assert [trial["setting"]["seed"] for trial in ran] == [1]
    assert [trial["setting"]["seed"] for trial in records.read(file)] == [0, 1]
    assert list(trials.run_all(settings, file, 1, pictures=1)) == []


@pytest.mark.slow
def test_a_prompt_that_names_the_category_gets_it(world: World):
    judges = Judges()
    for asks, least, most in ((True, 0.9, 1.0), (False, 0.0, 0.5)):
        setting = Setting("dog", 1, "DreamBooth, bare", prior=0.0, evaluate_at=(1,), ask_category=asks)
        (row,) = run(setting, world, judges, {}, pictures=1)
        assert least <= row["category_right"] <= most
        assert row["attribute"] > 0.9 and row["aligned"] <= row["category_right"]


def test_holding_the_empty_caption_adds_to_the_prior(world: World):
    priors = []
    for hold in (0.0, 2.0):
        images = world.encode(torch.zeros(8, 64, 64, 3, dtype=torch.uint8))
        trainer = type("Holding", (HoldingTrainer,), {"hold": hold})
        learner = Learner(world, recipe(Setting("dog", 7)), individual(7), images, trainer)
        learner.train_to(1)
        priors.append(learner.trainer.log.values["l_prior"][0])
    assert priors[1] > priors[0] > 0


# --- Protocol and results --------------------------------------------------------------------------------------------


def test_the_protocol_is_what_was_promised():
    every = list(protocol_trials())
    assert len(every) == len(SUBJECTS) * len(SEEDS) * sum(len(family.variants) for family in FAMILIES)
    assert len({json.dumps(setting.key()) for setting in every}) == len(every)
    assert len(SUBJECTS) >= 6 and len(SEEDS) >= 5
    assert {"DreamBooth", "Custom Diffusion", "ViCo"} <= {family.title for family in FAMILIES}
    assert all(family.variants[0].name == PLAIN for family in FAMILIES)


def test_the_protocol_uses_no_individual_and_no_seed_of_the_exploration():
    explored = [trial["setting"] for trial in records.read(RESULTS / "explored.jsonl")]
    assert len(explored) > 100
    assert not {(s["category"], s["individual"]) for s in explored} & set(SUBJECTS)
    assert not {s["seed"] for s in explored} & set(SEEDS)


def test_what_is_compared_with_what():
    names = [PLAIN, "SuDe 2", "SuDe 2, no truncation", "SuDe 6, pretrained references"]
    assert report.pairs(names) == [
        ("SuDe 2", PLAIN),
        ("SuDe 2, no truncation", PLAIN),
        ("SuDe 6, pretrained references", PLAIN),
        ("SuDe 2", "SuDe 2, no truncation"),
        ("SuDe 6, pretrained references", "SuDe 2"),
    ]


def test_a_report_has_curves_comparisons_and_a_picture(tmp_path: Path):
    found = []
    for name, speed, lift in ((PLAIN, 1.0, 0.0), ("SuDe 2", 1.0, 0.1), ("plain, lower rate", 0.8, 0.1)):
        for row in rows(speed, lift, subjects=3, seeds=2):
            more = {"attribute": row["aligned"], "identity_plain": row["identity"], "category_right": 1.0, "gate": 0.5}
            found.append(row | more | {"tag": f"Custom Diffusion: {name}", "train_cpu_seconds": row["step"] / speed})
    results = report.results(found)
    compared = {(row["variant"], row["against"]): row for row in results["families"]["Custom Diffusion"]["comparisons"]}
    assert set(compared) == {("SuDe 2", PLAIN), ("SuDe 2", "plain, lower rate"), ("plain, lower rate", PLAIN)}
    assert compared["SuDe 2", PLAIN]["aligned at equal identity"]["value"] == pytest.approx(0.1)
    assert compared["SuDe 2", "plain, lower rate"]["aligned at equal identity"]["value"] == pytest.approx(0.0)
    assert compared["plain, lower rate", PLAIN]["training cost, ratio"] == pytest.approx(1.25)
    assert "+0.100" in report.text(results)
    picture = report.plot(results, tmp_path / "curves.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_published_results_are_those_of_the_published_trials():
    published = json.loads((RESULTS / "results.json").read_text())
    everything = report.sort(trials.rows(RESULTS / "trials.jsonl"))
    for title, family in published["families"].items():
        for name, drawn in family["curves"].items():
            variant = everything[title][name]
            assert drawn["units"] == len(variant)
            for score in ("aligned", "identity"):
                assert [p[score] for p in drawn["points"]] == pytest.approx(
                    curves.mean(variant, sorted(variant), score).tolist(), abs=1e-4
                )


def test_the_claims_hold_on_the_published_trials_and_fail_where_an_effect_is_gone(tmp_path: Path, capsys):
    kept = tmp_path / "trials.jsonl"
    published = records.read(RESULTS / "trials.jsonl")
    kept.write_text("".join(json.dumps(trial) + "\n" for trial in published))
    assert claims.main(["--keep", str(kept)]) == 0
    assert capsys.readouterr().out.count("holds") == len(claims.CLAIMS)

    def unit(trial: dict, variant: str) -> tuple | None:
        family, _, name = trial["setting"]["tag"].partition(": ")
        return (trial["setting"]["category"], trial["setting"]["seed"]) if (family, name) == variant else None

    plain = {unit(trial, (claims.BARE, PLAIN)): trial["rows"] for trial in published}
    for trial in published:  # SuDe that does nothing
        if unit(trial, (claims.BARE, claims.SUDE)):
            trial["rows"] = [row | trial["setting"] for row in plain[unit(trial, (claims.BARE, claims.SUDE))]]
    kept.write_text("".join(json.dumps(trial) + "\n" for trial in published))
    assert claims.main(["--keep", str(kept)]) == 1
    assert capsys.readouterr().out.count("GONE") == 1
