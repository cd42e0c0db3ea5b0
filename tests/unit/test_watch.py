"""Looking at a training changes nothing in it, costs what it may, and shows what is there."""

import gc
import time
import weakref

import pytest
import torch

from comfy_sude import resume, watch
from comfy_sude.log import TERMS, Log
from comfy_sude.recipe import Options, Watching
from comfy_sude.watch import Curves, Previews, Row, Watcher, wanted

from .test_train import SUBJECT, Report, Toy

pytestmark = pytest.mark.usefixtures("one_thread", "like_comfyuis_executor")

EVERY_STEP = Watching(preview_prompts="photo of a [subject]", preview_every=1, preview_steps=2, preview_limit=100)


def watcher(toy: Toy, watching: Watching = EVERY_STEP, decode=None, tick=lambda: None) -> Watcher:
    """A watcher of a toy's training that keeps the latents it is shown."""
    made = []

    def keep(latents, step):
        made.append((step, latents))
        return [{"filename": f"{step}"} for _ in latents]

    found = Watcher(toy.trainer, watching, decode or keep, tick)
    found.made = made
    return found


def run(toy: Toy, watching: Watcher, steps: int = 4) -> None:
    watching.begin()
    toy.trainer.run(Report(), steps, after_step=watching.after_step)


def log_of(steps: int) -> Log:
    return Log({term: [float(step * (place + 1)) for step in range(steps)] for place, term in enumerate(TERMS)})


# --- Curves


@pytest.mark.parametrize("steps", [0, 1, 7, 199, 200, 201, 5000, 10_000])
def test_a_curve_has_the_means_of_its_steps_in_at_most_200_points(steps):
    log, curves = log_of(steps), Curves()
    curves.feed(log)
    means = curves.means()
    for term, values in log.values.items():
        every = curves.every
        expected = [sum(values[i : i + every]) / len(values[i : i + every]) for i in range(0, steps, every)]
        assert means.get(term, []) == pytest.approx(expected), term
        assert len(expected) < 200


def test_curves_fed_step_by_step_are_those_fed_at_once():
    log, whole, steady = log_of(777), Curves(), Curves()
    whole.feed(log)
    for steps in range(1, 778):
        steady.feed(Log({term: values[:steps] for term, values in log.values.items()}))
    assert steady.means() == whole.means() and steady.every == whole.every == 4


def test_ten_thousand_steps_cost_next_to_nothing():
    log, curves = log_of(10_000), Curves()
    began = time.process_time()
    curves.feed(log)
    each = (time.process_time() - began) / 10_000
    assert each < 1e-4, f"{each * 1e6:.0f} us a step"


# --- What it must leave alone


@pytest.mark.parametrize("prior", ["class images", "distillation"])
def test_a_watched_training_ends_in_the_bits_of_an_unwatched_one(prior):
    plain, watched = Toy(prior=prior), Toy(prior=prior)
    plain.trainer.run(Report(), 4)
    found = watcher(watched)
    run(watched, found)
    assert len(found.made) == 4 and watched.equals(plain)
    assert watched.log == plain.log


def test_the_watcher_lets_go_of_the_trainer():
    toy = Toy()
    found = watcher(toy)
    run(toy, found)
    found.end()
    trainer = weakref.ref(toy.trainer)
    del toy
    gc.collect()
    assert trainer() is None and found.previews.rows and found.curves.means()["l_sub"]


def test_a_stop_in_a_preview_stops_the_training_with_its_state_whole():
    class Stop(Exception):
        """What ComfyUI's interrupt is: no OSError."""

    def stop():
        raise Stop

    toy = Toy()
    with pytest.raises(Stop):
        run(toy, watcher(toy, tick=stop))
    assert toy.trainer.whole and toy.trainer.log.steps == 1


# --- Previews


def test_previews_show_the_weights_as_they_are_from_the_same_noise():
    toy, still = Toy(), Toy(learning_rate=1e-9)
    moving, standing = watcher(toy), watcher(still)
    run(toy, moving)
    run(still, standing)
    first, *later = [latents for _, latents in moving.made]
    assert all(not torch.allclose(first, one, atol=1e-4) for one in later)
    first, *later = [latents for _, latents in standing.made]
    assert all(torch.allclose(first, one, atol=1e-4) for one in later)


