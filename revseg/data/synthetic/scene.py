"""One street and who is on it, painted from far to near.

Things are listed with their distances first and painted afterwards, so that the near ones hide
the far ones whatever the order in which they were thought of.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from revseg.data.classes import CITYSCAPES
from revseg.data.synthetic import buildings, furniture, ground, people, vehicles
from revseg.data.synthetic.canvas import Canvas
from revseg.data.synthetic.city import City
from revseg.data.synthetic.dice import Dice
from revseg.data.synthetic.plan import Side, Street, planned_street

Thing = tuple[float, Callable[[], None]]  # at a distance, how to paint it


def painted_street(size: tuple[int, int], city: City, dice: Dice, grain: Dice) -> Canvas:
    """A canvas with a street on it.

    Args:
        size: (H, W) in pixels.
        city: Where the street is.
        dice: Chooses everything about this street, alike for every size.
        grain: Makes its texture.
    """
    visibility = city.visibility * dice.uniform(0.8, 1.2)
    canvas = Canvas(size, dice, grain, city.sky[1], visibility)
    street = planned_street(dice, city)
    ground.paint_sky(canvas, dice, city)
    ground.paint_ground(canvas, dice, city, street)
    buildings.skyline(canvas, dice, city, street.end)
    paint_in_order(backdrop(canvas, dice, city, street))
    for side in street.sides:
        paint_in_order(frontage(canvas, dice, city, street, side))
    ground.paint_building_shadows(canvas, dice, street)
    things = traffic(canvas, dice, city, street)
    for side in street.sides:
        things += kerbside(canvas, dice, city, street, side)
    paint_in_order(things)
    paint_bonnet(canvas, dice)
    return canvas


def paint_in_order(things: list[Thing]) -> None:
    """Paints things, the far ones first."""
    for _, paint in sorted(things, key=lambda thing: -thing[0]):
        paint()


def backdrop(canvas: Canvas, dice: Dice, city: City, street: Street) -> list[Thing]:
    """Trees at the end of the street."""
    things: list[Thing] = []
    for _ in range(dice.integer(2, 9)):
        x, z = dice.uniform(-45, 45), dice.uniform(0.9, 1.5) * street.end
        leaves, tall = dice.choice(city.leaves), dice.uniform(7, 15)
        things.append((z, partial(furniture.tree, canvas, dice, x, z, leaves, tall)))
    return things


def frontage(
    canvas: Canvas, dice: Dice, city: City, street: Street, side: Side, *, fences: bool = True
) -> list[Thing]:
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
            things.append((z, partial(buildings.house, canvas, dice, city, x, z, end, side.sign)))
        else:
            things.append((z, partial(_paint_garden, canvas, dice, city, side, z, end, fences)))
        z = end + (dice.uniform(2, 5) if dice.chance(0.2) else 0.0)
    return things


def _paint_garden(
    canvas: Canvas, dice: Dice, city: City, side: Side, z0: float, z1: float, fences: bool
) -> None:
    """Paints trees and bushes behind a wall, a fence (if there may be fences) or nothing."""
    for step in range(3):
        z = z1 - (step + 0.5) * (z1 - z0) / 3
        x = side.at(side.front + dice.uniform(2, 9))
        if dice.chance(0.75):
            furniture.tree(canvas, dice, x, z, dice.choice(city.leaves), dice.uniform(6, 13))
        bush_x = side.at(side.front + dice.uniform(0.8, 2.5))
        furniture.bush(canvas, dice, bush_x, z, dice.choice(city.leaves), dice.uniform(0.9, 2.0))
    border = dice.integer(0, 4)
    if border < (2 if fences else 4):
        buildings.garden_wall(canvas, dice, city, side.at(side.front), z0, z1, dice.uniform(1.0, 2.6))
    elif border < 4:
        buildings.fence(canvas, dice, city, side.at(side.front), z0, z1, dice.uniform(1.0, 2.0))


def traffic(canvas: Canvas, dice: Dice, city: City, street: Street) -> list[Thing]:
    """What moves on the road, and what is parked at its edge."""
    things: list[Thing] = []
    kinds = (vehicles.car,) * 11 + (vehicles.truck, vehicles.bus)

    def add(kind: Callable[..., None], x: float, z: float, oncoming: bool) -> None:
        things.append((z, partial(kind, canvas, dice, x, z, oncoming, city.paints)))

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
                    kind = vehicles.truck if dice.chance(0.03) else vehicles.car
                    add(kind, side.at(side.kerb - 1.05), z, side.sign < 0)
                    z += 3.5 if kind is vehicles.truck else 0.0
                z += dice.uniform(5.4, 8) if dice.chance(0.8) else dice.uniform(8, 22)
    for _ in range(dice.choice((0, 1, 1, 2))):
        side = dice.choice(street.sides)
        edge = side.at(side.kerb - (3.0 if side.parking else 0.8))
        z, motorised = dice.uniform(7, 30), dice.chance(0.35)
        things.append((z, partial(people.rider, canvas, dice, edge, z, motorised)))
    if street.crossing is not None:
        for _ in range(dice.integer(0, 3)):
            x, z = dice.uniform(-5, 4), street.crossing - dice.uniform(1.5, 4.3)
            things.append((z, partial(people.person, canvas, dice, x, z)))
    return things


def kerbside(canvas: Canvas, dice: Dice, city: City, street: Street, side: Side) -> list[Thing]:
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
            add(z, partial(furniture.tree, canvas, dice, kerb, z, leaves, tall * dice.uniform(0.85, 1.15)))
            z += spacing * dice.uniform(0.85, 1.2)
    z = dice.uniform(6, 24)
    while z < street.end:
        add(z, partial(furniture.street_lamp, canvas, dice, kerb, z, inwards))
        z += dice.uniform(16, 28)
    for _ in range(dice.integer(0, 3)):
        z = dice.uniform(7, 45)
        add(z, partial(furniture.sign, canvas, dice, kerb + side.sign * 0.2, z))
    if dice.chance(0.25):
        z = dice.uniform(6, 14)
        for step in range(dice.integer(3, 8)):
            add(z + 2 * step, partial(furniture.bollard, canvas, dice, kerb, z + 2 * step))
    if street.crossing is not None and dice.chance(0.8):
        z = street.crossing - 5.2
        add(z, partial(furniture.traffic_light, canvas, dice, kerb, z, inwards))
    if dice.chance(0.15):
        z, long = dice.uniform(6, 16), dice.uniform(6, 16)
        add(z, partial(buildings.fence, canvas, dice, city, kerb, z, z + long, 1.05))
    walkers = dice.choice((0, 1, 2, 3, 4, 6, 9))
    for _ in range(walkers):
        x, z = side.at(dice.uniform(side.kerb + 0.5, side.walk)), dice.uniform(7, 45)
        add(z, partial(people.person, canvas, dice, x, z))
    if dice.chance(0.4):
        z, motorised = dice.uniform(7, 22), dice.chance(0.35)
        for step in range(dice.integer(1, 3)):
            place = side.at(side.walk - 1.0)
            add(z + step, partial(people.two_wheeler, canvas, dice, place, z + step, motorised))
    if dice.chance(0.35):
        z = dice.uniform(8, 30)
        add(z, partial(furniture.rubbish_bin, canvas, dice, side.at(side.walk - 0.6), z))
    return things


def paint_bonnet(canvas: Canvas, dice: Dice) -> None:
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
