"""The gradients of batch norm and a leaky activation as Triton kernels.

One launch takes sums, one adds their parts, one makes the gradient of the raw map. A launch reads
a map once and stores nothing of its size but the result.

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
from revseg.kernels.gpu.tiles import Parts, Tiles, part_of, place_of, sum_of_pixels
from revseg.kernels.norm import Norm


def bn_act_sums(u: Tensor, dz: Tensor, norm: Norm) -> Tensor:
    """As `revseg.kernels.bn_act_backward.op.bn_act_sums`."""
    sums: Tensor = _bn_act_sums(u, dz, *parameters_of(norm))
    return sums[:3]


def bn_act_backward(
    u: Tensor, dz: Tensor, norm: Norm, batch: bool, out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `revseg.kernels.bn_act_backward.op.bn_act_backward`."""
    parameters = parameters_of(norm)
    sums: Tensor = _bn_act_sums(u, dz, *parameters)
    _bn_act_gradient(u, dz, *parameters, sums if batch else None, u.numel() // u.shape[1], out)
    dbias, _, dslope, dweight = sums.unbind()
    return out, dweight, dbias, dslope


def bn_act_gradient(
    u: Tensor, dz: Tensor, norm: Norm, sums: Tensor | None, values: int, out: Tensor
) -> Tensor:
    """As `revseg.kernels.bn_act_backward.op.bn_act_gradient`."""
    if sums is not None:
        sums = torch.cat((sums, (sums[1] * norm.inverse_deviation)[None]))
    _bn_act_gradient(u, dz, *parameters_of(norm), sums, values, out)
    return out


@torch.library.custom_op("revseg::bn_act_sums", mutates_args=())
def _bn_act_sums(
    u: Tensor, dz: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None,
    slope: Tensor | None, fixed: float, eps: float,
) -> Tensor:  # fmt: skip
    tiles, channels = Tiles.of(u), u.shape[1]
    count = tiles.parts()
    added = Parts.of(count, channels)
    parts = u.new_empty(3, count, channels, dtype=torch.float32)
    sums = u.new_empty(4, channels, dtype=torch.float64)
    with torch.cuda.device_of(u):
        _sums_kernel[count, tiles.groups](
            u, dz, mean, var, weight, bias, slope, eps, parts, tiles.pixels, tiles.count, count,
            **of_slope(slope, fixed), **tiles.constants,
        )  # fmt: skip
        _add_kernel[(added.groups,)](parts, var, eps, sums, count, **added.constants)
    return sums


@torch.library.custom_op("revseg::bn_act_gradient", mutates_args=("out",))
def _bn_act_gradient(
    u: Tensor, dz: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None,
    slope: Tensor | None, fixed: float, eps: float, sums: Tensor | None, values: int, out: Tensor,
) -> None:  # fmt: skip
    tiles = Tiles.of(u)
    count = tiles.parts()
    with torch.cuda.device_of(u):
        _gradient_kernel[count, tiles.groups](
            u, dz, mean, var, weight, bias, slope, eps, sums, float(values), out, tiles.pixels, tiles.count, count,
            **of_slope(slope, fixed), **tiles.constants, num_warps=8,
        )  # fmt: skip


@_bn_act_sums.register_fake
def _(u: Tensor, *_: Any) -> Tensor:
    return u.new_empty(4, u.shape[1], dtype=torch.float64)


@_bn_act_gradient.register_fake
def _(*_: Any) -> None:
    """It writes to `out`."""


@triton.jit
def _sums_kernel(
    u, dz, mean, var, weight, bias, slope, eps, parts, pixels, tiles, count,
    FIXED: tl.constexpr, SHARED: tl.constexpr,
    C: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    # a program owns every S-th tile of Q channels
    m, _, scale, b, s = vectors(mean, var, weight, bias, slope, eps, FIXED, SHARED, C, Q)
    dbias = tl.zeros([P, Q], tl.float32)
    dot = tl.zeros([P, Q], tl.float32)
    dslope = tl.zeros([P, Q], tl.float32)
    for tile in range(tl.program_id(0), tiles, count):
        place, inside = place_of(tile, pixels, C, P, Q, CHANNELS_LAST, LARGE)
        centered = tl.load(u + place, mask=inside, other=0.0).to(tl.float32) - m
        g = tl.load(dz + place, mask=inside, other=0.0).to(tl.float32)
        n = centered * scale + b
        dn = tl.where(n > 0, g, g * s)
        dbias += dn
        dot += centered * dn
        dslope += tl.where(n > 0, 0.0, n) * g
    c = tl.program_id(1) * Q + tl.arange(0, Q)
    to = parts + tl.program_id(0) * C + c
    tl.store(to, sum_of_pixels(dbias), mask=c < C)
    tl.store(to + count * C, sum_of_pixels(dot), mask=c < C)
    tl.store(to + 2 * count * C, sum_of_pixels(dslope), mask=c < C)


@triton.jit
def _add_kernel(parts, var, eps, sums, count, C: tl.constexpr, S: tl.constexpr, Q: tl.constexpr):
    # a program owns Q channels, and stores dbias, dot, dslope, and dweight = dot / deviation
    for k in tl.static_range(3):
        at, inside, c = part_of(k, count, C, S, Q)
        total = tl.sum(tl.load(parts + at, mask=inside, other=0.0).to(tl.float64), 0)
        tl.store(sums + k * C + c, total, mask=c < C)
        if k == 1:
            v = tl.load(var + c, mask=c < C, other=1.0) + eps
            tl.store(sums + 3 * C + c, total / tl.sqrt(v), mask=c < C)


@triton.jit
def _gradient_kernel(
    u, dz, mean, var, weight, bias, slope, eps, sums, m, out, pixels, tiles, count,
    FIXED: tl.constexpr, SHARED: tl.constexpr,
    C: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    # a program owns every S-th tile of Q channels
    center, inverse, scale, b, s = vectors(mean, var, weight, bias, slope, eps, FIXED, SHARED, C, Q)
    if sums is not None:
        c = tl.program_id(1) * Q + tl.arange(0, Q)[None, :]
        dbias = tl.load(sums + c, mask=c < C, other=0.0).to(tl.float32)
        dweight = tl.load(sums + 3 * C + c, mask=c < C, other=0.0).to(tl.float32)
        by_u, constant = scale * inverse * (dweight / m), scale * (dbias / m)
    for tile in range(tl.program_id(0), tiles, count):
        place, inside = place_of(tile, pixels, C, P, Q, CHANNELS_LAST, LARGE)
        centered = tl.load(u + place, mask=inside, other=0.0).to(tl.float32) - center
        g = tl.load(dz + place, mask=inside, other=0.0).to(tl.float32)
        du = tl.where(centered * scale + b > 0, g, g * s) * scale
        if sums is not None:  # else an infinity in u would make NaN of zero
            du -= centered * by_u + constant
        tl.store(out + place, rounded(du, out.dtype.element_ty), mask=inside)
