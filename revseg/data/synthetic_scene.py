"""One street: its cross-section, its sides, and who is on it, painted from far to near.

From the middle outwards a street has lanes, sometimes a strip of parked cars, a kerb, a
sidewalk, sometimes grass, and then houses or gardens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from revseg.data import synthetic_buildings as buildings
from revseg.data import synthetic_furniture as furniture
from revseg.data import synthetic_people as people
from revseg.data import synthetic_vehicles as vehicles
from revseg.data.classes import CITYSCAPES
from revseg.data.synthetic_canvas import Canvas
from revseg.data.synthetic_city import City, found_city
from revseg.data.synthetic_dice import Colour, Dice

ROAD, SIDEWALK = CITYSCAPES.names.index("road"), CITYSCAPES.names.index("sidewalk")
TERRAIN, SKY = CITYSCAPES.names.index("terrain"), CITYSCAPES.names.index("sky")

CITIES = 12  # of each split
FAR = 400.0  # metres to where the ground meets the sky

Thing = tuple[float, Callable[[], None]]  # at a distance, how to paint it


@dataclass(frozen=True)
class _Side:
    """One side of the street: -1 is left. All places are metres from the middle of our lane."""

    sign: int
    kerb: float
    parking: bool
    walk: float  # where the sidewalk ends
    front: float  # where the houses begin
    trees: bool

    def at(self, distance: float) -> float:
        return self.sign * distance


@dataclass(frozen=True)
class _Street:
    sides: tuple[_Side, _Side]
    lane: float
    lanes_left: int
    end: float
    crossing: float | None  # the distance of a cross street
    tram: bool


def painted_street(size: tuple[int, int], dice: Dice, stream: tuple[int, int]) -> Canvas:
    """A canvas with a street on it.

    Args:
        size: (H, W) in pixels.
        dice: Chooses everything about this street.
        stream: Seed and split, which own a set of cities.
    """
    city = found_city(Dice(*stream, 2, dice.integer(0, CITIES - 1)))
    canvas = Canvas(size, dice, haze=city.sky[1], visibility=city.visibility * dice.uniform(0.8, 1.2))
    street = _planned(dice, city)
    _paint_sky(canvas, dice, city)
    _paint_ground(canvas, dice, city, street)
    buildings.skyline(canvas, dice, city, street.end)
    _paint_in_order(_backdrop(canvas, dice, city, street))
    for side in street.sides:
        _paint_in_order(_frontage(canvas, dice, city, street, side))
    _paint_building_shadows(canvas, dice, street)
    things = _traffic(canvas, dice, city, street)
    for side in street.sides:
        things += _kerbside(canvas, dice, city, street, side)
    _paint_in_order(things)
    _paint_bonnet(canvas, dice)
    return canvas


def _paint_in_order(things: list[Thing]) -> None:
    for _, paint in sorted(things, key=lambda thing: -thing[0]):
        paint()


def _planned(dice: Dice, city: City) -> _Street:
    lane = dice.uniform(3.0, 3.7)
    lanes_left = dice.choice((1, 1, 1, 2))
    sides = []
    for sign in (-1, 1):
        parking = dice.chance(0.6)
        edge = lane * (0.5 + (lanes_left if sign < 0 else 0)) + 0.3
        kerb = edge + (2.2 if parking else 0.0)
        walk = kerb + dice.uniform(1.6, 4.2)
        front = walk + (dice.uniform(1.5, 7.0) if dice.chance(0.4) else 0.0)
        sides.append(_Side(sign, kerb, parking, walk, front, dice.chance(city.greenery)))
    crossing = dice.uniform(12, 55) if dice.chance(0.55) else None
    tram = dice.chance(0.3)
    return _Street((sides[0], sides[1]), lane, lanes_left, dice.uniform(70, 180), crossing, tram)


def _paint_sky(canvas: Canvas, dice: Dice, city: City) -> None:
    top, bottom = city.sky
    bands = 48
    for band in range(bands):
        t = band / (bands - 1)
        r, g, b = (int(a * (1 - t) + c * t) for a, c in zip(top, bottom, strict=True))
        pigment = canvas.pigment(SKY, (r, g, b), roughness=3)
        start = canvas.horizon / canvas.height * t
        canvas.rows(start, canvas.horizon / canvas.height + 0.02, pigment)
    if dice.chance(0.6):
        cloud = canvas.pigment(SKY, dice.tint((226, 228, 230), 14), roughness=14)
        rows = slice(0, int(canvas.horizon))
        threshold = dice.integer(128, 168)
        canvas.pigments[rows][canvas.texture[rows] > threshold] = cloud


def _paint_ground(canvas: Canvas, dice: Dice, city: City, street: _Street) -> None:
    """Paints the strips of the cross-section, the cross street and the lines on the road."""
    left, right = street.sides
    grass_or_slabs = [
        (TERRAIN, dice.tint(city.grass, 12)) if side.front > side.walk and dice.chance(0.75)
        else (SIDEWALK, dice.tint(city.slabs, 8))
        for side in street.sides
    ]  # fmt: skip
    kerb_colour = dice.tint((min(255, city.slabs[0] + 26),) * 3, 8)
    depths = [0.9 * canvas.nearest, 9, 14, 22, 36, 60, 110, FAR]
    for near, far in pairwise(depths):
        if near >= far:
            continue
        strips: list[tuple[int, Colour, float, float]] = [
            (TERRAIN, city.grass, -600, 600),
            (*grass_or_slabs[0], -left.front - 40, -left.walk),
            (*grass_or_slabs[1], right.walk, right.front + 40),
            (SIDEWALK, city.slabs, -left.walk, -left.kerb),
            (SIDEWALK, city.slabs, right.kerb, right.walk),
            (SIDEWALK, kerb_colour, -left.kerb - 0.18, -left.kerb),
            (SIDEWALK, kerb_colour, right.kerb, right.kerb + 0.18),
            (ROAD, city.asphalt, -left.kerb, right.kerb),
        ]
        for label, colour, x0, x1 in strips:
            roughness = 46 if label == TERRAIN else 15
            canvas.flat(x0, x1, near, far, canvas.pigment(label, colour, (near + far) / 2, roughness))
    _paint_slabs(canvas, city, street)
    _paint_patches(canvas, dice, city, street)
    if street.crossing is not None:
        asphalt = canvas.pigment(ROAD, city.asphalt, street.crossing, roughness=15)
        canvas.flat(-80, 80, street.crossing, street.crossing + 9, asphalt)
    _paint_lines(canvas, dice, city, street)


def _paint_slabs(canvas: Canvas, city: City, street: _Street) -> None:
    """Paints the joints between the slabs of the sidewalks."""
    r, g, b = (value * 7 // 8 for value in city.slabs)
    joint = canvas.pigment(SIDEWALK, (r, g, b))
    for side in street.sides:
        edges = sorted((side.at(side.kerb + 0.18), side.at(side.walk)))
        z = 5.0
        while z < 32:
            canvas.flat(edges[0], edges[1], z, z + 0.04 + 0.002 * z, joint)
            z += 1.2
        middle = side.at((side.kerb + side.walk) / 2)
        canvas.flat(middle - 0.02, middle + 0.02, canvas.nearest, 40, joint)


def _paint_patches(canvas: Canvas, dice: Dice, city: City, street: _Street) -> None:
    """Paints repairs, covers and rails in the road."""
    left, right = street.sides
    for _ in range(dice.integer(1, 5)):
        pigment = canvas.pigment(ROAD, dice.tint(city.asphalt, 16), roughness=24)
        x, z = dice.uniform(-left.kerb, right.kerb - 1), dice.uniform(4, 30)
        canvas.flat(x, min(right.kerb, x + dice.uniform(0.6, 2.5)), z, z + dice.uniform(1, 9), pigment)
    iron = canvas.pigment(ROAD, (64, 62, 62), roughness=8)
    for _ in range(dice.integer(0, 3)):
        x, z = dice.uniform(-left.kerb, right.kerb - 0.7), dice.uniform(5, 25)
        canvas.flat(x, x + 0.65, z, z + 0.65, iron)
    if street.tram:
        rail = canvas.pigment(ROAD, (138, 134, 130), roughness=6)
        track = -street.lane * street.lanes_left
        for x in (track - 0.72, track + 0.72):
            canvas.flat(x - 0.05, x + 0.05, canvas.nearest, street.end, rail)


def _paint_lines(canvas: Canvas, dice: Dice, city: City, street: _Street) -> None:
    left, right = street.sides
    paint = canvas.pigment(ROAD, city.marking, roughness=30)
    solid_middle, edge_lines = dice.chance(0.25), dice.chance(0.5)
    for number in range(street.lanes_left):
        x = -street.lane * (0.5 + number)
        if solid_middle and number == 0:
            canvas.flat(x - 0.07, x + 0.07, canvas.nearest, street.end, paint)
            continue
        z = dice.uniform(0, 6)
        while z < street.end:
            canvas.flat(x - 0.07, x + 0.07, max(z, canvas.nearest), max(z + 3, canvas.nearest), paint)
            z += 7.5
    if edge_lines:
        for side in street.sides:
            x = side.at(side.kerb - (2.25 if side.parking else 0.35))
            canvas.flat(x - 0.06, x + 0.06, canvas.nearest, street.end, paint)
    if street.crossing is not None and dice.chance(0.7):
        z = street.crossing - 4.5
        x = -left.kerb + 0.3
        while x < right.kerb - 0.6:
            canvas.flat(x, x + 0.5, z, z + 3.2, paint)
            x += 1.0
        canvas.flat(-street.lane / 2, street.lane / 2, z - 1.4, z - 1.0, paint)
    if dice.chance(0.3):
        z = dice.uniform(6, 14)
        canvas.flat(-0.08, 0.08, z, z + 2.2, paint)
        canvas.shape([(-0.4, 0, z + 2.2), (0.4, 0, z + 2.2), (0.0, 0, z + 3.6)], paint)


def _backdrop(canvas: Canvas, dice: Dice, city: City, street: _Street) -> list[Thing]:
    """Trees at the end of the street."""
    things: list[Thing] = []
    for _ in range(dice.integer(2, 9)):
        x, z = dice.uniform(-45, 45), dice.uniform(0.9, 1.5) * street.end
        leaves, tall = dice.choice(city.leaves), dice.uniform(7, 15)
        things.append((z, lambda x=x, z=z, c=leaves, t=tall: furniture.tree(canvas, dice, x, z, c, t)))  # type: ignore[misc]
    return things


def _frontage(canvas: Canvas, dice: Dice, city: City, street: _Street, side: _Side) -> list[Thing]:
    """Houses and gardens along one side, lot by lot."""
    things: list[Thing] = []
    z = dice.uniform(3.5, 8)
    while z < street.end:
        end = z + dice.uniform(8, 26)
        if street.crossing is not None and z < street.crossing + 10 and end > street.crossing - 2:
            if z > street.crossing - 8:
                z = street.crossing + 10
                continue
            end = street.crossing - 2
        if dice.chance(0.7):
            x = side.at(side.front + dice.choice((0.0, 0.0, dice.uniform(0, 2))))
            things.append(
                (z, lambda x=x, a=z, b=end: buildings.house(canvas, dice, city, x, a, b, side.sign))  # type: ignore[misc]
            )
        else:
            things.append((z, lambda a=z, b=end: _paint_garden(canvas, dice, city, side, a, b)))  # type: ignore[misc]
        z = end + (dice.uniform(2, 5) if dice.chance(0.2) else 0.0)
    return things


def _paint_garden(canvas: Canvas, dice: Dice, city: City, side: _Side, z0: float, z1: float) -> None:
    """Paints trees and bushes behind a wall, a fence or nothing."""
    for step in range(3):
        z = z1 - (step + 0.5) * (z1 - z0) / 3
        x = side.at(side.front + dice.uniform(2, 9))
        if dice.chance(0.75):
            furniture.tree(canvas, dice, x, z, dice.choice(city.leaves), dice.uniform(6, 13))
        bush_x = side.at(side.front + dice.uniform(0.8, 2.5))
        furniture.bush(canvas, dice, bush_x, z, dice.choice(city.leaves), dice.uniform(0.9, 2.0))
    border = dice.integer(0, 4)
    if border < 2:
        buildings.garden_wall(canvas, dice, city, side.at(side.front), z0, z1, dice.uniform(1.0, 2.6))
    elif border < 4:
        buildings.fence(canvas, dice, city, side.at(side.front), z0, z1, dice.uniform(1.0, 2.0))


def _paint_building_shadows(canvas: Canvas, dice: Dice, street: _Street) -> None:
    """Darkens the ground beside the houses away from the sun, which stands on one side or nowhere."""
    sun = dice.choice((-1, 0, 1))
    if sun == 0:
        return
    side = street.sides[0 if sun < 0 else 1]
    z = dice.uniform(0, 10)
    while z < 70:
        length, reach = dice.uniform(6, 20), dice.uniform(0.5, 7)
        edges = sorted((side.at(side.front), side.at(side.front - reach)))
        canvas.shadow(edges[0], edges[1], z, z + length)
        z += length + dice.uniform(0.5, 9)


def _traffic(canvas: Canvas, dice: Dice, city: City, street: _Street) -> list[Thing]:
    """What moves on the road, and what is parked at its edge."""
    things: list[Thing] = []
    kinds = (vehicles.car,) * 9 + (vehicles.truck, vehicles.bus)

    def add(kind: Callable[..., None], x: float, z: float, oncoming: bool) -> None:
        things.append((z, lambda: kind(canvas, dice, x, z, oncoming, city.paints)))

    for number in range(-street.lanes_left, 1):
        oncoming = number < 0
        z = dice.uniform(9, 45) if number < 0 else dice.uniform(11, 60)
        middle = number * street.lane
        if number == -street.lanes_left and street.tram and dice.chance(0.7):
            add(vehicles.train, middle, z + 4, oncoming)
            z += 45
        while z < street.end:
            kind = dice.choice(kinds)
            add(kind, middle + dice.uniform(-0.3, 0.3), z, oncoming)
            z += dice.uniform(14, 60)
    for side in street.sides:
        if side.parking and dice.chance(0.9):
            z = dice.uniform(5.5, 14)
            while z < min(street.end, 90):
                if street.crossing is None or not street.crossing - 10 < z < street.crossing + 10:
                    kind = vehicles.truck if dice.chance(0.06) else vehicles.car
                    add(kind, side.at(side.kerb - 1.05), z, side.sign < 0)
                    z += 3.5 if kind is vehicles.truck else 0.0
                z += dice.uniform(5.4, 8) if dice.chance(0.8) else dice.uniform(8, 22)
    for _ in range(dice.choice((0, 1, 1, 2))):
        side = dice.choice(street.sides)
        edge = side.at(side.kerb - (3.0 if side.parking else 0.8))
        z, motorised = dice.uniform(7, 30), dice.chance(0.35)
        things.append((z, lambda x=edge, z=z, m=motorised: people.rider(canvas, dice, x, z, m)))  # type: ignore[misc]
    if street.crossing is not None:
        for _ in range(dice.integer(0, 3)):
            x, z = dice.uniform(-5, 4), street.crossing - dice.uniform(1.5, 4.3)
            things.append((z, lambda x=x, z=z: people.person(canvas, dice, x, z)))  # type: ignore[misc]
    return things


def _kerbside(canvas: Canvas, dice: Dice, city: City, street: _Street, side: _Side) -> list[Thing]:
    """What stands and walks on one sidewalk."""
    things: list[Thing] = []
    kerb, inwards = side.at(side.kerb + 0.45), -side.sign

    def add(z: float, paint: Callable[[], None]) -> None:
        if street.crossing is None or not street.crossing < z < street.crossing + 9:
            things.append((z, paint))

    if side.trees:
        spacing = dice.uniform(7, 14)
        z, leaves, tall = dice.uniform(6, 14), dice.choice(city.leaves), dice.uniform(5, 10)
        while z < street.end:
            add(z, lambda z=z: furniture.tree(canvas, dice, kerb, z, leaves, tall * dice.uniform(0.85, 1.15)))  # type: ignore[misc]
            z += spacing * dice.uniform(0.85, 1.2)
    z = dice.uniform(6, 24)
    while z < street.end:
        add(z, lambda z=z: furniture.street_lamp(canvas, dice, kerb, z, inwards))  # type: ignore[misc]
        z += dice.uniform(16, 28)
    for _ in range(dice.integer(0, 3)):
        z = dice.uniform(7, 45)
        add(z, lambda z=z: furniture.sign(canvas, dice, kerb + side.sign * 0.2, z))  # type: ignore[misc]
    if dice.chance(0.25):
        z = dice.uniform(6, 14)
        for step in range(dice.integer(3, 8)):
            add(z + 2 * step, lambda z=z + 2 * step: furniture.bollard(canvas, dice, kerb, z))  # type: ignore[misc]
    if street.crossing is not None and dice.chance(0.8):
        z = street.crossing - 5.2
        add(z, lambda z=z: furniture.traffic_light(canvas, dice, kerb, z, inwards))  # type: ignore[misc]
    if dice.chance(0.15):
        z, long = dice.uniform(6, 16), dice.uniform(6, 16)
        add(z, lambda z=z: buildings.fence(canvas, dice, city, kerb, z, z + long, 1.05))  # type: ignore[misc]
    walkers = dice.choice((0, 1, 2, 3, 4, 6, 9))
    for _ in range(walkers):
        x, z = side.at(dice.uniform(side.kerb + 0.5, side.walk)), dice.uniform(7, 45)
        add(z, lambda x=x, z=z: people.person(canvas, dice, x, z))  # type: ignore[misc]
    if dice.chance(0.4):
        z, motorised = dice.uniform(7, 22), dice.chance(0.35)
        for step in range(dice.integer(1, 3)):
            place = side.at(side.walk - 1.0)
            add(z + step, lambda x=place, z=z + step, m=motorised: people.two_wheeler(canvas, dice, x, z, m))  # type: ignore[misc]
    if dice.chance(0.35):
        z = dice.uniform(8, 30)
        add(z, lambda z=z: furniture.bin_(canvas, dice, side.at(side.walk - 0.6), z))  # type: ignore[misc]
    return things


def _paint_bonnet(canvas: Canvas, dice: Dice) -> None:
    """Paints our own car at the bottom, and on some images the border that rectification leaves."""
    if dice.chance(0.8):
        rise = dice.uniform(0.03, 0.09)
        dark = canvas.pigment(CITYSCAPES.ignore, dice.tint((36, 38, 42), 16), roughness=4)
        x = (np.arange(canvas.width) + 0.5 - canvas.centre) / (0.62 * canvas.width)
        edge = canvas.height * (1 - rise * (1 - x * x))
        rows = np.arange(canvas.height)[:, None] + 0.5
        start = int(canvas.height * (1 - rise))
        np.copyto(canvas.pigments[start:], np.uint16(dark), where=rows[start:] > edge)
    if dice.chance(0.5):
        border = canvas.pigment(CITYSCAPES.ignore, (0, 0, 0), roughness=0)
        side = canvas.height * dice.integer(2, 5) // 1024
        if side:
            canvas.pigments[:, :side] = border
            canvas.pigments[:, -side:] = border
