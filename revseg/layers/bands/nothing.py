"""The linear part of a layer that has none: batch norm and activation of a map as it comes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from revseg.engine.gradients import Grads
from revseg.layers.bands.rows import Band
from revseg.layers.bands.window import Window
from revseg.layers.layer_input import LayerInput
from revseg.layers.linear import LinearOp


class Nothing(LinearOp):
    """A raw map that is the input.

    Args:
        dims: Of the maps.
    """

    def __init__(self, dims: int = 2) -> None:
        self.dims = dims

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
