"""Curves of one score against another over the steps of many trials, with intervals that resample subjects and seeds.

Variants are compared at equal identity, not at equal steps: a method that only learns more slowly keeps its attributes
longer, and a table at one step takes that for a gain. All of one comparison is recomputed in every resample, from the
trials to the interpolated difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
INTERVAL = 95  # per cent

Unit = tuple[tuple[str, int], int]  # subject (category, individual) and training seed
Runs = dict[Unit, dict[int, dict]]
"""One variant's rows: by subject and seed, then by step."""


def runs(rows: Iterable[dict]) -> Runs:
    """Rows of one variant in their order.

    Raises ValueError for two rows of one subject, seed and step, and for units without the steps of the others.
    """
    found: Runs = {}
    for row in rows:
        steps = found.setdefault(((row["category"], row["individual"]), row["seed"]), {})
        if row["step"] in steps:
            raise ValueError(f"Step {row['step']} of {row['category']} {row['individual']}, seed {row['seed']}, twice.")
        steps[row["step"]] = row
    steps = {tuple(sorted(of_unit)) for of_unit in found.values()}
    if len(steps) > 1:
        raise ValueError(f"The trials of one variant were judged at different steps: {sorted(steps)}.")
    return found


def resamples(units: Sequence[Unit], count: int = RESAMPLES, seed: int = 0) -> list[list[Unit]]:
    """Bootstrap in two levels: subjects with replacement, then within each as many of its seeds with replacement."""
    rng = np.random.default_rng(seed)
    by_subject: dict = {}
    for unit in units:
        by_subject.setdefault(unit[0], []).append(unit)
    subjects = sorted(by_subject)
    drawn = []
    for _ in range(count):
        chosen = [by_subject[subjects[i]] for i in rng.integers(len(subjects), size=len(subjects))]
        drawn.append([of[i] for of in chosen for i in rng.integers(len(of), size=len(of))])
    return drawn


def mean(variant: Runs, units: Sequence[Unit], score: str) -> np.ndarray:
    """[steps] the score's mean over units (with repetitions), in the order of the steps."""
    steps = sorted(next(iter(variant.values())))
    return np.array([[variant[unit][step][score] for step in steps] for unit in units]).mean(0)


def at(levels: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """y where the curve (x, y), in the order of its steps, first reaches each level of x; NaN where it never does."""
    found = np.full(len(levels), np.nan)
    for i, level in enumerate(levels):
        for before, after in zip(range(len(x) - 1), range(1, len(x)), strict=True):
            if x[before] <= level <= x[after]:
                share = (level - x[before]) / (x[after] - x[before]) if x[after] > x[before] else 0.0
                found[i] = y[before] + share * (y[after] - y[before])
                break
    return found


@dataclass(frozen=True)
class Estimate:
    """A value with its interval; `n` is the number of units."""

    value: float
    low: float
    high: float
    n: int

    @property
    def clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0

    def plain(self) -> dict:
        """Plain values for JSON; None for what has no value."""
        values = {"value": self.value, "low": self.low, "high": self.high}
        return {name: None if np.isnan(x) else round(x, 4) for name, x in values.items()} | {"n": self.n}


def estimate(units: Sequence[Unit], statistic: Callable[[Sequence[Unit]], float], count: int = RESAMPLES) -> Estimate:
    """A statistic of the units with its percentile interval; resamples in which it has no value (NaN) are left out.

    An interval needs a value in 9 of 10 resamples; otherwise low and high are NaN.
    """
    value = statistic(units)
    drawn = np.array([statistic(chosen) for chosen in resamples(units, count)])
    drawn = drawn[~np.isnan(drawn)]
    tail = (100 - INTERVAL) / 2
    low, high = np.percentile(drawn, [tail, 100 - tail]) if len(drawn) >= 0.9 * count else (np.nan, np.nan)
    return Estimate(float(value), float(low), float(high), len(units))


def common(a: Runs, b: Runs) -> list[Unit]:
    """Subjects and seeds that both variants have: the same picture, noise and timesteps."""
    return sorted(set(a) & set(b))


def at_equal(
    a: Runs, b: Runs, score: str = "aligned", against: str = "identity", levels: Sequence[float] | None = None
) -> Estimate:
    """Mean difference a - b of `score` over levels of `against` that both mean curves pass through.

    The levels are fixed from all units once (nine, from the 10th to the 90th per cent of the common range, when not
    given) and then kept in every resample; levels that a resampled curve misses are left out of its mean.
    """
    units = common(a, b)
    if levels is None:
        levels = shared_levels(a, b, units, against)

    def difference(chosen: Sequence[Unit]) -> float:
        found = [at(np.asarray(levels), mean(v, chosen, against), mean(v, chosen, score)) for v in (a, b)]
        gap = found[0] - found[1]
        return float(np.nanmean(gap)) if len(gap) and not np.isnan(gap).all() else float("nan")

    return estimate(units, difference)


def shared_levels(a: Runs, b: Runs, units: Sequence[Unit], against: str, count: int = 9) -> np.ndarray:
    """Levels of `against` inside the common range of both mean curves; empty where they have none."""
    ranges = [mean(v, units, against) for v in (a, b)]
    low, high = max(r.min() for r in ranges), min(r.max() for r in ranges)
    return np.linspace(low + 0.1 * (high - low), high - 0.1 * (high - low), count) if high > low else np.array([])


def at_step(a: Runs, b: Runs, step: int, score: str) -> Estimate:
    """Mean difference a - b of a score at one step."""
    units = common(a, b)
    return estimate(units, lambda chosen: float(np.mean([a[u][step][score] - b[u][step][score] for u in chosen])))