class Clock:
    """Time that passes only when told to."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(watch.time, "monotonic", lambda: self.now)


@pytest.mark.parametrize("limit", [5.0, 10.0, 50.0])
def test_previews_never_take_more_than_their_limit_of_the_time(monkeypatch, limit):
    clock, toy = Clock(monkeypatch), Toy(steps=200)

    def decode(latents, step):
        clock.now += 5.0
        return []

    watching = Watching(preview_prompts="photo of a [subject]", preview_every=10, preview_steps=1, preview_limit=limit)
    found = watcher(toy, watching, decode)
    found.begin()
    began, drawn, previews = clock.now, [], 0.0
    for _ in range(200):
        toy.trainer.step()
        clock.now += 1.0
        before = clock.now
        found.after_step(toy.trainer)
        if clock.now > before:
            drawn.append(toy.trainer.log.steps)
            previews += clock.now - before
        if drawn and len(drawn) > 1:  # what the first one costs is an estimate
            assert previews <= (limit / 100 + 1e-9) * (clock.now - began)
        elif not drawn:
            assert found.previews.note == "" or "waits" in found.previews.note
    assert drawn, "the limit allows some"
    assert len(drawn) == pytest.approx(min(20, limit / 100 * (200 + previews) / 5), abs=1.1)
    assert found.share == pytest.approx(previews / (clock.now - began))


def test_without_a_limit_there_is_a_row_every_so_many_steps_and_at_zero_none():
    watching = Watching(preview_prompts="photo of a [subject]", preview_every=2, preview_steps=1, preview_limit=100)
    toy = Toy(steps=7)
    found = watcher(toy, watching)
    run(toy, found, 7)
    assert [step for step, _ in found.made] == [2, 4, 6]
    for changes in ({"preview_limit": 0.0}, {"preview_every": 0}, {"preview_prompts": " \n"}):
        values = {"preview_prompts": "photo of a [subject]", "preview_every": 1, "preview_limit": 100.0, **changes}
        toy = Toy()
        found = watcher(toy, Watching(**values))
        run(toy, found)
        assert not found.made


@pytest.mark.parametrize("error", [OSError("disk full"), torch.OutOfMemoryError("no memory")])
def test_what_fails_in_a_preview_ends_the_previews_and_nothing_else(error):
    def fail(latents, step):
        raise error

    plain, toy = Toy(), Toy()
    plain.trainer.run(Report(), 4)
    found = watcher(toy, decode=fail)
    run(toy, found)
    assert toy.equals(plain) and "previews stopped" in found.previews.note and str(error) in found.previews.note
    found.end()
    assert "previews stopped" in found.previews.note


def test_there_are_never_more_than_16_rows_and_the_first_and_the_newest_stay():
    previews = Previews(["x"])
    for step in range(1, 101):
        previews.add(Row(step, []))
        steps = [row.step for row in previews.rows]
        assert len(steps) <= 16 and steps == sorted(set(steps)) and steps[0] == 1 and steps[-1] == step
    assert len(steps) >= 8


def test_prompts_have_the_subjects_words_and_there_are_four_at_most():
    text = "photo of a running  [subject]\n\n photo of a cat \nphoto of a cat\n"
    assert wanted(Watching(preview_prompts=text), "sks dog") == ["photo of a running sks dog", "photo of a cat"]
    with pytest.raises(ValueError, match="preview_prompts has 5 prompts.*remove 1"):
        wanted(Watching(preview_prompts="a\nb\nc\nd\ne"), "sks dog")


# --- The validation value


def test_the_validation_value_is_the_error_at_the_fixed_timesteps(monkeypatch):
    monkeypatch.setattr(watch, "VALIDATE_EVERY", 2)
    toy = Toy(steps=5)
    found = watcher(toy, Watching(preview_every=0))
    run(toy, found, 5)
    found.end()
    assert [step for step, _ in toy.trainer.log.validation] == [0, 2, 4, 5]

    g = torch.Generator().manual_seed(0)
    z, errors = toy.example.mean[:1, 0], []
    with torch.no_grad():
        context = toy.text([SUBJECT])
        for t in (100, 300, 500, 700):
            noise, t = torch.randn(z.shape, generator=g), torch.tensor([t])
            errors.append((toy.unet(toy.process.add_noise(z, noise, t), t, context) - noise).pow(2).mean().item())
    assert toy.trainer.log.validation[-1][1] == pytest.approx(sum(errors) / 4, rel=1e-5)
    assert toy.trainer.log.validation[-1][1] < toy.trainer.log.validation[0][1], "it learns"


def test_the_validation_values_go_on_with_a_resumed_training(monkeypatch):
    monkeypatch.setattr(watch, "VALIDATE_EVERY", 1)
    whole, first, second = Toy(), Toy(), Toy()
    run(whole, watcher(whole), 4)
    run(first, watcher(first), 2)
    resume.restore(second.trainer, *resume.state(first.trainer))
    found = watcher(second)
    run(second, found, 4)
    assert second.trainer.log.validation == whole.trainer.log.validation
    assert found.curves.steps == 4


def test_watching_is_no_part_of_what_decides_a_training():
    assert Toy().recipe.as_dict() == Toy(watching=EVERY_STEP).recipe.as_dict()
    assert "watching" not in Toy().recipe.as_dict()["options"]
    with pytest.raises(ValueError, match="preview_limit is 101"):
        Toy(watching=Watching(preview_limit=101))
    assert EVERY_STEP in Options(watching=EVERY_STEP).parts
