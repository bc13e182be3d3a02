"""Bytes to measure."""

import torch


def block(size: int) -> torch.Tensor:
    """`size` bytes that nobody shares."""
    return torch.empty(size, dtype=torch.uint8)
