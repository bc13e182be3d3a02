"""Batch norm and activation of contiguous maps so small that calls take longer than loops: PyTorch's own passes, a few of them.

The other ways go through a map block by block (`revseg.kernels.cpu.blocks`) or in one compiled loop (`revseg.kernels.cpu.compiled`);
their vectors alone take more calls than these passes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from revseg.kernels.cpu.compiled import is_large
from revseg.kernels.norm import Norm
from revseg.kernels.shapes import has_values

_OTHERS = (0, 2, 3)  # dimensions of a map besides its channels


def is_small(u: Tensor) -> bool:
    """Whether these passes are taken.

    Not in half precision, which PyTorch would round in between; nor in channels_last, where it sums in float32.
    """
    return (
        u.device.type == "cpu"
        and not is_large(u)
        and u.is_contiguous()
        and u.dtype in (torch.float32, torch.float64)
        and has_values(u)
    )


def statistics(u: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance by channel [C], float64."""
    mean, var = torch.batch_norm_update_stats(u, None, None, 0.0)
    return mean.double(), var.double()


def activated(u: Tensor, norm: Norm) -> Tensor:
    """The activated map, in new memory."""
    n = _normalized(u, norm)
    if isinstance(norm.slope, Tensor):
        return torch.prelu(n, norm.slope.to(n.dtype))
    if norm.slope == 0.0:
        return n.relu_()  # of an infinity too
    return n if norm.slope == 1.0 else F.leaky_relu_(n, norm.slope)


def gradients(u: Tensor, dz: Tensor, norm: Norm, batch: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Those of the raw map, in new memory, and of weight, bias and slope [C], float64."""
    n = _normalized(u, norm)
    slope = norm.slope.to(n.dtype)[:, None, None] if isinstance(norm.slope, Tensor) else norm.slope
    dn = torch.where(n > 0, dz, dz * slope)
    dslope = n.clamp_(max=0).mul_(dz).sum(_OTHERS)
    mean, var, deviation = (v.to(u.dtype) for v in (norm.mean, norm.var, norm.inverse_deviation))
    weight = None if norm.weight is None else norm.weight.to(u.dtype)
    du, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
        dn, u, weight, mean, var, mean, deviation, batch, norm.eps, [True, True, True]
    )
    return du, dweight.double(), dbias.double(), dslope.double()


def _normalized(u: Tensor, norm: Norm) -> Tensor:
    mean, var = norm.mean.to(u.dtype), norm.var.to(u.dtype)
    weight, bias = (None if v is None else v.to(u.dtype) for v in (norm.weight, norm.bias))
    return F.batch_norm(u, mean, var, weight, bias, False, 0.0, norm.eps)
