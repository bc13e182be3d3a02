"""What operations on a CPU take inside, beside their results.

The allocator sees it, a caller does not: copies in other layouts, in wider numbers, and columns of pixels. The rules are
read from torch 2.13's events, on processors with vectors of 512 bits, with and without matrix tiles (AMX).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from revseg.memory.convolution_workspace import CONVOLUTIONS
from revseg.memory.inside import Workspace
from revseg.memory.passes import PASSES


def workspace(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Workspace | None:
    """Of an operation on a CPU; None if it has none that is known.

    Args:
        func: The operation.
        args: Its arguments.
        kwargs: Those given by name.
        result: What it returned.
    """
    rule = CONVOLUTIONS.get(func) or PASSES.get(func)
    first = args[0] if args else None
    if rule is None or not isinstance(first, Tensor) or first.device.type != "cpu" or not first.numel():
        return None
    return rule(args, kwargs, result)
