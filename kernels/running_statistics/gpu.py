"""Running statistics moved on by those of a batch, as one Triton kernel."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from revseg.kernels.gpu.rounding import rounded


@torch.library.custom_op("revseg::move_statistics", mutates_args=("running_mean", "running_var", "batches"))
def move_statistics(
    running_mean: Tensor,
    running_var: Tensor,
    batches: Tensor | None,
    mean: Tensor,
    var: Tensor,
    values: int,
    momentum: float | None,
) -> None:
    """As `revseg.kernels.running_statistics.op.move_statistics`."""
    channels = len(mean)
    with torch.cuda.device_of(mean):
        _move_kernel[(1,)](
            running_mean, running_var, batches, mean, var, values, momentum,
            C=channels, BLOCK=triton.next_power_of_2(channels),
        )  # fmt: skip


@move_statistics.register_fake
def _(running_mean, running_var, batches, mean, var, values, momentum) -> None:
    return None


@triton.jit
def _move_kernel(
    running_mean, running_var, batches, mean, var, values, momentum, C: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    # the one program owns all channels
    c = tl.arange(0, BLOCK)
    inside = c < C
    share = tl.zeros([BLOCK], tl.float64)
    if momentum is not None:
        share += momentum
    if batches is not None:
        seen = tl.load(batches) + 1
        if momentum is None:
            share += 1.0 / seen.to(tl.float64)
        tl.store(batches, seen)
    count = tl.zeros([BLOCK], tl.float64) + values
    old = tl.load(running_mean + c, mask=inside, other=0.0).to(tl.float64)
    new = tl.load(mean + c, mask=inside, other=0.0)
    moved = (old + share * (new - old)).to(tl.float32)
    tl.store(running_mean + c, rounded(moved, running_mean.dtype.element_ty), mask=inside)
    old = tl.load(running_var + c, mask=inside, other=0.0).to(tl.float64)
    new = tl.load(var + c, mask=inside, other=0.0) * (count / (count - 1.0))
    moved = (old + share * (new - old)).to(tl.float32)
    tl.store(running_var + c, rounded(moved, running_var.dtype.element_ty), mask=inside)
