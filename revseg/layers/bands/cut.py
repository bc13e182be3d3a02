"""How a row of layers goes by bands: what is fixed about one run, and how its maps are cut."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from revseg import ops
from revseg.layers.bands.keeping import kept_maps
from revseg.layers.bands.rows import Images, InPlace, Kept, NotKept, Whole
from revseg.layers.bands.window import Window
from revseg.layers.layer_input import lowered
from revseg.layers.linear import LinearOp
from revseg.layers.norms import batch_statistics
from revseg.layers.stack_layer import Layer, go_together
from revseg.layers.stack_pass import Plan
from revseg.tensors import CHANNELS_LAST


@dataclass(frozen=True)
class Bands:
    """How much of a map exists at a time, and what may be kept whole.

    Args:
        bytes: Of one band in the backward pass, unless `part` asks for more. Each layer needs a few; smaller ones cost time,
            as every band is some calls.
        kept: Raw maps that the backward pass of a row keeps besides the one that it goes through: each spares runs of
            layers, and is a map of memory. A part of one is kept of a part of the images.

        part: A band is at least this part of the largest map: of one that is very wide many rows would be read for each.

    Raises:
        ValueError: If there is no room for a band, or `kept` is below 0.
    """

    bytes: int = 1 << 20
    kept: float = 0.75
    part: int = 64

    def __post_init__(self) -> None:
        if self.bytes < 1 or self.kept < 0 or self.part < 1:
            raise ValueError(
                "expected bytes and part of at least 1 and kept of at least 0, got "
                f"{self.bytes}, {self.part} and {self.kept}"
            )


# A band of the first run is so much larger where a map is whole in both: then there are fewer maps beside it.
FIRST_RUN = 4


class BandPlan(Plan):
    """What is fixed about one run of a row of layers by bands.

    Args:
        layers: All of ops with a window.
        x: The input.
        bands: How it is cut.
    """

    def __init__(self, layers: Sequence[Layer], x: Whole, bands: Bands) -> None:
        first = x.parts[0]
        super().__init__(layers, first)
        self.ops = [layer.op for layer in layers]
        self.bands = bands
        self.windows: list[Window] = [window for op in self.ops if (window := op.window()) is not None]
        self.shapes: list[Sequence[int]] = [x.shape]
        for i, op in enumerate(self.ops):
            self.shapes.append(op.shape(self.shapes[-1], self.of_op(i, self.parameters)))
        weights = self.of_op(0, self.parameters)
        self.dtype = weights[0].dtype if weights else lowered(first[:0], self.cast).dtype  # of raw maps
        # a CPU copies other layouts into this one
        self.layout = CHANNELS_LAST.get(first.ndim) if first.device.type == "cpu" else None
        self.by_image = any(layer.is_by_image() for layer in layers)
        self.images, self.times = slice(0, x.shape[0]), 1
        self._cut()

    def wider(self, times: int) -> BandPlan:
        """The same row in bands that are so much larger."""
        return self._with(self.images, times)

    def parts(self) -> list[BandPlan]:
        """What has statistics of its own: the batch, or each image, which goes through the row by itself then."""
        if not self.by_image:
            return [self]
        return [self._with(slice(i, i + 1), self.times) for i in range(self.images.stop)]

    def _with(self, images: Images, times: int) -> BandPlan:
        plan = copy.copy(self)
        plan.images, plan.times = images, times
        plan._cut()
        return plan

    def _cut(self) -> None:
        largest = max(map(self._bytes, range(1, len(self.shapes)))) * self._count()
        self.bytes = max(self.bands.bytes, largest // self.bands.part) * self.times
        self.groups = list(self._groups())

    def _count(self) -> int:
        return self.images.stop - self.images.start

    @staticmethod
    def takes(layers: Sequence[Layer], x: Tensor) -> bool:
        """Whether a row goes by bands: ops that are local, of maps of these dimensions."""
        return go_together(layers) and all(
            layer.op.dims == x.ndim - 2 and layer.op.window() is not None for layer in layers
        )

    def _groups(self) -> Iterator[Images]:
        """Images that go together: one, or as many as are small enough."""
        image = max(map(self._bytes, range(len(self.shapes))))
        step = max(1, self.bytes // max(1, image))
        for first in range(self.images.start, self.images.stop, step):
            yield slice(first, min(first + step, self.images.stop))

    def _row(self, j: int) -> int:
        """Bytes of a row of a map of one image."""
        _, channels, _, *across = self.shapes[j]
        return channels * math.prod(across) * self.dtype.itemsize

    def cuts(self, j: int) -> Iterator[tuple[int, int]]:
        """First and last row (excluded) of the bands of raw map j, 1 for the first; the input is 0."""
        height = self.shapes[j][2]
        images = self.groups[0].stop - self.groups[0].start
        row = max(self._row(j), self._row(j - 1) * self.windows[j - 1].step) * images
        rows = max(1, self.bytes // self.op(j).band_share // max(1, row))
        for first in range(0, height, rows):
            yield first, min(first + rows, height)

    def values(self, j: int) -> int:
        """Of each channel of map j."""
        return self._count() * math.prod(self.shapes[j][2:])

    def parameters_of(self, j: int, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Of the op that makes raw map j."""
        return self.of_op(j - 1, parameters)

    def norms(self, parameters: Sequence[Tensor]) -> list[ops.Norm]:
        """What follows each raw map, once statistics are found."""
        return [self.norm(i, parameters) for i in range(len(self.layers))]

    def op(self, j: int) -> LinearOp:
        return self.ops[j - 1]

    def is_linear(self, j: int) -> bool:
        """Whether nothing follows raw map j."""
        return self.layers[j - 1].is_linear()

    def kept(self) -> list[int]:
        """The raw maps that the way back keeps as they are first made, without the last one."""
        return [m for m in self._keeping()[0] if m < len(self.layers)]

    def needs_no_map(self, x: Whole) -> bool:
        """Whether neither raw map 1 nor its gradient is whole: of a layer and what makes scores of it, smaller by far.

        Rows of the one follow from the input, of the other from the gradient of the scores, as often as they are read. Where the
        gradient of the input would lie in that of map 1, there is nothing to spare.
        """
        if self.bands.kept or not gives_scores(self.layers):
            return False
        shares = len(x.parts) == 1 and tuple(x.parts[0].shape) == tuple(self.shapes[1])
        return not shares and 2 * self._bytes(2) <= self._bytes(1)

    def kept_by(self, j: int) -> list[int]:
        """Those that the pass for layer j keeps, of maps that are not larger than those before.

        The first one is not among them: the last pass has the gradient of the input beside it.
        """
        largest = max((self._bytes(m) for m in self.kept()), default=0)
        return [m for m in self._keeping()[j] if m > 1 and self._bytes(m) <= largest]

    def _keeping(self) -> tuple[tuple[int, ...], ...]:
        return kept_maps(len(self.layers), math.ceil(self.bands.kept))

    def _bytes(self, j: int) -> int:
        """Of a map of one image."""
        return self._row(j) * self.shapes[j][2]

    def of_images(self, images: Images, keep: Mapping[int, Kept]) -> dict[int, Kept]:
        """What is kept of a group: all, or the last raw map alone."""
        count = math.ceil(self.bands.kept)
        groups = max(1, round(len(self.groups) * self.bands.kept / count)) if count else 0
        among = images in self.groups[:groups]
        return {j: kept for j, kept in keep.items() if among or j == len(self.layers)}

    def kept_map(self, j: int) -> Kept:
        """Memory for raw map j; of the last one in one piece, if the gradients of those before fit into it.

        Where other raw maps are kept, the peak is while these are there, and pieces spare the band that is copied.
        """
        last = j == len(self.layers) and self.fits_in_place(j) and not self.bands.kept
        return InPlace((self._count(), *self.shapes[j][1:]), self.images.start) if last else Kept()

    def fits_in_place(self, j: int) -> bool:
        """Whether gradients of map j - 1 may be written over rows of map j that were read."""
        return tuple(self.shapes[j]) == tuple(self.shapes[j - 1]) and self.windows[j - 1].above >= 0

    def lies_ahead(self) -> bool:
        """Whether rows of the gradient of map 1 were all read when those of the input's gradient in their places are written."""
        return tuple(self.shapes[1][2:]) == tuple(self.shapes[0][2:]) and self.windows[0].above >= 0

    def map_of_gradient(self, j: int, there: Kept | None) -> Kept:
        """Memory for the gradient of map j - 1: what is there, if it fits; else in one piece, if the next one fits into that."""
        if isinstance(there, NotKept):
            return there if j == len(self.layers) else Kept()
        if isinstance(there, InPlace) and (self.fits_in_place(j) or (j == 1 and self.lies_ahead())):
            return there
        alone = j == len(self.layers) > 1 and self.is_linear(j) and not self.bands.kept
        if alone and (self.fits_in_place(j - 1) or (j == 2 and self.lies_ahead())):
            return InPlace((self._count(), *self.shapes[j - 1][1:]), self.images.start)
        return Kept()

    def lies_over(self, x: Sequence[Tensor], dz: Sequence[Tensor]) -> bool:
        """Whether the gradient of the input of the one layer may lie where that of its output does.

        Rows of the one are written when those of the other that lie there were read: as many bytes, row by row.
        """
        alone = len(self.layers) == 1 and not self.is_linear(1)
        return alone and len(x) == len(dz) and all(map(self._lies_over, x, dz))

    def _lies_over(self, x: Tensor, dz: Tensor) -> bool:
        window, layout = self.windows[0], CHANNELS_LAST.get(x.ndim)
        if layout is None or window.above < 0 or x.shape[2] != dz.shape[2] * window.step:
            return False
        dense = all(each.is_contiguous(memory_format=layout) for each in (x, dz))
        return dense and (len(x), x.nbytes, x.dtype) == (len(dz), dz.nbytes, dz.dtype)

    def kept_last(self) -> list[int]:
        """The last raw map, which the gradient of the one before then takes the place of, band by band."""
        return [len(self.layers)] if len(self.layers) > 1 else []


def gives_scores(layers: Sequence[Layer]) -> bool:
    """Whether these are a layer and a classifier, of which rows of the gradient of its input follow from rows of its own."""
    if len(layers) != 2 or not layers[1].is_linear():
        return False
    op = layers[1].op
    window = op.window()
    return window is not None and window.step == 1 and not op.input_gradient_reads_input


def statistics_of(parts: Sequence[tuple[Tensor, Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] from those of bands and the values of each channel in them."""
    mean, var = (torch.stack([part[k] for part in parts]) for k in (0, 1))  # type: ignore[misc]
    counts = mean.new_tensor([part[2] for part in parts])[:, None]
    total = counts.sum()
    middle = (mean * counts).sum(0) / total
    return middle, ((var + (mean - middle).square()) * counts).sum(0) / total


def of_band(u: Tensor) -> tuple[Tensor, Tensor, int]:
    """What `statistics_of` takes of a band [n, C, rows, ...]."""
    return *batch_statistics(u), math.prod(u.shape) // u.shape[1]
