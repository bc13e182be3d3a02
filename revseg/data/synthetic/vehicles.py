"""Cars, trucks, buses and trams: boxes on wheels, each with one face to the camera and one side.

All four take their paint from the same tins. What tells them apart is their shape.
"""

from dataclasses import dataclass

from revseg.data.classes import CITYSCAPES
from revseg.data.synthetic.canvas import Canvas, Point
from revseg.data.synthetic.dice import Colour, Dice

CAR, TRUCK = CITYSCAPES.names.index("car"), CITYSCAPES.names.index("truck")
BUS, TRAIN = CITYSCAPES.names.index("bus"), CITYSCAPES.names.index("train")

GLASS: Colour = (44, 52, 62)
TYRE: Colour = (26, 26, 28)
RED_LAMP: Colour = (196, 26, 26)
WHITE_LAMP: Colour = (244, 242, 226)


@dataclass
class _Body:
    """A vehicle being painted: its place and the pigments of its face and of its darker side."""

    canvas: Canvas
    label: int
    x: float
    z: float
    half: float  # of the width
    length: float
    paint: int
    side: int
    glass: int
    dark: int

    @property
    def visible(self) -> float | None:
        """X of the side that the camera sees; None straight ahead."""
        if abs(self.x) <= self.half:
            return None
        return self.x - self.half if self.x > 0 else self.x + self.half

    def flank(self, pigment: int, *corners: tuple[float, float]) -> None:
        """Paints on the visible side: corners are shares of the length and metres of height."""
        if (x := self.visible) is not None:
            self.canvas.shape([(x, y, self.z + s * self.length) for s, y in corners], pigment)

    def panel(self, pigment: int, left: float, right: float, y0: float, y1: float) -> None:
        """Paints on the face: left and right are shares of half the width."""
        self.canvas.face(self.x + left * self.half, self.x + right * self.half, y0, y1, self.z, pigment)

    def wheels(self, radius: float, *places: float) -> None:
        """Paints wheels, at shares of the length on the side and under the face."""
        for end in (-1.0, 0.62):
            self.panel(self.dark, end, end + 0.38, 0.0, 2 * radius * 0.8)
        if (x := self.visible) is None:
            return
        for place in places:
            middle = self.z + place * self.length
            turn = ((1, 0), (0.7, 0.7), (0, 1), (-0.7, 0.7), (-1, 0), (-0.7, -0.7), (0, -1), (0.7, -0.7))
            tyre: list[Point] = [(x, radius * (1 + b), middle + radius * a) for a, b in turn]
            rim: list[Point] = [(x, radius * (1 + 0.55 * b), middle + 0.55 * radius * a) for a, b in turn]
            self.canvas.shape(tyre, self.dark)
            self.canvas.shape(rim, self.side)

    def lamps(self, dice: Dice, y: float, oncoming: bool, size: float = 0.11) -> None:
        lamp = WHITE_LAMP if oncoming else RED_LAMP
        pigment = self.canvas.pigment(self.label, dice.tint(lamp, 14), self.z, roughness=0)
        for side in (-1, 1):
            inner, outer = side * 0.92, side * 0.64
            self.panel(pigment, min(inner, outer), max(inner, outer), y, y + size)


