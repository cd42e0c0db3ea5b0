"""What a preview shows is what the finished training would sample; validation and previews fit every baseline."""

import comfy.sample
import comfy.samplers
import pytest
import torch

from comfy_sude import watch
from comfy_sude.baselines import REGISTRY
from comfy_sude.recipe import Watching

from .helpers import Silent, recipe, train

WATCHING = Watching(preview_prompts="photo of a running [subject]", preview_every=3, preview_steps=3, preview_limit=100)
CASES = [
    *((name, "eps", {}) for name in REGISTRY),
    ("ViCo", "eps", {"unconditional_image": False}),
    ("DreamBooth LoRA", "v_prediction", {}),
]


@pytest.mark.parametrize("method, prediction, settings", CASES)
def test_the_last_preview_is_what_comfyui_samples_from_the_result(
    models, load, picture, tmp_path, monkeypatch, method, prediction, settings
):
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    from comfy_sude.host.apply import apply_subject

    drawn = []
    monkeypatch.setattr("comfy_sude.host.live.save_previews", lambda pixels, name: drawn.append(pixels) or [])
    model, clip, vae = models if prediction == "eps" else load("small")  # a schedule leaves its mark on a shared one
    (model,) = ModelSamplingDiscrete().patch(model, prediction, zsnr=prediction != "eps")
    report = Silent()
    subject = train((model, clip, vae), picture, tmp_path, recipe(method, watching=WATCHING, **settings), report)
    assert [row.step for row in report.watched.previews.rows] == [3]
    (prompt,) = report.watched.previews.prompts
    assert prompt == f"photo of a running {subject.metadata['subject']}"

    patched, text = apply_subject(model, clip, subject)
    sampling = patched.get_model_object("model_sampling")
    times = torch.linspace(sampling.num_timesteps - 1, 0, WATCHING.preview_steps + 1).round().long()[:-1]
    sigmas = torch.cat([sampling.sigmas[times], torch.zeros(1)])
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    positive, negative = (text.encode_from_tokens_scheduled(text.tokenize(words)) for words in (prompt, ""))
    latents = comfy.sample.sample_custom(
        patched, noise, watch.GUIDANCE, comfy.samplers.sampler_object("ddim"), sigmas, positive, negative,
        torch.zeros_like(noise), disable_pbar=True, seed=0,
    )  # fmt: skip
    expected = vae.decode(latents)
    spread = (expected - expected.mean()).abs().max()
    assert (drawn[0] - expected).abs().max() <= 0.02 * max(spread, 0.1)


@pytest.mark.parametrize("method", list(REGISTRY))
def test_every_baseline_is_validated_and_the_subject_keeps_the_values(models, picture, tmp_path, method):
    from comfy_sude.subject import packed, unpacked

    report = Silent()
    subject = train(models, picture, tmp_path, recipe(method, watching=Watching(preview_every=0)), report)
    steps, values = zip(*subject.log.validation, strict=True)
    assert steps == (0, 3) and all(value > 0 for value in values)
    assert report.watched.previews is None
    assert unpacked(*packed(subject)).log.validation == subject.log.validation


def test_a_watched_training_ends_in_the_bits_of_an_unwatched_one(models, picture, tmp_path):
    blind = train(models, picture, tmp_path, recipe(watching=Watching(preview_every=0)))
    seen = train(models, picture, tmp_path, recipe(watching=WATCHING))
    assert blind.tensors.keys() == seen.tensors.keys()
    for key, parts in blind.tensors.items():
        assert all(torch.equal(tensor, seen.tensors[key][part]) for part, tensor in parts.items()), key


def test_a_result_from_the_store_shows_its_curves(models, picture, tmp_path):
    first, second = Silent(), Silent()
    train(models, picture, tmp_path, recipe("DreamBooth LoRA"), first, retrain=False)
    again = train(models, picture, tmp_path, recipe("DreamBooth LoRA"), second, retrain=False)
    assert again.story.startswith("reused")
    assert second.watched.curves.means() == first.watched.curves.means()
    assert second.watched.log.validation == first.watched.log.validation


def test_prompts_that_do_not_fit_are_refused_before_training(models, picture, tmp_path):
    for text, message in (("a [subject] " + "very " * 90, "shorten preview_prompts"), ("a\nb\nc\nd\ne", "at most 4")):
        report = Silent()
        with pytest.raises(ValueError, match=message):
            train(models, picture, tmp_path, recipe(watching=Watching(preview_prompts=text)), report)
        assert not report.steps
