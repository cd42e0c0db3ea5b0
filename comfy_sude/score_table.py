"""Scores by label as a table: as text, as a picture, and as JSON values."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw
from torch import Tensor

from .chart import BACKGROUND, GRID, INK
from .data import from_pil
from .grid import font_for
from .scores import best

FAINT, GOOD, BAD, CHOSEN = (140, 146, 158), (120, 210, 130), (240, 120, 110), (36, 52, 46)
SIZE, SMALL, MARGIN = 22, 15, 22  # px
ROW, HEAD, COLUMN, LONGEST = 58, 46, 118, 520  # px; LONGEST of a label
NOTE = 110  # characters in a line below the table
ALL = "all pictures"  # label where none is given


@dataclass(frozen=True)
class Row:
    """Scores of the pictures of one label.

    Attributes:
        label: what they have in common.
        count: number of pictures.
        mean: metric -> mean in percent.
        error: metric -> standard error of that mean; 0 for a single picture, and where it is not known.
    """

    label: str
    count: int
    mean: dict[str, float]
    error: dict[str, float]


@dataclass(frozen=True)
class Choice:
    """Which row is best and why (`scores.best`).

    Attributes:
        best: label of the best row.
        plain: label of the row the others are compared with.
        alignment: metric that is to be high.
        fidelity: metric that may be `within` points below the plain row's.
        within: points.
    """

    best: str
    plain: str
    alignment: str
    fidelity: str
    within: float

    def rule(self, rows: Sequence[Row]) -> str:
        """The rule as a sentence."""
        least = next(row.mean[self.fidelity] for row in rows if row.label == self.plain) - self.within
        return (
            f"best: {self.best}, the highest {self.alignment} of those with {self.fidelity} of at least {least:.1f} "
            f"({self.plain} less {self.within:g})"
        )


def rows(labels: Sequence[str], scores: Mapping[str, Sequence[float]]) -> list[Row]:
    """One row a label, in the order in which labels appear.

    Args:
        labels: of each picture.
        scores: metric -> value of each picture, as from `scores.evaluate`.
    """
    found = []
    for label in dict.fromkeys(labels):
        places = [index for index, one in enumerate(labels) if one == label]
        values = {metric: [series[index] for index in places] for metric, series in scores.items()}
        mean = {metric: sum(series) / len(series) for metric, series in values.items()}
        error = {metric: _error(series, mean[metric]) for metric, series in values.items()}
        found.append(Row(label, len(places), mean, error))
    return found


def _error(values: Sequence[float], mean: float) -> float:
    """Standard error of a mean."""
    count = len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count) if count > 1 else 0.0


def choose(
    table: Sequence[Row], alignment: str, fidelity: str, fidelity_within: float, plain_label: str
) -> Choice | None:
    """Which row is best by the rule of `scores.best`; None if there is only one row.

    Args:
        table: the rows.
        alignment: metric that is to be high.
        fidelity: metric that may be `fidelity_within` points below the plain row's.
        fidelity_within: points.
        plain_label: of the plain row; if empty, the first row of the highest fidelity takes its part.
    """
    if len(table) < 2:
        return None
    plain = plain_label or max(table, key=lambda row: row.mean[fidelity]).label
    means = {row.label: row.mean for row in table}
    chosen = best(means, plain, fidelity_within, alignment, fidelity)
    return Choice(chosen, plain, alignment, fidelity, fidelity_within)


def text(table: Sequence[Row], choice: Choice | None = None) -> str:
    """The table in lines of equal columns, with the rule below if something was chosen."""
    metrics = list(table[0].mean)
    wide = max(len(row.label) for row in table)
    lines = ["  ".join([" " * wide, "pictures", *(f"{metric:>8}" for metric in metrics)])]
    for row in table:
        cells = [f"{row.label:<{wide}}", f"{row.count:>8}", *(f"{row.mean[metric]:>8.1f}" for metric in metrics)]
        lines.append("  ".join(cells) + ("  best" if choice and row.label == choice.best else ""))
    return "\n".join([*lines, *([choice.rule(table)] if choice else [])])


def values(table: Sequence[Row], choice: Choice | None = None) -> dict:
    """The table as JSON values."""
    listed = [
        {"label": row.label, "pictures": row.count, "mean": row.mean, "standard_error": row.error} for row in table
    ]
    return {"rows": listed, "choice": vars(choice) if choice else None}


def draw(table: Sequence[Row], choice: Choice | None = None) -> Tensor:
    """[1, H, W, 3] IMAGE of the table: means and, below them, the difference from the plain row and standard errors.

    The best row stands out; rows whose fidelity is too low for it are faint.
    """
    metrics = list(table[0].mean)
    plain = next((row for row in table if choice and row.label == choice.plain), None)
    measured = any(row.error[metric] for row in table for metric in metrics)
    notes = ["percent, higher is better" + ("; ± is the standard error over a row's pictures" if measured else "")]
    notes += [f"coloured: difference from {plain.label}", choice.rule(table)] if plain else []
    notes = [line for note in notes for line in textwrap.wrap(note, NOTE)]
    everything = "".join([*notes, *(row.label for row in table), "±+−"])
    font, small = font_for(everything, SIZE), font_for(everything, SMALL)
    labels = [_shortened(row.label, font) for row in table]
    side = max(font.getlength(label) for label in labels)
    left = round(MARGIN + max(side, 90) + MARGIN)  # of the first column of numbers
    width = max(left + COLUMN * (len(metrics) + 1), round(max(map(small.getlength, notes)) + 2 * MARGIN)) + MARGIN
    line = sum(small.getmetrics()) + 4
    height = MARGIN + HEAD + ROW * len(table) + MARGIN // 2 + line * len(notes) + MARGIN
    image = Image.new("RGB", (width, height), BACKGROUND)
    canvas = ImageDraw.Draw(image)
    right = [left + COLUMN * (index + 1) - 10 for index in range(len(metrics) + 1)]
    y = MARGIN + HEAD // 2
    for x, (name, color) in zip(right, [("pictures", FAINT), *((metric, INK) for metric in metrics)], strict=True):
        canvas.text((x, y), name, fill=color, font=font if name in metrics else small, anchor="rm")
    for index, (row, label) in enumerate(zip(table, labels, strict=True)):
        top = MARGIN + HEAD + ROW * index
        chosen = choice is not None and row.label == choice.best
        if chosen:
            canvas.rounded_rectangle((MARGIN // 2, top + 3, width - MARGIN // 2, top + ROW - 3), 8, fill=CHOSEN)
        canvas.line((MARGIN, top, width - MARGIN, top), fill=GRID)
        lost = plain is not None and row.mean[choice.fidelity] < plain.mean[choice.fidelity] - choice.within
        ink = FAINT if lost else INK
        middle = top + ROW // 2
        canvas.text(
            (MARGIN, middle - (9 if chosen else 0)), label, fill=GOOD if chosen else ink, font=font, anchor="lm"
        )
        if chosen:
            canvas.text((MARGIN, middle + 15), "best", fill=GOOD, font=small, anchor="lm")
        canvas.text((right[0], middle), str(row.count), fill=FAINT, font=small, anchor="rm")
        for x, metric in zip(right[1:], metrics, strict=True):
            up = 9 if row.error[metric] or plain not in (None, row) else 0
            canvas.text((x, middle - up), f"{row.mean[metric]:.1f}", fill=ink, font=font, anchor="rm")
            _below(canvas, (x, middle + 15), row, metric, None if row is plain else plain, small)
    for index, note in enumerate(notes):
        y = MARGIN + HEAD + ROW * len(table) + MARGIN // 2 + line * index
        canvas.text((MARGIN, y), note, fill=FAINT, font=small)
    return from_pil(image)


def _below(canvas, place: tuple[int, int], row: Row, metric: str, plain: Row | None, font) -> None:
    """What stands small below a mean: its difference from the plain row, and its standard error."""
    x, y = place
    if row.error[metric]:
        error = f"±{row.error[metric]:.1f}"
        canvas.text((x, y), error, fill=FAINT, font=font, anchor="rm")
        x -= round(font.getlength(f"{error} "))
    if plain is not None:
        difference = round(row.mean[metric] - plain.mean[metric], 1) + 0.0
        color = FAINT if not difference else GOOD if difference > 0 else BAD
        canvas.text((x, y), f"{difference:+.1f}".replace("-", "−"), fill=color, font=font, anchor="rm")


def _shortened(label: str, font) -> str:
    """A label that fits its column."""
    while font.getlength(label) > LONGEST:
        label = label[:-2].rstrip("… ") + "…"
    return label
