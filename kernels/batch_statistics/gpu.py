"""Mean and variance by channel as Triton kernels: one reads the map, once, and one merges.

Means and squared deviations are taken tile by tile and merged as in Chan et al., Updating Formulae
and a Pairwise Algorithm for Computing Sample Variances, 1979, counted from the mean of a program's
first tile: a mean far from zero costs no digits.

Letters: as in `gpu/tiles`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from revseg.kernels.gpu.tiles import Parts, Tiles, part_of, pixels_of, place_of


@torch.library.custom_op("revseg::batch_statistics", mutates_args=())
def batch_statistics(u: Tensor) -> tuple[Tensor, Tensor]:
    """As `revseg.kernels.batch_statistics.op.batch_statistics`."""
    tiles, channels = Tiles.of(u), u.shape[1]
    count = tiles.parts()
    merged = Parts.of(count, channels)
    parts = u.new_empty(4, count, channels, dtype=torch.float32)
    mean = u.new_empty(channels, dtype=torch.float64)
    var = torch.empty_like(mean)
    with torch.cuda.device_of(u):
        _moments_kernel[count, tiles.groups](u, parts, tiles.pixels, tiles.count, count, **tiles.constants)
        _merge_kernel[(merged.groups,)](parts, mean, var, count, **merged.constants, num_warps=8)
    return mean, var


@batch_statistics.register_fake
def _(u: Tensor) -> tuple[Tensor, Tensor]:
    mean = u.new_empty(u.shape[1], dtype=torch.float64)
    return mean, torch.empty_like(mean)


@triton.jit
def _moments_kernel(
    u, parts, pixels, tiles, count,
    C: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    # a program owns every S-th tile of Q channels
    total = 0.0
    shift = tl.zeros([Q], tl.float32)
    mean = tl.zeros([Q], tl.float32)  # less the shift
    square = tl.zeros([Q], tl.float32)
    for tile in range(tl.program_id(0), tiles, count):
        place, inside = place_of(tile, pixels, C, P, Q, CHANNELS_LAST, LARGE)
        _, _, valid = pixels_of(tile, pixels, P)
        valid = valid.to(tl.float32)
        x = tl.load(u + place, mask=inside, other=0.0).to(tl.float32)  # [P, Q]
        center = tl.sum(x, 0) / valid
        x = tl.where(inside, x - center[None, :], 0.0)
        rest = tl.sum(x, 0) / valid  # what rounding left of the mean
        own = tl.sum(x * x, 0) - rest * rest * valid
        if total == 0.0:
            shift = center
        apart = (center - shift) + rest - mean
        share = valid / (total + valid)
        mean += apart * share
        square += own + apart * apart * (total * share)
        total += valid
    c = tl.program_id(1) * Q + tl.arange(0, Q)
    to = parts + tl.program_id(0) * C + c
    tl.store(to, shift, mask=c < C)
    tl.store(to + count * C, mean, mask=c < C)
    tl.store(to + 2 * count * C, square, mask=c < C)
    tl.store(to + 3 * count * C, tl.zeros([Q], tl.float32) + total, mask=c < C)


@triton.jit
def _merge_kernel(parts, mean, var, count, C: tl.constexpr, S: tl.constexpr, Q: tl.constexpr):
    # a program owns Q channels
    at, inside, c = part_of(0, count, C, S, Q)
    shift = tl.load(parts + at, mask=inside, other=0.0).to(tl.float64)  # [S, Q]
    means = shift + tl.load(parts + at + count * C, mask=inside, other=0.0)
    square = tl.load(parts + at + 2 * count * C, mask=inside, other=0.0).to(tl.float64)
    counts = tl.load(parts + at + 3 * count * C, mask=inside, other=0.0).to(tl.float64)
    total = tl.maximum(tl.sum(counts, 0), 1.0)  # channels outside have none
    merged = tl.sum(means * counts, 0) / total
    apart = tl.where(inside, means - merged[None, :], 0.0)
    tl.store(mean + c, merged, mask=c < C)
    tl.store(var + c, tl.sum(square + apart * apart * counts, 0) / total, mask=c < C)
