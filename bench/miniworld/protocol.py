"""The protocol of the mini world benchmark. Fixed and committed before it was run; NOTES.md tells how it was chosen.

Individuals 101 to 106 and the training seeds below were not used to explore. Everything is judged as `trial.judge`
says, at the steps given here, and compared at equal identity (`curves.at_equal`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .trial import Setting

SUBJECTS: tuple[tuple[str, int], ...] = (
    ("dog", 101), ("cat", 102), ("bird", 103), ("fish", 104), ("car", 105), ("boat", 106)
)  # fmt: skip
SEEDS: tuple[int, ...] = (11, 12, 13, 14, 15)


class Variant(NamedTuple):
    """One curve: a name within its baseline and what differs from the baseline's plain setting."""

    name: str
    changes: dict


class Family(NamedTuple):
    """A baseline with its variants; the first is plain."""

    title: str
    common: dict
    variants: tuple[Variant, ...]


PLAIN = "plain"
FAMILIES: tuple[Family, ...] = (
    Family(
        "DreamBooth, caption without category",
        {"method": "DreamBooth, bare", "learning_rate": 1e-4, "prior": 0.0, "evaluate_at": (25, 50, 100, 150)},
        (
            Variant(PLAIN, {}),
            Variant("SuDe 0.4", {"w_s": 0.4}),
            Variant("SuDe 1", {"w_s": 1.0}),
            Variant("SuDe 4, pretrained references", {"w_s": 4.0, "reference": "pretrained"}),
            Variant("plain, lower rate", {"learning_rate": 3e-5, "evaluate_at": (50, 100, 200, 300)}),
            Variant("plain, category in the caption", {"method": "DreamBooth"}),
            Variant("plain, category in the prompt", {"ask_category": True}),
        ),
    ),
    Family(
        "Custom Diffusion",
        {"method": "Custom Diffusion", "learning_rate": 1e-3, "prior": 0.0, "evaluate_at": (50, 100, 200, 300)},
        (
            Variant(PLAIN, {}),
            Variant("SuDe 2", {"w_s": 2.0}),
            Variant("SuDe 2, no truncation", {"w_s": 2.0, "truncation": False}),
            Variant("SuDe 6, pretrained references", {"w_s": 6.0, "reference": "pretrained"}),
            Variant("plain, lower rate", {"learning_rate": 5e-4, "evaluate_at": (100, 200, 300, 400)}),
        ),
    ),
    Family(
        "DreamBooth",
        {"method": "DreamBooth, text", "learning_rate": 3e-5, "prior": 0.0, "evaluate_at": (50, 100, 150, 200)},
        (Variant(PLAIN, {}), Variant("SuDe 0.4", {"w_s": 0.4})),
    ),
    Family(
        "ViCo",
        {"method": "ViCo", "learning_rate": 1e-3, "evaluate_at": (100, 200)},
        (Variant(PLAIN, {}), Variant("SuDe 1.5", {"w_s": 1.5})),
    ),
)


def setting(family: Family, variant: Variant, subject: tuple[str, int], seed: int) -> Setting:
    """The trial of one variant on one individual with one training seed."""
    category, individual = subject
    values = {"category": category, "individual": individual, "seed": seed, "tag": f"{family.title}: {variant.name}"}
    return Setting(**values | family.common | variant.changes)


def trials() -> Iterator[Setting]:
    """All of it, so ordered that what is done at any time is nearly balanced: by seed, then by variant."""
    for seed in SEEDS:
        for family in FAMILIES:
            for variant in family.variants:
                yield from (setting(family, variant, subject, seed) for subject in SUBJECTS)


def describe() -> dict:
    """The protocol as plain values, for the results' file."""
    families = [
        {"title": f.title, "common": f.common, "variants": {v.name: v.changes for v in f.variants}} for f in FAMILIES
    ]
    return {"subjects": SUBJECTS, "seeds": SEEDS, "families": families}


def smaller(families: dict[str, tuple[str, ...]], subjects: int, seeds: int) -> Iterator[Setting]:
    """The trials of some variants on the first subjects and seeds, as `bench claims` runs them.

    Args:
        families: names of variants by the title of their family.
        subjects: how many.
        seeds: how many.
    """
    for seed in SEEDS[:seeds]:
        for family in FAMILIES:
            for variant in family.variants:
                if variant.name in families.get(family.title, ()):
                    for subject in SUBJECTS[:subjects]:
                        yield setting(family, variant, subject, seed)
