"""Results of the protocol: comparisons with intervals as JSON, curves as a picture, and a table in words."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from .curves import INTERVAL, RESAMPLES, Runs, at_equal, at_step, common, mean, resamples, runs
from .identity import IDENTITY_FILE
from .protocol import FAMILIES, PLAIN, describe
from .trials import rows

SCORES = ("aligned", "attribute", "category_right", "identity", "identity_plain", "gate")
OPEN, PRETRAINED = ", no truncation", "pretrained references"
COLOURS = ("#3a3f4b", "#d66b16", "#c4343a", "#2c805c", "#8a5cc2", "#7f8794", "#2563c9", "#0e8fa8")
Everything = dict[str, dict[str, Runs]]


def sort(judgements: Iterable[dict]) -> Everything:
    """Rows of trials -> runs by family and variant, as far as there are any."""
    by_tag: dict[str, list[dict]] = {}
    for row in judgements:
        by_tag.setdefault(row["tag"], []).append(row)
    found: Everything = {}
    for family in FAMILIES:
        for variant in family.variants:
            of_variant = by_tag.get(f"{family.title}: {variant.name}")
            if of_variant:
                found.setdefault(family.title, {})[variant.name] = runs(of_variant)
    return found


def curve(variant: Runs) -> list[dict]:
    """Means over all units at every step, with intervals for what is plotted."""
    units, steps = sorted(variant), sorted(next(iter(variant.values())))
    means = {score: mean(variant, units, score) for score in SCORES if score in variant[units[0]][steps[0]]}
    draws = resamples(units)
    tails = (100 - INTERVAL) / 2, (100 + INTERVAL) / 2
    spread = {
        score: np.percentile([mean(variant, chosen, score) for chosen in draws], tails, 0)
        for score in ("aligned", "identity")
    }
    points = []
    for i, step in enumerate(steps):
        point = {"step": step} | {score: round(float(values[i]), 4) for score, values in means.items()}
        for score, (low, high) in spread.items():
            point |= {f"{score}_low": round(float(low[i]), 4), f"{score}_high": round(float(high[i]), 4)}
        points.append(point)
    return points


def cost(variant: Runs, rival: Runs) -> float | None:
    """Median ratio of the CPU seconds of both trainings over the units they share."""
    last = [max(next(iter(v.values()))) for v in (variant, rival)]
    units = common(variant, rival)
    spent = [
        [v[unit][step]["train_cpu_seconds"] for unit in units] for v, step in zip((variant, rival), last, strict=True)
    ]
    return round(float(np.median(np.array(spent[0]) / np.array(spent[1]))), 3)


def pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """What is compared with what, of a family's variants that are there.

    SuDe with everything that is not SuDe, that with plain training, and of SuDe: with the truncation against without,
    pretrained references against current ones.
    """
    sude = [name for name in names if name.startswith("SuDe")]
    others = [name for name in names if name not in sude]
    found = [(name, rival) for name in sude for rival in others]
    found += [(name, PLAIN) for name in others if name != PLAIN and PLAIN in others]
    found += [(name, name + OPEN) for name in sude if name + OPEN in sude]
    current = [name for name in sude if OPEN not in name and PRETRAINED not in name]
    return found + [(name, other) for name in sude if PRETRAINED in name for other in current]


def compare(a: Runs, b: Runs) -> dict:
    """One variant less another: at equal identity and, where both end at the same step, there."""
    found = {
        f"{score} at equal {against}": at_equal(a, b, score, against).plain()
        for score in ("aligned", "attribute")
        for against in ("identity", "identity_plain")
    }
    last = [max(next(iter(variant.values()))) for variant in (a, b)]
    if last[0] == last[1]:
        found["last step"] = last[0]
        found |= {
            f"{score} at the last step": at_step(a, b, last[0], score).plain() for score in ("aligned", "identity")
        }
        found["training cost, ratio"] = cost(a, b)
    return found


def results(judgements: Iterable[dict]) -> dict:
    """All that is published: the protocol, curves and comparisons, and how many units each variant has."""
    everything = sort(judgements)
    families = {}
    for title, variants in everything.items():
        families[title] = {
            "curves": {name: {"units": len(of), "points": curve(of)} for name, of in variants.items()},
            "comparisons": [
                {"variant": a, "against": b, **compare(variants[a], variants[b])}
                for a, b in pairs(variants)
                if common(variants[a], variants[b])
            ],
        }
    return {"protocol": describe(), "interval": INTERVAL, "resamples": RESAMPLES, "families": families}


def floor_and_ceiling() -> tuple[float, float]:
    """Identity of pictures of a random other individual and of the subject itself, both after the codec."""
    measured = json.loads(IDENTITY_FILE.with_suffix(".json").read_text(encoding="utf-8"))["scores of reconstructions"]
    return measured["other"]["score"], measured["own"]["score"]


def plot(found: dict, path: Path) -> Path:
    """Alignment against identity, one panel a family, dots at the steps with their intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    families = list(found["families"].items())
    figure, panels = pyplot.subplots(2, 2, figsize=(15, 12), dpi=90)
    for panel, (title, family) in zip(panels.flat, families, strict=False):
        for (name, drawn), colour in zip(family["curves"].items(), COLOURS, strict=False):
            points = drawn["points"]
            x, y = ([p[score] for p in points] for score in ("identity", "aligned"))
            bars = [
                [[p[s] - p[f"{s}_low"] for p in points], [p[f"{s}_high"] - p[s] for p in points]]
                for s in ("identity", "aligned")
            ]
            style = ":" if "category in" in name else "--" if name.startswith("plain,") else "-"
            panel.errorbar(
                x, y, bars[1], bars[0], style, color=colour, marker="o", ms=5, lw=2, elinewidth=0.6, label=name
            )
            panel.annotate(str(points[-1]["step"]), (x[-1], y[-1]), (4, 4), textcoords="offset points", color=colour)
        units = max(drawn["units"] for drawn in family["curves"].values())
        panel.set(
            title=f"{title} ({units} trainings a curve)", xlabel="identity", ylabel="attribute and category right"
        )
        panel.set(xlim=(0.05, 0.85), ylim=(-0.03, 1.03))
        for level, name in zip(floor_and_ceiling(), ("a random other", "the subject itself"), strict=True):
            panel.axvline(level, color="#9aa0aa", lw=1, ls=(0, (1, 3)))
            panel.text(level, 0.005, f" {name}", color="#7f8794", fontsize=8, rotation=90, va="bottom", ha="right")
        panel.grid(alpha=0.25)
        panel.legend(fontsize=9)
    for panel in panels.flat[len(families) :]:
        panel.set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
    return path


