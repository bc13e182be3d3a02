"""Convolutions of n x 1 and 1 x n that activate their input themselves (`revseg.kernels.asymmetric_conv.op`).

Such a layer reads the raw map of the layer before it and writes its own, with the sums over it that norm
needs; so no activated map exists, on the way forward and back.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from revseg import ops
from revseg.engine.gradients import Grads
from revseg.layers.convolution import Convolution
from revseg.layers.layer_input import LayerInput
from revseg.layers.linear import LayerEnd, LayerGradients, LinearOp


class AsymmetricConvolution(LinearOp):
    """A convolution of n x 1 or 1 x n that keeps the size of its map, fused with its neighbours.

    Args:
        plain: The same convolution by itself.
        dilation: Distance between taps.
    """

    activates_its_input = True

    def __init__(self, plain: Convolution, dilation: int) -> None:
        self.plain, self.dilation = plain, dilation

    def forward(self, x: Tensor, *parameters: Tensor) -> Tensor:
        return self.plain.forward(x, *parameters)

    def make(self, x: LayerInput, parameters: Sequence[Tensor]) -> Tensor:
        return ops.asymmetric_conv(*x.before_norm(), parameters[0], self.dilation, False)[0]

    def make_with_statistics(
        self, x: LayerInput, parameters: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        u, mean, var = ops.asymmetric_conv(*x.before_norm(), parameters[0], self.dilation, True)
        assert mean is not None
        assert var is not None
        return u, (mean, var)

    def backward(
        self, du: Tensor, x: LayerInput, parameters: Sequence[Tensor], wanted: Sequence[bool]
    ) -> Grads:
        return self.plain.backward(du, x, parameters, wanted)

    def layer_gradients(
        self, end: LayerEnd, x: LayerInput, parameters: Sequence[Tensor], wanted: Sequence[bool]
    ) -> LayerGradients:
        u, dz, norm = end.u, end.dz, end.norm
        sums = ops.bn_act_sums(u, dz, norm) if end.sums is None else end.sums
        dx, dweight, before = ops.asymmetric_conv_backward(
            u,
            dz,
            norm,
            sums,
            end.batch,
            *x.before_norm(),
            parameters[0],
            self.dilation,
            (wanted[0], wanted[1]),
        )
        return LayerGradients(dx, [dweight], [sums[1] * norm.inverse_deviation, sums[0], sums[2]], before)


def fused(op: LinearOp, parameters: Sequence[Tensor | None]) -> LinearOp:
    """The op that does the same in fewer passes where the parameters are; the op itself if there is none."""
    weight = parameters[0] if parameters else None
    if not isinstance(op, Convolution) or op.asymmetric is None or weight is None:
        return op
    return AsymmetricConvolution(op, op.asymmetric) if ops.has_asymmetric_conv(weight, weight) else op
