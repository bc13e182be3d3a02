"""Convolutions of one, two and three dimensions as the linear part of a layer.

A CPU copies maps into layouts of its own, and those in half precision into float32 as well: large ones therefore
go through a convolution image by image, and their weight's gradient by bands of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revseg.engine.gradients import Grads
from revseg.engine.tracing import has_hooks
from revseg.layers.bands.convolution import BandConvolution
from revseg.layers.bands.rows import Band
from revseg.layers.bands.window import Window
from revseg.layers.layer_input import LayerInput, by_image, gather, is_large
from revseg.layers.linear import LinearOp, prepared, summed
from revseg.tensors import is_plain

# Values of a band of rows, 4 MiB in float32, by which the gradients of weights go through a map in half precision.
_BAND = 1 << 20


Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
_CONVS = get_args(Conv)


class Convolution(LinearOp):
    """A convolution, transposed or not.

    Args:
        conv: Gives stride, padding, dilation and groups.
        prepare: Makes the input out of images that are bytes, of one image at a time; the batch as
            a whole then never exists as floats.
    """

    def __init__(
        self,
        conv: Conv,
        prepare: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.dims = len(conv.kernel_size)
        self.stride, self.dilation, self.groups = conv.stride, conv.dilation, conv.groups
        self.padding: Any = conv.padding
        self.transposed, self.output_padding = conv.transposed, conv.output_padding
        self.prepare = prepare
        self.by_band = _by_band(conv)
        self.asymmetric = None if prepare else _asymmetric(conv)
        self.every = _steps(conv)  # of the pixels that are picked here
        if self.every:
            self.stride = (1,) * self.dims

    @classmethod
    def of(
        cls,
        conv: nn.Module,
        prepare: Callable[[Tensor], Tensor] | None = None,
    ) -> Convolution | None:
        """The op of this module; None if it is no ordinary convolution."""
        if not isinstance(conv, _CONVS) or has_hooks(conv):
            return None
        ordinary = type(conv) in _CONVS
        zeros = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
        if not ordinary or not zeros or not is_plain(conv.weight):
            return None
        return cls(conv, prepare)

    def forward(self, x: Tensor, *parameters: Tensor) -> Tensor:
        weight, bias = parameters[0], parameters[1] if len(parameters) > 1 else None
        return torch.convolution(
            self._picked(prepared(x, self.prepare, weight.dtype)),
            weight,
            bias,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
        )

    def make(self, x: LayerInput, parameters: Sequence[Tensor]) -> Tensor:
        # A CPU copies the input into another layout; with few channels, or in half precision, the output too.
        copies = x.raw.shape[1] < 16 or x.raw.element_size() < 4
        if (x.computed or copies) and by_image(x.raw):
            return gather((self.forward(image, *parameters) for image in x.images()), len(x.raw))
        return self.forward(x.values(), *parameters)

    def backward(
        self, du: Tensor, x: LayerInput, parameters: Sequence[Tensor], wanted: Sequence[bool]
    ) -> Grads:
        like = x.raw
        count = len(like)
        step = 1 if by_image(like) or self.prepare is not None else count
        total: Grads = [None] * len(parameters)
        dx: Tensor | None = None
        for i in range(0, count, step):
            images = slice(i, i + step)
            if any(wanted[1:]):  # apart from the input's, for the sake of the workspaces of both
                part = self._input(x, images, du.dtype)
                total = summed(total, self._of_parameters(du[images], part, parameters, wanted))
                del part
            if wanted[0]:
                shape = (
                    like[images] if like.dtype == du.dtype else torch.empty_like(like[images], dtype=du.dtype)
                )
                found = self._of_input(du[images], shape, parameters)
                if step < count:
                    dx = _memory_for(du, like) if dx is None else dx
                    dx[images] = found
                else:
                    dx = found
                del found, shape  # before the next image
        return [dx, *(None if t is None else t.to(p.dtype) for t, p in zip(total, parameters, strict=True))]

    band_share = 1
    input_gradient_reads_input = False

    def window(self) -> Window | None:
        return None if self.by_band is None else self.by_band.window

    def shape(self, x: Sequence[int], parameters: Sequence[Tensor]) -> tuple[int, ...]:
        assert self.by_band is not None
        return x[0], len(parameters[0]), *self.by_band.size(x[2:])

    def make_band(self, x: Band, first: int, last: int, parameters: Sequence[Tensor]) -> Tensor:
        if self.by_band is None or self.every:
            return super().make_band(x, first, last, parameters)
        return self.by_band.make(self._floats(x, parameters), first, last, parameters)

    def band_parameter_gradients(
        self, du: Tensor, x: Band, first: int, parameters: Sequence[Tensor], wanted: Sequence[bool]
    ) -> Grads:
        if self.by_band is None or self.every:
            return super().band_parameter_gradients(du, x, first, parameters, wanted)
        return self.by_band.of_parameters(du, self._floats(x, parameters), first, parameters, wanted)

    def band_input_gradient(
        self, du: Band, x: Band, first: int, last: int, parameters: Sequence[Tensor]
    ) -> Tensor:
        if self.by_band is None or self.every:
            return super().band_input_gradient(du, x, first, last, parameters)
        return self.by_band.of_input(du, x.values.shape[3:], first, last, parameters)

    def _floats(self, x: Band, parameters: Sequence[Tensor]) -> Band:
        return replace(x, values=prepared(x.values, self.prepare, parameters[0].dtype))

    def _of_input(self, du: Tensor, shape: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """The gradient of an input of this shape and layout."""
        dpicked: Tensor = self._call(du, self._picked(shape), parameters, [True, False, False])[0]
        if self.every is None:
            return dpicked
        found = torch.zeros_like(shape)
        self._picked(found).copy_(dpicked)
        return found

    def _input(self, x: LayerInput, images: slice, dtype: torch.dtype) -> Tensor:
        return self._picked(prepared(x.values(lambda whole: whole[images]), self.prepare, dtype))

    def _picked(self, x: Tensor) -> Tensor:
        """The pixels that are read."""
        pixels: tuple[Any, ...] = tuple(slice(None, None, step) for step in self.every or ())
        return x[(..., *pixels)] if pixels else x

    def _of_parameters(
        self, du: Tensor, x: Tensor, parameters: Sequence[Tensor], wanted: Sequence[bool]
    ) -> Grads:
        """Their gradients; for large maps in half precision on a CPU the sum of those of bands of rows, in float32.

        A CPU copies such maps as a whole, into float32 or other layouts: three times each.
        """
        mask = [False, *wanted[1:]]
        if (
            x.ndim != 4
            or x.element_size() > 2
            or x.device.type != "cpu"
            or self.transposed
            or not is_large(x)
        ):
            return list(self._call(du, x, parameters, mask)[1:])
        (s, _), (above, across), (d, _) = self.stride, self.padding, self.dilation
        reach = d * (parameters[0].shape[2] - 1) + 1  # rows that one row of du has read
        rows = max(1, _BAND * x.shape[2] // x.numel() // s)
        wide = [p.float() for p in parameters]
        total: Grads = [None] * len(parameters)
        for first in range(0, du.shape[2], rows):
            last = min(first + rows, du.shape[2])
            start, stop = first * s - above, (last - 1) * s - above + reach
            band, rim = x[:, :, max(start, 0) : stop].float(), (max(-start, 0), max(stop - x.shape[2], 0))
            if any(rim):
                band = F.pad(band, (0, 0, *rim))
            more = self._call(du[:, :, first:last].float(), band, wide, mask, [0, across])[1:]
            total = summed(total, more)
        return total

    def _call(
        self,
        du: Tensor,
        x: Tensor,
        parameters: Sequence[Tensor],
        wanted: Sequence[bool],
        padding: Sequence[int] | None = None,
    ) -> Any:
        bias = list(parameters[1].shape) if len(parameters) > 1 else None
        mask = (wanted[0], wanted[1], len(parameters) > 1 and wanted[2])
        found = torch.ops.aten.convolution_backward(
            du,
            x,
            parameters[0],
            bias,
            self.stride,
            self.padding if padding is None else padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
            mask,
        )
        return found[: len(parameters) + 1]


def _by_band(conv: Conv) -> BandConvolution | None:
    """What it is for bands of a map; None for transposed ones, and windows of nothing but padding."""
    if conv.transposed or isinstance(conv.padding, str):
        return None
    given: Any = conv
    found = BandConvolution(given.kernel_size, given.stride, given.padding, given.dilation, conv.groups)
    return found if found.window.above < found.window.reach else None


def _asymmetric(conv: Conv) -> int | None:
    """The dilation of an n x 1 or 1 x n convolution that keeps the size of its map; None for all others."""
    if conv.transposed or len(conv.kernel_size) != 2:
        return None
    (height, width), (down, across) = conv.kernel_size, conv.dilation
    keeps = conv.padding == (down * (height // 2), across * (width // 2)) and conv.stride == (1, 1)
    fits = keeps and min(height, width) == 1 and height * width % 2 == 1 and conv.groups == 1
    return (down if height > 1 else across) if fits and conv.bias is None else None


def _steps(conv: Conv) -> tuple[int, ...] | None:
    """The stride of a 1 x 1 convolution of few channels; None for all others.

    Its weight gradient in channels_last writes beyond its memory on a CPU (torch 2.13).
    """
    few = conv.in_channels < 16 and not conv.transposed and not any(conv.padding)
    return conv.stride if few and max(conv.kernel_size) == 1 and max(conv.stride) > 1 else None


def _memory_for(du: Tensor, like: Tensor) -> Tensor:
    """Where the gradient of the input goes, image by image: the place of the one it comes from, if that fits."""
    if du.shape == like.shape and du.stride() == like.stride():
        return du
    return torch.empty_like(like, dtype=du.dtype)
