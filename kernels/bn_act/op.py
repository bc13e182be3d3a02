"""Batch norm and a leaky activation in one pass, keeping nothing but what the convolution made.

    n = (u - mean) * scale + bias,   scale = weight / sqrt(var + eps)
    z = n where n > 0, else slope * n

Plain PyTorch keeps u for batch norm, n for the activation and z for the next convolution. Here u
alone is kept: z and all gradients follow from it and a few vectors. A block of u goes through all
operations before the next one (`revseg.kernels.cpu.blocks`). Sums are taken per block and then added,
always in the same order: more exact than one long sum, and the same bits twice. On a CPU this takes
half the time of PyTorch's batch norm and PReLU; very small maps go through these (`revseg.kernels.cpu.native`).

Letters: u the raw map [N, C, H, W], n the normalised one, z the activated one; M = N * H * W.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from revseg.kernels.batch_statistics.op import batch_statistics
from revseg.kernels.cpu import native
from revseg.kernels.cpu.blocks import Matrix
from revseg.kernels.cpu.compiled import is_compiled, may_add, run
from revseg.kernels.dispatch import has_kernel
from revseg.kernels.norm import Norm
from revseg.kernels.shapes import has_values
from revseg.kernels.strides import as_dense, memory_like
from revseg.kernels.verify import Kernel, gradient_like


def bn_act(u: Tensor, norm: Norm, out: Tensor | None = None) -> Tensor:
    """The activated map z [N, C, H, W], of the dtype and strides of u.

    Args:
        u: The raw map.
        norm: Statistics and parameters.
        out: Written to instead of new memory; may be u itself.
    """
    z = memory_like(u, u.dtype, out)
    if has_kernel(u):
        from revseg.kernels.bn_act import gpu

        return gpu.bn_act(u, norm, z)
    if native.is_small(u):
        return z.copy_(native.activated(u, norm))
    matrix, written = Matrix(u), Matrix(z)
    if not has_values(u):
        matrix.one_block(2)
        return z
    if is_compiled(matrix):
        vectors = matrix.along(norm.vectors)
        run("act_in_place", matrix.whole(), *vectors) if z is u else run(
            "act", matrix.whole(), *vectors, written.whole()
        )
        return z
    results = written.blocks() if matrix.direct else matrix.scratch()
    for n, y in zip(_activated(matrix, norm, results), written.blocks(), strict=True):
        if not matrix.direct:
            y.copy_(n)
    return z


def reference(u: Tensor, norm: Norm) -> Tensor:
    """The activated map from the raw one, in a few lines of differentiable PyTorch."""
    wide = torch.promote_types(u.dtype, torch.float32)
    mean, scale, bias, slope = (v.to(wide)[:, None, None] for v in norm.vectors)
    n = (u.to(wide) - mean) * scale + bias
    return torch.where(n > 0, n, n * slope).to(u.dtype)


def bn_act_add(u: Tensor, norm: Norm, x: Tensor, sign: float = 1.0, out: Tensor | None = None) -> Tensor:
    """A stream updated by the activated map, x + sign * z [N, C, H, W]; the map itself is never stored.

    The same bits as `x + bn_act(u, norm)`, or `x - bn_act(u, norm)`, of the dtype of x and the strides of u.

    Args:
        u: The raw map.
        norm: Statistics and parameters.
        x: The stream, of the dtype of u or a wider one.
        sign: 1.0 to couple, -1.0 to uncouple.
        out: Written to instead of new memory; may be x, or u if that has the dtype.

    Raises:
        ValueError: If x is not of the shape of u.
        TypeError: If the dtype of x cannot hold the values of u.
    """
    if x.shape != u.shape:
        raise ValueError(f"expected a stream of the shape of the map {(*u.shape,)}, got {(*x.shape,)}")
    if torch.promote_types(x.dtype, u.dtype) != x.dtype:
        raise TypeError(f"expected a stream of the dtype of the map or a wider one, {u.dtype}, got {x.dtype}")
    y = memory_like(u, x.dtype, out)
    x = as_dense(x, u)
    if has_kernel(u, x):
        from revseg.kernels.bn_act import gpu

        return gpu.bn_act_add(u, norm, x, sign, y)
    if native.is_small(u):
        return torch.add(x, native.activated(u, norm), alpha=sign, out=y)
    matrix, added, written = Matrix(u), Matrix(x), Matrix(y)
    if not has_values(u):
        matrix.one_block(3)
        return y
    own = y.data_ptr() not in (u.data_ptr(), x.data_ptr())
    if abs(sign) == 1 and own and is_compiled(matrix):
        if not may_add(matrix, added):
            return torch.add(x, bn_act(u, norm, y if y.dtype == u.dtype else None), alpha=sign, out=y)
        args = matrix.whole(), *matrix.along(norm.vectors), added.whole(), written.whole()
        run("act_added" if sign > 0 else "act_subtracted", *args)
        return y
    for n, before, after in zip(
        _activated(matrix, norm, matrix.scratch()), added.blocks(), written.blocks(), strict=True
    ):
        torch.add(before, n.to(u.dtype), alpha=sign, out=after)
    return y


def add_reference(u: Tensor, norm: Norm, x: Tensor) -> Tensor:
    """The meaning of `bn_act_add`."""
    return x + reference(u, norm)


def _activated(u: Matrix, norm: Norm, results: Iterable[Tensor]) -> Iterator[Tensor]:
    """Every block of z, in `results`, not yet rounded to the dtype of u."""
    fixed = norm.slope if isinstance(norm.slope, float) else None
    for x, (mean, scale, bias, slope), n, t in zip(
        u.blocks(), u.spread(norm.vectors), results, u.scratch(), strict=True
    ):
        torch.sub(x, mean, out=n).mul_(scale).add_(bias)
        if fixed == 0.0:
            n.clamp_min_(0)
        elif fixed != 1.0:
            torch.clamp(n, max=0, out=t).mul_(slope)
            n.clamp_min_(0).add_(t)
        yield n


def example_inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Norm]:
    """Arguments of a small call of `bn_act`."""
    u = torch.randn(2, 5, 7, 9, device=device).to(dtype)
    weight, bias, slope = torch.randn(3, 5, device=device)
    return u, Norm(*batch_statistics(u), weight, bias, slope, 1e-5)


def add_example_inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Norm, Tensor]:
    """Arguments of a small call of `bn_act_add`."""
    u, norm = example_inputs(device, dtype)
    return u, norm, gradient_like(u)


KERNELS = (
    Kernel(bn_act, reference, example_inputs),
    Kernel(bn_act_add, add_reference, add_example_inputs),
)
