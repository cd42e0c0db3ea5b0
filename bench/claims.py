"""What the mini world benchmark found, checked again on a small part of it: `python dev.py bench claims`.

Trains some of the trials of `bench.miniworld.protocol` anew (the same individuals, seeds and noise) and exits with the
number of effects of the whole run that are gone. It reads no earlier result: every number is made here.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench import records
from bench.miniworld.curves import Estimate, at_equal, at_step, estimate
from bench.miniworld.protocol import PLAIN, smaller
from bench.miniworld.report import Everything, sort
from bench.miniworld.trials import name, run_all

BARE, CUSTOM = "DreamBooth, caption without category", "Custom Diffusion"
SUDE, GATED, UNGATED = "SuDe 1", "SuDe 2", "SuDe 2, no truncation"
LAST = 300  # step of CUSTOM
PART = (  # variants by family, subjects, seeds
    ({BARE: (PLAIN, SUDE)}, 6, 1),
    ({CUSTOM: (PLAIN, GATED, UNGATED)}, 3, 1),
)


class Claim(NamedTuple):
    """An effect of the whole run, and the least that must be left of it here."""

    text: str
    measure: Callable[[Everything], Estimate]
    least: float
    clear: bool = False
    """Whether the interval has to leave out zero too."""

    def holds(self, found: Estimate) -> bool:
        """Whether it is still there."""
        return found.value >= self.least and (found.low > 0 or not self.clear)


def fall(everything: Everything, family: str, score: str) -> Estimate:
    """How far a score of plain training falls from the first judgement to the last."""
    variant = everything[family][PLAIN]
    steps = sorted(next(iter(variant.values())))

    def mean(units) -> float:
        return float(np.mean([variant[unit][steps[0]][score] - variant[unit][steps[-1]][score] for unit in units]))

    return estimate(sorted(variant), mean)


CLAIMS = (
    Claim(
        "Plain Custom Diffusion loses attributes while it learns the subject",
        lambda found: fall(found, CUSTOM, "aligned"),
        0.3,
        True,
    ),
    Claim(
        "Captions without the category: SuDe aligns better at the same identity",
        lambda found: at_equal(found[BARE][SUDE], found[BARE][PLAIN]),
        0.02,
        True,
    ),
    Claim(
        "Without the truncation SuDe loses the subject's identity",
        lambda found: at_step(found[CUSTOM][GATED], found[CUSTOM][UNGATED], LAST, "identity"),
        0.1,
        True,
    ),
)


def run(file: Path, workers: int | None = None) -> Everything:
    """Train and judge the part, or what `file` lacks of it."""
    wanted = [setting for families, subjects, seeds in PART for setting in smaller(families, subjects, seeds)]
    for done, trial in enumerate(run_all(wanted, file, workers), 1):
        print(f"{done} of {len(wanted)}: {trial['setting']['tag']}, {trial['setting']['category']}", flush=True)
    names = {name(setting.key()) for setting in wanted}
    kept = [trial for trial in records.read(file) if name(trial["setting"]) in names]
    return sort(trial["setting"] | row for trial in kept for row in trial["rows"])


def main(argv: list[str] | None = None) -> int:
    """Check every claim; the number of those that do not hold."""
    parser = argparse.ArgumentParser(prog="python dev.py bench claims", description=__doc__)
    parser.add_argument("--workers", type=int, help="processes of one thread each; all cores by default")
    parser.add_argument("--keep", type=Path, help="a JSONL file to keep the trials in and to go on from")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = run(arguments.keep or Path(folder) / "trials.jsonl", arguments.workers)
    gone = 0
    for claim in CLAIMS:
        value = claim.measure(found)
        holds = claim.holds(value)
        gone += not holds
        print(
            f"{'holds' if holds else 'GONE '}  {value.value:+.3f} [{value.low:+.3f}, {value.high:+.3f}]  {claim.text}"
        )
        if not holds:
            print(f"       wanted: at least {claim.least}{' and an interval above 0' if claim.clear else ''}")
    print(f"{time.monotonic() - began:.0f} s")
    return gone


if __name__ == "__main__":
    sys.exit(main())
