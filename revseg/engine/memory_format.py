"""The memory layout of streams inside of a chain.

On contiguous maps a convolution of a CPU copies its input, its output and their gradients into a layout of its own
and back: one to seven maps of memory, and up to a third of its time. On channels_last it copies nothing. Nobody outside
of a chain sees how its streams lie in memory, so there they lie as convolutions want them; the doors of the chain
give back what the caller has.

Only for functions made of modules that are known to take either layout (a class of its own says
`any_memory_format = True`; what inherits from it does not), with convolutions of stride 1: the weight
gradient of a strided 1x1 convolution of 8 channels in channels_last writes beyond its memory (torch 2.13).
And not where bits count: convolutions round otherwise in the other layout.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from revseg.engine.tracing import has_hooks

_INDIFFERENT = (  # to the layout of what they are given; nn.Dropout draws in the order of memory
    *(nn.Sequential, nn.BatchNorm2d, nn.GroupNorm, nn.Identity, nn.Dropout2d),
    *(nn.PReLU, nn.ReLU, nn.LeakyReLU, nn.SiLU, nn.GELU),
)


def inner_layout(x: Tensor, functions: Iterable[Any]) -> torch.memory_format | None:
    """The layout for the streams of a chain of these functions, None for that of x, one of them [N, C, H, W]."""
    suits = (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.ndim == 4
        and x.is_contiguous()
        and min(x.shape[1:]) > 1
        and _is_worth_it(x)
        and all(isinstance(fn, nn.Module) and all(map(_is_indifferent, fn.modules())) for fn in functions)
    )
    return torch.channels_last if suits else None


def _is_worth_it(x: Tensor) -> bool:
    """Whether there are passes that copy it from one layout into the other; loads the kernels."""
    from revseg import ops

    return ops.kernels_are_on() and ops.is_large(x)


def _is_indifferent(module: nn.Module) -> Any:
    if has_hooks(module):
        return False
    if type(module) is nn.Conv2d:
        return module.stride == (1, 1) and module.groups in (1, module.in_channels)
    return type(module) in _INDIFFERENT or vars(type(module)).get("any_memory_format", False)


def relaid(x: Tensor, layout: torch.memory_format | None) -> Tensor:
    """A stream in the layout of a chain, x itself if that has none of its own."""
    return x if layout is None else _relaid(x, layout)


def restored(x: Tensor, layout: torch.memory_format | None) -> Tensor:
    """A stream of such a chain as the caller has it."""
    return x if layout is None else _relaid(x, torch.contiguous_format)


def joined(streams: tuple[Tensor, Tensor], layout: torch.memory_format | None) -> Tensor:
    """Streams that leave a chain, as one tensor [N, 2C, H, W]."""
    if layout is None:
        return torch.cat(streams, 1)
    n, c, height, width = streams[0].shape
    y = streams[0].new_empty(n, 2 * c, height, width)
    for x, half in zip(streams, y.chunk(2, 1), strict=True):
        _relaid(x, torch.contiguous_format, out=half)
    return y


def _relaid(x: Tensor, layout: torch.memory_format, out: Tensor | None = None) -> Tensor:
    from revseg import ops

    return ops.relaid(x, layout, out=out)
