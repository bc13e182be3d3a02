"""A canvas in metres: a pinhole camera looks down a street and flat shapes are painted far to near.

The canvas holds one map of pigments. A pigment has a class, a colour and a roughness, so image
and label come from the same pixels: neither can be off by one. Pigments are even numbers; the
odd number after each is the same surface in shadow, and a shadow only sets the last bit.

x is metres to the right of the camera, y above the ground, z ahead of it.
"""

from collections.abc import Callable, Sequence
from math import ceil

import numpy as np
import numpy.typing as npt

from revseg.data.synthetic.dice import Colour, Dice

Point = tuple[float, float, float]
Floats = npt.NDArray[np.float32]
# From metres along a surface [w] and metres above the ground [h, w] or [h, 1] to pigments [h, w].
Pattern = Callable[[Floats, Floats], npt.NDArray[np.uint16]]

TONES = 4  # the shades of a leafy surface

SPECK = 4  # shapes whose box has no more pixels fill it: most shapes of a small image do


class Canvas:
    """Pigments [H, W] and the table that says what they are.

    Args:
        size: (H, W) in pixels.
        dice: Chooses the camera.
        grain: Makes the texture. What it gives depends on the size, so it is not asked for choices.
        haze: The colour that far things fade to.
        visibility: The distance in metres at which they have half faded.
    """

    def __init__(self, size: tuple[int, int], dice: Dice, grain: Dice, haze: Colour, visibility: float):
        self.height, self.width = size
        self.focal = 2.2 * self.height * dice.uniform(0.88, 1.12)
        self.eye = dice.uniform(1.25, 1.75)
        self.horizon = self.height * dice.uniform(0.40, 0.50)
        self.centre = self.width * dice.uniform(0.44, 0.56)
        self.nearest = self.focal * self.eye / (self.height - self.horizon)
        self.haze, self.visibility = haze, visibility
        self.pigments = np.zeros(size, dtype=np.uint16)
        self.labels: list[int] = []
        self.colours: list[Colour] = []
        self.roughness: list[int] = []
        self.texture = _fractal(self.height, self.width, grain)

    def pigment(self, label: int, colour: Colour, z: float = 0.0, roughness: int = 12) -> int:
        """A new pigment, hazy as at distance z; roughness is how much of the texture shows, 0 to 60."""
        clear = self.visibility / (self.visibility + z)
        hidden, haze = 1 - clear, self.haze
        r = int(colour[0] * clear + haze[0] * hidden)
        g = int(colour[1] * clear + haze[1] * hidden)
        b = int(colour[2] * clear + haze[2] * hidden)
        self.labels += (label, label)
        self.colours += ((r, g, b), (r * 52 // 100, g * 55 // 100, b * 62 // 100))
        self.roughness += (roughness, roughness)
        return len(self.labels) - 2

    def tones(self, label: int, colour: Colour, z: float, contrast: int) -> int:
        """The first of `TONES` pigments in a row, from dark to light."""
        first = len(self.labels)
        for tone in range(TONES):
            r, g, b = (max(0, min(255, c + contrast * (2 * tone - TONES + 1) // TONES)) for c in colour)
            self.pigment(label, (r, g, b), z, roughness=22)
        return first

    def project(self, point: Point) -> tuple[float, float]:
        """Column and row of a point ahead of the camera."""
        x, y, z = point
        return self.centre + self.focal * x / z, self.horizon + self.focal * (self.eye - y) / z

    def rows(self, top: float, bottom: float, pigment: int) -> None:
        """Paints whole rows of pixels, as shares of the height of the image."""
        self.pigments[ceil(top * self.height) : ceil(bottom * self.height)] = pigment

    def face(self, x0: float, x1: float, y0: float, y1: float, z: float, pigment: int) -> None:
        """Paints an upright rectangle that faces the camera."""
        left, bottom = self.project((x0, y0, z))
        right, top = self.project((x1, y1, z))
        rows, columns = self._window(left, right, top, bottom)
        self.pigments[rows, columns] = pigment

    def flat(self, x0: float, x1: float, z0: float, z1: float, pigment: int) -> None:
        """Paints a rectangle on the ground."""
        self.shape(_ground(x0, x1, max(z0, 0.9 * self.nearest), z1), pigment)

    def shadow(self, x0: float, x1: float, z0: float, z1: float) -> None:
        """Darkens a rectangle on the ground and whatever is painted there."""
        points = [self.project(point) for point in _ground(x0, x1, max(z0, 0.9 * self.nearest), z1)]
        if (filled := self._inside(points)) is not None:
            box, inside = filled
            np.bitwise_or(box, inside, out=box)

    def shape(self, points: Sequence[Point], pigment: int) -> None:
        """Paints a convex polygon."""
        if (filled := self._inside([self.project(point) for point in points])) is not None:
            box, inside = filled
            np.copyto(box, pigment, where=inside)

    def bar(self, start: Point, end: Point, thickness: float, pigment: int) -> None:
        """Paints a straight bar in the plane z of its start."""
        (u0, v0), (u1, v1) = self.project(start), self.project(end)
        du, dv = u1 - u0, v1 - v0
        half = 0.5 * thickness * self.focal / start[2]
        length = max(abs(du), abs(dv), 1e-6)
        du, dv = half * du / length, half * dv / length
        corners = [(u0 - dv, v0 + du), (u1 - dv, v1 + du), (u1 + dv, v1 - du), (u0 + dv, v0 - du)]
        if (filled := self._inside(corners)) is not None:
            box, inside = filled
            np.copyto(box, pigment, where=inside)

    def disc(self, x: float, y: float, z: float, radius: float, pigment: int) -> None:
        """Paints a disc that faces the camera."""
        self._ellipse(x, y, z, (radius, radius), pigment, leafy=False)

    def foliage(self, x: float, y: float, z: float, radii: tuple[float, float], tones: int) -> None:
        """Paints an ellipse with a ragged edge, in the tones that start at `tones`."""
        self._ellipse(x, y, z, radii, tones, leafy=True)

    def along(self, x: float, z0: float, z1: float, y0: float, y1: float, pattern: Pattern) -> None:
        """Paints an upright surface that runs away from the camera."""
        (near, _), (far, _) = self.project((x, 0, max(z0, 1.0))), self.project((x, 0, z1))
        _, columns = self._window(min(near, far), max(near, far), 0, 1)
        u = np.arange(columns.start, columns.stop, dtype=np.float32) + np.float32(0.5)
        if u.size:
            z = np.float32(self.focal * x) / (u - np.float32(self.centre))
            self._surface(columns, z - np.float32(z0), z, y0, y1, pattern)

    def across(self, x0: float, x1: float, z: float, y0: float, y1: float, pattern: Pattern) -> None:
        """Paints an upright surface that faces the camera."""
        (left, _), (right, _) = self.project((x0, 0, z)), self.project((x1, 0, z))
        _, columns = self._window(left, right, 0, 1)
        u = np.arange(columns.start, columns.stop, dtype=np.float32) + np.float32(0.5)
        if u.size:
            x = (u - np.float32(self.centre)) * np.float32(z / self.focal)
            self._surface(columns, x - np.float32(x0), np.full_like(u, z), y0, y1, pattern)

    def _surface(self, columns: slice, s: Floats, z: Floats, y0: float, y1: float, pattern: Pattern) -> None:
        """Paints upright columns of pixels: s metres along the surface and z metres away [w]."""
        scale = np.float32(self.focal) / z
        tops = np.float32(self.horizon) - np.float32(y1 - self.eye) * scale
        bottoms = np.float32(self.horizon) - np.float32(y0 - self.eye) * scale
        rows, _ = self._window(0, 1, float(tops.min()), float(bottoms.max()))
        if rows.start >= rows.stop:
            return
        v = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] + np.float32(0.5)
        y = np.float32(self.eye) - (v - np.float32(self.horizon)) / scale
        inside = (v >= tops) & (v < bottoms)
        np.copyto(self.pigments[rows, columns], pattern(s, y), where=inside)

    def _ellipse(
        self, x: float, y: float, z: float, radii: tuple[float, float], pigment: int, leafy: bool
    ) -> None:
        u, v = self.project((x, y, z))
        a, b = (max(radius * self.focal / z, 0.1) for radius in radii)
        rows, columns = self._window(u - a, u + a, v - b, v + b)
        if rows.start >= rows.stop or columns.start >= columns.stop:
            return
        box = self.pigments[rows, columns]
        if box.size <= SPECK:
            box[:] = pigment
            return
        dx = (np.arange(columns.start, columns.stop, dtype=np.float32) + np.float32(0.5 - u)) / np.float32(a)
        dy = (np.arange(rows.start, rows.stop, dtype=np.float32) + np.float32(0.5 - v)) / np.float32(b)
        distance = dx * dx + (dy * dy)[:, None]
        if leafy:
            texture = self.texture[rows, columns]
            inside = distance + texture.astype(np.float32) * np.float32(1 / 160) < np.float32(1.45)
            # light from above: the upper half takes lighter tones
            light = texture.astype(np.int16) - (dy * 48).astype(np.int16)[:, None]
            tone = np.minimum(np.maximum(light >> 6, 0), TONES - 1)
            np.copyto(box, tone.astype(np.uint16) * np.uint16(2) + np.uint16(pigment), where=inside)
        else:
            np.copyto(box, pigment, where=distance < 1)

    def _window(self, left: float, right: float, top: float, bottom: float) -> tuple[slice, slice]:
        """The rows and columns whose pixel centres lie inside."""
        height, width = self.height, self.width
        return (
            slice(_pixel(top, height), _pixel(bottom, height)),
            slice(_pixel(left, width), _pixel(right, width)),
        )

    def _inside(
        self, points: list[tuple[float, float]]
    ) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.bool_] | np.bool_] | None:
        """The bounding box of a convex polygon on the canvas, and which of its pixels are inside."""
        us, vs = [point[0] for point in points], [point[1] for point in points]
        rows, columns = self._window(min(us), max(us), min(vs), max(vs))
        if rows.start >= rows.stop or columns.start >= columns.stop:
            return None
        box = self.pigments[rows, columns]
        if box.size <= SPECK:
            return box, np.True_
        v = np.arange(rows.start, rows.stop) + 0.5
        left, right = np.full(v.size, np.inf), np.full(v.size, -np.inf)
        for (ua, va), (ub, vb) in zip(points, points[1:] + points[:1], strict=True):
            if va == vb:
                continue
            start = _pixel(min(va, vb), self.height) - rows.start
            stop = _pixel(max(va, vb), self.height) - rows.start
            u = ua + (v[start:stop] - va) * ((ub - ua) / (vb - va))
            np.minimum(left[start:stop], u, out=left[start:stop])
            np.maximum(right[start:stop], u, out=right[start:stop])
        x = np.arange(columns.start, columns.stop) + 0.5
        return box, (x >= left[:, None]) & (x < right[:, None])


def _pixel(position: float, size: int) -> int:
    """The first pixel whose centre is not before the position, inside [0, size]."""
    if position <= 0.5:
        return 0
    return ceil(position - 0.5) if position < size else size


def _ground(x0: float, x1: float, z0: float, z1: float) -> list[Point]:
    z1 = max(z0, z1)
    return [(x0, 0, z0), (x1, 0, z0), (x1, 0, z1), (x0, 0, z1)]


def _fractal(height: int, width: int, grain: Dice) -> npt.NDArray[np.uint8]:
    """Noise with patches of every size [height, width]: a coarse grid, doubled again and again."""
    step = 64
    grid = grain.noise(height // step + 3, width // step + 3).astype(np.int16)
    while step > 1:
        step //= 2
        grid = _doubled(_doubled(grid).T).T
        detail = grain.noise(*grid.shape)
        grid = grid + ((detail.astype(np.int16) - 128) >> 2)
    grid = 128 + ((grid - 128) * 3 >> 2)
    return np.clip(grid, 0, 255).astype(np.uint8)[:height, :width]


def _doubled(grid: npt.NDArray[np.int16]) -> npt.NDArray[np.int16]:
    """Twice the rows (less one): between two rows their mean."""
    out = np.empty((2 * grid.shape[0] - 1, grid.shape[1]), dtype=np.int16)
    out[::2] = grid
    out[1::2] = (grid[1:] + grid[:-1]) >> 1
    return out
