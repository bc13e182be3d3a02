"""Maps laid out in memory as another one is: contiguous, or in channels_last."""

from __future__ import annotations

import torch
from torch import Tensor


def memory_like(u: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """`out`, or new memory of the strides of u.

    Raises:
        ValueError: If `out` is of another shape, dtype or strides.
    """
    if out is None:
        return torch.empty_like(u, dtype=dtype)
    found, expected = ((t.shape, t.stride()) for t in (out, u))
    if found != expected or out.dtype != dtype:
        raise ValueError(
            f"expected memory of shape {(*u.shape,)}, strides {u.stride()} and dtype {dtype}, "
            f"got {(*out.shape,)}, {out.stride()} and {out.dtype}"
        )
    return out


def as_dense(x: Tensor, u: Tensor) -> Tensor:
    """The values of x in the memory layout of u."""
    layout = torch.contiguous_format if u.is_contiguous() else torch.channels_last
    return x.contiguous(memory_format=layout)
