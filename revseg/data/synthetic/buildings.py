"""Upright surfaces along a street: houses, garden walls and fences.

A surface is drawn from a pattern, a function from metres along it and metres above the ground
to pigments, so that windows get smaller with distance as they should.
"""

import numpy as np
import numpy.typing as npt

from revseg.data.classes import CITYSCAPES
from revseg.data.synthetic.canvas import Canvas, Floats, Pattern
from revseg.data.synthetic.city import City
from revseg.data.synthetic.dice import Colour, Dice

BUILDING = CITYSCAPES.names.index("building")
WALL, FENCE = CITYSCAPES.names.index("wall"), CITYSCAPES.names.index("fence")

POSTERS: tuple[Colour, ...] = ((200, 44, 46), (40, 84, 160), (232, 196, 60), (60, 130, 90), (230, 228, 220))


def house(canvas: Canvas, dice: Dice, city: City, x: float, z0: float, z1: float, outwards: int) -> None:
    """Paints a house whose front runs along the street at x; `outwards` is the side of the street."""
    storey = dice.uniform(2.9, 3.7)
    tall = dice.integer(2, 6) * storey + dice.uniform(0.2, 1.2)
    colour = dice.tint(dice.choice(city.facades), 16)
    front = _facade(canvas, dice, colour, z0, storey, tall)
    dimmed = (colour[0] * 3 // 4, colour[1] * 3 // 4, colour[2] * 3 // 4)
    gable = _facade(canvas, dice, dimmed, z0, storey, tall)
    roof = canvas.pigment(BUILDING, dice.tint(dice.choice(city.roofs), 12), z0, roughness=24)
    if dice.chance(0.55):
        rise, back = dice.uniform(1.5, 4.0), x + outwards * 5.0
        canvas.shape([(x, tall, z0), (x, tall, z1), (back, tall + rise, z1), (back, tall + rise, z0)], roof)
        canvas.shape([(x, tall, z0), (back, tall + rise, z0), (x + outwards * 10, tall, z0)], roof)
    far_end = x + outwards * 14.0
    canvas.across(min(x, far_end), max(x, far_end), z0, 0, tall, gable)
    canvas.along(x, z0, z1, 0, tall, front)
    if dice.chance(0.5):
        awning = canvas.pigment(BUILDING, dice.tint(dice.choice(POSTERS), 26), z0)
        out = x - outwards * dice.uniform(0.7, 1.3)
        s0, s1 = z0 + 0.1 * (z1 - z0), z0 + dice.uniform(0.4, 0.9) * (z1 - z0)
        canvas.shape([(x, 3.1, s0), (x, 3.1, s1), (out, 2.6, s1), (out, 2.6, s0)], awning)


def garden_wall(canvas: Canvas, dice: Dice, city: City, x: float, z0: float, z1: float, tall: float) -> None:
    """Paints a wall along the street."""
    colour = dice.tint(dice.choice(city.walls), 14)
    canvas.along(x, z0, z1, 0, tall, _masonry(canvas, dice, colour, z0, tall))


def fence(canvas: Canvas, dice: Dice, city: City, x: float, z0: float, z1: float, tall: float) -> None:
    """Paints a fence along the street: boards close together, or bars with a view between them."""
    colour = dice.tint(dice.choice(city.fences), 16)
    light = canvas.pigment(FENCE, colour, z0, roughness=18)
    dark = canvas.pigment(FENCE, (colour[0] * 2 // 3, colour[1] * 2 // 3, colour[2] * 2 // 3), z0)
    if dice.chance(0.6):
        pitch = dice.uniform(0.14, 0.4)

        def boards(s: Floats, y: Floats) -> npt.NDArray[np.uint16]:
            gap = _share(s, pitch) < 0.3
            rail = np.abs(y - np.float32(0.8 * tall)) < 0.06
            return np.where(gap & ~rail, dark, light).astype(np.uint16)

        canvas.along(x, z0, z1, 0.05, tall, boards)
        return
    post = z0
    while post < z1:
        canvas.along(x, post, post + 0.16, 0, tall, _plain(light))
        post += 1.1
    for y in (0.35, 0.65, 0.97):
        canvas.along(x, z0, z1, y * tall - 0.11, y * tall, _plain(light if y > 0.9 else dark))


def skyline(canvas: Canvas, dice: Dice, city: City, z: float) -> None:
    """Paints the houses that close the view at distance z, and those far behind them."""
    for distance, half in ((3 * z, 1.4 * z), (z, 0.6 * z)):
        x = -half
        while x < half:
            wide = dice.uniform(12, 30)
            open_view = distance == z and abs(x + wide / 2) < 9 and dice.chance(0.6)
            if not open_view:
                storey = dice.uniform(3.0, 3.6)
                tall = dice.integer(2, 5) * storey + 0.5
                pattern = _facade(
                    canvas, dice, dice.tint(dice.choice(city.facades), 14), distance, storey, tall
                )
                canvas.across(x, x + wide, distance, 0, tall, pattern)
            x += wide


def _facade(canvas: Canvas, dice: Dice, colour: Colour, z: float, storey: float, tall: float) -> Pattern:
    """Storeys with windows, a cornice over each, and shops or doors at the bottom."""
    plaster = canvas.pigment(BUILDING, colour, z, roughness=20)
    ledge = canvas.pigment(BUILDING, (colour[0] * 7 // 8, colour[1] * 7 // 8, colour[2] * 7 // 8), z)
    base = canvas.pigment(
        BUILDING, dice.tint((colour[0] * 3 // 4, colour[1] * 3 // 4, colour[2] * 3 // 4), 14), z
    )
    bright = (min(255, colour[0] + 40), min(255, colour[1] + 40), min(255, colour[2] + 40))
    frame = canvas.pigment(BUILDING, bright, z)
    glass = [canvas.pigment(BUILDING, dice.tint((58, 66, 76), 24), z, roughness=24) for _ in range(3)]
    poster = canvas.pigment(BUILDING, dice.tint(dice.choice(POSTERS), 24), z)
    panes = np.array([*glass, glass[0], poster], dtype=np.uint16)
    pitch, wide = dice.uniform(1.8, 3.4), dice.uniform(0.4, 0.66)
    low, high = dice.uniform(0.22, 0.34), dice.uniform(0.72, 0.86)
    shop, salt = dice.chance(0.5), dice.integer(0, 4)

    def pattern(s: Floats, y: Floats) -> npt.NDArray[np.uint16]:
        along, up = _share(s, pitch), y * np.float32(1 / storey)
        floor = np.floor(up)
        up = up - floor
        bay = np.floor(s * np.float32(1 / pitch)).astype(np.int16)
        across = np.abs(along - np.float32(0.5)) < np.float32(0.5 * wide)
        border = np.abs(along - np.float32(0.5)) < np.float32(0.5 * wide + 0.05)
        level = floor.astype(np.int16)
        ground, top = level == 0, y > np.float32(tall - 0.35)
        open_ = (up > np.float32(low)) & (up < np.float32(high)) & ~ground & ~top
        rim = (up > np.float32(low - 0.05)) & (up < np.float32(high + 0.03)) & ~ground & ~top
        # shops have wide panes, other houses a door or a window in every bay
        door = ground & (up > np.float32(0.12 if shop else 0.02)) & (up < np.float32(0.74))
        wall = np.where(ground, base, np.where((up < np.float32(0.06)) | top, ledge, plaster))
        pane = panes[np.where(ground, (bay * 2 + salt) % 5, (bay * 7 + level * 11 + salt) % 4)]
        wall = np.where(rim & border, frame, wall)
        glazed = (open_ & across) | (door & ((along > np.float32(0.1)) if shop else across))
        return np.where(glazed, pane, wall).astype(np.uint16)

    return pattern


def _masonry(canvas: Canvas, dice: Dice, colour: Colour, z: float, tall: float) -> Pattern:
    """Courses of stones under a coping."""
    stones = [canvas.pigment(WALL, dice.tint(colour, 10), z, roughness=24) for _ in range(3)]
    dark = (colour[0] * 3 // 4, colour[1] * 3 // 4, colour[2] * 3 // 4)
    joint = canvas.pigment(WALL, dark, z)
    shades = np.array(stones, dtype=np.uint16)
    long, high = dice.uniform(0.6, 1.6), dice.uniform(0.25, 0.5)

    def pattern(s: Floats, y: Floats) -> npt.NDArray[np.uint16]:
        course = np.floor(y * np.float32(1 / high))
        shifted = s * np.float32(1 / long) + np.float32(0.5) * (course % 2)
        stone = np.floor(shifted)
        seam = (shifted - stone < np.float32(0.05)) | (y * np.float32(1 / high) - course < np.float32(0.1))
        seam = seam | (np.abs(y - np.float32(tall - 0.14)) < np.float32(0.03))
        which = (stone * 5 + course * 3).astype(np.int16) % 3
        return np.where(seam, joint, shades[which]).astype(np.uint16)

    return pattern


def _plain(pigment: int) -> Pattern:
    def pattern(s: Floats, y: Floats) -> npt.NDArray[np.uint16]:
        return np.full(np.broadcast_shapes(s.shape, y.shape), pigment, dtype=np.uint16)

    return pattern


def _share(s: Floats, pitch: float) -> Floats:
    """How far into a period of length pitch, in [0, 1)."""
    t: Floats = s * np.float32(1 / pitch)
    return np.subtract(t, np.floor(t))
