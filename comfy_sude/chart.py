"""The training's log as a picture: the loss terms and the share of open gates over the steps."""

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .data import from_pil
from .log import TERMS, Log

WIDTH, HEAD, PANEL, FOOT = 900, 30, 176, 32
BACKGROUND, INK, GRID = (24, 26, 31), (226, 228, 233), (58, 61, 69)
PANELS = (
    ("l_sub", "L_sub: denoising loss on the example", (90, 170, 255)),
    ("l_sude", "L_sude: what pulls towards the category", (255, 160, 70)),
    ("gate", "gate: share of steps that still inherit", (120, 210, 130)),
)
PRIOR = ("l_prior", "L_prior: denoising loss on the class images", (190, 140, 255))
OWN = (240, 120, 160)  # of a baseline's own terms


def draw(log: Log, title: str) -> Tensor:
    """[1, H, W, 3] IMAGE in [0, 1]: one panel a curve, raw values faint, running mean bold.

    Beside the three of every training a panel for the prior loss, if there was one, and for each of the baseline's own.
    """
    panels = [*PANELS, *([PRIOR] if any(log.values["l_prior"]) else [])]
    panels += [(term, log.labels.get(term, term), OWN) for term in log.values if term not in TERMS]
    size = (WIDTH, HEAD + PANEL * len(panels) + FOOT)
    image = Image.new("RGB", size, BACKGROUND)
    canvas = ImageDraw.Draw(image, "RGBA")
    font = ImageFont.load_default(14)
    canvas.text((16, 10), title, fill=INK, font=font)
    for index, (term, label, color) in enumerate(panels):
        box = (64, HEAD + 34 + index * PANEL, WIDTH - 20, HEAD + (index + 1) * PANEL)
        _panel(canvas, font, box, log.values[term], label, color)
    canvas.text((WIDTH - 20, size[1] - 24), f"{log.steps} steps", fill=INK, font=font, anchor="ra")
    return from_pil(image)


def _panel(canvas, font, box, values: list[float], label: str, color) -> None:
    left, top, right, bottom = box
    canvas.text((left, top - 22), label, fill=color, font=font)
    smooth = running_mean(values, max(1, len(values) // 20))
    low, high = (0.0, 1.0) if label.startswith("gate") else _range(values)
    for fraction in (0.0, 0.5, 1.0):
        y = bottom - fraction * (bottom - top)
        canvas.line((left, y, right, y), fill=GRID)
        canvas.text((left - 6, y), f"{low + fraction * (high - low):.2g}", fill=INK, font=font, anchor="rm")

    def points(series):
        last = max(1, len(series) - 1)
        clamped = [min(max((v - low) / (high - low), 0), 1) for v in series]
        return [(left + i / last * (right - left), bottom - v * (bottom - top)) for i, v in enumerate(clamped)]

    for series, alpha, width in ((values, 90, 1), (smooth, 255, 2)):
        if len(series) > 1:
            canvas.line(points(series), fill=(*color, alpha), width=width, joint="curve")
        else:
            x, y = points(series)[0]
            canvas.ellipse((x - 3, y - 3, x + 3, y + 3), fill=(*color, alpha))


def _range(values: list[float]) -> tuple[float, float]:
    """From the lowest value (or 0) to the 98th percentile, never empty."""
    ordered = sorted(values)
    low, high = min(0.0, ordered[len(ordered) // 50]), ordered[-1 - len(ordered) // 50]
    return (low, high) if high > low else (low, low + 1.0)


def running_mean(values: list[float], window: int) -> list[float]:
    """Mean of the last `window` values at each position."""
    result, total = [], 0.0
    for index, value in enumerate(values):
        total += value - (values[index - window] if index >= window else 0.0)
        result.append(total / min(index + 1, window))
    return result
