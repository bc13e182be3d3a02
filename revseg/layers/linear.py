"""The linear part of a layer: a convolution, or what stands in its place.

`forward` is ordinary differentiable PyTorch, and the definition of the rest. `make` gives the same raw map without
a graph, `backward` the gradients; both ask for the input only if they need its values, and for no more of
it than they need: it may have to be computed first (`revseg.layers.layer_input`).

An op that also does a part of what stands before or behind it, norm and activation, has its own
`make_with_statistics` and `layer_gradients`.

An op whose rows follow from some rows of its input says from which, by a `window`: it can then go through its map band
by band (`revseg.layers.bands`). A band is cut out with what it reads, goes through the op like any map, and the rows next to
the cut, which would have read beyond it, are left away; `Convolution` does without such rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from revseg import ops
from revseg.engine.gradients import Grads
from revseg.layers.bands.rows import Band, pad_rows
from revseg.layers.bands.window import Window
from revseg.layers.layer_input import LayerInput
from revseg.layers.norms import batch_statistics, bn_act_backward
from revseg.tensors import CHANNELS_LAST, dense


class LinearOp(ABC):
    """How a layer makes its raw map [N, C, h, w] from its input, and the gradients of that."""

    activates_its_input = (
        False  # whether it reads the raw map before it, and would only lose by an activated one
    )

    dims = 2  # of a map, besides images and channels

    @abstractmethod
    def forward(self, x: Tensor, *parameters: Tensor) -> Tensor:
        """The raw map; differentiable."""

    @abstractmethod
    def make(self, x: LayerInput, parameters: Sequence[Tensor]) -> Tensor:
        """The raw map, without a graph; `parameters` as given to `forward`."""

    @abstractmethod
    def backward(
        self, du: Tensor, x: LayerInput, parameters: Sequence[Tensor], wanted: Sequence[bool]
    ) -> Grads:
        """Gradients of the input and the parameters, None for those not wanted.

        Args:
            du: The gradient of the raw map; may be written to.
            x: As given to `make`.
            parameters: As given to `make`.
            wanted: Whether the gradient of the input and of each parameter is.
        """

    def window(self) -> Window | None:
        """Which rows of its input a row follows from; None if any may. `above` is a multiple of `step`."""
        return None

    def shape(self, x: Sequence[int], parameters: Sequence[Tensor]) -> tuple[int, ...]:
        """The shape of the raw map of an input [N, C, H, ...]; of ops that have a window."""
        raise NotImplementedError

    band_share = 2  # a band is cut into so many, as more of it is there at a time
    input_gradient_reads_input = True  # whether `band_input_gradient` needs values of the input

    def make_band(self, x: Band, first: int, last: int, parameters: Sequence[Tensor]) -> Tensor:
        """Rows first to last (excluded) of the raw map, from a band that has what they read."""
        part, before, _ = self._cut(x, first, last)
        return self.make(LayerInput(part), parameters)[:, :, first - before : last - before]

    def band_parameter_gradients(
        self,
        du: Tensor,
        x: Band,
        first: int,
        parameters: Sequence[Tensor],
        wanted: Sequence[bool],
    ) -> Grads:
        """What rows of the gradient of the raw map, from `first` on, add to the gradients of the parameters."""
        part, before, count = self._cut(x, first, first + du.shape[2])
        after = count - (first - before) - du.shape[2]
        whole = pad_rows(du, first - before, after)
        return self.backward(whole, LayerInput(part), parameters, [False, *wanted])[1:]

    def band_input_gradient(
        self, du: Band, x: Band, first: int, last: int, parameters: Sequence[Tensor]
    ) -> Tensor:
        """Rows first to last (excluded) of the gradient of the input; `du` has all rows that read one of these.

        The values of x are empty if none are needed, [n, C, 0, ...].
        """
        window = self.window()
        assert window is not None
        start, stop = window.readers(first, last, du.height)
        if stop <= start:
            n, c, _, *across = x.values.shape
            return du.values.new_zeros(n, c, last - first, *across)
        part, before, count = self._cut(x, start, stop)
        whole = pad_rows(du.rows(start, stop), start - before, count - (stop - before))
        dx = self.backward(whole, LayerInput(part), parameters, [True] + [False] * len(parameters))[0]
        assert dx is not None
        top = before * window.step
        return pad_rows(dx, 0, max(0, last - top - dx.shape[2]))[:, :, first - top : last - top]

    def _cut(self, x: Band, first: int, last: int) -> tuple[Tensor, int, int]:
        """The part of the input that rows first to last read; which row its first one makes, and how many it makes."""
        window = self.window()
        assert window is not None
        low, high = window.inside(first, last, x.height)
        if x.values.shape[2]:
            part = dense(x.rows(low, high))
        else:
            n, c, _, *across = x.values.shape
            layout = CHANNELS_LAST.get(x.values.ndim) if x.values.device.type == "cpu" else None
            part = x.values.new_empty(n, c, high - low, *across)
            part = part.contiguous(memory_format=layout or torch.contiguous_format)
        return part, low // window.step, window.height(high - low)

    def make_with_statistics(
        self, x: LayerInput, parameters: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The raw map, and its mean and biased variance by channel [C], float64 where the device has it."""
        u = self.make(x, parameters)
        return u, batch_statistics(u)

    def layer_gradients(
        self, end: LayerEnd, x: LayerInput, parameters: Sequence[Tensor], wanted: Sequence[bool]
    ) -> LayerGradients:
        """The gradients of a whole layer; `end` is used up, the rest is as in `backward`."""
        du, of_norm = end.of_raw_map()
        dx, *of_op = self.backward(du, x, parameters, wanted)
        return LayerGradients(dx, of_op, of_norm, None)


