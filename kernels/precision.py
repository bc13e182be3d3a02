"""The dtype in which statistics and sums are kept: float64, or float32 on devices that have no other.

GPUs of Apple and some of Intel refuse float64. What is kept in it are a few numbers a channel, whose parts were
summed in float32 before, so there these numbers are as exact as PyTorch's own.
"""

from functools import lru_cache

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

_KNOWN = {"cpu": torch.float64, "cuda": torch.float64, "meta": torch.float64, "mps": torch.float32}


def widest(device: torch.device) -> torch.dtype:
    """The widest floating dtype of a device."""
    return _KNOWN.get(device.type) or _found(device)


@lru_cache
def _found(device: torch.device) -> torch.dtype:
    """What the device says when it is asked to count in float64."""
    try:
        with unset_fake_temporarily():
            torch.ones((), dtype=torch.float64, device=device).add_(1)
    except (RuntimeError, TypeError, NotImplementedError):  # it depends on the device which
        return torch.float32
    return torch.float64
