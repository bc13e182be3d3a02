"""Batch norm and activation (`revseg.ops.bn_act`) of maps of one, two and three dimensions.

The operations see maps [N, C, H, W]. One of another number of dimensions has a view of this kind in the same memory:
what they do goes channel by channel, and where a value stands in its channel does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from revseg import ops

_PIECEWISE = (nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.ELU, nn.CELU, nn.SELU)
_SMOOTH = (nn.SiLU, nn.GELU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.LogSigmoid)
_ELEMENTWISE = (*_PIECEWISE, *_SMOOTH)


@dataclass(frozen=True)
class Followed(ops.Norm):
    """A norm with an activation behind it that the passes do not know: PyTorch's own runs behind them.

    Attributes:
        act: A module without parameters that goes element by element.
    """

    act: nn.Module

    def activated(self, n: Tensor) -> Tensor:
        """The activated map; n may be written over."""
        z: Tensor = type(self.act).forward(self.act, n)
        return z

    def gradient(self, u: Tensor, dz: Tensor) -> Tensor:
        """The gradient of the normalised map."""
        n = _normalised(u, self).detach().requires_grad_()
        with torch.enable_grad():
            z = self.activated(n.clone() if getattr(self.act, "inplace", False) else n)
        return torch.autograd.grad(z, n, dz.to(z.dtype))[0]


def is_elementwise(act: nn.Module) -> bool:
    """Whether `Followed` takes this activation."""
    return type(act) in _ELEMENTWISE


def plane(x: Tensor) -> Tensor:
    """A map [N, C, L], [N, C, H, W] or [N, C, D, H, W] as one of two dimensions, in its memory if that has no gaps."""
    return x if x.ndim == 4 else x.flatten(2, -2) if x.ndim > 4 else x.unsqueeze(2)


def batch_statistics(u: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance by channel [C], float64 where the device has it."""
    return ops.batch_statistics(plane(u))


def bn_act(u: Tensor, norm: ops.Norm, out: Tensor | None = None) -> Tensor:
    """The activated map, of the dtype and strides of u; in `out`, if given and the passes know the activation."""
    n = _normalised(u, norm, out)
    return norm.activated(n) if isinstance(norm, Followed) else n


def _normalised(u: Tensor, norm: ops.Norm, out: Tensor | None = None) -> Tensor:
    """The map behind the passes."""
    flat = plane(u)
    z = ops.bn_act(flat, norm, out=None if out is None else _memory(out, u, flat))
    return _shaped(z, u) if out is None else out


def bn_act_add(u: Tensor, norm: ops.Norm, x: Tensor, sign: int) -> Tensor:
    """A stream of the shape of u updated by the activated map, x + sign * z."""
    if isinstance(norm, Followed):
        return x.add(bn_act(u, norm).to(x.dtype), alpha=sign)
    return _shaped(ops.bn_act_add(plane(u), norm, plane(x), sign), u)


def bn_act_backward(
    u: Tensor, dz: Tensor, norm: ops.Norm, batch: bool, out: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient of the raw map, in `out` if given, and those of weight, bias and slope [C]."""
    assert not isinstance(norm, Followed), "expected an activation that the passes know: others go by bands"
    flat = plane(u)
    memory = None if out is None else _memory(out, u, flat)
    du, *of_norm = ops.bn_act_backward(flat, plane(dz), norm, batch, memory)
    dweight, dbias, dslope = of_norm
    return _shaped(du, u) if out is None else out, dweight, dbias, dslope


def bn_act_sums(u: Tensor, dz: Tensor, norm: ops.Norm) -> Tensor:
    """The sums over a map, or a band of one, from which its gradient follows [3, C]."""
    if isinstance(norm, Followed):
        dz = norm.gradient(u, dz)
    return ops.bn_act_sums(plane(u), plane(dz), norm)


def bn_act_gradient(u: Tensor, dz: Tensor, norm: ops.Norm, sums: Tensor | None, values: int) -> Tensor:
    """The gradient of a raw map, or of a band of one, whose sums are known; of the dtype and strides of u."""
    if isinstance(norm, Followed):
        dz = norm.gradient(u, dz)
    return _shaped(ops.bn_act_gradient(plane(u), plane(dz), norm, sums, values), u)


def _memory(out: Tensor, u: Tensor, flat: Tensor) -> Tensor:
    """Where results go, as a plane; of u itself the one plane, by which operations know that u is written over."""
    return flat if out is u else plane(out)  # with the strides of the other, also of a single channel


def _shaped(plane: Tensor, u: Tensor) -> Tensor:
    """New memory of the plane of u, shaped as u; a view alone gives one image any stride, and operations read layouts from it."""
    if u.ndim == 4:
        return plane
    z = plane.view(u.shape)
    return z.as_strided(z.shape, (z.numel(), *z.stride()[1:])) if len(z) == 1 else z
