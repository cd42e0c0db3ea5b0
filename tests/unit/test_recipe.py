"""The presets are the published ones, and no value that cannot train gets past the recipe."""

import dataclasses
import math

import pytest

from comfy_sude.baselines import REGISTRY
from comfy_sude.baselines.dreambooth import DreamBoothSettings
from comfy_sude.baselines.dreambooth_lora import DreamBoothLoRASettings
from comfy_sude.recipe import Keeping, Options, Prior, Recipe, Watching


def recipe(**changes) -> Recipe:
    return Recipe(**{"category": "dog", "method": "DreamBooth", "baseline": DreamBoothSettings(), **changes})


def test_the_dreambooth_preset_is_the_released_configuration():
    settings, options = DreamBoothSettings(), recipe().checked().options
    prior = options.prior
    assert (settings.w_s, settings.steps, settings.learning_rate, settings.identifier) == (0.4, 500, 1e-6, "sks")
    assert (options.batch_size, options.optimizer, options.weight_decay, options.max_grad_norm) == (1, "AdamW", 0.01, 0)
    assert (options.precision, options.flip, options.sample_latent) == ("fp32", True, True)
    assert (options.truncation, options.reference, options.t0) == (True, "current", "clamp")
    assert (prior.kind, prior.w_r, prior.number, prior.steps, prior.cfg) == ("class images", 2.0, 50, 50, 10.0)
    assert prior.negative_prompt == "monochrome, lowres, bad anatomy, worst quality, low quality"


@pytest.mark.parametrize("method", REGISTRY)
def test_every_baselines_preset_is_a_recipe_that_trains(method):
    assert recipe(method=method, baseline=REGISTRY[method].settings()).checked()


@pytest.mark.parametrize("values", [DreamBoothSettings, DreamBoothLoRASettings, Options, Prior, Keeping, Watching])
def test_every_setting_tells_what_it_does(values):
    for field in dataclasses.fields(values):
        if field.name not in ("prior", "keeping", "watching"):
            assert len(field.metadata["help"]) > 20, field.name


def test_captions_are_tidied():
    checked = recipe(category=" stuffed  animal ", baseline=DreamBoothSettings(identifier=" sks ")).checked()
    assert (checked.category, checked.baseline.identifier) == ("stuffed animal", "sks")


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        ("baseline", "w_s", -0.1),
        ("baseline", "w_s", math.nan),
        ("baseline", "w_s", math.inf),
        ("baseline", "w_s", "0.4"),
        ("baseline", "w_s", True),
        ("baseline", "steps", 0),
        ("baseline", "steps", 1.5),
        pytest.param("baseline", "steps", 10**400, id="baseline-steps-astronomical"),
        ("baseline", "learning_rate", -1e-6),
        ("options", "batch_size", -1),
        ("options", "weight_decay", 2.0),
        ("options", "max_grad_norm", -1.0),
        ("options", "precision", "fp8"),
        ("options", "optimizer", "SGD"),
        ("options", "t0", "zero"),
        ("options", "reference", "frozen"),
        ("options", "fit", "pad"),
        ("options", "resolution", 60),
        ("options", "resolution", 8),
        ("options", "resolution", 513),
        ("prior", "kind", "none"),
        ("prior", "w_r", -1.0),
        ("prior", "number", 0),
        ("prior", "cfg", None),
    ],
)
def test_a_value_no_training_can_use_is_named_before_training(where, name, value):
    if where == "baseline":
        broken = recipe(baseline=DreamBoothSettings(**{name: value}))
    elif where == "options":
        broken = recipe(options=Options(**{name: value}))
    else:
        broken = recipe(options=Options(prior=Prior(**{name: value})))
    with pytest.raises(ValueError, match=rf"^{name} is "):
        broken.checked()


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_outside_64_bits_is_refused(seed):
    with pytest.raises(ValueError, match="training_seed"):
        recipe(seed=seed).checked()


def test_the_bounds_themselves_are_allowed():
    assert recipe(
        seed=2**64 - 1,
        baseline=DreamBoothSettings(w_s=0.0, steps=1),
        options=Options(resolution=64, prior=Prior(w_r=0.0, image_seed=2**64 - 1)),
    ).checked()


def test_a_category_with_the_identifier_is_refused():
    with pytest.raises(ValueError, match="holds the identifier"):
        recipe(category="sks dog").checked()


def test_a_recipe_cannot_change_after_it_was_checked():
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe().seed = 3


def test_a_recipe_as_plain_values_tells_all_of_it():
    plain = recipe(seed=5).checked().as_dict()
    assert plain["baseline"]["w_s"] == 0.4
    assert plain["options"]["prior"]["kind"] == "class images"
    assert plain != recipe(seed=6).as_dict()
