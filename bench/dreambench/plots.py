"""The plots: attribute alignment against fidelity over w_s, and differences from plain with their intervals."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from comfy_sude.scores import METRICS

from .table import ATTRIBUTE, FIDELITY, PLAIN, SUDE, Row, load_paper

ENOUGH = 10  # subjects; intervals over fewer are drawn without a verdict
FAINT, UP, DOWN = "#707580", "#2c805c", "#c4343a"
COLORS = ("#2563c9", "#d66b16", "#2c805c", "#963ca0")
Points = Mapping[tuple[str, str], Mapping[float, Mapping[str, float]]]


def write(folder: Path, title: str, rows: Sequence[Row], points: Points) -> list[Path]:
    """Both plots as PNG files; those there is nothing for are left out."""
    made = []
    if any(FIDELITY in one and ATTRIBUTE in one for curve in points.values() for one in curve.values()):
        made.append(_save(curves(title, points), folder / "attribute_fidelity.png"))
    shown = [row for row in rows if row.difference]
    if shown:
        made.append(_save(differences(title, shown), folder / "differences.png"))
    return made


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    return path


def curves(title: str, points: Points) -> Figure:
    """A panel a backbone: fidelity across, attribute alignment up, a curve over w_s for each baseline."""
    backbones = list(dict.fromkeys(backbone for backbone, _ in points))
    baselines = list(dict.fromkeys(baseline for _, baseline in points))
    figure, paper = Figure((max(6.5, 5 * len(backbones)), 5.8), layout="constrained"), load_paper()
    for panel, backbone in zip(figure.subplots(1, len(backbones), squeeze=False)[0], backbones, strict=True):
        for color, baseline in zip(COLORS, baselines, strict=False):
            ours = sorted(points.get((backbone, baseline), {}).items())
            theirs = [paper[key] for method in (PLAIN, SUDE) if (key := (backbone, baseline, method)) in paper]
            for line, style in (([one for _, one in ours], "o-"), (theirs, "o:")):
                face = "white" if line is theirs else color
                label = baseline if line is not theirs else None
                x, y = ([one[metric] for one in line] for metric in (FIDELITY, ATTRIBUTE))
                panel.plot(x, y, style, color=color, markerfacecolor=face, label=label)
            for multiplier, one in ours:
                at = (one[FIDELITY], one[ATTRIBUTE])
                panel.annotate(f"{multiplier:g}", at, (5, 4), textcoords="offset points", color=color, fontsize=8)
        panel.set(title=backbone, xlabel=f"{FIDELITY}, subject fidelity", ylabel=f"{ATTRIBUTE}, attribute alignment")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.suptitle(title, fontsize=9, color=FAINT)
    figure.supxlabel("numbers: multiples of the published w_s; hollow: the paper's Table 1, plain to SuDe", fontsize=8)
    return figure


def differences(title: str, rows: Sequence[Row]) -> Figure:
    """A line a method and a panel a metric: the difference from plain with its interval, the paper's beside it."""
    paper = load_paper()
    metrics = [metric for metric in METRICS if all(metric in row.difference for row in rows)]
    figure = Figure((3.2 + 2.2 * len(metrics), 1.8 + 0.32 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for panel, metric in zip(panels, metrics, strict=True):
        panel.axvline(0, color=FAINT, lw=1)
        for line, row in enumerate(rows):
            found = row.difference[metric]
            clear = len(row.subjects) >= ENOUGH and not found.low <= 0 <= found.high
            color = FAINT if not clear else UP if found.value > 0 else DOWN
            panel.plot([found.low, found.high], [line, line], color=color, lw=2)
            panel.plot(found.value, line, "o", color=color)
            if metric in row.paper:
                gap = row.paper[metric] - paper[row.backbone, row.baseline, PLAIN][metric]
                panel.plot(gap, line, "o", color="black", markerfacecolor="none")
        panel.set_title(metric)
        panel.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(rows)), [f"{row.backbone} {row.baseline}, {row.method}" for row in rows], fontsize=8)
    panels[0].invert_yaxis()
    figure.suptitle(title, fontsize=9, color=FAINT)
    note = "points above plain; lines: 95 % bootstrap over subjects, coloured where 0 is outside"
    figure.supxlabel(f"{note}\nand there are at least {ENOUGH} subjects; hollow: the paper's", fontsize=8)
    return figure