class LayerGradients(NamedTuple):
    """The gradients of a layer.

    Attributes:
        dx: Of its input, None if it is not wanted.
        of_op: Of the parameters of its linear op, None for those not wanted.
        of_norm: Of weight and bias of its norm and of the slope of its activation, each [C], float64 where
            the device has it.
        sums: `bn_act_sums` of the raw map before with dx, if they were taken on the way.
    """

    dx: Tensor | None
    of_op: Grads
    of_norm: list[Tensor]
    sums: Tensor | None


class LayerEnd:
    """Where a gradient enters a layer.

    Args:
        u: The raw map of the layer [N, C, h, w].
        dz: The gradient of what norm and activation made of it.
        norm: What follows the raw map.
        batch: Whether the statistics of the norm are those of the batch.
        out: Memory for the gradient of the raw map: dz, u, or None for a new one.
        sums: `bn_act_sums(u, dz, norm)`, if the layer behind took them.
    """

    def __init__(
        self, u: Tensor, dz: Tensor, norm: ops.Norm, batch: bool, out: Tensor | None, sums: Tensor | None
    ) -> None:
        self.u, self.dz, self.norm, self.batch, self.out, self.sums = u, dz, norm, batch, out, sums

    def of_raw_map(self) -> tuple[Tensor, list[Tensor]]:
        """The gradient of the raw map, and those of the norm; maps that are not needed any more are let go."""
        du, *of_norm = bn_act_backward(self.u, self.dz, self.norm, self.batch, self.out)
        del self.u, self.dz, self.out
        return du, of_norm


def summed(total: Grads, more: Sequence[Tensor | None]) -> Grads:
    """The sums of gradients, in place; None for those that are none."""
    return [m if t is None or m is None else t.add_(m) for t, m in zip(total, more, strict=True)]


def prepared(x: Tensor, prepare: Callable[[Tensor], Tensor] | None, dtype: torch.dtype) -> Tensor:
    """What `prepare` makes of images, of this dtype unless it left them as they were; x itself without it."""
    images = x if prepare is None else prepare(x)
    return images if images is x else images.to(dtype)
