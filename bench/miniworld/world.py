"""The mini world: 64x64 pictures of eight categories with eight attributes, and the captions that describe them.

Attributes are geometry, accessories or surroundings, never a subject's own colours, so that a judge can read them
whatever a subject looks like. What belongs to a subject (colours, pattern, place, size, facing) is never captioned.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from .shapes import DARK, SHAPES, SIZE, SUPER, Anatomy, Canvas, Colour

CATEGORIES: tuple[str, ...] = tuple(SHAPES)
BEFORE: tuple[str, ...] = ("running", "flying", "burning", "broken", "tiny", "caged")
BEHIND: tuple[str, ...] = ("wearing a hat", "in the snow")
ATTRIBUTES: tuple[str, ...] = BEFORE + BEHIND
PATTERNS: tuple[str, ...] = ("plain", "spots", "band")


@dataclass(frozen=True)
class Subject:
    """What makes one individual: none of it is ever in a caption. Colours are RGB 0..255, dx and dy pixels."""

    body: Colour
    second: Colour
    background: Colour
    pattern: str = "plain"
    dx: float = 0.0
    dy: float = 0.0
    scale: float = 1.0
    facing: int = 1  # 1 looks right, -1 looks left
    seed: int = 0  # falling snow only


SUBJECTS: dict[str, tuple[str, Subject]] = {
    "spike": ("dog", Subject((35, 70, 200), (255, 205, 30), (226, 236, 208), "spots", 0, 0, 1.0, 1, 1)),
    "mitzi": ("cat", Subject((225, 60, 150), (30, 160, 90), (222, 232, 246), "band", 1, 0, 1.0, 1, 2)),
    "rio": ("bird", Subject((20, 170, 170), (220, 40, 50), (245, 232, 206), "spots", 0, 0.5, 1.02, -1, 3)),
    "nemo": ("fish", Subject((245, 110, 25), (60, 40, 160), (206, 236, 232), "band", 0, -1, 1.0, 1, 4)),
    "turbo": ("car", Subject((130, 45, 190), (250, 215, 60), (214, 238, 214), "spots", 0, 0, 0.98, 1, 5)),
    "nina": ("boat", Subject((215, 35, 45), (40, 150, 215), (240, 228, 236), "band", 0, 0, 1.0, -1, 6)),
    "polly": ("teapot", Subject((30, 150, 60), (235, 90, 170), (246, 236, 214), "spots", 0, 0, 1.0, 1, 7)),
    "wick": ("candle", Subject((250, 200, 40), (25, 110, 180), (232, 222, 244), "band", 0, 0, 1.04, -1, 8)),
}


def prompt(category: str, attribute: str | None = None, identifier: str = "") -> str:
    """Caption: `photo of a running sks dog`, `photo of a sks dog wearing a hat`; attribute None leaves it out."""
    noun = f"{identifier} {category}" if identifier else category
    if not attribute:
        return f"photo of a {noun}"
    return f"photo of a {attribute} {noun}" if attribute in BEFORE else f"photo of a {noun} {attribute}"


def _hsv(h: float, s: float, v: float) -> Colour:
    r, g, b = colorsys.hsv_to_rgb(h % 1, s, v)
    return int(255 * r), int(255 * g), int(255 * b)


def random_subject(rng: np.random.Generator) -> Subject:
    """Draw an individual; body and second colour always differ in hue."""
    hue = rng.random()
    return Subject(
        body=_hsv(hue, rng.uniform(0.55, 1), rng.uniform(0.5, 1)),
        second=_hsv(hue + rng.uniform(0.2, 0.8), rng.uniform(0.55, 1), rng.uniform(0.45, 1)),
        background=_hsv(rng.random(), rng.uniform(0.06, 0.3), rng.uniform(0.84, 0.99)),
        pattern=PATTERNS[int(rng.integers(len(PATTERNS)))],
        dx=float(rng.uniform(-3, 3)),
        dy=float(rng.uniform(-2, 2)),
        scale=float(rng.uniform(0.92, 1.08)),
        facing=1 if rng.random() < 0.5 else -1,
        seed=int(rng.integers(1 << 30)),
    )


def _lay_pattern(c: Canvas, subject: Subject) -> None:
    if subject.pattern == "plain":
        return
    layer = Canvas(c.cx, c.cy, c.scale, c.flip)
    if subject.pattern == "spots":
        for row, y in enumerate(range(-22, 23, 7)):
            for x in range(-28, 29, 8):
                layer.ellipse(x + 4 * (row % 2), y, 2.1, 2.1, subject.second, body=True)
    else:
        layer.polygon([(-5.5, -24), (0.5, -24), (0.5, 24), (-5.5, 24)], subject.second, body=True)
    c.image.paste((*subject.second, 255), (0, 0), ImageChops.multiply(layer.mask, c.mask))


def _running(c: Canvas, a: Anatomy, skip_legs: bool) -> None:
    for i, y in enumerate((-8, -1, 6)):
        start = -a.half_width - 5 + (2 if i == 1 else 0)
        c.stroke([(start, y), (start - 9, y)], 1.6, (70, 70, 80))
    if skip_legs:
        return
    (bx, by), (fx, fy) = a.hips
    c.stroke([(bx, by), (bx - 5, by + 8), (bx - 12, by + 6), (bx - 12, by + 3)], 3, DARK)
    c.stroke([(fx, fy), (fx + 6, fy + 4), (fx + 6, fy + 11), (fx + 11, fy + 11)], 3, DARK)


def _wings(c: Canvas, a: Anatomy) -> None:
    """A pair of wings behind the subject."""
    x, y = a.wing
    front = c.image
    c.aim(Image.new("RGBA", front.size, (0, 0, 0, 0)))
    for side in (-1, 1):
        edge = [
            (x + side * px, y + py) for px, py in ((0, 4), (8, -12), (18, -22), (25, -19), (27, -9), (24, 1), (14, 6))
        ]
        c.polygon(edge, (252, 252, 255))
        c.stroke([*edge, edge[0]], 1.5, (95, 100, 125))
        c.stroke([(x + side * 10, y - 1), (x + side * 21, y - 12)], 1.2, (150, 155, 180))
    c.image.alpha_composite(front)


def _flames(c: Canvas, a: Anatomy) -> None:
    x, y = a.fire
    for dx, dy, size in ((-7, 2, 0.75), (7, 2, 0.75), (0, 0, 1.0)):
        for colour, grow in (((232, 50, 12), 1.0), ((255, 150, 15), 0.66), ((255, 240, 110), 0.34)):
            w, h = 6.5 * size * grow, 18 * size * grow
            fx, fy = x + dx, y + dy + 2
            c.polygon(
                [(fx - w, fy), (fx - w, fy - h * 0.35), (fx - w * 0.35, fy - h * 0.6), (fx, fy - h)]
                + [(fx + w * 0.4, fy - h * 0.6), (fx + w, fy - h * 0.35), (fx + w, fy)],
                colour,
            )
            c.ellipse(fx, fy, w, w * 0.6, colour)


def _hat(c: Canvas, a: Anatomy) -> None:
    x, y = a.top
    y += 1.5
    c.polygon([(x - 5, y), (x + 5, y), (x + 5.5, y - 12.5), (x - 5.5, y - 12.5)], DARK)
    c.polygon([(x - 5, y - 2), (x + 5, y - 2), (x + 5.1, y - 5), (x - 5.1, y - 5)], (205, 30, 40))
    c.polygon([(x - 9, y + 1.2), (x + 9, y + 1.2), (x + 9, y - 1.8), (x - 9, y - 1.8)], DARK)


def _split(c: Canvas) -> None:
    side = SIZE * SUPER
    px, py = c.at(0, 0)
    edge = [(px + (3.2 if i % 2 else -3.2) * SUPER, py + y * SUPER) for i, y in enumerate(range(-40, 41, 5))]
    left = Image.new("L", (side, side), 0)
    ImageDraw.Draw(left).polygon([(-side, edge[0][1]), *edge, (-side, edge[-1][1])], fill=255)
    parts = []
    for sign, mask in ((-1, left), (1, ImageChops.invert(left))):
        part = Image.new("RGBA", (side, side), (0, 0, 0, 0))
        part.paste(c.image, (0, 0), mask)
        # each half tips outwards about the foot of the crack
        shift, foot = (round(sign * 3.0 * SUPER), 0), (px, py + 16 * SUPER)
        parts.append(part.rotate(-sign * 11, Image.Resampling.BILINEAR, center=foot, translate=shift))
    c.image = Image.alpha_composite(*parts)


def _scene(subject: Subject, attribute: str | None, horizon: float) -> Image.Image:
    side = SIZE * SUPER
    sky, ground = subject.background, tuple(int(v * 0.8) for v in subject.background)
    if attribute == "in the snow":
        sky = tuple(int(0.45 * v + 0.55 * w) for v, w in zip(sky, (110, 135, 180), strict=True))
        ground = (250, 252, 255)
    scene = Image.new("RGBA", (side, side), (*sky, 255))
    ImageDraw.Draw(scene).rectangle([0, horizon * SUPER, side, side], fill=(*ground, 255))
    return scene


def _snow(scene: Image.Image, subject: Subject, horizon: float) -> None:
    draw, rng = ImageDraw.Draw(scene), np.random.default_rng(subject.seed)
    white = (250, 252, 255, 255)
    for x in (-4, 14, 33, 52, 68):  # drifts that hide the feet
        draw.ellipse([(x - 15) * SUPER, (horizon + 1.5) * SUPER, (x + 15) * SUPER, (horizon + 26) * SUPER], fill=white)
    for gx in range(6):
        for gy in range(4):
            x, y = 5.5 + 10.7 * gx + rng.uniform(-3, 3), 5 + 11 * gy + rng.uniform(-3, 3)
            draw.ellipse([(x - 1.6) * SUPER, (y - 1.6) * SUPER, (x + 1.6) * SUPER, (y + 1.6) * SUPER], fill=white)


def _bars(scene: Image.Image) -> None:
    draw, steel = ImageDraw.Draw(scene), (45, 45, 55, 255)
    for x in range(4, SIZE, 11):
        draw.rectangle([x * SUPER, 4 * SUPER, (x + 2.4) * SUPER, 60 * SUPER], fill=steel)
    for y in (2, 59):
        draw.rectangle([1 * SUPER, y * SUPER, 63 * SUPER, (y + 3) * SUPER], fill=steel)


def render(category: str, attribute: str | None, subject: Subject) -> np.ndarray:
    """Picture of a subject as `category` with `attribute` (None: plain) -> uint8 [64, 64, 3]."""
    if category not in SHAPES or (attribute and attribute not in ATTRIBUTES):
        raise ValueError(f"The mini world has no {category!r} that is {attribute!r}: see CATEGORIES and ATTRIBUTES.")
    cx, cy, scale = SIZE / 2 + subject.dx, 36 + subject.dy, subject.scale
    horizon = cy + 12 * scale
    legged = category in ("dog", "cat", "bird")
    lift = {"running": -3.0 if legged else -7.0, "flying": -3.0, "burning": 3.0, "wearing a hat": 3.0}.get(
        attribute or "", 0.0
    )
    if attribute == "running":  # room for the speed lines behind
        cx += 3.5 * subject.facing
    if attribute == "tiny":
        lift, scale = 9.0, scale * 0.48
    c = Canvas(cx, cy + lift, scale, subject.facing)
    scene = _scene(subject, attribute, horizon)
    if attribute == "flying":
        x, y = cx * SUPER, 59 * SUPER
        dark = tuple(int(v * 0.45) for v in subject.background)
        ImageDraw.Draw(scene).ellipse([x - 16 * SUPER, y - 3 * SUPER, x + 16 * SUPER, y + 3 * SUPER], fill=(*dark, 255))
    anatomy = SHAPES[category](c, subject.body, subject.second, attribute == "running")
    _lay_pattern(c, subject)
    if attribute == "running":
        _running(c, anatomy, skip_legs=legged)
    elif attribute == "flying":
        _wings(c, anatomy)
    elif attribute == "burning":
        _flames(c, anatomy)
    elif attribute == "wearing a hat":
        _hat(c, anatomy)
    elif attribute == "broken":
        _split(c)
    scene.alpha_composite(c.image)
    if attribute == "in the snow":
        _snow(scene, subject, horizon)
    elif attribute == "caged":
        _bars(scene)
    return np.asarray(scene.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX))


def grid(pictures: list[np.ndarray], columns: int, zoom: int = 1, pad: int = 2) -> Image.Image:
    """Contact sheet of uint8 [h, w, 3] pictures, row by row."""
    height, width = pictures[0].shape[:2]
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * (height + pad), columns * (width + pad), 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = (i // columns) * (height + pad), (i % columns) * (width + pad)
        sheet[y : y + height, x : x + width] = picture
    image = Image.fromarray(sheet)
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
