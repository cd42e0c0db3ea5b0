"""The table: means with bootstrap intervals over subjects, differences from plain, the paper's numbers beside them.

Four rows a baseline: plain; SuDe at the baseline's published w_s; SuDe at the best w_s of each subject, chosen by
`scores.best` on the very pictures that are then reported, which flatters it; and the same chosen on one half of the
pictures and reported on the other, which does not.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from comfy_sude.scores import METRICS, best

PAPER = Path(__file__).with_name("paper.json")
PLAIN, SUDE, BEST, HELD_OUT = "plain", "SuDe", "SuDe, best w_s", "SuDe, best w_s, held out"
WITHIN = 1.0  # points of fidelity that the best may lose against plain. The node SuDe Score's default
ATTRIBUTE, FIDELITY = "BLIP-T", "DINO-I"  # what the best is chosen by
RESAMPLES, INTERVAL = 10_000, 95  # of the bootstrap; percent

Scores = Mapping[str, np.ndarray]
"""Metric -> [prompts, pictures] in percent."""
Runs = dict[float, list[Scores]]
"""Of one subject: multiplier of w_s -> its cells, one a training seed."""


@dataclass(frozen=True)
class Interval:
    """A mean over subjects with its percentile bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1f} [{self.low:.1f}, {self.high:.1f}]"


@dataclass(frozen=True)
class Row:
    """One method of one baseline on one backbone.

    Attributes:
        subjects: those whose cells are all there; only they count.
        mean: by metric.
        difference: from plain, paired by subject; by metric; none for plain itself.
        paper: Table 1, by metric; empty where it has no such row.
        chosen: how often each multiplier was the best.
    """

    backbone: str
    baseline: str
    method: str
    subjects: tuple[str, ...]
    mean: dict[str, Interval]
    difference: dict[str, Interval]
    paper: dict[str, float]
    chosen: dict[float, int]


def load_paper(path: Path = PAPER) -> dict[tuple[str, str, str], dict[str, float]]:
    """Table 1: (backbone, baseline, method) -> metric -> percent."""
    said = json.loads(path.read_text("utf-8"))
    return {
        (row["backbone"], row["baseline"], row["method"]): dict(zip(said["metrics"], row["scores"], strict=True))
        for row in said["rows"]
    }


def gather(records: Sequence[Mapping]) -> dict[tuple[str, str], dict[str, Runs]]:
    """Finished cells by (backbone, baseline), then by subject."""
    found: dict[tuple[str, str], dict[str, Runs]] = {}
    for record in records:
        cell = record["cell"]
        runs = found.setdefault((cell["backbone"], cell["baseline"]), {}).setdefault(cell["subject"], {})
        scores = {metric: np.array(values, dtype=float) for metric, values in record["scores"].items()}
        runs.setdefault(float(cell["multiplier"]), []).append(scores)
    return found


def mean(cells: Sequence[Scores], pictures: slice = slice(None)) -> dict[str, float]:
    """A subject's mean by metric, over training seeds, prompts and (some of) the pictures of each prompt."""
    return {
        metric: float(np.mean([cell[metric][:, pictures].mean() for cell in cells])) for metric in METRICS
        if all(metric in cell for cell in cells)
    }  # fmt: skip


def choose(runs: Runs, multipliers: Sequence[float], pictures: slice = slice(None)) -> float:
    """The best multiplier of one subject by the rule of `scores.best`; plain is among those it may choose."""
    candidates = {str(one): mean(runs[one], pictures) for one in (0.0, *multipliers)}
    return float(best(candidates, "0.0", WITHIN, ATTRIBUTE, FIDELITY))


