"""y1 = x1 * s(f(x2)) + t(f(x2)), and the same for y2 with g.

The value has twice the channels of a stream, raw scale and shift. The scale is exp(a) with
a = BOUND * tanh(raw): with a free exponent a block may shrink a stream to nothing, and undoing it
divides by that. With |a| <= 0.05 a block changes a stream's size by at most 5 %, 64 blocks by a
factor of at most 25 either way, and float32 gradients stay usable at that depth. Source of the
coupling: Dinh et al., Density Estimation Using Real NVP, arXiv:1605.08803, equations 7 and 8.
"""

import torch
from torch import Tensor

from revseg.couplings.base import Coupling

BOUND = 0.05


class AffineCoupling(Coupling):
    """RealNVP's block with a bounded scale; f and g return [N, 2C, ...], raw scales then shifts."""

    value_channels = 2

    @classmethod
    def couple(cls, x: Tensor, h: Tensor) -> Tensor:
        scale, shift = _scale_and_shift(x, h)
        return x * scale + shift

    @classmethod
    def uncouple(cls, y: Tensor, h: Tensor) -> Tensor:
        scale, shift = _scale_and_shift(y, h)
        return (y - shift) / scale


def _scale_and_shift(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    if h.shape[1] != 2 * x.shape[1]:
        raise ValueError(
            f"an affine coupling needs a function value of {2 * x.shape[1]} channels, scales then "
            f"shifts, for a stream of {x.shape[1]}; got {h.shape[1]}"
        )
    raw, shift = h.to(x.dtype).chunk(2, 1)
    return torch.exp(BOUND * torch.tanh(raw)), shift
