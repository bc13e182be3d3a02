"""Batch norm and activation of maps that are joined, by bands: a layer whose linear part does nothing."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from revseg.engine.gradients import Grads
from revseg.engine.tracing import has_hooks
from revseg.layers.bands.rows import Band
from revseg.layers.bands.run import run_by_bands
from revseg.layers.bands.window import Window
from revseg.layers.layer_input import LayerInput
from revseg.layers.linear import LinearOp
from revseg.layers.stack import bands_of, stacks_are_right
from revseg.layers.stack_layer import layer_of
from revseg.replay.context import is_casting


class Nothing(LinearOp):
    """A raw map that is the input."""

    input_gradient_reads_input = False

    def window(self) -> Window:
        return Window(1, 1, 0, 0)

    def shape(self, x: Sequence[int], parameters: Sequence[Tensor]) -> tuple[int, ...]:
        return tuple(x)

    def forward(self, x: Tensor, *parameters: Tensor) -> Tensor:
        return x

    def make(self, x: LayerInput, parameters: Sequence[Tensor]) -> Tensor:
        return x.values().clone()

    def backward(
        self, du: Tensor, x: LayerInput, parameters: Sequence[Tensor], wanted: Sequence[bool]
    ) -> Grads:
        return [du if wanted[0] else None]

    def make_band(self, x: Band, first: int, last: int, parameters: Sequence[Tensor]) -> Tensor:
        return x.rows(first, last).clone()  # whoever activates it writes to it

    def band_input_gradient(
        self, du: Band, x: Band, first: int, last: int, parameters: Sequence[Tensor]
    ) -> Tensor:
        return du.rows(first, last)


def normed_by_bands(norm: nn.Sequential, maps: Sequence[Tensor]) -> Tensor | None:
    """What batch norm and activation make of maps joined by their channels; None if they do not go by bands in this call.

    Args:
        norm: Batch norm and activation, with the `bands` that they go by.
        maps: Each [N, c, H, W].
    """
    bands, first = bands_of(norm), maps[0]
    alike = all(each.dtype == first.dtype and stacks_are_right(each) for each in maps)
    if bands is None or len(norm) != 2 or not alike or is_casting(first.device.type) or has_hooks(norm):
        return None
    layer = layer_of(Nothing(), (), *norm)
    return None if layer is None else run_by_bands([layer], tuple(maps), bands)[0]