def text(found: dict) -> str:
    """The comparisons and the curves as Markdown tables."""
    lines = [
        "| baseline | variant | less | aligned at equal identity | at equal plain identity | at the last step | "
        "identity there | cost |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for title, family in found["families"].items():
        for row in family["comparisons"]:
            kinds = ("equal identity", "equal identity_plain", "the last step")
            cells = [title, row["variant"], row["against"], *(_words(row.get(f"aligned at {kind}")) for kind in kinds)]
            ratio = row.get("training cost, ratio")
            cells += [_words(row.get("identity at the last step")), "" if ratio is None else f"{ratio:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"| baseline | variant | trainings | step | {' | '.join(SCORES)} |", "|---" * (4 + len(SCORES)) + "|"]
    for title, family in found["families"].items():
        for name, drawn in family["curves"].items():
            for point in drawn["points"]:
                values = [f"{point[score]:.3f}" if score in point else "" for score in SCORES]
                lines.append(f"| {title} | {name} | {drawn['units']} | {point['step']} | {' | '.join(values)} |")
    return "\n".join(lines)


def write(folder: Path) -> str:
    """trials.jsonl of a folder -> results.json, results.md and curves.png beside it; the table as text."""
    found = results(rows(folder / "trials.jsonl"))
    (folder / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(text(found) + "\n", encoding="utf-8")
    plot(found, folder / "curves.png")
    return text(found)


def _words(e: dict | None) -> str:
    if e is None:
        return ""
    if e["value"] is None:
        return "no common identity"
    if e["low"] is None:
        return f"{e['value']:+.3f} (no interval)"
    return f"{e['value']:+.3f} [{e['low']:+.3f}, {e['high']:+.3f}]"
