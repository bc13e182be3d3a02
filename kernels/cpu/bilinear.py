"""Bilinear upsampling of a map [N, C, h, w] to [N, C, H, W] that never exists as a whole.

Rows of the output that lie between the same two rows of the source form a band: interpolate the
two along x, and every row of the band is a mixture of them. The transpose goes the same way back:
first the rows of a band are summed into two, then the two are summed along x. Nothing is added
by threads that race each other, so that the same input gives the same bits.

In float32, positions and weights are those of `F.interpolate` to the bit (`interpolation`). So are the
results on a CPU for contiguous maps of many channels. To ask for more has no meaning: `F.interpolate`
adds the products in another order for channels_last maps, for few channels and for small results, so
that its own last bits differ between them.

To its own size a map is what it is: a band is a copy of its rows.

Letters: N images, C channels, h w size of the source, H W size of the output; n images and R rows of
a band; K outputs that one source column has a share in.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from revseg.kernels.interpolation import Axis, axis
from revseg.kernels.shapes import has_values

# Bytes of one map [n, C, R, W] of a band, unless a single row of one image takes more. The two or three
# such maps that exist at a time fit into the second-level cache of a core.
BAND_BYTES = 2**20 * 3 // 2
BAND_BYTES_CUDA = 2**23  # few launches count more than the cache
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Band(NamedTuple):
    """Some rows of the output of some images, between two rows of the source; of a source of the same size any rows."""

    images: slice
    rows: slice
    low: int
    high: int


class Upsampling:
    """From a source map to the bands of its output, and from their gradients back.

    Args:
        source: The map [N, C, h, w] of any floating type; float16 and bfloat16 are interpolated in float32.
        size: (H, W), also smaller than (h, w).
        align_corners: Whether the centres of the corner pixels, or their outer corners, coincide.

    Attributes:
        dtype: Of the bands and of their gradients.
    """

    def __init__(self, source: Tensor, size: Sequence[int], align_corners: bool) -> None:
        self.source, self.width, self.align_corners = source, size[1], align_corners
        self.dtype = torch.promote_types(source.dtype, torch.float32)
        h, w = source.shape[-2:]
        self._same_size = (h, w) == tuple(size)
        rows = axis(h, size[0], align_corners, self.dtype)
        columns = axis(w, size[1], align_corners, self.dtype)
        outputs, shares = _transpose(columns, w)
        self._low, self._high = rows.low.tolist(), rows.high.tolist()
        self._row_weights = (self._tensor(rows.low_weight[:, None]), self._tensor(rows.high_weight[:, None]))
        self._outputs, self._shares = self._tensor(outputs), self._tensor(shares)

    def bands(self) -> Iterator[Band]:
        """All bands, from the top of the first images to the bottom of the last ones.

        Of a source without values one band of each shape: it takes the memory that all of them take.
        """
        seen = set()
        for band in self._bands():
            shape = (band.images.stop - band.images.start, band.rows.stop - band.rows.start)
            if shape not in seen or has_values(self.source):
                yield band
            seen.add(shape)

    def forward(self, band: Band) -> Tensor:
        """The band of the output [n, C, R, W], a tensor of its own."""
        images = self.source[band.images]
        if self._same_size:
            return images[:, :, band.rows].to(self.dtype, copy=True)
        low, high = (
            F.interpolate(
                images[:, :, row].to(self.dtype), self.width, mode="linear", align_corners=self.align_corners
            )[:, :, None]  # [n, C, 1, W]
            for row in (band.low, band.high)
        )
        low_weight, high_weight = (weight[band.rows] for weight in self._row_weights)
        return (high * high_weight).addcmul_(low, low_weight)

    def add_gradient(self, band: Band, doutput: Tensor, dsource: Tensor) -> None:
        """Adds what the gradient of a band contributes to that of the source.

        Args:
            band: One of `bands`.
            doutput: Gradient of the band [n, C, R, W].
            dsource: Gradient of the source [N, C, h, w], of the same type; added to.
        """
        if self._same_size:
            dsource[band.images, :, band.rows] += doutput
            return
        pair = torch.stack([(doutput * weight[band.rows]).sum(dim=2) for weight in self._row_weights], dim=2)
        pair = (pair[..., self._outputs] * self._shares).sum(dim=-1)  # [n, C, 2, W] to [n, C, 2, w]
        images = dsource[band.images]
        images[:, :, band.low] += pair[:, :, 0]
        images[:, :, band.high] += pair[:, :, 1]

    def _bands(self) -> Iterator[Band]:
        n, channels = self.source.shape[:2]
        row_bytes = channels * self.width * self.dtype.itemsize
        rows_allowed = (BAND_BYTES_CUDA if self.source.is_cuda else BAND_BYTES) // row_bytes
        groups = [slice(0, len(self._low))] if self._same_size else [*_equal_runs(self._low)]
        most_rows = max(1, min(rows_allowed, max(rows.stop - rows.start for rows in groups)))
        most_images = max(1, rows_allowed // most_rows)
        for images in _pieces(slice(0, n), most_images):
            for group in groups:
                for rows in _pieces(group, most_rows):
                    yield Band(images, rows, self._low[rows.start], self._high[rows.start])

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.tensor(values, device=self.source.device)


def _transpose(axis: Axis, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The outputs [size, K] that each source has a share in, and the shares; 0 where there are fewer."""
    sources = np.concatenate((axis.low, axis.high))
    order = sources.argsort(kind="stable")
    counts = np.bincount(sources, minlength=size)
    place = np.arange(len(order)) - np.repeat(counts.cumsum() - counts, counts)  # among those of its source
    outputs = np.zeros((size, counts.max()), dtype=np.int64)
    shares = np.zeros((size, counts.max()), dtype=axis.low_weight.dtype)
    outputs[sources[order], place] = order % len(axis.low)
    shares[sources[order], place] = np.concatenate((axis.low_weight, axis.high_weight))[order]
    return outputs, shares


def _equal_runs(values: list[int]) -> Iterator[slice]:
    """The stretches of a list in which nothing changes."""
    start = 0
    for i in range(1, len(values) + 1):
        if i == len(values) or values[i] != values[start]:
            yield slice(start, i)
            start = i


def _pieces(whole: slice, most: int) -> Iterator[slice]:
    """A stretch in pieces of at most that length."""
    for start in range(whole.start, whole.stop, most):
        yield slice(start, min(start + most, whole.stop))
