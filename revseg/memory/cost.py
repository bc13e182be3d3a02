"""What an operation costs, in seconds of no machine in particular.

Only the ratio of two costs is used: how much longer a step takes that runs some of its modules again. An operation
takes as long as its arithmetic or as moving its bytes, whichever is more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

_FLOPS = 5e10  # of one core
_BYTES = 1e10


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
