"""Draws docs/hinge.png, the README's picture of what the SuDe loss does: `python -m bench.figures [--output FILE]`.

Two panels on a ground of their own, so that they read on light and on dark pages. Left the plane of predictions with
the hinge through c; right the loss along the direction from u to c, with and without the truncation.
"""

import argparse
import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

REPO = Path(__file__).resolve().parents[1]
OUTPUT = REPO / "docs" / "hinge.png"
SIZE = (1640, 800)
FINE = 3  # drawn so many times larger and scaled down, for smooth lines

GROUND, PANEL, EDGE = (246, 245, 241), (255, 255, 255), (221, 219, 211)
INK, FAINT = (38, 42, 51), (112, 117, 128)
OPEN, SHUT, FLOORLESS = (214, 107, 22), (44, 128, 92), (196, 52, 58)
OPEN_TINT, SHUT_TINT = (255, 241, 226), (230, 244, 237)
SUBJECT, CATEGORY, EMPTY = (37, 99, 201), (38, 42, 51), (112, 117, 128)

Point = tuple[float, float]


class Sheet:
    """A drawing in the picture's own pixels, kept `FINE` times larger."""

    def __init__(self):
        self.image = Image.new("RGBA", (SIZE[0] * FINE, SIZE[1] * FINE), (0, 0, 0, 0))
        self.draw = ImageDraw.Draw(self.image)

    def box(self, left: float, top: float, right: float, bottom: float, fill, edge=None, radius: float = 0) -> None:
        """A rectangle with rounded corners."""
        at = tuple(value * FINE for value in (left, top, right, bottom))
        self.draw.rounded_rectangle(at, radius * FINE, fill=fill, outline=edge, width=2 * FINE)

    def polygon(self, points: list[Point], fill) -> None:
        """A filled polygon."""
        self.draw.polygon([(x * FINE, y * FINE) for x, y in points], fill=fill)

    def line(self, start: Point, end: Point, color, width: float = 3, dash: tuple[float, float] | None = None) -> None:
        """A straight line, solid or dashed (length of stroke and gap)."""
        length = math.dist(start, end)
        stroke, gap = dash or (length, 0)
        along = ((end[0] - start[0]) / length, (end[1] - start[1]) / length)
        position = 0.0
        while position < length:
            stop = min(position + stroke, length)
            ends = [(start[i] + along[i] * at) * FINE for at in (position, stop) for i in (0, 1)]
            self.draw.line(ends, fill=color, width=round(width * FINE))
            position += stroke + gap

    def arrow(self, start: Point, end: Point, color, width: float = 5, head: float = 20) -> None:
        """A line with a filled head that ends at `end`."""
        angle = math.atan2(end[1] - start[1], end[0] - start[0])
        neck = (end[0] - 0.8 * head * math.cos(angle), end[1] - 0.8 * head * math.sin(angle))
        self.line(start, neck, color, width)
        wings = [
            (end[0] - head * math.cos(angle + turn), end[1] - head * math.sin(angle + turn)) for turn in (0.42, -0.42)
        ]
        self.polygon([end, *wings], color)

    def dot(self, at: Point, radius: float, fill, edge=PANEL, width: float = 3) -> None:
        """A filled circle with a rim."""
        x, y = at
        around = tuple(value * FINE for value in (x - radius, y - radius, x + radius, y + radius))
        self.draw.ellipse(around, fill=fill, outline=edge, width=round(width * FINE))

    def text(self, at: Point, words: str, size: float, color=INK, anchor: str = "la", bold: bool = False) -> None:
        """Words of one or more lines; `anchor` as in Pillow."""
        font = ImageFont.load_default(size * FINE)
        stroke = round(size * FINE / 60) if bold else 0
        x, y = at
        for number, line in enumerate(words.split("\n")):
            place = (x * FINE, (y + number * size * 1.32) * FINE)
            self.draw.text(place, line, font=font, fill=color, anchor=anchor, stroke_width=stroke, stroke_fill=color)

    def finished(self) -> Image.Image:
        """The picture at its own size."""
        return self.image.resize(SIZE, Image.Resampling.LANCZOS)


