"""Bytes that an operation takes inside, and how its maps lie: what the rules for all kinds of operations share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Workspace:
    """Bytes beside the arguments: the most until the last result is there, the most beside all results, and those copied."""

    before: int
    beside: int
    copied: int = 0


def is_channels_last(x: Tensor) -> bool:
    """Whether channels lie side by side, be it in a larger map."""
    return x.ndim in (4, 5) and x.stride(1) == 1 and x.shape[1] > 1 and x[0, 0].numel() > 1


def order_of(x: Tensor) -> torch.memory_format:
    """The order in which a map lies, or would as a map of its own."""
    if not is_channels_last(x):
        return torch.contiguous_format
    return torch.channels_last if x.ndim == 4 else torch.channels_last_3d


def copies(order: torch.memory_format, *maps: Tensor) -> int:
    """Bytes of the maps that do not lie in an order."""
    return sum(x.nbytes for x in maps if not x.is_contiguous(memory_format=order))
