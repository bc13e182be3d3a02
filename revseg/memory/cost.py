"""What an operation costs, in seconds of no machine in particular.

Only the ratio of two costs is used: how much longer a step takes that runs some of its modules again. An operation
takes as long as its arithmetic or as moving its bytes, whichever is more, and beside that as moving what a library copies
inside. One core with vectors of 512 bits does some twenty operations in the time in which it moves a byte, as a GPU does in float32.
Both numbers are those of single operations in a step of a U-Net, 1 x 3 x 512 x 1024, torch 2.13.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

_FLOPS = 1.4e11  # of one core, in convolutions of maps that lie as these read them
_BYTES = 6e9  # read and written, of maps that no cache holds


def cost_of(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, tensors: Sequence[Tensor]
) -> float:
    """Seconds; `tensors` are those read and written."""
    if torch.Tag.inplace_view in func.tags or func.is_view:
        return 0.0
    moved = sum(x.numel() * x.element_size() for x in tensors)
    count = flop_registry.get(func._overloadpacket)
    flops = 0 if count is None else count(*args, **kwargs, out_val=result)
    return max(moved / _BYTES, flops / _FLOPS)


def time_of_copies(size: int) -> float:
    """Seconds in which so many bytes are read and written."""
    return 2 * size / _BYTES


def is_product(func: Any) -> bool:
    """Whether an operation is a convolution or another product, and more than moving bytes."""
    return func._overloadpacket in flop_registry
