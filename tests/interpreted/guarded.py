"""Tensors with a page that may not be touched behind their last element, or in front of their first."""

import ctypes
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE


def guarded(x: Tensor, shape: Sequence[int] | None = None, *, end: bool = True) -> Tensor:
    """A copy of a contiguous tensor; one step over its end, or its start, ends the process.

    Args:
        x: What is copied.
        shape: Of the result, with as many elements; that of x if None.
        end: Whether the end is guarded to the byte, else the start.
    """
    size = x.numel() * x.itemsize
    body = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, body + 2 * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (start, start + PAGE + body):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), PAGE, 0) == 0
    offset = PAGE + (body - size if end else 0)
    copy = torch.frombuffer(memory, dtype=x.dtype, count=math.prod(x.shape), offset=offset)
    return copy.view(x.shape if shape is None else shape).copy_(x)
