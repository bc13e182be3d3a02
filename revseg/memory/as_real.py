"""Results that lie otherwise on a CPU than fake tensors say, put as they really lie.

What is joined with such a result lies as it does, so one vector of a channel's means decides about whole maps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_NORMS = (
    torch.ops.aten.native_batch_norm.default,
    torch.ops.aten._native_batch_norm_legit.default,
    torch.ops.aten._native_batch_norm_legit.no_stats,
    torch.ops.aten._native_batch_norm_legit_functional.default,
    torch.ops.aten._batch_norm_with_update.default,
    torch.ops.aten._batch_norm_with_update_functional.default,
)


def as_real(func: Any, args: tuple[Any, ...], result: Any) -> Any:
    """The result of an operation, a batch norm's map of one pixel contiguous: it may lie in either order, and is taken to be so."""
    if func not in _NORMS or args[0].device.type != "cpu" or not args[0].is_contiguous():
        return result
    y: Tensor = result[0]
    strides = torch.empty(y.shape, device="meta").stride()
    return result if y.stride() == strides else (y.as_strided(y.shape, strides), *result[1:])
