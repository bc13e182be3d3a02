"""Batches that move the running statistics of a batch norm, and what PyTorch makes of them."""

import torch
from torch import nn

CHANNELS = 11


def moved_by_pytorch(batches, momentum, counts, dtype):
    """The buffers of a batch norm after these batches, by name."""
    bn = nn.BatchNorm2d(CHANNELS, momentum=momentum).to(dtype)
    if not counts:
        bn.num_batches_tracked = None
    for x in batches:
        bn(x.to(dtype))
    return dict(bn.named_buffers())


def moved_by_us(move, batches, momentum, counts, dtype):
    """The same by `move_statistics`."""
    running = {
        "running_mean": torch.zeros(CHANNELS, dtype=dtype),
        "running_var": torch.ones(CHANNELS, dtype=dtype),
        "num_batches_tracked": torch.tensor(0) if counts else None,
    }
    for x in batches:
        var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
        move(*running.values(), mean, var, x.numel() // CHANNELS, momentum)
    return {name: buffer for name, buffer in running.items() if buffer is not None}


def some_batches(count=3):
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, CHANNELS, 3, 5), (1, CHANNELS, 1, 2), (3, CHANNELS, 4, 4)]
    return [3 + 2 * torch.randn(size, generator=generator) for size in sizes[:count]]


def assert_as_in_pytorch(move, momentum, counts, dtype):
    """Buffers at most twice as far from those in float64 as PyTorch's, or a rounding a batch."""
    batches = some_batches()
    ours = moved_by_us(move, batches, momentum, counts, dtype)
    plain = moved_by_pytorch(batches, momentum, counts, dtype)
    exact = moved_by_pytorch(batches, momentum, counts, torch.float64)
    assert ours.keys() == plain.keys()
    for name, truth in exact.items():
        assert ours[name].dtype == plain[name].dtype
        if not truth.is_floating_point():
            assert torch.equal(ours[name], truth)
            continue
        error, theirs = ((each[name].double() - truth).norm() for each in (ours, plain))
        assert error <= max(2 * theirs, len(batches) * torch.finfo(dtype).eps * truth.norm()), name
