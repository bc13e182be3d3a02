"""The values of a map in another memory layout.

PyTorch's own copy from contiguous to channels_last takes ten times as long as a copy without a change of layout;
merged into one loop (`revseg.kernels.merged`) it takes about twice as long.
"""

from __future__ import annotations

import torch
from torch import Tensor

from revseg.kernels.flat import Flat
from revseg.kernels.merged import is_merged, run


def relaid(x: Tensor, layout: torch.memory_format, out: Tensor | None = None) -> Tensor:
    """A copy of x in this layout; x itself if it is laid out so, and no memory is given.

    Args:
        x: A map [N, C, H, W].
        layout: `torch.contiguous_format` or `torch.channels_last`.
        out: Written to instead of new memory; of any strides.
    """
    if out is None and x.is_contiguous(memory_format=layout):
        return x
    if torch.is_grad_enabled() and x.requires_grad:
        return x.contiguous(memory_format=layout)
    y = torch.empty_like(x, memory_format=layout) if out is None else out
    gapless = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    if x.stride() != y.stride() and is_merged(Flat(x if gapless else y)):
        run("relaid", x, y)
        return y
    return y.copy_(x)
