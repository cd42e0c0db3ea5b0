"""Pictures in a labelled grid: which cell each one goes to, and the drawing."""

import math
import textwrap
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .chart import BACKGROUND, INK
from .data import from_pil, to_pil

SMALLEST = 192  # px of a cell's longer side, unless told otherwise: labels stay readable beside small pictures
LARGEST = 16_384  # px of the grid's longer side
GAP = 6
MARGIN = 14
# Fonts of other scripts than Latin, as Windows, macOS and Linux have them; Pillow's own font knows Latin only.
FONTS = (
    "msyh.ttc", "YuGothM.ttc", "malgun.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc", "AppleSDGothicNeo.ttc",
    "NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "wqy-microhei.ttc", "arial.ttf", "DejaVuSans.ttf",
    "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf",
)  # fmt: skip
EMPTY = (36, 39, 46)  # beside a picture that does not fill its cell


@dataclass
class Layout:
    """Where everything goes.

    Attributes:
        cells: rows of cells; each cell has the pictures [h, w, 3] that stand side by side in it.
        rows: labels of the rows, or none.
        columns: labels of the columns, or none.
    """

    cells: list[list[list[Tensor]]]
    rows: list[str]
    columns: list[str]


def arrange(items: list[Tensor], row_labels: list[str], column_labels: list[str], columns: int = 0) -> Layout:
    """Where pictures go.

    If there is a label of each kind for every item, and together they make a whole table, each item goes to its labels'
    cell. Else all pictures follow one another: in `columns` columns, or as many as there are column labels, or a row
    for each item if all have equally many pictures, or as the row labels say, or as nearly square as can be.

    Args:
        items: batches [B, h, w, 3] of pictures.
        row_labels: of the rows, or of the items.
        column_labels: of the columns, or of the items.
        columns: their number; 0 finds it.
    """
    names = list(dict.fromkeys(row_labels)), list(dict.fromkeys(column_labels))
    pairs = list(zip(row_labels, column_labels, strict=False))
    paired = len(row_labels) == len(column_labels) == len(items) == len(set(pairs))
    if paired and not columns and len(names[0]) * len(names[1]) == len(items):
        place = {pair: list(item) for pair, item in zip(pairs, items, strict=True)}
        return Layout([[place[row, column] for column in names[1]] for row in names[0]], *names)

    pictures = [picture for item in items for picture in item]
    sizes = {len(item) for item in items}
    if not columns:
        if column_labels:
            columns = len(column_labels)
        elif len(items) > 1 and len(sizes) == 1 and max(sizes) > 1:
            columns = max(sizes)
        elif row_labels:
            columns = math.ceil(len(pictures) / len(row_labels))
        else:
            columns = math.ceil(math.sqrt(len(pictures)))
    cells = [[[one] for one in pictures[i : i + columns]] for i in range(0, len(pictures), columns)]
    return Layout(cells, row_labels[: len(cells)], column_labels[:columns])


def draw(layout: Layout, title: str = "", cell: int = 0) -> Tensor:
    """[1, H, W, 3] IMAGE of the grid.

    Args:
        layout: from `arrange`.
        title: above it.
        cell: px of the longer side of a picture; 0 is the largest picture's own, at least 192.

    Raises:
        ValueError: the grid would be too large for one picture.
    """
    every = [picture for row in layout.cells for one in row for picture in one]
    width, height = max(p.shape[1] for p in every), max(p.shape[0] for p in every)
    factor = (cell or max(SMALLEST, width, height)) / max(width, height)
    width, height = max(1, round(width * factor)), max(1, round(height * factor))
    columns = max(len(row) for row in layout.cells)
    deep = max(len(one) for row in layout.cells for one in row)  # pictures in a cell
    across = deep * width + (deep - 1) * GAP // 2
    sizes = (max(12, min(width, height) // part) for part in (12, 9))
    font, large = (font_for("".join([title, *layout.rows, *layout.columns]), size) for size in sizes)
    heads = [_wrapped(label, font, across) for label in layout.columns]
    sides = [_wrapped(label, font, width) for label in layout.rows]
    line = sum(font.getmetrics())
    head = max((text.count("\n") + 1 for text in heads if text), default=0) * line
    side = max((font.getlength(part) for text in sides for part in text.split("\n")), default=0)
    top = MARGIN + (sum(large.getmetrics()) + MARGIN if title else 0) + (head + GAP if head else 0)
    left = MARGIN + (round(side) + MARGIN if side else 0)
    size = (
        left + columns * (across + GAP) - GAP + MARGIN,
        top + len(layout.cells) * (height + GAP) - GAP + MARGIN,
    )
    if max(size) > LARGEST:
        raise ValueError(
            f"the grid would be {size[0]} x {size[1]} px, but at most {LARGEST} are drawn: set cell to a smaller size, "
            "or show fewer pictures."
        )
    image = Image.new("RGB", size, BACKGROUND)
    canvas = ImageDraw.Draw(image)
    if title:
        canvas.text((MARGIN, MARGIN), title, fill=INK, font=large)
    for index, text in enumerate(heads):
        middle = left + index * (across + GAP) + across / 2
        canvas.multiline_text((middle, top - GAP), text, fill=INK, font=font, anchor="md", align="center", spacing=0)
    for index, row in enumerate(layout.cells):
        y = top + index * (height + GAP)
        if index < len(sides):
            canvas.multiline_text((MARGIN, y + height / 2), sides[index], fill=INK, font=font, anchor="lm", spacing=0)
        for column, pictures in enumerate(row):
            for place, picture in enumerate(pictures):
                x = left + column * (across + GAP) + place * (width + GAP // 2)
                fitted = _fitted(picture, width, height)
                canvas.rectangle((x, y, x + width - 1, y + height - 1), fill=EMPTY)
                image.paste(fitted, (x + (width - fitted.width) // 2, y + (height - fitted.height) // 2))
    return from_pil(image)


def font_for(text: str, size: int):
    """Pillow's own font; if it lacks a character of the text, the first of this machine that has them all, if any."""
    own = ImageFont.load_default(size)
    if _has_all(own, text):
        return own
    for name in FONTS:
        try:
            found = ImageFont.truetype(name, size)
        except OSError:
            continue
        if _has_all(found, text):
            return found
    return own


def _has_all(font, text: str) -> bool:
    """Whether a font has every character of a text: none looks as one that no font has."""
    unknown = bytes(font.getmask("\U0010fffe"))
    return all(character.isspace() or bytes(font.getmask(character)) != unknown for character in set(text))


def _fitted(picture: Tensor, width: int, height: int) -> Image.Image:
    """A picture [h, w, 3] as large as fits."""
    image = to_pil(picture)
    factor = min(width / image.width, height / image.height)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def _wrapped(text: str, font, width: float) -> str:
    """A label in lines that fit a width, at most three."""
    letters = max(4, int(width / max(1.0, font.getlength("n"))))
    return "\n".join(textwrap.wrap(text, letters, max_lines=3, placeholder=" …"))