def plane(sheet: Sheet) -> None:
    """Left: the predictions a, c and u, the hinge through c, and where SuDe pulls a."""
    left, top, right, bottom = 30, 96, 960, 770
    u, c = (150.0, 600.0), (590.0, 478.0)
    length = math.dist(u, c)
    ahead = ((c[0] - u[0]) / length, (c[1] - u[1]) / length)  # unit vector along c - u
    across = (ahead[1], -ahead[0])

    def at(along: float, aside: float) -> Point:
        """A point from c: `along` the direction and `aside` of it."""
        return c[0] + along * ahead[0] + aside * across[0], c[1] + along * ahead[1] + aside * across[1]

    def hinge_at(y: float) -> Point:
        """Where the hinge is at a height."""
        return c[0] + (y - c[1]) * across[0] / across[1], y

    inset = 20  # the rounded corners on the right
    sheet.box(left, top, right, bottom, OPEN_TINT, radius=inset)
    sheet.box(right - 3 * inset, top, right, bottom, SHUT_TINT, radius=inset)
    sheet.polygon([hinge_at(top), (right - inset, top), (right - inset, bottom), hinge_at(bottom)], SHUT_TINT)

    sheet.line(hinge_at(top), hinge_at(bottom), INK, 4)
    sheet.line(at(20, 0), at(300, 0), FAINT, 2.5, (10, 9))
    sheet.arrow(u, at(-17, 0), FAINT, 4, 20)

    corner = 22.0  # the right angle at c
    sheet.line(at(corner, 0), at(corner, corner), INK, 2.5)
    sheet.line(at(corner, corner), at(0, corner), INK, 2.5)

    a, goal, settled = at(-330, 190), at(0, 190), at(150, 120)
    sheet.line(a, goal, SUBJECT, 2.5, (5, 8))
    sheet.arrow(a, at(-140, 190), OPEN, 8, 30)
    sheet.dot(goal, 10, PANEL, SUBJECT, 3)
    for place, radius, color in ((u, 14, EMPTY), (c, 16, CATEGORY), (a, 16, SUBJECT), (settled, 16, SUBJECT)):
        sheet.dot(place, radius, color)

    sheet.text((u[0] - 12, u[1] + 18), "u", 36, EMPTY, bold=True)
    sheet.text((u[0] + 18, u[1] + 31), "under no words at all", 21, FAINT)
    sheet.text((c[0] + 26, c[1] + 12), "c", 36, CATEGORY, bold=True)
    sheet.text((c[0] + 54, c[1] + 25), 'under "photo of a dog"', 21, FAINT)
    sheet.text((a[0] - 12, a[1] + 18), "a", 36, SUBJECT, bold=True)
    sheet.text((a[0] + 18, a[1] + 31), 'under "photo of a sks dog"', 21, FAINT)
    sheet.text((settled[0] + 26, settled[1] - 27), "a", 36, SUBJECT, bold=True)
    sheet.text((settled[0] + 56, settled[1] - 14), "left alone", 21, FAINT)
    middle = at(-0.62 * length, 0)
    sheet.text((middle[0] + 12, middle[1] + 22), "guidance direction c - u", 21, FAINT)

    sheet.text((left + 28, top + 24), "gate 1 · open", 28, OPEN, bold=True)
    sheet.text((left + 28, top + 64), "a has less of its category than c:\nSuDe pulls it along c - u", 21, INK)
    sheet.text((right - 28, top + 24), "gate 0 · closed", 28, SHUT, "ra", True)
    sheet.text((right - 28, top + 64), "a has as much as c:\nno pull any more", 21, INK, "ra")
    foot = hinge_at(bottom - 60)[0] - 22
    sheet.text((foot, bottom - 76), "the hinge: through c, across c - u", 21, INK, "ra", True)
    sheet.text((foot, bottom - 46), "along it SuDe asks for nothing", 21, FAINT, "ra")


def profile(sheet: Sheet) -> None:
    """Right: the loss along the direction, its floor at c, and the line that has none."""
    left, top, right, bottom = 990, 96, 1610, 770
    sheet.box(left, top, right, bottom, PANEL, EDGE, 20)
    axis, base, ceiling = left + 50, bottom - 92, top + 118
    start, hinge, end = axis + 70, axis + 290, right - 44
    high, low = ceiling + 110, ceiling + 320  # the loss at u and at c
    slope = (low - high) / (hinge - start)

    sheet.polygon([(axis, ceiling), (hinge, ceiling), (hinge, base), (axis, base)], OPEN_TINT)
    sheet.polygon([(hinge, ceiling), (end, ceiling), (end, base), (hinge, base)], SHUT_TINT)
    sheet.arrow((axis, base), (axis, ceiling - 18), INK, 3, 16)
    sheet.arrow((axis, base), (end + 18, base), INK, 3, 16)
    sheet.text((left + 28, top + 24), "The SuDe loss along that direction", 28, INK, bold=True)
    sheet.text((axis + 14, ceiling - 34), "loss", 21, FAINT)

    sheet.line((hinge, ceiling), (hinge, base), INK, 2.5, (9, 8))
    for x, name in ((start, "u"), (hinge, "c")):
        sheet.line((x, base - 7), (x, base + 7), INK, 3)
        sheet.text((x, base + 8), name, 36, INK, "ma", True)
    sheet.text((end + 18, base + 46), "how far a has come", 21, FAINT, "ra")

    past = hinge + 100
    sheet.line((hinge, low), (past, low + slope * (past - hinge)), FLOORLESS, 5, (14, 9))
    sheet.line((axis + 2, high - slope * (start - axis - 2)), (hinge, low), OPEN, 7)
    sheet.line((hinge, low), (end, low), SHUT, 7)
    sheet.dot((hinge, low), 12, INK)

    sheet.text((axis + 24, low - 38), "the same pull\neverywhere,\nuntil c", 21, OPEN)
    sheet.text((hinge + 26, low - 104), "truncated: a floor,\nand nothing pulls\n(paper, Eq. 9)", 21, SHUT)
    sheet.text((past + 18, low + 26), "without it:\nno floor,\ncollapses", 21, FLOORLESS)


def hinge() -> Image.Image:
    """The whole picture."""
    sheet = Sheet()
    sheet.box(0, 0, SIZE[0] - 1, SIZE[1] - 1, GROUND, EDGE, 24)
    sheet.text((34, 30), "What SuDe adds to a training step", 34, INK, bold=True)
    sheet.text((1606, 42), "three predictions of the noise at the same noisy picture", 21, FAINT, "ra")
    plane(sheet)
    profile(sheet)
    return sheet.finished()


def main() -> None:
    """Write the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the file to write")
    output = parser.parse_args().output
    hinge().save(output, optimize=True)
    print(f"{output}: {output.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
