"""People, and the two-wheelers they ride or leave at the kerb."""

from revseg.data.classes import CITYSCAPES
from revseg.data.synthetic.canvas import Canvas
from revseg.data.synthetic.dice import Colour, Dice

PERSON, RIDER = CITYSCAPES.names.index("person"), CITYSCAPES.names.index("rider")
MOTORCYCLE, BICYCLE = CITYSCAPES.names.index("motorcycle"), CITYSCAPES.names.index("bicycle")

CLOTHES: tuple[Colour, ...] = (
    (38, 42, 58), (70, 66, 64), (150, 40, 44), (60, 92, 140), (196, 190, 176), (88, 104, 70), (170, 140, 90),
)  # fmt: skip
SKIN: tuple[Colour, ...] = ((214, 172, 146), (168, 120, 92), (110, 78, 60))


def person(canvas: Canvas, dice: Dice, x: float, z: float, label: int = PERSON, lift: float = 0.0) -> None:
    """Paints someone who stands or walks; `lift` metres above the ground."""
    h = dice.uniform(1.5, 1.9) * (0.72 if lift == 0 and dice.chance(0.1) else 1.0)
    trousers = canvas.pigment(label, dice.tint(dice.choice(CLOTHES[:4]), 16), z)
    jacket = canvas.pigment(label, dice.tint(dice.choice(CLOTHES), 24), z)
    skin = canvas.pigment(label, dice.tint(dice.choice(SKIN), 12), z)
    hair = canvas.pigment(label, dice.tint((60, 46, 36), 24), z)
    stride = dice.uniform(0.02, 0.22)
    if lift == 0:
        canvas.shadow(x - 0.3, x + 0.45, z - 0.1, z + 0.35)
    for side in (-1, 1):
        hip, foot = x + side * 0.08, x + side * (0.09 + stride)
        canvas.shape(_limb(hip, 0.50 * h + lift, foot, lift, z, 0.09), trousers)
    canvas.shape(
        [
            (x - 0.22, 0.83 * h + lift, z),
            (x + 0.22, 0.83 * h + lift, z),
            (x + 0.18, 0.46 * h + lift, z),
            (x - 0.18, 0.46 * h + lift, z),
        ],
        jacket,
    )
    for side in (-1, 1):
        canvas.shape(
            _limb(x + side * 0.23, 0.82 * h + lift, x + side * 0.28, 0.48 * h + lift, z, 0.055), jacket
        )
    canvas.face(x - 0.05, x + 0.05, 0.82 * h + lift, 0.88 * h + lift, z, skin)
    canvas.disc(x, 0.925 * h + lift, z, 0.068 * h, hair)
    canvas.disc(x, 0.905 * h + lift, z, 0.058 * h, skin)


def rider(canvas: Canvas, dice: Dice, x: float, z: float, motorised: bool) -> None:
    """Paints someone on a bicycle or a motorcycle, seen from ahead or behind, or from the side."""
    if dice.chance(0.5):
        _two_wheeler_along(canvas, dice, x, z, motorised)
        person(canvas, dice, x, z - 0.05, RIDER, lift=0.35 if motorised else 0.28)
        return
    facing = dice.choice((-1, 1))
    two_wheeler(canvas, dice, x, z, motorised, facing)
    trousers = canvas.pigment(RIDER, dice.tint(dice.choice(CLOTHES[:4]), 16), z)
    jacket = canvas.pigment(RIDER, dice.tint(dice.choice(CLOTHES), 24), z)
    skin = canvas.pigment(RIDER, dice.tint(dice.choice(SKIN), 12), z)
    helmet = canvas.pigment(RIDER, dice.tint(dice.choice(CLOTHES), 30), z)
    seat, shoulder = x - facing * 0.2, x + facing * 0.12
    for reach in (0.05, 0.22):
        knee = seat + facing * (reach + 0.15)
        canvas.shape(_limb(seat, 0.98, knee, 0.66, z, 0.09), trousers)
        canvas.shape(_limb(knee, 0.66, seat + facing * reach, 0.28, z, 0.07), trousers)
    canvas.shape(_limb(seat, 0.88, shoulder, 1.48, z, 0.17), jacket)
    canvas.shape(_limb(shoulder, 1.42, x + facing * 0.46, 1.08, z, 0.06), jacket)
    canvas.disc(shoulder + facing * 0.06, 1.64, z, 0.12, skin)
    canvas.disc(shoulder + facing * 0.05, 1.68, z, 0.115, helmet)


