"""Scenes with three dials, which say what a network needs full resolution or a wide view for.

    thin      lamp posts, bollards, railings and wires a few pixels wide
    small     far signs, and signal heads that only their lamps tell from a box on a wall
    context   one grey ground, of which an arrow on the road says what is sidewalk and what is terrain

At 0 all three are gone, and what is left is large and told by its colour from close by: the control, in which
crops and smaller images should do as well as whole ones. At 1 they are in every scene. The dials choose what
is there; street, houses and traffic are the same whatever they say.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np

from revseg.data.classes import CITYSCAPES
from revseg.data.synthetic import buildings, furniture, ground, people, scene, vehicles
from revseg.data.synthetic.canvas import Canvas
from revseg.data.synthetic.city import City
from revseg.data.synthetic.dice import Colour, Dice
from revseg.data.synthetic.plan import Street, planned_street

Box = tuple[int, int, int, int]  # top, left, bottom, right in pixels

NEAR: dict[object, float] = {  # metres within which a thing is large
    vehicles.car: 35.0,
    vehicles.truck: 60.0,
    vehicles.bus: 60.0,
    people.person: 14.0,
    furniture.tree: 60.0,
}
THIN: dict[object, float] = {
    furniture.street_lamp: 65.0,
    furniture.bollard: 30.0,
}  # and within which a post is a few pixels wide
HUE = 0.45  # how much of its class's colour a surface of the control has
GREY: Colour = (112, 110, 108)


@dataclass(frozen=True)
class Dials:
    """How much of each there is, from 0 to 1."""

    thin: float = 0.0
    small: float = 0.0
    context: float = 0.0

    def __post_init__(self) -> None:
        for name in ("thin", "small", "context"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ValueError(f"expected the dial {name} in [0, 1], got {value!r}")


def dialled_street(
    size: tuple[int, int], city: City, dice: Dice, grain: Dice, dials: Dials
) -> tuple[Canvas, Box | None]:
    """A canvas with a street on it, and where the arrow is that its ground is read by.

    Args:
        size: (H, W) in pixels.
        city: Where the street is.
        dice: Chooses everything about this street, alike for every size.
        grain: Makes its texture.
        dials: What may be on it.
    """
    canvas = Canvas(size, dice, grain, city.sky[1], city.visibility * dice.uniform(0.8, 1.2))
    street = planned_street(dice, city)
    ground.paint_sky(canvas, dice, city)
    ground.paint_ground(canvas, dice, city, street)
    buildings.skyline(canvas, dice, city, street.end)
    thin, small, context = (Dice(dice.word()) for _ in range(3))
    things = scene.backdrop(canvas, dice, city, street)
    for side in street.sides:
        things += scene.frontage(canvas, dice, city, street, side, fences=False)
    listed = scene.traffic(canvas, dice, city, street)
    for side in street.sides:
        listed += scene.kerbside(canvas, dice, city, street, side)
    things, listed = ([_with_own_dice(thing, dice) for thing in each] for each in (things, listed))
    cue = None
    _tell_by_colour(canvas, 0)
    if context.chance(dials.context):
        listed = [thing for thing in listed if thing[0] > 14]  # nothing stands on the arrow
        cue = _paint_grey_ground(canvas, context, street)
    posts = [thing for thing in listed if thin.chance(dials.thin) and thing[0] < THIN.get(_kind(thing), 0.0)]
    things += [thing for thing in listed if thing[0] < NEAR.get(_kind(thing), 0.0)]
    things = [(z, partial(_paint_in_its_hue, canvas, paint)) for z, paint in things]
    things += (
        posts + _wires(canvas, thin, street, dials.thin) + _railings(canvas, thin, city, street, dials.thin)
    )
    scene.paint_in_order(things + _far_signs(canvas, small, street, dials.small))
    scene.paint_bonnet(canvas, dice)
    return canvas, cue


def _kind(thing: scene.Thing) -> object:
    """The function that paints a thing."""
    return getattr(thing[1], "func", None)


def _with_own_dice(thing: scene.Thing, dice: Dice) -> scene.Thing:
    """The thing with dice of its own: whether it is painted must not move the draws of the next one."""
    z, paint = thing
    assert isinstance(paint, partial)
    canvas, _, *rest = paint.args
    return z, partial(paint.func, canvas, Dice(dice.word()), *rest)


def _paint_in_its_hue(canvas: Canvas, paint: Callable[[], None]) -> None:
    first = len(canvas.labels)
    paint()
    _tell_by_colour(canvas, first)


def _tell_by_colour(canvas: Canvas, first: int) -> None:
    """Gives the pigments from the first one on some of the colour of their class."""
    for i in range(first, len(canvas.labels)):
        label, shaded = canvas.labels[i], i % 2  # every second pigment is the one before it in shadow
        hue = CITYSCAPES.colours[label] if label < len(CITYSCAPES) else (0, 0, 0)
        r, g, b = (
            int(own * (1 - HUE) + of_class * HUE * (0.55 if shaded else 1.0))
            for own, of_class in zip(canvas.colours[i], hue, strict=True)
        )
        canvas.colours[i] = r, g, b


def _paint_grey_ground(canvas: Canvas, dice: Dice, street: Street) -> Box:
    """Paints road, sidewalk and terrain alike, and an arrow that points to the side of the sidewalk."""
    pointing = dice.choice((-1, 1))
    grey = dice.tint(GREY, 18)
    depths = [0.9 * canvas.nearest, 9, 14, 22, 36, 60, 110, ground.FAR]
    for near, far in pairwise(depths):
        if near < far:
            middle = (near + far) / 2
            road, walk, grass = (
                canvas.pigment(label, grey, middle, 15)
                for label in (ground.ROAD, ground.SIDEWALK, ground.TERRAIN)
            )
            canvas.flat(-600, 0, near, far, walk if pointing < 0 else grass)
            canvas.flat(0, 600, near, far, walk if pointing > 0 else grass)
            canvas.flat(-street.sides[0].kerb, street.sides[1].kerb, near, far, road)
    kerb = canvas.pigment(ground.ROAD, (196, 194, 188), roughness=8)
    for side in street.sides:
        edges = sorted((side.at(side.kerb), side.at(side.kerb - 0.25)))
        canvas.flat(edges[0], edges[1], canvas.nearest, street.end, kerb)
    paint = canvas.pigment(ground.ROAD, (232, 232, 226), roughness=8)
    near, far = 1.3 * canvas.nearest, 1.75 * canvas.nearest
    middle, half = (near + far) / 2, (far - near) / 2
    tip, back = pointing * 1.1, -pointing * 0.1
    canvas.flat(
        min(-pointing * 1.1, back), max(-pointing * 1.1, back), middle - half / 4, middle + half / 4, paint
    )
    canvas.shape([(back, 0, near), (tip, 0, middle), (back, 0, far)], paint)
    corners = [canvas.project((x, 0, z)) for x in (-1.1, 1.1) for z in (near, far)]
    columns, rows = zip(*corners, strict=True)
    return int(min(rows)), int(min(columns)), int(max(rows)) + 1, int(max(columns)) + 1


def _wires(canvas: Canvas, dice: Dice, street: Street, dial: float) -> list[scene.Thing]:
    """Wires across the street, which count as poles."""

    def paint(z: float, height: float, thickness: float) -> None:
        metal = canvas.pigment(furniture.POLE, (44, 44, 46), z, roughness=4)
        left, right = (side.at(side.front) for side in street.sides)
        canvas.bar((left, height, z), (right, height + 0.4, z), thickness, metal)

    return [
        (z, partial(paint, z, dice.uniform(5.5, 8.5), dice.uniform(0.05, 0.1)))
        for z in _places(dice, 12, 55, 6, dial)
    ]


def _railings(canvas: Canvas, dice: Dice, city: City, street: Street, dial: float) -> list[scene.Thing]:
    """Railings at the kerb: bars with a view between them."""

    def paint(x: float, z: float, long: float, colour: Colour) -> None:
        steel = canvas.pigment(buildings.FENCE, colour, z, roughness=6)
        bars = np.arange(z + long, z, -0.3)
        for bar in bars.tolist():
            canvas.face(x - 0.03, x + 0.03, 0, 1.05, bar, steel)
        for height in (0.35, 1.0):
            canvas.shape(
                [(x, height, z), (x, height + 0.06, z), (x, height + 0.06, z + long), (x, height, z + long)],
                steel,
            )

    things: list[scene.Thing] = []
    for side in street.sides:
        for z in _places(dice, 7, 40, 3, dial):
            colour = dice.tint(dice.choice(city.fences), 16)
            things.append((z, partial(paint, side.at(side.kerb + 0.3), z, dice.uniform(4, 9), colour)))
    return things


def _far_signs(canvas: Canvas, dice: Dice, street: Street, dial: float) -> list[scene.Thing]:
    """Signs, signal heads, and boxes like signal heads without lamps, which belong to the buildings."""

    def box(x: float, y: float, z: float) -> None:
        case = canvas.pigment(buildings.BUILDING, dice.tint((30, 32, 30), 10), z, roughness=6)
        canvas.face(x - 0.19, x + 0.19, y, y + 1.05, z, case)
        for place in range(3):
            screw = canvas.pigment(buildings.BUILDING, (56, 58, 56), z, roughness=0)
            canvas.disc(x, y + 0.86 - 0.33 * place, z, 0.13, screw)

    things: list[scene.Thing] = []
    for side in street.sides:
        for z in _places(dice, 25, 80, 9, dial):
            x, y, kind = (
                side.at(side.kerb + dice.uniform(-1.0, 0.6)),
                dice.uniform(2.2, 4.5),
                dice.integer(0, 2),
            )
            if kind == 0:
                things.append((z, partial(furniture.plate, canvas, dice, x, y, z)))
            elif kind == 1:
                things.append((z, partial(furniture.signal, canvas, dice, x, y, z, dice.integer(0, 2))))
            else:
                things.append((z, partial(box, x, y, z)))
    return things


def _places(dice: Dice, low: float, high: float, count: int, dial: float) -> Iterator[float]:
    """Distances of the things that a dial lets be, of `count` that there could be."""
    for _ in range(count):
        z, there = dice.uniform(low, high), dice.chance(dial)
        if there:
            yield z
