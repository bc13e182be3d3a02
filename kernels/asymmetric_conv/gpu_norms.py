"""The vectors by which kernels apply a batch norm with its activation, and the gradient of both.

    n = (u - mean) * scale + bias,   z = n where n > 0, else slope * n
    du = dn * scale + (u - mean) * by_u + constant

One program folds them, so that thousands do not. The gradient of a norm with running statistics has
no last two terms.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def vectors_of(parameters: Any, sums: Tensor | None = None, pixels: int = 1) -> Tensor:
    """Mean, scale, bias and slope, float32 [4, C]; by_u and constant too, if sums are given [6, C].

    Args:
        parameters: `parameters_of` the norm.
        sums: `bn_act_sums` [3, C].
        pixels: Of a channel in the batch.
    """
    mean, var, weight, bias, slope, fixed, eps = parameters
    channels = mean.shape[0]
    vectors: Tensor = mean.new_empty(4 if sums is None else 6, channels, dtype=torch.float32)
    _vectors_kernel[(1,)](
        mean, var, weight, bias, slope, fixed, eps, sums, float(pixels), vectors,
        C=channels, BLOCK=triton.next_power_of_2(channels),
        SHARED=slope is not None and slope.numel() == 1,
    )  # fmt: skip
    return vectors


@triton.jit
def _vectors_kernel(
    mean, var, weight, bias, slope, fixed, eps, sums, pixels, vectors,
    C: tl.constexpr, BLOCK: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    # the one program owns all channels
    c = tl.arange(0, BLOCK)
    inside = c < C
    zero = tl.zeros([BLOCK], tl.float64)
    m = tl.load(mean + c, mask=inside, other=0.0)
    inverse = 1.0 / tl.sqrt(tl.load(var + c, mask=inside, other=1.0) + eps)
    scale = inverse
    if weight is not None:
        scale = inverse * tl.load(weight + c, mask=inside, other=0.0).to(tl.float64)
    b, s = zero, zero + fixed
    if bias is not None:
        b = tl.load(bias + c, mask=inside, other=0.0).to(tl.float64)
    if slope is not None:
        s = tl.load(slope + (c * 0 if SHARED else c), mask=inside, other=0.0).to(tl.float64)
    tl.store(vectors + c, m.to(tl.float32), mask=inside)
    tl.store(vectors + C + c, scale.to(tl.float32), mask=inside)
    tl.store(vectors + 2 * C + c, b.to(tl.float32), mask=inside)
    tl.store(vectors + 3 * C + c, s.to(tl.float32), mask=inside)
    if sums is not None:
        dbias = tl.load(sums + c, mask=inside, other=0.0) / pixels
        dot = tl.load(sums + C + c, mask=inside, other=0.0) / pixels
        tl.store(vectors + 4 * C + c, (-scale * inverse * inverse * dot).to(tl.float32), mask=inside)
        tl.store(vectors + 5 * C + c, (-scale * dbias).to(tl.float32), mask=inside)