def halves(runs: Runs) -> tuple[slice, slice]:
    """The pictures of each prompt in two halves."""
    count = next(iter(runs[0.0][0].values())).shape[1]
    return slice(0, count // 2), slice(count // 2, count)


def values(method: str, runs: Runs, multipliers: Sequence[float]) -> tuple[dict[str, float], list[float]]:
    """One subject's means by one method, and the multipliers it chose (none where there is nothing to choose)."""
    if method == PLAIN:
        return mean(runs[0.0]), []
    if method == SUDE:
        return mean(runs[1.0]), []
    if method == BEST:
        chosen = choose(runs, multipliers)
        return mean(runs[chosen]), [chosen]
    made = [(one, other, choose(runs, multipliers, one)) for one, other in (halves(runs), halves(runs)[::-1])]
    parts = [mean(runs[chosen], other) for _, other, chosen in made]
    return {metric: (parts[0][metric] + parts[1][metric]) / 2 for metric in parts[0]}, [made[0][2], made[1][2]]


def bootstrap(samples: Sequence[float], seed: int = 0) -> Interval:
    """The mean of one number a subject, with its interval; the same samples give the same interval."""
    data = np.asarray(samples, dtype=float)
    drawn = np.random.default_rng(seed).integers(len(data), size=(RESAMPLES, len(data)))
    low, high = np.percentile(data[drawn].mean(1), [(100 - INTERVAL) / 2, (100 + INTERVAL) / 2])
    return Interval(float(data.mean()), float(low), float(high))


def rows(records: Sequence[Mapping], multipliers: Sequence[float], seeds: int = 1) -> list[Row]:
    """The table's rows.

    Args:
        records: of finished cells.
        multipliers: of SuDe, those the best is chosen of; without 0.
        seeds: trainings of each kind that a subject must have to count.
    """
    paper, found = load_paper(), []
    for (backbone, baseline), subjects in gather(records).items():
        for method in (PLAIN, SUDE, BEST, HELD_OUT):
            needed = {PLAIN: [0.0], SUDE: [0.0, 1.0]}.get(method, [0.0, *multipliers])
            whole = {
                name: runs
                for name, runs in subjects.items()
                if all(len(runs.get(one, [])) == seeds for one in needed)
                and (method != HELD_OUT or halves(runs)[0].stop)
            }
            if not whole or (method in (BEST, HELD_OUT) and len(multipliers) < 2):
                continue
            made = [values(method, runs, multipliers) for runs in whole.values()]
            plain = [mean(runs[0.0]) for runs in whole.values()]
            metrics = [metric for metric in METRICS if all(metric in one for one, _ in made)]
            taken = [one for _, chosen in made for one in chosen]
            row = Row(
                backbone,
                baseline,
                method,
                tuple(whole),
                {metric: bootstrap([one[metric] for one, _ in made]) for metric in metrics},
                {}
                if method == PLAIN
                else {
                    metric: bootstrap([one[metric] - base[metric] for (one, _), base in zip(made, plain, strict=True)])
                    for metric in metrics
                },
                paper.get((backbone, baseline, method), {}),
                {one: taken.count(one) for one in (0.0, *multipliers) if taken},
            )
            found.append(row)
    return found


def points(records: Sequence[Mapping], seeds: int = 1) -> dict[tuple[str, str], dict[float, dict[str, float]]]:
    """(backbone, baseline) -> multiplier -> mean by metric, over the subjects that have every multiplier."""
    found = {}
    for place, subjects in gather(records).items():
        multipliers = sorted({one for runs in subjects.values() for one in runs})
        whole = [runs for runs in subjects.values() if all(len(runs.get(one, [])) == seeds for one in multipliers)]
        for one in multipliers if whole else ():
            means = [mean(runs[one]) for runs in whole]
            found.setdefault(place, {})[one] = {
                metric: float(np.mean([values[metric] for values in means])) for metric in means[0]
            }
    return found


def as_values(table: Sequence[Row], about: Mapping) -> dict:
    """The table as JSON values; "paper_difference" is ours minus the paper's."""
    listed = []
    for row in table:
        entry = {"backbone": row.backbone, "baseline": row.baseline, "method": row.method, "subjects": row.subjects}
        entry["mean"] = {metric: vars(interval) for metric, interval in row.mean.items()}
        entry["difference_from_plain"] = {metric: vars(interval) for metric, interval in row.difference.items()}
        entry["paper"] = row.paper
        entry["paper_difference"] = {metric: row.mean[metric].value - value for metric, value in row.paper.items()}
        entry["chosen_multipliers"] = {f"{one:g}": count for one, count in row.chosen.items()}
        listed.append(entry)
    rule = {"attribute": ATTRIBUTE, "fidelity": FIDELITY, "within": WITHIN}
    return {**about, "bootstrap": {"resamples": RESAMPLES, "percent": INTERVAL}, "rule": rule, "rows": listed}


def as_text(table: Sequence[Row], title: str, notes: Sequence[str] = ()) -> str:
    """The table in Markdown: ours, the difference from plain, the paper's and how far ours are from them."""
    lines = [f"# {title}", "", *notes, ""]
    for backbone in dict.fromkeys(row.backbone for row in table):
        part = [row for row in table if row.backbone == backbone]
        metrics = list(part[0].mean)
        lines += [f"## {backbone}", "", "| | subjects | " + " | ".join(metrics) + " |"]
        lines += ["|---|---|" + "---|" * len(metrics)]
        for row in part:
            cells = [str(row.mean[metric]) for metric in metrics]
            lines.append(_line(f"**{row.baseline}, {row.method}**", len(row.subjects), cells))
            if row.difference:
                cells = [_signed(row.difference[metric]) for metric in metrics]
                lines.append(_line("less plain", "", cells))
            if row.paper:
                lines.append(_line("paper", "", [f"{row.paper[m]:.1f}" if m in row.paper else "" for m in metrics]))
                gaps = [f"{row.mean[m].value - row.paper[m]:+.1f}" if m in row.paper else "" for m in metrics]
                lines.append(_line("ours less paper", "", gaps))
        lines.append("")
        for row in part:
            if row.chosen:
                counts = ", ".join(f"{one:g}: {count}" for one, count in row.chosen.items())
                lines.append(f"- {row.baseline}, {row.method}: multiplier of w_s chosen ({counts}).")
        lines.append("")
    lines += [
        f"Percent; mean over subjects with its {INTERVAL} % bootstrap interval over subjects. Best: the highest "
        f"{ATTRIBUTE} of those with {FIDELITY} at most {WITHIN:g} below plain, plain among them; held out: chosen on "
        "one half of each prompt's pictures, reported on the other, both ways round.",
        "",
    ]
    return "\n".join(lines)


def _line(label: str, count: object, cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return f"| {label} | {count} | " + " | ".join(cells) + " |"


def _signed(interval: Interval) -> str:
    """A difference with its sign."""
    return f"{interval.value:+.1f} [{interval.low:+.1f}, {interval.high:+.1f}]"