def car(canvas: Canvas, dice: Dice, x: float, z: float, oncoming: bool, paints: tuple[Colour, ...]) -> None:
    """Paints a car, low or tall."""
    body = _body(canvas, dice, CAR, x, z, dice.uniform(0.84, 0.95), dice.uniform(3.7, 4.9), paints)
    tall = dice.uniform(1.38, 1.85)
    waist, floor = 0.58 * tall, 0.24
    hood = 0.22 if oncoming else dice.choice((0.03, 0.15))  # where the cabin begins
    tail = 0.97 if oncoming else 0.78
    half = body.half
    shoulder = waist - 0.1  # the cabin reaches into the body, or the street would show between them
    body.flank(body.side, (hood, shoulder), (hood + 0.12, tall), (tail - 0.08, tall), (tail, shoulder))
    body.flank(
        body.glass,
        (hood + 0.05, waist),
        (hood + 0.15, tall - 0.1),
        (tail - 0.1, tall - 0.1),
        (tail - 0.04, waist),
    )
    body.flank(body.side, (0.46, waist), (0.46, tall - 0.1), (0.49, tall - 0.1), (0.49, waist))
    body.flank(body.side, (0, floor), (0, waist - 0.04), (0.25, waist), (1, waist - 0.06), (1, floor))
    near = z + hood * body.length
    roof: list[Point] = [
        (x - 0.72 * half, tall, near), (x + 0.72 * half, tall, near),
        (x + 0.96 * half, waist, near), (x - 0.96 * half, waist, near),
    ]  # fmt: skip
    pane: list[Point] = [
        (x - 0.64 * half, tall - 0.09, near), (x + 0.64 * half, tall - 0.09, near),
        (x + 0.84 * half, waist + 0.04, near), (x - 0.84 * half, waist + 0.04, near),
    ]  # fmt: skip
    canvas.shape(
        [(x - half, waist, z), (x + half, waist, z), (x + half, waist, near), (x - half, waist, near)],
        body.side,
    )
    if (side := body.visible) is not None:
        corner = x + 0.72 * (side - x)
        brow = z + (hood + 0.12) * body.length
        canvas.shape([(side, shoulder, near), (corner, tall, near), (side, tall, brow)], body.side)
    canvas.shape(roof, body.paint)
    canvas.shape(pane, body.glass)
    body.wheels(0.31, 0.19, 0.81)
    body.panel(body.paint, -1, 1, floor, waist)
    body.panel(body.dark, -0.96, 0.96, floor, floor + 0.12)
    if oncoming:
        body.panel(body.dark, -0.5, 0.5, 0.48, 0.62)
    body.lamps(dice, waist - 0.24, oncoming)
    plate = canvas.pigment(CAR, (214, 212, 196), z)
    body.panel(plate, -0.28, 0.28, 0.40, 0.51)


def truck(canvas: Canvas, dice: Dice, x: float, z: float, oncoming: bool, paints: tuple[Colour, ...]) -> None:
    """Paints a truck: a cab and a box that is higher than it."""
    body = _body(canvas, dice, TRUCK, x, z, dice.uniform(1.1, 1.25), dice.uniform(6.0, 9.5), paints)
    tall = dice.uniform(2.8, 3.7)
    cargo = canvas.pigment(TRUCK, dice.tint(dice.choice(((206, 204, 198), *paints)), 20), z)
    cab_side = (0.0, 0.24) if oncoming else (0.76, 1.0)
    body.flank(cargo, (0, 0.95), (0, tall), (1, tall), (1, 0.95))
    body.flank(body.dark, (0, 0.55), (0, 0.95), (1, 0.95), (1, 0.55))
    a, b = cab_side
    body.flank(body.side, (a, 0.4), (a, 2.5), (b, 2.5), (b, 0.4))
    body.flank(body.glass, (a + 0.04, 1.5), (a + 0.04, 2.2), (b - 0.06, 2.2), (b - 0.06, 1.5))
    body.wheels(0.48, 0.12, 0.3, 0.86)
    body.panel(cargo, -1, 1, 0.95, tall)
    if oncoming:
        body.panel(body.paint, -0.96, 0.96, 0.45, 2.5)
        body.panel(body.glass, -0.84, 0.84, 1.5, 2.2)
        body.panel(body.dark, -0.6, 0.6, 0.75, 1.1)
    else:
        body.panel(body.dark, -0.94, 0.94, 0.5, 0.95)
        body.panel(body.dark, -0.015, 0.015, 1.0, tall - 0.06)
        for side in (-0.55, 0.45):
            body.panel(body.dark, side, side + 0.06, 1.05, tall - 0.1)
    body.lamps(dice, 0.66, oncoming)


