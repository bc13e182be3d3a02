"""What stands along a street: trees, lamps, traffic lights, signs and bins."""

from revseg.data.classes import CITYSCAPES
from revseg.data.synthetic.canvas import Canvas, Point
from revseg.data.synthetic.dice import Colour, Dice

POLE, VEGETATION = CITYSCAPES.names.index("pole"), CITYSCAPES.names.index("vegetation")
LIGHT, SIGN = CITYSCAPES.names.index("traffic light"), CITYSCAPES.names.index("traffic sign")

METAL: Colour = (104, 106, 106)
LAMPS: tuple[Colour, ...] = ((236, 44, 32), (246, 180, 40), (40, 214, 120))
PLATES: tuple[Colour, ...] = ((28, 78, 160), (232, 190, 40), (206, 40, 42), (236, 236, 230), (24, 110, 70))


def tree(canvas: Canvas, dice: Dice, x: float, z: float, leaves: Colour, tall: float) -> None:
    """Paints a trunk and a crown of a few ragged balls."""
    trunk = canvas.pigment(VEGETATION, dice.tint((82, 70, 58), 16), z, roughness=40)
    thick = dice.uniform(0.1, 0.2)
    crown = dice.uniform(0.28, 0.4) * tall
    canvas.shadow(x - crown, x + crown, z - 0.3 * crown, z + 0.6 * crown)
    canvas.shape(
        [
            (x - thick, 0, z),
            (x + thick, 0, z),
            (x + 0.6 * thick, 0.6 * tall, z),
            (x - 0.6 * thick, 0.6 * tall, z),
        ],
        trunk,
    )
    tones = canvas.tones(VEGETATION, dice.tint(leaves, 16), z, contrast=64)
    for _ in range(dice.integer(4, 6)):
        across, up = dice.uniform(-0.6, 0.6) * crown, dice.uniform(-0.35, 0.5) * crown
        radius = dice.uniform(0.55, 0.85) * crown
        canvas.foliage(x + across, 0.66 * tall + up, z, (radius, 0.85 * radius), tones)


def bush(canvas: Canvas, dice: Dice, x: float, z: float, leaves: Colour, radius: float) -> None:
    """Paints leaves without a trunk."""
    tones = canvas.tones(VEGETATION, dice.tint(leaves, 18), z, contrast=56)
    canvas.foliage(x, 0.55 * radius, z, (radius, 0.8 * radius), tones)


def street_lamp(canvas: Canvas, dice: Dice, x: float, z: float, towards: int) -> None:
    """Paints a lamp post with an arm over the road."""
    metal = canvas.pigment(POLE, dice.tint(METAL, 24), z)
    tall = dice.uniform(6.0, 9.0)
    canvas.face(x - 0.08, x + 0.08, 0, tall, z, metal)
    canvas.bar((x, tall, z), (x + towards * 1.6, tall + 0.25, z), 0.09, metal)
    canvas.face(x + towards * 1.6 - 0.35, x + towards * 1.6 + 0.35, tall + 0.15, tall + 0.32, z, metal)


def bollard(canvas: Canvas, dice: Dice, x: float, z: float) -> None:
    """Paints a post at the kerb."""
    metal = canvas.pigment(POLE, dice.tint(dice.choice((METAL, (52, 52, 54), (180, 176, 170))), 16), z)
    canvas.face(x - 0.06, x + 0.06, 0, dice.uniform(0.8, 1.1), z, metal)


def traffic_light(canvas: Canvas, dice: Dice, x: float, z: float, towards: int) -> None:
    """Paints a post with a signal head, sometimes with a second one on an arm over the road."""
    metal = canvas.pigment(POLE, dice.tint(METAL, 24), z)
    lit = dice.integer(0, 2)
    canvas.face(x - 0.07, x + 0.07, 0, 3.0, z, metal)
    signal(canvas, dice, x + towards * 0.05, 2.2, z, lit)
    if dice.chance(0.5):
        reach = dice.uniform(2.5, 4.5)
        canvas.face(x - 0.09, x + 0.09, 0, 5.6, z, metal)
        canvas.bar((x, 5.4, z), (x + towards * reach, 5.6, z), 0.12, metal)
        signal(canvas, dice, x + towards * reach, 5.0, z, lit)


