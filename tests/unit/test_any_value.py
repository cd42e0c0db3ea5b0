"""Whatever is typed or sent, the recipe and the captions take it or refuse it in words that name the field."""

import dataclasses
import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comfy_sude import captions
from comfy_sude.baselines import REGISTRY
from comfy_sude.recipe import Options, Prior, Recipe, check_values

settings.register_profile("quiet", deadline=None, derandomize=True, database=None)
settings.load_profile("quiet")

INNER = tuple(type(value) for value in vars(Options()).values() if dataclasses.is_dataclass(value))
GROUPS: tuple[type, ...] = (*INNER, Options, *(baseline.settings for baseline in REGISTRY.values()))
NUMBERS = st.one_of(
    st.integers(), st.integers(-(10**400), 10**400), st.floats(), st.booleans(), st.sampled_from([2**63, 2**64, -0.0])
)
VALUES = st.one_of(
    NUMBERS, st.text(), st.none(), st.binary(), st.lists(st.integers()), st.dictionaries(st.text(), NUMBERS)
)
TEXT = st.text(st.characters(exclude_categories=()))  # lone surrogates and NUL too
WORDS = st.one_of(
    TEXT, st.sampled_from(["sks", "SKS", "<new1>", "*", "ß", "İ", "ſ", "x" * 10_000, "\ud800", "a\0b", "(?P<"])
)


def limited(group: type) -> list[dataclasses.Field]:
    """The fields of a group of settings that have bounds or a list of names."""
    return [spec for spec in dataclasses.fields(group) if {"low", "options"} & spec.metadata.keys()]


def allowed(spec: dataclasses.Field, value: Any) -> bool:
    """Whether a training can use the value, said independently of the recipe."""
    if "options" in spec.metadata:
        return isinstance(value, str) and value in spec.metadata["options"]
    if type(value) not in (int, float) or not math.isfinite(value if type(value) is float else 0):
        return False
    if isinstance(spec.default, int) and type(value) is float and not value.is_integer():
        return False
    return spec.metadata["low"] <= value <= spec.metadata["high"]


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
@given(data=st.data())
def test_any_value_of_a_limited_setting_is_usable_or_refused_by_name(group: type, data: st.DataObject):
    spec = data.draw(st.sampled_from(limited(group)))
    near = [spec.metadata[end] + by for end in ("low", "high") if end in spec.metadata for by in (-1, -0.5, 0, 0.5, 1)]
    value = data.draw(st.one_of(VALUES, st.sampled_from([*near, *spec.metadata.get("options", ())])))
    values = group(**{spec.name: value})
    if allowed(spec, value):
        check_values(values)
    else:
        with pytest.raises(ValueError, match=rf"(?s)^{spec.name} is .*must be"):
            check_values(values)


@given(data=st.data(), method=st.sampled_from(sorted(REGISTRY)))
def test_any_recipe_is_whole_or_refused_in_a_sentence(data: st.DataObject, method: str):
    def some(group: type, **fixed: Any) -> Any:
        chosen = {
            spec.name: data.draw(st.one_of(st.just(spec.default), NUMBERS, TEXT), spec.name)
            for spec in data.draw(st.lists(st.sampled_from(limited(group)), max_size=2, unique_by=lambda one: one.name))
        }
        return group(**{**chosen, **fixed})

    baseline = some(REGISTRY[method].settings, identifier=data.draw(st.one_of(st.just("sks"), WORDS)))
    options = some(Options, prior=some(Prior))
    category = data.draw(st.one_of(st.just("dog"), WORDS), "category")
    seed = data.draw(st.one_of(st.just(0), NUMBERS), "seed")
    try:
        recipe = Recipe(category, method, baseline, options, seed).checked()
    except ValueError as error:
        named = {"training_seed", "category", "identifier", "resolution", "prior"}
        named |= {spec.name for group in GROUPS for spec in limited(group)}
        assert str(error).split()[0] in named and str(error).endswith(".") and len(str(error)) > 30
        assert str(error).encode(), "ComfyUI's executor dies of a message that cannot be written to its log"
        return
    assert type(recipe.seed) is int and 0 <= recipe.seed < 2**64
    for values in (recipe.baseline, recipe.options, recipe.options.prior):
        assert all(allowed(spec, getattr(values, spec.name)) for spec in limited(type(values)))
    assert recipe.options.batch_size >= 1 and recipe.options.prior.kind != "preset"
    side = recipe.options.resolution
    assert side == 0 or (side >= 64 and side % 8 == 0)
    assert recipe.checked() == recipe, "what was checked must not change when it is checked again"


@given(category=WORDS, identifier=WORDS)
def test_any_two_words_are_tidied_or_refused_by_name(category: str, identifier: str):
    try:
        tidy = captions.check(category, identifier)
    except ValueError as error:
        assert re.match(
            r"(category|identifier) (is empty: type|.*: give the plain kind of thing|.*: type it again)",
            str(error),
            re.DOTALL,
        )
        return
    assert tidy == (" ".join(category.split()), " ".join(identifier.split())) and all(tidy)
    assert captions.check(*tidy) == tidy
    subject, plain = captions.subject_caption(*tidy), captions.category_caption(tidy[0])
    assert subject.encode() != plain.encode() and subject.startswith("photo of a ") and "  " not in subject


@given(placeholder=WORDS.filter(bool), before=TEXT, after=TEXT)
def test_any_new_word_is_found_where_it_stands_alone(placeholder: str, before: str, after: str):
    assert captions.holds(placeholder, placeholder)
    assert captions.holds(placeholder.swapcase(), placeholder) or placeholder.swapcase().swapcase() != placeholder
    if not before.lower().endswith("embedding:"):
        assert captions.holds(f"{before} {placeholder} {after}", placeholder)
    if placeholder[0].isalnum() and placeholder[-1].isalnum():
        assert not captions.holds(f"x{placeholder}y", placeholder)


@given(placeholder=WORDS.map(captions.normalize).filter(bool), text=WORDS)
def test_any_new_word_is_usable_in_any_case_or_refused(placeholder: str, text: str):
    try:
        captions.check_placeholder(placeholder, [text])
    except ValueError as error:
        assert str(error).startswith("identifier ") and str(error).endswith(".")
        return
    assert not captions.holds(text, placeholder)
    # the CLIP that learned the word keeps it in lower case and looks for it in prompts as they are typed
    assert captions.holds(f"a {placeholder} b", placeholder.lower())
