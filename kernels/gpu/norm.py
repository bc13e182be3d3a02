"""What kernels are given of a Norm, and what a program makes of it for its own channels."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from revseg.kernels.norm import Norm


def parameters_of(norm: Norm) -> tuple[Any, ...]:
    """What the operations take for a Norm; its slope is a tensor, or else a number."""
    slope, fixed = (norm.slope, 1.0) if isinstance(norm.slope, Tensor) else (None, norm.slope)
    return norm.mean, norm.var, norm.weight, norm.bias, slope, fixed, norm.eps


def of_slope(slope: Tensor | None, fixed: float) -> dict[str, Any]:
    """What kernels are compiled for: a number in place of a slope, or one slope for all channels."""
    return {"FIXED": fixed if slope is None else None, "SHARED": slope is not None and slope.numel() == 1}


@triton.jit
def vectors(
    mean, var, weight, bias, slope, eps,
    FIXED: tl.constexpr, SHARED: tl.constexpr, C: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """Mean, inverse deviation, scale, bias and slope of the channels of a program, each [1, Q]."""
    c = tl.program_id(1) * Q + tl.arange(0, Q)[None, :]
    inside = c < C
    m = tl.load(mean + c, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(var + c, mask=inside, other=1.0) + eps
    inverse = tl.rsqrt(v.to(tl.float32)).to(tl.float64)
    inverse *= 1.5 - 0.5 * v * inverse * inverse  # Newton's step, all that float64 is needed for
    scale = inverse
    if weight is not None:
        scale *= tl.load(weight + c, mask=inside, other=0.0)
    scale = scale.to(tl.float32)
    b = tl.zeros([1, Q], tl.float32)
    if bias is not None:
        b += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    if slope is None:
        s = tl.full([1, Q], FIXED, tl.float32)
    else:
        s = tl.load(slope + (c * 0 if SHARED else c), mask=inside, other=0.0).to(tl.float32)
    return m, inverse.to(tl.float32), scale, b, s
