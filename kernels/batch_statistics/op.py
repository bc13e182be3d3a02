"""Mean and variance by channel of a map, in one pass over it.

The map goes block by block (`revseg.kernels.cpu.blocks`); the sums of the blocks are then added, always in
the same order: more exact than one long sum, and the same bits twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from revseg.kernels.cpu import native
from revseg.kernels.cpu.blocks import Matrix
from revseg.kernels.cpu.compiled import is_compiled, run
from revseg.kernels.dispatch import has_kernel
from revseg.kernels.precision import widest
from revseg.kernels.shapes import has_values
from revseg.kernels.verify import Kernel


def batch_statistics(u: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance by channel, of all images.

    Args:
        u: A map [N, C, H, W].

    Returns:
        Two vectors [C], float64 where the device has it (`widest`).
    """
    if has_kernel(u):
        from revseg.kernels.batch_statistics import gpu

        return gpu.batch_statistics(u)  # type: ignore[no-any-return]
    if native.is_small(u):
        return native.statistics(u)
    matrix, wide = Matrix(u), widest(u.device)
    if not has_values(u):
        matrix.one_block(2)
        mean = u.new_empty(u.shape[1], dtype=wide)
        return mean, torch.empty_like(mean)
    if is_compiled(matrix):
        mean, rest, square = (v.to(wide) for v in run("statistics", matrix.whole()))
        count = matrix.whole().shape[1]
        return matrix.merged_whole(mean + rest / count, square - rest.square() / count)
    means, squares = [], []
    for x, t in zip(matrix.blocks(), matrix.scratch(), strict=True):
        x = x.to(matrix.dtype)
        mean = x.mean(matrix.dim, keepdim=True)
        rest = torch.sub(x, mean, out=t).mean(matrix.dim).to(wide)  # what rounding left of the mean
        square = t.square_().sum(matrix.dim).to(wide)
        means.append(mean.flatten().to(wide) + rest)
        squares.append(square - rest.square() * (x.numel() / rest.numel()))
    return matrix.merged(means, squares)


def reference(u: Tensor) -> tuple[Tensor, Tensor]:
    """The meaning of `batch_statistics`."""
    var, mean = torch.var_mean(u.to(torch.promote_types(u.dtype, torch.float32)), (0, 2, 3), correction=0)
    return mean.to(widest(u.device)), var.to(widest(u.device))


def example_inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor]:
    """Arguments of a small call of `batch_statistics`."""
    u = torch.randn(2, 5, 7, 9, device=device).to(dtype)
    return (u + 2 * u.abs().amax(),)  # the relative error of a mean near 0 says nothing


KERNELS = (Kernel(batch_statistics, reference, example_inputs),)
