"""Where the kernels run: on GPUs that Triton compiles for.

`has_kernel` is the one rule. Each operation asks it and otherwise computes in plain PyTorch, which
means the same. Two other places run the kernels without a GPU: Triton's interpreter (`TRITON_INTERPRET=1` in the
environment, for the tests), and `forced`, inside of which launches are compiled and not run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from revseg.kernels.shapes import has_values

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OLDEST_CUDA = (7, 5)  # Turing; older ones have no use of tl.dot here

_forced: ContextVar[bool] = ContextVar("forced", default=False)


def kernels_are_on() -> bool:
    """Whether layers use the operations of this library; `REVSEG_KERNELS=0` turns them off."""
    return os.environ.get("REVSEG_KERNELS", "1") != "0"


def is_interpreting() -> bool:
    """Whether Triton's interpreter stands in for a GPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def has_kernel(*tensors: Tensor) -> bool:
    """Whether an operation on these tensors, all of one device, runs as a Triton kernel."""
    first = tensors[0]
    on_cpu = first.device.type == "cpu"
    if on_cpu and not (_forced.get() or is_interpreting()):
        return False
    return (
        first.dtype in DTYPES
        and all(has_values(x) for x in tensors)
        and kernels_are_on()
        and (on_cpu or device_has_triton(first.device))
        and has_triton()
    )


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


@lru_cache(maxsize=1)
def triton_version() -> tuple[int, int]:
    """Of the Triton that is installed, as in (3, 7)."""
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


@lru_cache
def device_has_triton(device: torch.device) -> bool:
    """Whether Triton compiles for this device."""
    if device.type != "cuda":
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= OLDEST_CUDA


@contextmanager
def forced() -> Iterator[None]:
    """Launches kernels for CPU tensors too: for checks that compile what is launched, and run nothing."""
    token = _forced.set(True)
    try:
        yield
    finally:
        _forced.reset(token)


@contextmanager
def plain() -> Iterator[None]:
    """No kernels, in the whole process: for what a kernel is compared with."""
    before = os.environ.get("REVSEG_KERNELS", "1")
    os.environ["REVSEG_KERNELS"] = "0"
    try:
        yield
    finally:
        os.environ["REVSEG_KERNELS"] = before
