"""A convolution of a map of which whole channels were dropped between: heads of segmentation networks end so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from revseg.engine.gradients import Grads
from revseg.layers.bands.rows import Band, Images
from revseg.layers.bands.window import Window
from revseg.layers.layer_input import LayerInput
from revseg.layers.linear import LinearOp


class Dropped(LinearOp):
    """An op of its input times a number for each channel of each image, 0 for those that were dropped.

    Args:
        op: With a window.
        scale: These numbers [N, C, 1, ...].
    """

    def __init__(self, op: LinearOp, scale: Tensor) -> None:
        self.op, self.scale = op, scale
        self.dims, self.band_share = op.dims, op.band_share
        self.input_gradient_reads_input = op.input_gradient_reads_input

    def forward(self, x: Tensor, *parameters: Tensor) -> Tensor:
        return self.op.forward(x * self._like(x), *parameters)

    def make(self, x: LayerInput, parameters: Sequence[Tensor]) -> Tensor:
        return self.op.make(self._input(x), parameters)

    def backward(
        self, du: Tensor, x: LayerInput, parameters: Sequence[Tensor], wanted: Sequence[bool]
    ) -> Grads:
        dx, *others = self.op.backward(du, self._input(x), parameters, wanted)
        return [None if dx is None else dx * self._like(dx), *others]

    def window(self) -> Window | None:
        return self.op.window()

    def shape(self, x: Sequence[int], parameters: Sequence[Tensor]) -> tuple[int, ...]:
        return self.op.shape(x, parameters)

    def make_band(self, x: Band, first: int, last: int, parameters: Sequence[Tensor]) -> Tensor:
        return self.op.make_band(self._band(x), first, last, parameters)

    def band_parameter_gradients(
        self, du: Tensor, x: Band, first: int, parameters: Sequence[Tensor], wanted: Sequence[bool]
    ) -> Grads:
        return self.op.band_parameter_gradients(du, self._band(x), first, parameters, wanted)

    def band_input_gradient(
        self, du: Band, x: Band, first: int, last: int, parameters: Sequence[Tensor]
    ) -> Tensor:
        dx = self.op.band_input_gradient(du, self._band(x), first, last, parameters)
        return dx * self._like(dx, du.images)

    def _input(self, x: LayerInput) -> LayerInput:
        values = x.values()
        return LayerInput(values * self._like(values))

    def _band(self, x: Band) -> Band:
        return replace(x, values=x.values * self._like(x.values, x.images))

    def _like(self, x: Tensor, images: Images | None = None) -> Tensor:
        return (self.scale if images is None else self.scale[images]).to(x.dtype)
