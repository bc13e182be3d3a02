"""The values of a map in another memory layout.

PyTorch's own copy from contiguous to channels_last takes ten times as long as a copy without a change of layout;
compiled into one loop (`revseg.kernels.cpu.compiled`) it takes about twice as long.
"""

from __future__ import annotations

import torch
from torch import Tensor

from revseg.kernels.cpu.blocks import Matrix
from revseg.kernels.cpu.compiled import is_compiled, run
from revseg.kernels.verify import Kernel


def relaid(x: Tensor, layout: torch.memory_format, out: Tensor | None = None) -> Tensor:
    """A copy of x in this layout; x itself if it is laid out so, and no memory is given.

    Args:
        x: A map [N, C, H, W].
        layout: `torch.contiguous_format` or `torch.channels_last`.
        out: Written to instead of new memory; half of a map by its channels, say.
    """
    if out is None and x.is_contiguous(memory_format=layout):
        return x
    if torch.is_grad_enabled() and x.requires_grad:
        return x.contiguous(memory_format=layout)
    y = torch.empty_like(x, memory_format=layout) if out is None else out
    gapless = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    by_pixel = all(t.stride(2) == t.shape[3] * t.stride(3) for t in (x, y))
    if by_pixel and x.stride() != y.stride() and is_compiled(Matrix(x if gapless else y)):
        run("to_contiguous" if y.stride(3) == 1 else "to_channels_last", *map(_by_pixel, (x, y)))
        return y
    return y.copy_(x)


def reference(x: Tensor, layout: torch.memory_format) -> Tensor:
    """The meaning of `relaid`: PyTorch's own copy."""
    return x.contiguous(memory_format=layout)


def _by_pixel(x: Tensor) -> Tensor:
    """A map in any layout as [N, C, H * W]; a view."""
    n, c, h, w = x.shape
    return x.as_strided((n, c, h * w), (x.stride(0), x.stride(1), x.stride(3)))


def example_inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, torch.memory_format]:
    """Arguments of a small call of `relaid`."""
    return torch.randn(2, 5, 7, 9, device=device).to(dtype), torch.channels_last


KERNELS = (Kernel(relaid, reference, example_inputs),)
