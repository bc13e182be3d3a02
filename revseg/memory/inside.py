"""Bytes that an operation takes inside, and how its maps lie: what the rules for all kinds of operations share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from revseg.tensors import CHANNELS_LAST


@dataclass(frozen=True)
class Workspace:
    """Bytes beside the arguments: the most until the last result is there, the most beside all results, and those copied."""

    before: int
    beside: int
    copied: int = 0


def lies_by_pixels(x: Tensor) -> bool:
    """Whether channels lie side by side, be it in a larger map."""
    return x.ndim in CHANNELS_LAST and x.stride(1) == 1 and x.shape[1] > 1 and x[0, 0].numel() > 1


def order_of(x: Tensor) -> torch.memory_format:
    """The order in which a map lies, or would as a map of its own."""
    return CHANNELS_LAST[x.ndim] if lies_by_pixels(x) else torch.contiguous_format


def copies(order: torch.memory_format, *maps: Tensor) -> int:
    """Bytes of the maps that do not lie in an order."""
    return sum(x.nbytes for x in maps if not x.is_contiguous(memory_format=order))
