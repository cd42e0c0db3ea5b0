"""The plots, drawn with Pillow: attribute against fidelity over w_s, and differences from plain with intervals."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from comfy_sude.scores import METRICS

from .table import ATTRIBUTE, FIDELITY, PLAIN, SUDE, Row, load_paper

ENOUGH = 10  # subjects; intervals over fewer are drawn without a verdict
GROUND, INK, FAINT, GRID = (252, 252, 250), (38, 42, 51), (112, 117, 128), (226, 224, 218)
COLORS = ((37, 99, 201), (214, 107, 22), (44, 128, 92), (150, 60, 160))
UP, DOWN = (44, 128, 92), (196, 52, 58)
FINE = 2  # drawn so many times larger and scaled down
PANEL, MARGIN = 420, 70  # px
Points = Mapping[tuple[str, str], Mapping[float, Mapping[str, float]]]
Box = tuple[float, float, float, float]  # left, top, right, bottom


class Sheet:
    """A drawing in its own pixels."""

    def __init__(self, width: int, height: int):
        self.size = (width, height)
        self.image = Image.new("RGB", (width * FINE, height * FINE), GROUND)
        self.draw = ImageDraw.Draw(self.image)

    def line(self, x0: float, y0: float, x1: float, y1: float, color, width: float = 1.5) -> None:
        """A straight line."""
        at = tuple(round(value * FINE) for value in (x0, y0, x1, y1))
        self.draw.line(at, fill=color, width=round(width * FINE))

    def dot(self, x: float, y: float, radius: float, color, hollow: bool = False) -> None:
        """A circle."""
        at = tuple(value * FINE for value in (x - radius, y - radius, x + radius, y + radius))
        self.draw.ellipse(at, fill=GROUND if hollow else color, outline=color, width=2 * FINE)

    def text(self, x: float, y: float, words: str, color=INK, size: float = 14, anchor: str = "la") -> None:
        """A line of words; `anchor` as in Pillow."""
        font = ImageFont.load_default(size * FINE)
        self.draw.text((x * FINE, y * FINE), words, font=font, fill=color, anchor=anchor)

    def save(self, path: Path) -> Path:
        """Write it and return the path."""
        self.image.resize(self.size, Image.Resampling.LANCZOS).save(path, optimize=True)
        return path


class Axis:
    """From values to pixels, a little wider than the values."""

    def __init__(self, values: Sequence[float], start: float, end: float):
        low, high = min(values), max(values)
        room = max(0.12 * (high - low), 0.2)
        self.low, self.high, self.start, self.end = low - room, high + room, start, end

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Evenly spread values."""
        return [self.low + (self.high - self.low) * (index + 0.5) / count for index in range(count)]


def write(folder: Path, title: str, rows: Sequence[Row], points: Points) -> list[Path]:
    """Both plots as PNG files; those there is nothing for are left out."""
    made = []
    if any(FIDELITY in one and ATTRIBUTE in one for curve in points.values() for one in curve.values()):
        made.append(curves(title, points).save(folder / "attribute_fidelity.png"))
    if any(row.difference for row in rows):
        shown = [row for row in rows if row.difference]
        made.append(differences(title, shown).save(folder / "differences.png"))
    return made


def curves(title: str, points: Points) -> Sheet:
    """A panel a backbone: fidelity across, attribute alignment up, a curve over w_s for each baseline."""
    backbones = list(dict.fromkeys(backbone for backbone, _ in points))
    baselines = list(dict.fromkeys(baseline for _, baseline in points))
    sheet = Sheet(max(640, MARGIN + (PANEL + MARGIN) * len(backbones)), PANEL + 2 * MARGIN + 24 * (len(baselines) + 1))
    sheet.text(20, 8, title, FAINT, 12)
    for index, backbone in enumerate(backbones):
        left = MARGIN + (PANEL + MARGIN) * index
        _panel(sheet, (left, MARGIN, left + PANEL, MARGIN + PANEL), backbone, points, baselines)
    y = PANEL + 2 * MARGIN
    for color, baseline in zip(COLORS, baselines, strict=False):
        sheet.dot(MARGIN + 8, y, 6, color)
        sheet.text(MARGIN + 24, y, f"{baseline}; the numbers are multiples of its published w_s", INK, 14, "lm")
        y += 24
    sheet.dot(MARGIN + 8, y, 6, FAINT, hollow=True)
    sheet.text(MARGIN + 24, y, "hollow: the paper's Table 1, plain to SuDe", FAINT, 14, "lm")
    return sheet


