"""Mean and variance of a map from those of its parts, as in Chan et al., Updating Formulae and a
Pairwise Algorithm for Computing Sample Variances, 1979.

A program merges so many parts at once, in float64, and so on until one is left: the order is always
the same, whatever the GPU.

Letters: R parts, D channels; B channels of a block.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 256  # parts that a program merges
BLOCK = 16


def merged(counts: Tensor, partials: Tensor) -> Tensor:
    """Mean and biased variance [2, D], float64.

    Args:
        counts: Values of each part [R].
        partials: Of each part, mean, sum of squared deviations, and what to add to the mean [R, 3, D].
    """
    while True:
        rows, _, channels = partials.shape
        parts = triton.cdiv(rows, ROWS)
        more = counts.new_empty(parts, dtype=torch.float64)
        fewer = counts.new_zeros(parts, 3, channels, dtype=torch.float64)
        _merge_kernel[(parts, triton.cdiv(channels, BLOCK))](
            counts, partials, more, fewer, rows, D=channels, ROWS=ROWS, B=BLOCK, LAST=parts == 1, num_warps=8
        )
        counts, partials = more, fewer
        if parts == 1:
            return fewer[0, :2]


@triton.jit
def _merge_kernel(
    counts, partials, more, fewer, R, D: tl.constexpr, ROWS: tl.constexpr, B: tl.constexpr, LAST: tl.constexpr
):  # fmt: skip
    # a program owns ROWS parts of B channels
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * B + tl.arange(0, B)
    at = partials + r.to(tl.int64)[:, None] * 3 * D + d[None, :]
    inside = (r < R)[:, None] & (d < D)[None, :]
    count = tl.load(counts + r, mask=r < R, other=0.0).to(tl.float64)
    means = tl.load(at, mask=inside, other=0.0).to(tl.float64)  # [ROWS, B]
    means += tl.load(at + 2 * D, mask=inside, other=0.0).to(tl.float64)
    squares = tl.load(at + D, mask=inside, other=0.0).to(tl.float64)
    total = tl.sum(count, 0)
    mean = tl.sum(count[:, None] * means, 0) / total
    apart = means - mean[None, :]
    square = tl.sum(squares + count[:, None] * (apart * apart), 0)
    to = fewer + tl.program_id(0) * 3 * D + d
    tl.store(to, mean, mask=d < D)
    tl.store(to + D, square / total if LAST else square, mask=d < D)
    if tl.program_id(1) == 0:
        tl.store(more + tl.program_id(0), total)
