"""The sum of average pools as Triton kernels: each map is read once, and no pool's output is stored.

The pools share a center, so forward a program walks outwards over the pixels of the largest and
adds up what each pool covers on the way. Backward it gathers: a gradient of the output is divided
by what each pool counted there, and given to those of the program's own pixels that the pool covered.

Letters: as in `sum_of_pools`; a cell is an output and the 2 x 2 pixels of x from its center on. A
program owns BI rows by BJ columns of cells, by Q channels. R are the reaches of the pools in rising
order, after -1 for none.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from revseg.kernels.gpu.rounding import rounded

THREADS = 128  # of a program


def sum_of_pools(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """As `revseg.kernels.sum_of_pools.op.sum_of_pools`."""
    y: Tensor = _sum_of_pools(x, sorted(sizes))
    return y


def sum_of_pools_backward(dy: Tensor, x: Tensor, sizes: Sequence[int]) -> Tensor:
    """As `revseg.kernels.sum_of_pools.op.sum_of_pools_backward`."""
    dx: Tensor = _sum_of_pools_backward(dy, x, sorted(sizes))
    return dx


@torch.library.custom_op("revseg::sum_of_pools", mutates_args=(), schema="(Tensor x, int[] sizes) -> Tensor")
def _sum_of_pools(x: Tensor, sizes: Sequence[int]) -> Tensor:
    y = _output(x)
    grid, constants = _launch(x, y, sizes, 16)
    with torch.cuda.device_of(x):
        _forward_kernel[grid](x, y, *x.shape[1:], *y.shape[2:], *x.stride(), *y.stride(), **constants)
    return y


@torch.library.custom_op(
    "revseg::sum_of_pools_backward", mutates_args=(), schema="(Tensor dy, Tensor x, int[] sizes) -> Tensor"
)
def _sum_of_pools_backward(dy: Tensor, x: Tensor, sizes: Sequence[int]) -> Tensor:
    dx = torch.empty_like(x)
    grid, constants = _launch(dx, dy, sizes, 8)  # of four pixels each
    with torch.cuda.device_of(x):
        _backward_kernel[grid](dx, dy, *x.shape[1:], *dy.shape[2:], *dx.stride(), *dy.stride(), **constants)
    return dx


@_sum_of_pools.register_fake
def _(x: Tensor, sizes: Sequence[int]) -> Tensor:
    return _output(x)


def _output(x: Tensor) -> Tensor:
    """Memory for y, of the layout of x."""
    shape = (*x.shape[:2], *((length + 1) // 2 for length in x.shape[2:]))
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


@_sum_of_pools_backward.register_fake
def _(dy: Tensor, x: Tensor, sizes: Sequence[int]) -> Tensor:
    return torch.empty_like(x)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *_, x, ctx.sizes = inputs
    ctx.save_for_backward(x)


def _forward_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    return _sum_of_pools_backward(dy, *ctx.saved_tensors, ctx.sizes), None


def _backward_gradient(ctx: Any, ddx: Tensor) -> tuple[Tensor, None, None]:
    return _sum_of_pools(ddx, ctx.sizes), None, None


_sum_of_pools.register_autograd(_forward_gradient, setup_context=_keep)
_sum_of_pools_backward.register_autograd(_backward_gradient, setup_context=_keep)


def _launch(x: Tensor, y: Tensor, sizes: Sequence[int], width: int) -> tuple[tuple[int, int], dict[str, Any]]:
    """The programs, and what they are compiled for; a thread loads `width` bytes at a time where channels are last."""
    images, channels, *size = y.shape
    rows, columns, groups = map(triton.next_power_of_2, (*size, channels))
    last = x.stride(1) == 1 and channels >= 8
    width = width if channels > 8 else min(width, 8)  # or registers spill
    values = THREADS * (width // x.element_size() if last else 2)
    q = min(groups, max(1, values // 8)) if last else 1
    bi = min(rows, 4)
    bj = min(columns, values // (q * bi))
    q = min(groups, values // (bi * bj))
    cells = images * triton.cdiv(size[0], bi) * triton.cdiv(size[1], bj)
    large = any(sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) >= 2**31 for t in (x, y))
    reaches = (-1, *(size // 2 for size in sizes))
    constants = {"R": reaches, "BI": bi, "BJ": bj, "Q": q, "LARGE": large, "num_warps": THREADS // 32}
    return (cells, triton.cdiv(channels, q)), constants


@triton.jit
def _cells(h, w, BI: tl.constexpr, BJ: tl.constexpr, Q: tl.constexpr, LARGE: tl.constexpr):
    """The image of a program, its rows and columns of outputs [P, 1], P = BI * BJ, and its channels [1, Q]."""
    across = tl.cdiv(w, BJ)
    tile = tl.program_id(0)
    of_image = across * tl.cdiv(h, BI)
    image, tile = tile // of_image, tile % of_image
    p = tl.arange(0, BI * BJ)[:, None]
    i, j = tile // across * BI + p // BJ, tile % across * BJ + p % BJ
    c = tl.program_id(1) * Q + tl.arange(0, Q)[None, :]
    if LARGE:
        image, i, j, c = image.to(tl.int64), i.to(tl.int64), j.to(tl.int64), c.to(tl.int64)
    return image, i, j, c


@triton.jit
def _counted(i, R: tl.constexpr, length):
    """How many of the pixels along a side a pool covers, around the center of output i."""
    count = tl.minimum(2 * i + R, length - 1) - tl.maximum(2 * i - R, 0) + 1
    return tl.maximum(count, 1).to(tl.float32)  # outputs that do not exist would count none


@triton.jit
def _ring(covered, x, i, j, valid, H, W, xi, xj, INNER: tl.constexpr, OUTER: tl.constexpr):
    """With the pixels that a pool of reach OUTER covers and one of reach INNER does not."""
    for di in tl.static_range(-OUTER, OUTER + 1):
        for dj in tl.static_range(-OUTER, OUTER + 1):
            if (di > INNER or -di > INNER) or (dj > INNER or -dj > INNER):
                a, b = 2 * i + di, 2 * j + dj
                inside = (a >= 0) & (a < H) & (b >= 0) & (b < W) & valid
                covered += tl.load(x + a * xi + b * xj, mask=inside, other=0.0).to(tl.float32)
    return covered


@triton.jit
def _given(dx, share, R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """With its share, if a pool of reach R covers what lies so far from its center."""
    if (ROWS <= R and -ROWS <= R) and (COLUMNS <= R and -COLUMNS <= R):
        dx += share
    return dx


@triton.jit
def _forward_kernel(
    x, y, C, H, W, h, w, xn, xc, xi, xj, yn, yc, yi, yj,
    R: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, Q: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    # a program owns the outputs of its cells
    image, i, j, c = _cells(h, w, BI, BJ, Q, LARGE)
    x += image * xn + c * xc
    covered = tl.zeros([BI * BJ, Q], tl.float32)
    total = tl.zeros([BI * BJ, Q], tl.float32)
    for k in tl.static_range(1, len(R)):
        covered = _ring(covered, x, i, j, c < C, H, W, xi, xj, R[k - 1], R[k])
        total += covered / (_counted(i, R[k], H) * _counted(j, R[k], W))
    out = y + image * yn + c * yc + i * yi + j * yj
    tl.store(out, rounded(total, y.dtype.element_ty), mask=(i < h) & (j < w) & (c < C))


@triton.jit
def _backward_kernel(
    dx, dy, C, H, W, h, w, xn, xc, xi, xj, yn, yc, yi, yj,
    R: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, Q: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    # a program owns the four pixels of its cells
    image, i, j, c = _cells(h, w, BI, BJ, Q, LARGE)
    dy += image * yn + c * yc
    dx00 = tl.zeros([BI * BJ, Q], tl.float32)
    dx01 = tl.zeros([BI * BJ, Q], tl.float32)
    dx10 = tl.zeros([BI * BJ, Q], tl.float32)
    dx11 = tl.zeros([BI * BJ, Q], tl.float32)
    LAST: tl.constexpr = R[len(R) - 1]
    for di in tl.static_range(-(LAST // 2), (LAST + 1) // 2 + 1):
        for dj in tl.static_range(-(LAST // 2), (LAST + 1) // 2 + 1):
            a, b = i + di, j + dj
            inside = (a >= 0) & (a < h) & (b >= 0) & (b < w) & (c < C)
            g = tl.load(dy + a * yi + b * yj, mask=inside, other=0.0).to(tl.float32)
            for k in tl.static_range(1, len(R)):
                share = g / (_counted(a, R[k], H) * _counted(b, R[k], W))
                dx00 = _given(dx00, share, R[k], 2 * di, 2 * dj)
                dx01 = _given(dx01, share, R[k], 2 * di, 2 * dj - 1)
                dx10 = _given(dx10, share, R[k], 2 * di - 1, 2 * dj)
                dx11 = _given(dx11, share, R[k], 2 * di - 1, 2 * dj - 1)
    a, b = 2 * i, 2 * j
    out = dx + image * xn + c * xc + a * xi + b * xj
    inside = (i < h) & (j < w) & (c < C)
    tl.store(out, rounded(dx00, dx.dtype.element_ty), mask=inside)
    tl.store(out + xj, rounded(dx01, dx.dtype.element_ty), mask=inside & (b + 1 < W))
    tl.store(out + xi, rounded(dx10, dx.dtype.element_ty), mask=inside & (a + 1 < H))
    tl.store(out + xi + xj, rounded(dx11, dx.dtype.element_ty), mask=inside & (a + 1 < H) & (b + 1 < W))
