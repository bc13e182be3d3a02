"""What a kernel stores, rounded to the nearest: Triton's interpreter cuts off the bits that bfloat16 lacks."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from revseg.kernels.dispatch import is_interpreting

INTERPRETED = tl.constexpr(is_interpreting())


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """Values in another dtype, ties to even; for bfloat16 they are float32."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nearest = tl.where(value == value, nearest, 0x7FC0)  # noqa: PLR0124  a carry may make a zero of NaN
        result = nearest.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = value.to(dtype)
    return result
