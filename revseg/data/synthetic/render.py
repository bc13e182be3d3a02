"""From pigments to the image a camera would give: light, texture, lens, noise and tone curve.

All arithmetic is on integers, so that the bytes are the same everywhere.
"""

import numpy as np
import numpy.typing as npt

from revseg.data.synthetic.canvas import Canvas
from revseg.data.synthetic.dice import Dice

Bytes = npt.NDArray[np.uint8]


def label_map(canvas: Canvas) -> Bytes:
    """The class ids of a painted canvas [H, W]."""
    return np.array(canvas.labels, dtype=np.uint8)[canvas.pigments]


def image(canvas: Canvas, dice: Dice, grain: Dice) -> Bytes:
    """The picture of a painted canvas [3, H, W]."""
    light = _light(canvas, dice)
    colours = np.array(canvas.colours, dtype=np.uint8)
    noise = grain.noise(canvas.height + 3, canvas.width + 3)
    strength = dice.integer(4, 5)
    curves = _tone_curves(dice)
    out = np.empty((3, canvas.height, canvas.width), dtype=np.uint8)
    for channel in range(3):
        lit = colours[:, channel][canvas.pigments].astype(np.uint16)
        lit *= light
        lit >>= 7
        np.minimum(lit, 255, out=lit)
        lit = _blurred(lit)
        # the noise of the three channels are three shifts of one field
        rows, columns = slice(channel, channel + canvas.height), slice(channel, channel + canvas.width)
        lit += noise[rows, columns] >> strength
        out[channel] = curves[channel][lit]
    return out


def _light(canvas: Canvas, dice: Dice) -> npt.NDArray[np.uint16]:
    """Brightness [H, W] with 128 for 1: a slope of the sun's light, and the texture of each surface."""
    across, down = dice.integer(-14, 14), dice.integer(-8, 8)
    x = np.arange(canvas.width) * across // canvas.width - across // 2
    y = np.arange(canvas.height) * down // canvas.height - down // 2
    roughness = np.array(canvas.roughness, dtype=np.int16)[canvas.pigments]
    light = canvas.texture.astype(np.int16)
    light -= 128
    light *= roughness
    light >>= 6
    light += (128 + x).astype(np.int16)
    light += y.astype(np.int16)[:, None]
    np.clip(light, 30, 250, out=light)
    return light.astype(np.uint16)


def _blurred(pixels: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16]:
    """The lens: weights 1, 2, 1 along both axes softens the steps at the edges of shapes."""
    for axis in (pixels, pixels.T):
        middle = axis[1:-1] << 1
        middle += axis[:-2]
        middle += axis[2:]
        middle += 2
        middle >>= 2
        axis[1:-1] = middle
    return pixels


def _tone_curves(dice: Dice) -> list[Bytes]:
    """For each channel the byte of each brightness in [0, 288): exposure, gamma, white balance.

    The gamma curve is x (1 + k) / (1 + k x), which needs no power function.
    """
    k = dice.uniform(-0.35, 0.45)
    black = 8
    curves = []
    for _ in range(3):
        white = dice.uniform(230, 262)
        x = np.clip((np.arange(288) - black) / white, 0, 1)
        curves.append((255 * x * (1 + k) / (1 + k * x)).astype(np.uint8))
    return curves
