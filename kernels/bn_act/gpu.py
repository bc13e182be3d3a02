"""Batch norm and a leaky activation as Triton kernels.

One launch makes the activated map, or a stream updated by it. It reads a map once and stores nothing
of its size but the result; each program folds the vectors of its own channels, once for all of its tiles.

Letters: u, z, n as in `bn_act`; P, Q, C, S as in `gpu/tiles`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from revseg.kernels.gpu.norm import of_slope, parameters_of, vectors
from revseg.kernels.gpu.rounding import rounded
from revseg.kernels.gpu.tiles import Tiles, place_of
from revseg.kernels.norm import Norm


def bn_act(u: Tensor, norm: Norm, out: Tensor) -> Tensor:
    """As `revseg.kernels.bn_act.op.bn_act`."""
    _bn_act(u, *parameters_of(norm), None, 1.0, out)
    return out


def bn_act_add(u: Tensor, norm: Norm, x: Tensor, sign: float, out: Tensor) -> Tensor:
    """As `revseg.kernels.bn_act.op.bn_act_add`."""
    _bn_act(u, *parameters_of(norm), x, sign, out)
    return out


@torch.library.custom_op("revseg::bn_act", mutates_args=("out",))
def _bn_act(
    u: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, slope: Tensor | None,
    fixed: float, eps: float, x: Tensor | None, sign: float, out: Tensor,
) -> None:  # fmt: skip
    tiles = Tiles.of(u)
    count = tiles.parts()
    with torch.cuda.device_of(u):
        _bn_act_kernel[count, tiles.groups](
            u, mean, var, weight, bias, slope, eps, x, sign, out, tiles.pixels, tiles.count, count,
            **of_slope(slope, fixed), **tiles.constants,
        )  # fmt: skip


@_bn_act.register_fake
def _(*_: Any) -> None:
    """It writes to `out`."""


@triton.jit
def _bn_act_kernel(
    u, mean, var, weight, bias, slope, eps, x, sign, out, pixels, tiles, count,
    FIXED: tl.constexpr, SHARED: tl.constexpr,
    C: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    # a program owns every S-th tile of Q channels
    m, _, scale, b, s = vectors(mean, var, weight, bias, slope, eps, FIXED, SHARED, C, Q)
    for tile in range(tl.program_id(0), tiles, count):
        place, inside = place_of(tile, pixels, C, P, Q, CHANNELS_LAST, LARGE)
        n = (tl.load(u + place, mask=inside, other=0.0).to(tl.float32) - m) * scale + b
        if FIXED == 0.0:
            z = tl.where(n < 0, 0.0, n)  # minus infinity becomes 0, and NaN stays
        else:
            z = tl.where(n > 0, n, n * s)
        if x is not None:
            before = tl.load(x + place, mask=inside, other=0.0)
            before = before if before.dtype == tl.float64 else before.to(tl.float32)
            z = rounded(z, u.dtype.element_ty).to(before.dtype)
            z = before + sign * z
        tl.store(out + place, rounded(z, out.dtype.element_ty), mask=inside)
