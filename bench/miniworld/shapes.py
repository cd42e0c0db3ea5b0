"""The silhouettes of the mini world: one drawing function per category, on a supersampled canvas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageDraw

SIZE = 64  # pixels of a finished picture
SUPER = 4  # supersampling factor of the canvas
DARK = (32, 28, 34)
Colour = tuple[int, int, int]
Point = tuple[float, float]


@dataclass
class Canvas:
    """A transparent picture addressed in subject coordinates (x to the front, y down, origin at the body's middle).

    `mask` collects the body alone, so that a pattern can be laid on it. `flip` is -1 for a subject that faces left.
    """

    cx: float
    cy: float
    scale: float = 1.0
    flip: int = 1
    image: Image.Image = field(init=False)
    mask: Image.Image = field(init=False)

    def __post_init__(self) -> None:
        side = SIZE * SUPER
        self.image = Image.new("RGBA", (side, side), (0, 0, 0, 0))
        self.mask = Image.new("L", (side, side), 0)
        self._mask_draw = ImageDraw.Draw(self.mask)
        self.aim(self.image)

    def aim(self, image: Image.Image) -> None:
        """Draw on `image` from now on."""
        self.image, self._draw = image, ImageDraw.Draw(image)

    def at(self, x: float, y: float) -> Point:
        """Canvas pixel of a point in subject coordinates."""
        return (self.cx + self.flip * x * self.scale) * SUPER, (self.cy + y * self.scale) * SUPER

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: Colour | None, body: bool = False) -> None:
        """Filled ellipse; colour None erases."""
        px, py = self.at(x, y)
        rx, ry = rx * self.scale * SUPER, ry * self.scale * SUPER
        box = (px - rx, py - ry, px + rx, py + ry)
        self._draw.ellipse(box, fill=(0, 0, 0, 0) if colour is None else colour)
        if body:
            self._mask_draw.ellipse(box, fill=255)

    def polygon(self, points: Sequence[Point], colour: Colour, body: bool = False) -> None:
        """Filled polygon."""
        pixels = [self.at(*point) for point in points]
        self._draw.polygon(pixels, fill=colour)
        if body:
            self._mask_draw.polygon(pixels, fill=255)

    def stroke(self, points: Sequence[Point], width: float, colour: Colour) -> None:
        """Polyline with round joints and ends."""
        self._draw.line([self.at(*p) for p in points], fill=colour, width=max(1, round(width * self.scale * SUPER)))
        for x, y in points:
            self.ellipse(x, y, width / 2, width / 2, colour)


@dataclass(frozen=True)
class Anatomy:
    """Where attributes attach, in subject coordinates: hat, flames, wings' root, hips (x, y), half width."""

    top: Point
    fire: Point
    wing: Point
    hips: tuple[Point, Point]
    half_width: float


def _animal_legs(c: Canvas, running: bool, colour: Colour, front: float, back: float, y: float) -> None:
    if running:
        legs = [((back, y), (back - 11, y + 7)), ((back + 3, y), (back - 3, y + 11))]
        legs += [((front, y), (front + 11, y + 6)), ((front - 3, y), (front + 5, y + 11))]
    else:
        legs = [((x, y), (x, y + 12)) for x in (back, back + 4.5, front - 4.5, front)]
    for leg in legs:
        c.stroke(leg, 3.2, colour)


def dog(c: Canvas, body: Colour, second: Colour, running: bool) -> Anatomy:
    """Long snout, hanging ear, straight tail; ear and legs in the second colour."""
    _animal_legs(c, running, second, 9, -9, 4)
    c.stroke([(-11, -2), (-18, -10)], 3, body)
    c.ellipse(0, 1, 13.5, 7.5, body, body=True)
    c.ellipse(13, -9, 7, 7, body, body=True)
    c.ellipse(19.5, -7, 4.5, 3.2, body)
    c.ellipse(23, -8.5, 1.8, 1.8, DARK)
    c.ellipse(8.5, -7, 3.2, 6.8, second)
    c.ellipse(15, -11, 1.5, 1.5, DARK)
    return Anatomy((13, -15), (-4, -7), (-2, -4), ((-8, 5), (8, 5)), 17)


def cat(c: Canvas, body: Colour, second: Colour, running: bool) -> Anatomy:
    """Round frontal face with pointed ears and whiskers, tail raised in a hook; ears and tail in the second colour."""
    _animal_legs(c, running, body, 8, -9, 4)
    c.stroke([(-11, 0), (-18, -5), (-18, -14), (-14, -18)], 3, second)
    c.ellipse(-1, 2, 12, 6.8, body, body=True)
    c.polygon([(4, -10), (4.5, -22), (12, -14)], second)
    c.polygon([(12, -14), (19.5, -22), (20, -10)], second)
    c.ellipse(12, -8, 8.5, 7.5, body, body=True)
    c.ellipse(9, -9, 1.5, 2, DARK)
    c.ellipse(15, -9, 1.5, 2, DARK)
    c.ellipse(12, -4.8, 1.4, 1, DARK)
    return Anatomy((12, -14.5), (-5, -5), (-4, -3), ((-8, 5), (7, 5)), 17)


def bird(c: Canvas, body: Colour, second: Colour, running: bool) -> Anatomy:
    """Egg-shaped body, beak, fan tail and two thin legs; tail and folded wing in the second colour."""
    orange = (240, 150, 30)
    legs = [((-2, 8), (-11, 14), (-14, 12)), ((3, 8), (12, 13), (15, 11))]
    if not running:
        legs = [((-2, 8), (-2, 16), (2, 16)), ((4, 8), (4, 16), (8, 16))]
    for leg in legs:
        c.stroke(leg, 1.8, orange)
    c.polygon([(-8, 2), (-23, -6), (-22, 0), (-23, 5), (-9, 7)], second)
    c.ellipse(-1, 1, 12, 9.5, body, body=True)
    c.ellipse(9, -9, 7, 7, body, body=True)
    c.polygon([(14.5, -12), (23, -8.5), (14.5, -6)], orange)
    c.ellipse(11, -10.5, 1.7, 1.7, DARK)
    c.ellipse(-3, 1.5, 6.5, 4.2, second)
    return Anatomy((9, -15), (-4, -8), (-3, -4), ((-2, 7), (4, 7)), 17)


def fish(c: Canvas, body: Colour, second: Colour, running: bool) -> Anatomy:
    """Lens-shaped body with forked tail, back fin and belly fin in the second colour."""
    c.polygon([(-11, 0), (-23, -10), (-19, 0), (-23, 10)], second)
    c.polygon([(-6, -8), (2, -16), (9, -8)], second)
    c.polygon([(-3, 8), (0, 14), (6, 8)], second)
    c.ellipse(2, 0, 17, 10, body, body=True)
    c.ellipse(12, -3, 3, 3, (250, 250, 250))
    c.ellipse(12.6, -3, 1.6, 1.6, DARK)
    c.stroke([(14, 4), (18, 3)], 1.4, DARK)
    return Anatomy((4, -11), (2, -11), (0, -4), ((-5, 7), (7, 7)), 19)


def car(c: Canvas, body: Colour, second: Colour, running: bool) -> Anatomy:
    """Saloon with a cabin, two wheels; the windows in the second colour."""
    c.polygon([(-13, -2), (-8, -12), (7, -12), (13, -2)], body, body=True)
    c.polygon([(-21, -3), (18, -3), (22, 1), (22, 9), (-21, 9)], body, body=True)
    c.polygon([(-10, -3), (-6.5, -10), (-0.8, -10), (-0.8, -3)], second)
    c.polygon([(1, -3), (1, -10), (6, -10), (10, -3)], second)
    c.ellipse(20.5, 2.5, 1.6, 1.8, (255, 245, 180))
    for x in (-12, 12):
        c.ellipse(x, 10, 6, 6, DARK)
        c.ellipse(x, 10, 2.4, 2.4, (200, 200, 205))
    return Anatomy((-1, -12), (-1, -12), (0, -8), ((-10, 9), (10, 9)), 22)


def boat(c: Canvas, body: Colour, second: Colour, running: bool) -> Anatomy:
    """Hull with a mast and two sails in the second colour."""
    c.stroke([(0, 6), (0, -19)], 1.8, (90, 65, 45))
    c.polygon([(2, -18), (2, 3), (17, 3)], second)
    c.polygon([(-2, -14), (-2, 3), (-13, 3)], second)
    c.polygon([(-21, 5), (23, 5), (15, 16), (-14, 16)], body, body=True)
    return Anatomy((0, -18), (0, -17), (0, 0), ((-9, 13), (9, 13)), 21)


def teapot(c: Canvas, body: Colour, second: Colour, running: bool) -> Anatomy:
    """Round pot with a spout; ring handle, lid and knob in the second colour."""
    c.ellipse(-15, 1, 8.5, 9, second)
    c.ellipse(-15, 1, 5, 5.5, None)
    c.polygon([(8, 0), (18, -10), (24, -11), (13, 10)], body, body=True)
    c.ellipse(0, 3, 15, 12, body, body=True)
    c.polygon([(-9, -7), (9, -7), (6, -11.5), (-6, -11.5)], second)
    c.ellipse(0, -13.5, 2.6, 2.6, second)
    return Anatomy((0, -14), (0, -14), (0, -6), ((-7, 12), (7, 12)), 21)


def candle(c: Canvas, body: Colour, second: Colour, running: bool) -> Anatomy:
    """Tall unlit candle with a wick on a saucer with a finger ring in the second colour."""
    c.ellipse(-16, 13, 5, 4.5, second)
    c.ellipse(-16, 13, 2.4, 2, None)
    c.stroke([(0, -12), (0, -16.5)], 1.8, DARK)
    c.polygon([(-6.5, -12), (6.5, -12), (6.5, 13), (-6.5, 13)], body, body=True)
    c.ellipse(0, 14, 15, 3.6, second)
    return Anatomy((0, -13), (0, -13), (0, 0), ((-6, 14), (6, 14)), 15)


SHAPES: dict[str, Callable[[Canvas, Colour, Colour, bool], Anatomy]] = {
    "dog": dog,
    "cat": cat,
    "bird": bird,
    "fish": fish,
    "car": car,
    "boat": boat,
    "teapot": teapot,
    "candle": candle,
}
