"""A training that was stopped anywhere and goes on has the bits of one that was not, whatever its state is made of."""

import copy

import pytest
import torch

from comfy_sude import resume
from comfy_sude.resume import Keeper
from comfy_sude.store import Store

from .test_train import Report, Toy

pytestmark = pytest.mark.usefixtures("one_thread", "like_comfyuis_executor")

STATES = [
    {},
    {"optimizer": "Adafactor"},
    {"precision": "fp16"},
    {"precision": "bf16"},
    {"prior": "distillation", "reference": "pretrained"},
    {"lora": True, "max_grad_norm": 0.5},
    {"batch_size": 3, "pictures": 4},
]


def keeper(folder, steps=6, interval=0.0) -> Keeper:
    return Keeper(Store(folder), "trajectory", steps, interval)


@pytest.mark.parametrize("options", STATES, ids=str)
@pytest.mark.parametrize("stop", [1, 4])
def test_it_goes_on_bit_for_bit(tmp_path, options, stop):
    whole = Toy(steps=6, **options).run(6)
    first = Toy(steps=6, **options).run(stop)
    assert keeper(tmp_path).save(first.trainer)
    on = Toy(steps=6, **options)
    assert keeper(tmp_path).resume(on.trainer) == stop
    assert on.equals(first) and on.log == first.log
    on.trainer.run(Report())
    assert on.equals(whole) and on.log == whole.log
    assert on.trainer.scaler.state_dict() == whole.trainer.scaler.state_dict()


def test_every_part_of_the_state_matters(tmp_path):
    whole = Toy(steps=6).run(6)
    for part in (
        "parameter/0",
        "optimizer/0/exp_avg",
        "optimizer/1/exp_avg_sq",
        "generator/noise",
        "generator/timesteps",
    ):
        toy = Toy(steps=6).run(3)
        tensors, document = resume.state(toy.trainer)
        untouched, _ = resume.state(Toy(steps=6).run(1).trainer)
        on = Toy(steps=6)
        resume.restore(on.trainer, copy.deepcopy({**tensors, part: untouched[part]}), document)
        assert not on.run(3).equals(whole), part


def test_the_furthest_state_that_is_not_too_far_is_taken(tmp_path):
    for steps, done in ((4, 4), (9, 7), (20, 12)):
        assert keeper(tmp_path, steps).save(Toy(steps=steps).run(done).trainer)
    for steps, expected in ((3, 0), (4, 4), (6, 4), (7, 7), (11, 7), (30, 12)):
        assert keeper(tmp_path, steps).resume(Toy(steps=steps).trainer) == expected
    other = Keeper(Store(tmp_path), "another trajectory", 30, 0.0)
    assert other.resume(Toy(steps=30).trainer) == 0


def test_a_shorter_training_does_not_overwrite_the_state_of_a_longer_one(tmp_path):
    keeper(tmp_path, 20).save(Toy(steps=20).run(12).trainer)
    keeper(tmp_path, 5).save(Toy(steps=5).run(2).trainer)
    assert keeper(tmp_path, 20).resume(Toy(steps=20).trainer) == 12


def test_a_damaged_state_is_left_for_the_next_best(tmp_path):
    keeper(tmp_path, 4).save(Toy(steps=4).run(4).trainer)
    keeper(tmp_path, 9).save(Toy(steps=9).run(7).trainer)
    path = Store(tmp_path).path("state", "trajectory-9")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert keeper(tmp_path, 9).resume(Toy(steps=9).trainer) == 4


def test_a_state_of_another_network_or_format_is_not_taken(tmp_path):
    tensors, document = resume.state(Toy(steps=6).run(2).trainer)
    toy = Toy(steps=6)
    before = copy.deepcopy(toy.weights)
    smaller = {**tensors, "parameter/0": tensors["parameter/0"][:1]}
    missing = {name: value for name, value in tensors.items() if name != "generator/noise"}
    for bad in ((smaller, document), (missing, document), (tensors, {**document, "format": 2})):
        with pytest.raises(ValueError, match="another training"):
            resume.restore(toy.trainer, *bad)
    assert all(torch.equal(value, before[name]) for name, value in toy.weights.items())


def test_weights_that_are_not_finite_never_replace_a_good_state(tmp_path):
    toy, kept = Toy(steps=6).run(2), keeper(tmp_path)
    assert kept.save(toy.trainer)
    toy.run(1)
    with torch.no_grad():
        toy.trainer.parameters[0].fill_(float("nan"))
    assert not kept.save(toy.trainer)
    assert kept.resume(Toy(steps=6).trainer) == 2


def test_an_optimizer_step_that_broke_off_is_not_kept(tmp_path):
    toy = Toy(steps=6).run(2)
    toy.trainer.optimizer.step = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        toy.trainer.step()
    assert not keeper(tmp_path).save(toy.trainer)


@pytest.mark.parametrize("where", ["losses", "backward"])
def test_a_step_that_failed_before_the_weights_changed_can_be_done_again(where, monkeypatch):
    whole, toy = Toy(steps=6).run(6), Toy(steps=6).run(3)
    failing = "comfy_sude.train.Trainer._inherit" if where == "losses" else "torch.Tensor.backward"
    with monkeypatch.context() as patch:
        patch.setattr(failing, lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            toy.trainer.step()
    assert all(parameter.grad is None for parameter in toy.trainer.parameters)
    assert toy.run(3).equals(whole)


def test_saving_takes_a_twentieth_of_the_time_at_most(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(resume.time, "monotonic", lambda: clock[0])
    toy, kept = Toy(steps=6), keeper(tmp_path, interval=60.0)
    saves = []

    def slow(trainer):
        saves.append(clock[0])
        clock[0] += 10.0
        return {}, {}

    monkeypatch.setattr(resume, "state", slow)
    for _ in range(1000):
        toy.trainer.log.values["l_sub"].append(0.0)
        clock[0] += 1.0
        kept.after_step(toy.trainer)
    gaps = [later - earlier for earlier, later in zip(saves, saves[1:], strict=False)]
    assert saves[0] == 60.0 and all(200.0 <= gap <= 202.0 for gap in gaps), saves


def test_enough_ends_the_run_after_at_least_one_step():
    toy, report = Toy(steps=6), Report()
    report.enough = True
    assert toy.trainer.run(report).steps == 1


def test_what_could_not_be_saved_is_told(tmp_path):
    told = []
    kept = Keeper(Store(tmp_path, limit=10), "trajectory", 6, 0.0, told.append)
    assert not kept.save(Toy(steps=6).run(1).trainer) and "could not be saved" in told[0]
    silent = Keeper(Store(tmp_path, limit=0), "trajectory", 6, 0.0, told.append)
    assert not silent.save(Toy(steps=6).run(1).trainer) and len(told) == 1, "a person who keeps nothing knows"