def two_wheeler(canvas: Canvas, dice: Dice, x: float, z: float, motorised: bool, facing: int = 1) -> None:
    """Paints a bicycle or a motorcycle from the side."""
    label = MOTORCYCLE if motorised else BICYCLE
    tyre = canvas.pigment(label, dice.tint((34, 34, 36), 10), z)
    frame = canvas.pigment(label, dice.tint(dice.choice(CLOTHES), 30), z)
    metal = canvas.pigment(label, dice.tint((122, 122, 124), 24), z)
    radius, reach = (0.31, 0.66) if motorised else (0.34, 0.53)
    canvas.shadow(x - 1.0, x + 1.0, z - 0.1, z + 0.3)
    for side in (-1, 1):
        canvas.disc(x + side * reach, radius, z, radius, tyre)
        canvas.disc(x + side * reach, radius, z, radius * (0.55 if motorised else 0.82), metal)
    if motorised:
        canvas.shape(_outline(x, z, facing, (-0.75, 0.78), (-0.1, 0.86), (-0.05, 0.34), (-0.5, 0.4)), tyre)
        canvas.shape(_outline(x, z, facing, (-0.1, 0.95), (0.42, 0.92), (0.35, 0.4), (-0.2, 0.36)), frame)
        canvas.bar((x + facing * 0.62, 0.3, z), (x + facing * 0.38, 1.05, z), 0.1, metal)
        canvas.disc(x + facing * 0.48, 0.86, z, 0.1, metal)
        return
    ends = {"rear": (-0.53, 0.34), "seat": (-0.2, 0.86), "pedal": (-0.08, 0.32), "head": (0.4, 0.88)}
    at = {name: (x + facing * s, y, z) for name, (s, y) in ends.items()}
    front = (x + facing * 0.53, 0.34, z)
    pairs = (("rear", "seat"), ("rear", "pedal"), ("pedal", "seat"), ("pedal", "head"), ("seat", "head"))
    for start, end in pairs:
        canvas.bar(at[start], at[end], 0.05, frame)
    canvas.bar(front, at["head"], 0.05, frame)
    canvas.bar((x + facing * 0.34, 1.0, z), (x + facing * 0.5, 0.98, z), 0.06, tyre)
    canvas.bar((x - facing * 0.32, 0.9, z), (x - facing * 0.1, 0.9, z), 0.08, tyre)


def _two_wheeler_along(canvas: Canvas, dice: Dice, x: float, z: float, motorised: bool) -> None:
    """Paints a bicycle or a motorcycle from ahead or behind."""
    label = MOTORCYCLE if motorised else BICYCLE
    tyre = canvas.pigment(label, dice.tint((36, 36, 38), 10), z)
    frame = canvas.pigment(label, dice.tint(dice.choice(CLOTHES), 30), z)
    lamp = canvas.pigment(label, dice.choice(((240, 236, 220), (190, 30, 30))), z, roughness=0)
    half = 0.09 if motorised else 0.035
    canvas.shadow(x - 0.35, x + 0.45, z - 0.1, z + 1.2)
    canvas.face(x - half, x + half, 0.0, 0.68, z, tyre)
    canvas.face(x - 2.4 * half, x + 2.4 * half, 0.42, 0.9, z, frame)
    canvas.face(x - 0.32, x + 0.32, 0.98, 1.05, z, tyre)
    canvas.disc(x, 0.8, z, 0.09 if motorised else 0.05, lamp)


def _limb(
    x0: float, y0: float, x1: float, y1: float, z: float, half: float
) -> list[tuple[float, float, float]]:
    return [(x0 - half, y0, z), (x0 + half, y0, z), (x1 + half, y1, z), (x1 - half, y1, z)]


def _outline(
    x: float, z: float, facing: int, *corners: tuple[float, float]
) -> list[tuple[float, float, float]]:
    return [(x + facing * s, y, z) for s, y in corners]
