"""Running statistics of a batch norm, moved on by those of a batch.

In PyTorch these are eight small operations a layer. On a GPU each is a launch, and a layer of a small map is
three: so here they are one kernel, which also counts the batch. It writes to what it is given; that a
batch counts once is for the caller to see to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from revseg.kernels.dispatch import has_kernel
from revseg.kernels.precision import widest
from revseg.kernels.verify import Kernel


def move_statistics(
    running_mean: Tensor,
    running_var: Tensor,
    batches: Tensor | None,
    mean: Tensor,
    var: Tensor,
    values: int,
    momentum: float | None,
) -> None:
    """Running statistics after one more batch, written to the first three arguments.

    Args:
        running_mean: [C], of any float type.
        running_var: [C], unbiased, of the same type.
        batches: How many batches they have seen, int64, one value; None if nobody counts.
        mean: Of the batch [C], float64 where the device has it.
        var: Of the batch [C], of the same dtype, biased.
        values: Of each channel in the batch, at least 2.
        momentum: Weight of the batch; None for the mean of all batches, or none at all if nobody counts.

    Raises:
        ValueError: If the batch has one value a channel, which has no variance.
    """
    if values < 2:
        raise ValueError(f"expected at least 2 values a channel, got {values}")
    if has_kernel(running_mean, running_var, mean, var):
        from revseg.kernels.running_statistics import gpu

        gpu.move_statistics(running_mean, running_var, batches, mean, var, values, momentum)
        return
    if batches is not None:
        batches.add_(1)
        momentum = 1 / float(batches) if momentum is None else momentum
    share = momentum or 0.0
    running_mean.copy_(torch.lerp(running_mean.to(mean.dtype), mean, share))
    running_var.copy_(torch.lerp(running_var.to(var.dtype), var * (values / (values - 1)), share))


def moved_statistics(
    running_mean: Tensor, running_var: Tensor, batches: Tensor, *batch: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The same on copies: the new running mean, running variance and count."""
    moved = running_mean.clone(), running_var.clone(), batches.clone()
    move_statistics(*moved, *batch)
    return moved


def reference(
    running_mean: Tensor,
    running_var: Tensor,
    batches: Tensor,
    mean: Tensor,
    var: Tensor,
    values: int,
    momentum: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The meaning of `moved_statistics`."""
    batches = batches + 1
    share = 1 / float(batches) if momentum is None else momentum
    unbiased = var * (values / (values - 1))
    mean, unbiased = mean.to(running_mean.dtype), unbiased.to(running_var.dtype)
    return (1 - share) * running_mean + share * mean, (1 - share) * running_var + share * unbiased, batches


def example_inputs(
    device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int, float]:
    """Arguments of a small call of `moved_statistics`."""
    running, batch = torch.rand(2, 2, 11, device=device)
    batches = torch.tensor(4, device=device)
    return *running.to(dtype), batches, *batch.to(widest(device)), 90, 0.1


KERNELS = (Kernel(moved_statistics, reference, example_inputs),)
