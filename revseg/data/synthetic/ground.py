"""What is flat or far: the sky, the strips of the ground, the lines on the road, the shadows of houses."""

from itertools import pairwise

from revseg.data.classes import CITYSCAPES
from revseg.data.synthetic.canvas import Canvas
from revseg.data.synthetic.city import City
from revseg.data.synthetic.dice import Colour, Dice
from revseg.data.synthetic.plan import Street

ROAD, SIDEWALK = CITYSCAPES.names.index("road"), CITYSCAPES.names.index("sidewalk")
TERRAIN, SKY = CITYSCAPES.names.index("terrain"), CITYSCAPES.names.index("sky")

FAR = 400.0  # metres to where the ground meets the sky


def paint_sky(canvas: Canvas, dice: Dice, city: City) -> None:
    """Paints the sky from the top to just below the horizon, sometimes with clouds."""
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


def paint_ground(canvas: Canvas, dice: Dice, city: City, street: Street) -> None:
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


def paint_building_shadows(canvas: Canvas, dice: Dice, street: Street) -> None:
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


def _paint_slabs(canvas: Canvas, city: City, street: Street) -> None:
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


def _paint_patches(canvas: Canvas, dice: Dice, city: City, street: Street) -> None:
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


def _paint_lines(canvas: Canvas, dice: Dice, city: City, street: Street) -> None:
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
