"""Adding without rounding: sums of multiples of one step, as long as they stay within a range.

The gradient passes the rounding of the summands straight through. `revseg.exact.modes` says what it is for.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from revseg.engine.drift import InversionError, report
from revseg.tensors import flat

LIMIT = 2.0**12
STEP = {torch.float32: 2.0**-12, torch.float64: 2.0**-41}  # 24 and 53 bits below the limit


class GridRule:
    """x + h on the grid: couple and uncouple are each other's inverse, to the bit."""

    def couple(self, x: Tensor, h: Tensor) -> Tensor:
        return _GridAdd.apply(x, h, 1.0)  # type: ignore[no-any-return, no-untyped-call]

    def uncouple(self, y: Tensor, h: Tensor) -> Tensor:
        return _GridAdd.apply(y, h, -1.0)  # type: ignore[no-any-return, no-untyped-call]

    def gradients(self, x: Tensor, h: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        return dy, dy.sum_to_size(h.shape).to(h.dtype)


def snap(x: Tensor) -> Tensor:
    """The nearest values on the grid; the gradient passes through.

    Raises:
        TypeError: If x is neither float32 nor float64.
    """
    if x.dtype not in STEP:
        raise TypeError(
            f"exact=True needs float32 or float64 streams, got {x.dtype}; under autocast streams are float32, "
            'and exact="lossless" takes any dtype'
        )
    return _GridAdd.apply(torch.zeros_like(x), x, 1.0)  # type: ignore[no-any-return, no-untyped-call]


def check_range(streams: list[tuple[str, Tensor]]) -> None:
    """Raise if a stream has left the grid; on a GPU at the next pass, without waiting here.

    Values that are infinite or NaN are let through, as in plain autograd. A sum one step beyond
    the limit is rounded to the limit, and left to the checksum of the inversion (`revseg.engine.drift`).

    Args:
        streams: Where each stream comes from, and its smallest and largest value [2].

    Raises:
        InversionError: If a value is too large, naming the step and the remedy.
    """
    names = [name for name, _ in streams]

    def judge(sizes: list[float]) -> None:
        for name, size in zip(names, sizes, strict=True):
            if LIMIT < size < math.inf:
                raise InversionError(
                    f"{name}: exact=True adds without error up to {LIMIT:g}, got a value of {size:g}; "
                    'scale the input or normalize inside the functions, or use exact="lossless"'
                )

    report(torch.stack([extremes.abs().amax() for _, extremes in streams]), judge)


def extremes_of(x: Tensor) -> Tensor:
    """The smallest and the largest value [2] of a stream, which has no gaps."""
    return torch.stack(
        torch.aminmax(flat(x.detach()))
    )  # of another shape a CPU copies it, in channels_last slowly


class _GridAdd(torch.autograd.Function):
    """x + sign * h, h rounded to the grid of x's dtype."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, h: Tensor, sign: float) -> Tensor:
        step = STEP[x.dtype]
        rounded = torch.mul(h.to(x.dtype), 1 / step).round_()
        fits = rounded.shape == x.shape and rounded.stride() == x.stride()
        out = rounded if fits and not torch._C._are_functorch_transforms_active() else None  # saves a stream
        return torch.add(x, rounded, alpha=sign * step, out=out)  # alpha, a power of two, rounds nothing

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        _, h, ctx.sign = inputs
        ctx.dtype, ctx.shape = h.dtype, h.shape

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        dh = dy if ctx.sign > 0 else -dy
        return dy, dh.sum_to_size(ctx.shape).to(ctx.dtype), None
