"""Batch norm over the batches of all processes.

torch's own `SyncBatchNorm` refuses a CPU. This one adds up counts, sums and squares by the collectives
that autograd knows, on any backend, and its backward pass follows from them. A run again in the
backward pass repeats the collectives, on all processes alike. One process is its plain twin.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d`, whose statistics in training are those of the batches of all processes.

    Names and values of parameters and buffers are those of `nn.BatchNorm2d`.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(x)
        values = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        count = values.numel() // values.shape[1]
        own_mean = values.mean((0, 2, 3))
        own_square = (values - own_mean.view(1, -1, 1, 1)).square().sum((0, 2, 3))
        counts = torch.tensor(count, device=x.device)
        dist.all_reduce(counts)
        total = int(counts)
        mean = _Sum.apply(own_mean * (count / total))  # type: ignore[no-untyped-call]
        spread = own_square + count * (own_mean - mean).square()  # around the mean of all
        var = _Sum.apply(spread) / total  # type: ignore[no-untyped-call]
        self._move(mean.detach(), var.detach(), total)
        shape = (1, -1, 1, 1)
        y = (values - mean.view(shape)) * (var + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)  # type: ignore[no-any-return]

    @torch.no_grad()
    def _move(self, mean: Tensor, var: Tensor, total: int) -> None:
        """Moves the running statistics as `nn.BatchNorm2d` does."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_((var * (total / (total - 1))).to(self.running_var.dtype), momentum)


class _Sum(torch.autograd.Function):
    """The sum of a tensor over the processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return _Sum.apply(dy)  # type: ignore[no-any-return, no-untyped-call]


def with_synced_norms(model: nn.Module) -> nn.Module:
    """The network, in which the batch norms of two dimensions are synchronised; the same parameters and buffers."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncedBatchNorm2d
    return model
