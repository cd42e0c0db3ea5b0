"""Nothing trained is lost: found again, resumed bit for bit, stopped early, kept in files, told about full disks."""

import dataclasses
import re

import pytest
import torch

from comfy_sude import files, subject
from comfy_sude.baselines import REGISTRY
from comfy_sude.host import memory
from comfy_sude.host.apply import apply_subject, differences
from comfy_sude.recipe import Keeping, Prior
from comfy_sude.resume import Keeper
from comfy_sude.store import Store
from comfy_sude.train import Trainer

from .helpers import Silent, recipe, sample, train
from .test_finetune import tensors_equal

pytestmark = pytest.mark.slow
OFTEN = Keeping(save_interval=0.0)
LORA = "DreamBooth LoRA"


def lora(**values):
    """The quickest training there is."""
    return recipe(LORA, **{"prior": Prior("off"), "rank": 2, "train_text_encoder": False, **values})


class Crash(Exception):
    """Something that goes wrong in the middle."""


def stop_at(step: int, error: BaseException):
    def act(done):
        if done == step:
            raise error

    return Silent(act)


def interrupt():
    import comfy.model_management

    return comfy.model_management.InterruptProcessingException()


# --- The memo


def test_the_same_training_is_found_again_and_samples_the_same(models, picture, tmp_path):
    first = train(models, picture, tmp_path, lora(), retrain=False)
    report = Silent()
    again = train(models, picture, tmp_path, lora(), report, retrain=False)
    assert "training" not in report.phases and "class images" not in " ".join(report.phases)
    assert again.story.startswith("reused") and not first.story.startswith("reused")
    assert tensors_equal(first, again) and first.log == again.log and first.metadata == again.metadata
    latents = [sample(*apply_subject(*models[:2], one)) for one in (first, again)]
    assert torch.equal(*latents)
    report = Silent()
    anew = train(models, picture, tmp_path, lora(), report, retrain=True)
    assert "training" in report.phases and tensors_equal(first, anew)


def test_anything_that_decides_the_result_is_another_training(models, picture, tmp_path):
    from .test_host_model import with_lora

    model, clip, vae = models
    nudged = picture.clone()
    nudged[0, 0, 0, 0] += 1 / 255
    skipped = clip.clone()
    skipped.clip_layer(-2)
    usual = {"steps": 1}
    trainings = [
        (models, picture, lora(**usual), None),
        (models, nudged, lora(**usual), None),
        (models, picture, lora(seed=1, **usual), None),
        (models, picture, lora(w_s=0.5, **usual), None),
        (models, picture, lora(category="cat", **usual), None),
        (models, picture, lora(**{**usual, "steps": 2}), None),
        (models, picture, lora(precision="bf16", **usual), None),
        ((with_lora(model), clip, vae), picture, lora(**usual), None),
        ((model, skipped, vae), picture, lora(**usual), None),
    ]
    for which, (loaded, image, wanted, classes) in enumerate(trainings):
        report = Silent()
        train(loaded, image, tmp_path, wanted, report, classes, retrain=False)
        assert "training" in report.phases, which
    report = Silent()
    same = dataclasses.replace(lora(w_s=0.4, **usual), seed=0)
    same = dataclasses.replace(same, options=dataclasses.replace(same.options, keeping=OFTEN))
    train(models, picture.clone(), tmp_path, same, report, retrain=False)
    assert "training" not in report.phases, "where results are kept is no part of the training"


def test_encodings_of_a_frozen_text_encoder_are_kept_and_make_the_same_bits(models, picture, tmp_path, monkeypatch):
    from comfy_sude.host.text import Encoder

    encoded = []
    call = Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda self, texts: encoded.append(texts) or call(self, texts))
    first = train(models, picture, tmp_path, lora())
    assert encoded and len(Store(tmp_path).entries("text")) == len(encoded) == 3
    encoded.clear()
    assert tensors_equal(first, train(models, picture, tmp_path, lora())) and not encoded
    train(models, picture, tmp_path, lora(precision="bf16"))
    assert encoded


def test_gradient_checkpointing_gives_the_same_bits_so_it_may_be_turned_on_half_way(models, picture, tmp_path):
    kept = [lora(steps=4, gradient_checkpointing=on) for on in (False, True)]
    without, with_it = (train(models, picture, tmp_path / "whole", one) for one in kept)
    assert tensors_equal(without, with_it)
    with pytest.raises(Crash):
        train(models, picture, tmp_path / "parts", kept[0], stop_at(2, Crash()), retrain=False)
    resumed = train(models, picture, tmp_path / "parts", kept[1], retrain=False)
    assert "resumed at step 2" in resumed.story and tensors_equal(without, resumed)


def test_a_whole_number_given_for_a_decimal_one_is_the_same_recipe():
    made = [recipe(w_s=value, prior=Prior(kind="off", w_r=value)).checked().as_dict() for value in (1, 1.0)]
    assert all(isinstance(one["baseline"]["w_s"], float) for one in made) and made[0] == made[1]


# --- Stop and resume