def signal(canvas: Canvas, dice: Dice, x: float, y: float, z: float, lit: int) -> None:
    """Paints a signal head: a dark case with three lamps, of which one is lit."""
    case = canvas.pigment(LIGHT, dice.tint((30, 32, 30), 10), z, roughness=6)
    canvas.face(x - 0.19, x + 0.19, y, y + 1.05, z, case)
    for place, colour in enumerate(LAMPS):
        dim = (colour[0] // 5, colour[1] // 5, colour[2] // 5)
        lamp = canvas.pigment(LIGHT, colour if place == lit else dim, z, roughness=0)
        canvas.disc(x, y + 0.86 - 0.33 * place, z, 0.13, lamp)


def sign(canvas: Canvas, dice: Dice, x: float, z: float) -> None:
    """Paints one or two plates on a post."""
    metal = canvas.pigment(POLE, dice.tint(METAL, 24), z)
    y = dice.uniform(2.2, 2.9)
    canvas.face(x - 0.04, x + 0.04, 0, y + 0.4, z, metal)
    for _ in range(dice.choice((1, 1, 1, 2))):
        plate(canvas, dice, x, y, z - 0.05)
        y -= 0.75


def plate(canvas: Canvas, dice: Dice, x: float, y: float, z: float) -> None:
    """Paints a traffic sign without its post."""
    board = canvas.pigment(SIGN, dice.tint(dice.choice(PLATES), 14), z, roughness=4)
    white = canvas.pigment(SIGN, dice.tint((234, 234, 228), 8), z, roughness=4)
    black = canvas.pigment(SIGN, (24, 24, 26), z, roughness=4)
    r = dice.uniform(0.3, 0.42)
    kind = dice.integer(0, 3)
    if kind == 0:  # a ban: a ring
        canvas.disc(x, y, z, r, canvas.pigment(SIGN, dice.tint((200, 34, 38), 14), z, roughness=4))
        canvas.disc(x, y, z, 0.72 * r, white)
        canvas.face(x - 0.3 * r, x + 0.3 * r, y - 0.25 * r, y + 0.25 * r, z, black)
    elif kind == 1:  # a warning: a triangle
        red = canvas.pigment(SIGN, dice.tint((204, 36, 38), 14), z, roughness=4)
        for size, pigment in ((r, red), (0.62 * r, white)):
            corners: list[Point] = [
                (x, y + 1.1 * size, z), (x + size, y - 0.7 * size, z), (x - size, y - 0.7 * size, z)
            ]  # fmt: skip
            canvas.shape(corners, pigment)
    elif kind == 2:  # priority: a diamond
        for size, pigment in ((1.15 * r, white), (0.85 * r, board)):
            diamond: list[Point] = [(x, y + size, z), (x + size, y, z), (x, y - size, z), (x - size, y, z)]
            canvas.shape(diamond, pigment)
    else:  # directions: a board
        wide = dice.uniform(1.0, 2.2) * r
        canvas.face(x - wide, x + wide, y - 0.8 * r, y + 0.8 * r, z, board)
        for line in (-0.3, 0.25):
            canvas.face(x - 0.75 * wide, x + 0.6 * wide, y + line * r, y + (line + 0.2) * r, z, white)


def rubbish_bin(canvas: Canvas, dice: Dice, x: float, z: float) -> None:
    """Paints a bin or a box, which has no class."""
    colour = dice.tint(dice.choice(((60, 84, 60), (74, 74, 78), (150, 120, 40))), 16)
    pigment = canvas.pigment(CITYSCAPES.ignore, colour, z)
    half, tall = dice.uniform(0.25, 0.6), dice.uniform(0.8, 1.4)
    canvas.shadow(x - half, x + half + 0.2, z - 0.1, z + 0.5)
    canvas.face(x - half, x + half, 0, tall, z, pigment)
    lid = canvas.pigment(CITYSCAPES.ignore, (colour[0] // 2, colour[1] // 2, colour[2] // 2), z)
    canvas.face(x - 1.08 * half, x + 1.08 * half, 0.9 * tall, tall, z, lid)