def bus(canvas: Canvas, dice: Dice, x: float, z: float, oncoming: bool, paints: tuple[Colour, ...]) -> None:
    """Paints a bus: windows all along, its number in lights over the windscreen."""
    body = _body(canvas, dice, BUS, x, z, 1.25, dice.uniform(10.0, 12.5), paints)
    tall = dice.uniform(2.95, 3.2)
    body.flank(body.side, (0, 0.3), (0, tall), (1, tall), (1, 0.3))
    windows = 7
    for i in range(windows):
        s0, s1 = (i + 0.12) / windows, (i + 0.92) / windows
        low = 0.45 if i in (1, 4) else 1.25  # doors reach down
        body.flank(body.glass, (s0, low), (s0, tall - 0.5), (s1, tall - 0.5), (s1, low))
    body.wheels(0.46, 0.24, 0.74)
    body.panel(body.paint, -1, 1, 0.3, tall)
    body.panel(body.glass, -0.9, 0.9, 1.1 if oncoming else 1.5, tall - 0.42)
    lights = canvas.pigment(BUS, (238, 160, 44), z, roughness=0)
    body.panel(body.dark, -0.7, 0.7, tall - 0.38, tall - 0.1)
    body.panel(lights, -0.45, 0.4, tall - 0.31, tall - 0.17)
    body.lamps(dice, 0.62, oncoming, size=0.2)


def train(canvas: Canvas, dice: Dice, x: float, z: float, oncoming: bool, paints: tuple[Colour, ...]) -> None:
    """Paints a tram: several cars long, with a narrow nose and a pantograph."""
    body = _body(canvas, dice, TRAIN, x, z, 1.22, dice.uniform(20.0, 32.0), paints)
    tall = dice.uniform(3.3, 3.6)
    stripe = canvas.pigment(TRAIN, dice.tint(dice.choice(paints), 20), z)
    body.flank(body.side, (0, 0.2), (0, tall), (1, tall), (1, 0.2))
    body.flank(stripe, (0, 0.75), (0, 1.05), (1, 1.05), (1, 0.75))
    windows = 14
    for i in range(windows):
        s0, s1 = (i + 0.1) / windows, (i + 0.9) / windows
        low = 0.4 if i % 4 == 1 else 1.35
        body.flank(body.glass, (s0, low), (s0, tall - 0.6), (s1, tall - 0.6), (s1, low))
        if i in (4, 9):
            joint = (i + 1.0) / windows
            body.flank(body.dark, (joint, 0.3), (joint, tall), (joint + 0.02, tall), (joint + 0.02, 0.3))
    h = body.half
    nose: list[Point] = [
        (x - h, 0.2, z), (x - h, 2.2, z), (x - 0.72 * h, tall, z),
        (x + 0.72 * h, tall, z), (x + h, 2.2, z), (x + h, 0.2, z),
    ]  # fmt: skip
    if (side := body.visible) is not None:
        canvas.shape([(side, 2.2, z), (x + 0.72 * (side - x), tall, z), (side, tall, z)], body.side)
    canvas.shape(nose, body.paint)
    screen: list[Point] = [
        (x - 0.86 * h, 1.35, z), (x - 0.66 * h, tall - 0.5, z),
        (x + 0.66 * h, tall - 0.5, z), (x + 0.86 * h, 1.35, z),
    ]  # fmt: skip
    canvas.shape(screen, body.glass)
    body.panel(stripe, -1, 1, 0.75, 1.05)
    body.panel(body.dark, -0.95, 0.95, 0.2, 0.42)
    body.panel(body.dark, -0.5, 0.5, tall - 0.4, tall - 0.14)
    for side in (-1, 1):
        canvas.bar((x + side * 0.5, tall, z + 3), (x - side * 0.2, tall + 0.9, z + 3), 0.07, body.dark)
    body.lamps(dice, 0.56, oncoming, size=0.16)


def _body(
    canvas: Canvas,
    dice: Dice,
    label: int,
    x: float,
    z: float,
    half: float,
    length: float,
    paints: tuple[Colour, ...],
) -> _Body:
    colour = dice.tint(dice.choice(paints), 18)
    shade = dice.uniform(0.62, 0.86)
    dimmed = (int(colour[0] * shade), int(colour[1] * shade), int(colour[2] * shade))
    canvas.shadow(x - half - 0.15, x + half + 0.25, z - 0.25, z + length)
    return _Body(
        canvas, label, x, z, half, length,
        paint=canvas.pigment(label, colour, z, roughness=7),
        side=canvas.pigment(label, dimmed, z, roughness=7),
        glass=canvas.pigment(label, dice.tint(GLASS, 16), z, roughness=20),
        dark=canvas.pigment(label, dice.tint(TYRE, 8), z, roughness=6),
    )  # fmt: skip