@pytest.mark.parametrize("method", list(REGISTRY))
def test_an_interrupted_training_goes_on_bit_for_bit(models, picture, tmp_path, method):
    wanted = recipe(method, steps=4)
    whole = train(models, picture, tmp_path / "whole", wanted)
    with pytest.raises(type(interrupt())):
        train(models, picture, tmp_path / "parts", wanted, stop_at(1, interrupt()), retrain=False)
    with pytest.raises(Crash):
        train(models, picture, tmp_path / "parts", wanted, stop_at(3, Crash()), retrain=False)
    report = Silent()
    resumed = train(models, picture, tmp_path / "parts", wanted, report, retrain=False)
    assert report.steps.count(4) and report.phases.count("training") == 1
    assert "resumed at step 3" in resumed.story
    assert tensors_equal(whole, resumed) and whole.log.values == resumed.log.values


def test_a_step_that_fails_half_way_is_done_again_with_the_same_draws(models, picture, tmp_path, monkeypatch):
    wanted = lora(steps=4)
    whole = train(models, picture, tmp_path / "whole", wanted)
    calls = []
    backward = torch.Tensor.backward

    def fail(loss, *args, **kwargs):
        calls.append(loss)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return backward(loss, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", fail)
    with pytest.raises(torch.OutOfMemoryError, match="state of step 2 is kept"):
        train(models, picture, tmp_path / "parts", wanted, retrain=False)
    resumed = train(models, picture, tmp_path / "parts", wanted, retrain=False)
    assert "resumed at step 2" in resumed.story and tensors_equal(whole, resumed)


def test_a_discarded_training_starts_over(models, picture, tmp_path):
    made = lora()
    wanted = dataclasses.replace(made, options=dataclasses.replace(made.options, keeping=Keeping("discard", 0.0)))
    with pytest.raises(type(interrupt())):
        train(models, picture, tmp_path, wanted, stop_at(2, interrupt()), retrain=False)
    assert not Store(tmp_path).entries("state")
    assert "resumed" not in train(models, picture, tmp_path, wanted, retrain=False).story


def test_more_steps_train_on_from_a_finished_training(models, picture, tmp_path):
    train(models, picture, tmp_path, lora(steps=2), retrain=False)
    longer = train(models, picture, tmp_path, lora(steps=4), retrain=False)
    assert "resumed at step 2" in longer.story
    assert tensors_equal(longer, train(models, picture, tmp_path / "whole", lora(steps=4)))
    shorter = train(models, picture, tmp_path, lora(steps=3), retrain=False)
    assert "resumed at step 2" in shorter.story and shorter.log.steps == 3


def test_enough_is_enough_and_can_be_had_again(models, picture, tmp_path):
    report = Silent(lambda done: setattr(report, "enough", done >= 2))
    early = train(models, picture, tmp_path, lora(steps=50), report, retrain=False)
    assert early.log.steps == 2 and early.metadata["steps"] == 2 and "stopped after 2 of 50" in early.story
    assert early.metadata["recipe"]["baseline"]["steps"] == 2
    again = train(models, picture, tmp_path, lora(steps=2), retrain=False)
    assert again.story.startswith("reused") and tensors_equal(early, again)
    on = train(models, picture, tmp_path, lora(steps=3), retrain=False)
    assert "resumed at step 2" in on.story


def test_class_images_drawn_before_a_crash_are_not_drawn_again(models, picture, tmp_path):
    wanted = recipe(LORA, prior=Prior("class images", number=6, steps=2, cfg=2.0))
    whole = train(models, picture, tmp_path / "whole", wanted)

    class Report(Silent):
        def step(self, done, line):
            super().step(done, line)
            if self.phases[-1] == "drawing class images" and done > 8:
                raise Crash

    with pytest.raises(Crash):
        train(models, picture, tmp_path / "parts", wanted, Report(), retrain=False)
    (kept,) = Store(tmp_path / "parts").entries("class_images")
    report = Silent()
    resumed = train(models, picture, tmp_path / "parts", wanted, report, retrain=False)
    assert tensors_equal(whole, resumed)
    assert len(Store(tmp_path / "parts").entries("class_images")) == 2
    assert kept.path.stat().st_ino == Store(tmp_path / "parts").entries("class_images")[0].path.stat().st_ino


# --- Trouble


def test_a_loss_that_is_not_finite_names_the_last_good_state(models, picture, tmp_path, monkeypatch):
    wanted = lora(steps=9)
    keep_all = Keeper.save
    monkeypatch.setattr(Keeper, "after_step", lambda self, trainer: keep_all(self, trainer))

    losses = Trainer.losses

    def poisoned(trainer):
        terms = losses(trainer)
        return terms if trainer.log.steps < 4 else terms | {"l_sub": terms["l_sub"] * float("nan")}

    monkeypatch.setattr(Trainer, "losses", poisoned)
    with pytest.raises(FloatingPointError, match="not finite at step 5.*state of step 4 is kept: queue with steps 4"):
        train(models, picture, tmp_path, wanted, retrain=False)
    monkeypatch.undo()
    good = train(models, picture, tmp_path, lora(steps=4), retrain=False)
    assert "resumed at step 4" in good.story and good.log.steps == 4


def test_a_full_disk_costs_the_state_and_not_the_training(models, picture, tmp_path, monkeypatch):
    def full(path, tensors, metadata):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write", full)
    report = Silent()
    trained = train(models, picture, tmp_path, lora(), report, retrain=False)
    assert trained.log.steps == 3 and any("could not be" in notice for notice in report.notices)
    monkeypatch.undo()
    assert tensors_equal(trained, train(models, picture, tmp_path / "other", lora()))


def test_out_of_memory_names_what_would_have_fitted(models, picture, tmp_path, monkeypatch):
    def full(done):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(memory, "free_memory", lambda device: 1.2e9)
    with pytest.raises(torch.OutOfMemoryError) as raised:
        train(models, picture, tmp_path, recipe(batch_size=4), Silent(full), retrain=False)
    said = str(raised.value)
    assert "out of memory: this training needs about 2.1 GB, 1.2 GB were free" in said
    fitting = re.findall(r"([a-z][\w ]*) \(about (\d\.\d) GB\)", said)
    assert len(fitting) == 4 and all(float(gigabytes) <= 1.2 for _, gigabytes in fitting), said
    changes = [text.split(" and ") for text, _ in fitting]
    assert 1 < len(changes[0]) <= len(changes[-1]), "no single change fits here, and the fewest come first"
    monkeypatch.setattr(memory, "free_memory", lambda device: 1e6)
    with pytest.raises(torch.OutOfMemoryError, match=r"The least this can need is about 0\.\d GB, with .*LoRA"):
        train(models, picture, tmp_path, recipe(batch_size=4), Silent(full), retrain=True)


# --- Files


@pytest.mark.parametrize("method", list(REGISTRY))
def test_a_saved_subject_is_the_same_in_every_bit(models, picture, tmp_path, method):
    trained = train(models, picture, tmp_path, recipe(method))
    path = tmp_path / "subject.safetensors"
    assert trained.save(path) == 0.0
    loaded = subject.load(path)
    assert tensors_equal(trained, loaded) and loaded.log == trained.log
    assert dataclasses.replace(loaded, story="").prompt("running") == trained.prompt("running")
    about = loaded.metadata
    assert about["steps"] == 3 and about["recipe"]["baseline"]["w_s"] == trained.metadata["recipe"]["baseline"]["w_s"]
    assert about["base"]["family"] == "SD15" and len(about["base"]["sha256"]) == 64
    assert about["versions"].keys() == {"sude", "comfyui", "torch"} and about["versions"]["comfyui"]
    assert files.peek(path)["modelspec.trigger_phrase"] == about["subject"]
    text = about["subject"]
    a, b = (sample(*apply_subject(*models[:2], one), text=f"photo of a {text}") for one in (trained, loaded))
    assert torch.equal(a, b) and not torch.equal(a, sample(*models[:2], text=f"photo of a {text}"))


def test_half_precision_says_what_it_loses_and_stays_close(models, picture, tmp_path):
    trained = train(models, picture, tmp_path, lora(rank=16))
    for precision, bound in (("fp16", 1e-3), ("bf16", 5e-3)):
        path = tmp_path / f"{precision}.safetensors"
        error = trained.save(path, precision)
        loaded = subject.load(path)
        pairs = [(trained.tensors[k][p], loaded.tensors[k][p]) for k in trained.tensors for p in trained.tensors[k]]
        lost = sum(float((a - b).double().pow(2).sum()) for a, b in pairs)
        size = sum(float(a.double().pow(2).sum()) for a, _ in pairs)
        assert 0 < error < bound and error == pytest.approx((lost / size) ** 0.5)
        assert all(b.dtype == torch.float32 for _, b in pairs)
    assert (tmp_path / "fp16.safetensors").stat().st_size < 0.6 * trained.size


def test_another_checkpoint_of_the_family_takes_it_with_a_warning_and_other_families_do_not(
    models, picture, tmp_path, load
):
    trained = train(models, picture, tmp_path, lora())
    assert differences(models[0], trained) == []
    model, clip, _ = load("small", seed=5)
    (said,) = differences(model, trained)
    assert "trained on" in said
    assert torch.isfinite(sample(*apply_subject(model, clip, trained))).all()
    other, clip, _ = load("sd21v")
    with pytest.raises(ValueError, match="family SD15.*this model is of the family SD20"):
        apply_subject(other, clip, trained)


def test_two_subjects_in_one_model_both_act(models, picture, tmp_path):
    one = train(models, picture, tmp_path, lora(identifier="sks"))
    two = train(models, 1 - picture, tmp_path, lora(identifier="olis", seed=3))
    both = apply_subject(*apply_subject(*models[:2], one), two)
    other = apply_subject(*apply_subject(*models[:2], two), one)
    latents = sample(*both)
    assert torch.allclose(latents, sample(*other), atol=1e-2)
    singles = [sample(*apply_subject(*models[:2], single)) for single in (one, two)]
    assert not any(torch.allclose(latents, single, atol=1e-1) for single in singles)
    off = apply_subject(*apply_subject(*models[:2], one, 0.0, 0.0), two)
    assert torch.equal(sample(*off), singles[1])
