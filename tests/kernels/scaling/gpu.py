"""`scaling.scale` as a kernel; `scale_hungrily` holds more values than a thread has registers."""

import torch
import triton
import triton.language as tl


@torch.library.custom_op("revseg_tests::scale", mutates_args=())
def scale(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    height, width = x.shape[2:]
    grid = (triton.cdiv(x.numel(), 64),)
    _scale_kernel[grid](x, factor, y, x.numel(), height * width, x.shape[1], BLOCK=64, num_warps=1)
    return y


def scale_hungrily(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    _hungry_kernel[(1,)](x, y, SIZE=16384, num_warps=1)
    return y


@triton.jit
def _scale_kernel(x, factor, y, size, pixels, channels, BLOCK: tl.constexpr):
    # a program owns BLOCK consecutive elements
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = i < size
    value = tl.load(x + i, mask=inside, other=0.0).to(tl.float32)
    by = tl.load(factor + i // pixels % channels, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + i, value * by, mask=inside)


@triton.jit
def _hungry_kernel(x, y, SIZE: tl.constexpr):
    # one warp holds all values, 512 a thread, until it knows their sum
    i = tl.arange(0, SIZE)
    value = tl.load(x + i)
    tl.store(y + i, value / tl.sum(value))
