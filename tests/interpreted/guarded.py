"""Tensors between two pages that nobody may touch, so that a kernel that leaves its memory stops at once."""

import ctypes
import faulthandler
import mmap
import multiprocessing
from collections.abc import Callable

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_kept: list[mmap.mmap] = []


def guarded(x: Tensor, end: bool = True) -> Tensor:
    """A copy of x, of its strides, that begins where a forbidden page ends, or ends where one begins."""
    size = x.numel() * x.element_size()
    body = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, body + 2 * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (start, start + PAGE + body):
        assert _libc.mprotect(ctypes.c_void_p(page), PAGE, 0) == 0
    _kept.append(memory)
    offset = PAGE + (body - size if end else 0)
    flat = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=offset).view(x.dtype)
    return flat.as_strided(x.shape, x.stride()).copy_(x)


def survives(call: Callable[[], object]) -> bool:
    """Whether a call touches no forbidden page; it runs in a process of its own."""

    def quietly() -> None:
        faulthandler.disable()
        call()

    process = multiprocessing.get_context("fork").Process(target=quietly)
    process.start()
    process.join()
    return process.exitcode == 0