def _panel(sheet: Sheet, box: Box, backbone: str, points: Points, baselines: Sequence[str]) -> None:
    left, top, right, bottom = box
    paper = load_paper()
    series = []
    for color, baseline in zip(COLORS, baselines, strict=False):
        curve = points.get((backbone, baseline), {})
        ours = [(one[FIDELITY], one[ATTRIBUTE], f"{multiplier:g}") for multiplier, one in sorted(curve.items())]
        table = [paper.get((backbone, baseline, method)) for method in (PLAIN, SUDE)]
        theirs = [(one[FIDELITY], one[ATTRIBUTE], "") for one in table if one]
        series += [(color, ours, False), (color, theirs, True)]
    every = [point for _, line, _ in series for point in line]
    x, y = Axis([one[0] for one in every], left, right), Axis([one[1] for one in every], bottom, top)
    for value in x.ticks():
        sheet.line(x(value), top, x(value), bottom, GRID, 1)
        sheet.text(x(value), bottom + 6, f"{value:.1f}", FAINT, 12, "ma")
    for value in y.ticks():
        sheet.line(left, y(value), right, y(value), GRID, 1)
        sheet.text(left - 6, y(value), f"{value:.1f}", FAINT, 12, "rm")
    sheet.text(left, top - 40, backbone, INK, 18)
    sheet.text(left, top - 16, f"{ATTRIBUTE}, attribute alignment", FAINT, 12)
    sheet.text(right, bottom + 26, f"{FIDELITY}, subject fidelity", FAINT, 12, "ra")
    for color, line, hollow in series:
        for one, other in zip(line, line[1:], strict=False):
            sheet.line(x(one[0]), y(one[1]), x(other[0]), y(other[1]), color, 1 if hollow else 2)
        for fidelity, attribute, label in line:
            sheet.dot(x(fidelity), y(attribute), 5, color, hollow)
            sheet.text(x(fidelity) + 8, y(attribute) - 8, label, color, 12, "lm")


def differences(title: str, rows: Sequence[Row]) -> Sheet:
    """A line a method and a panel a metric: the difference from plain with its interval, the paper's beside it."""
    paper = load_paper()
    metrics = [metric for metric in METRICS if all(metric in row.difference for row in rows)]
    side, wide, high = 330, 180, 30
    sheet = Sheet(side + (wide + 20) * len(metrics) + 20, 70 + high * len(rows) + 60)
    sheet.text(20, 8, title, FAINT, 12)
    for index, row in enumerate(rows):
        name = f"{row.backbone} {row.baseline}, {row.method}"
        sheet.text(side - 14, 70 + high * (index + 0.5), name, INK, 12, "rm")
    for number, metric in enumerate(metrics):
        left = side + (wide + 20) * number
        base = {(row.backbone, row.baseline): paper.get((row.backbone, row.baseline, PLAIN), {}) for row in rows}
        gaps = [
            row.paper[metric] - base[row.backbone, row.baseline][metric] if metric in row.paper else None
            for row in rows
        ]
        ends = [end for row in rows for end in (row.difference[metric].low, row.difference[metric].high)]
        x = Axis([0.0, *ends, *(gap for gap in gaps if gap is not None)], left, left + wide)
        sheet.text(left + wide / 2, 30, metric, INK, 15, "mm")
        sheet.line(x(0), 50, x(0), 70 + high * len(rows), FAINT, 1)
        for index, (row, gap) in enumerate(zip(rows, gaps, strict=True)):
            y, found = 70 + high * (index + 0.5), row.difference[metric]
            clear = len(row.subjects) >= ENOUGH and not found.low <= 0 <= found.high
            color = FAINT if not clear else UP if found.value > 0 else DOWN
            sheet.line(x(found.low), y, x(found.high), y, color, 2)
            sheet.dot(x(found.value), y, 4, color)
            if gap is not None:
                sheet.dot(x(gap), y, 5, INK, hollow=True)
        apart = [value for value in x.ticks(4) if abs(x(value) - x(0)) > 36]
        for value in (0.0, *apart[:1], *(apart[-1:] if len(apart) > 1 else ())):
            sheet.text(x(value), 76 + high * len(rows), f"{value:+.1f}" if value else "0", FAINT, 11, "ma")
    note = "points above plain; lines: 95 % bootstrap over subjects, coloured where 0 is outside and there are at least"
    note += f" {ENOUGH} subjects; hollow: the paper's"
    sheet.text(20, sheet.size[1] - 16, note, FAINT, 12, "lm")
    return sheet
