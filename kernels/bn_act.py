"""Batch norm and a leaky activation in one pass, keeping nothing but what the convolution made.

    n = (u - mean) * scale + bias,   scale = weight / sqrt(var + eps)
    z = n where n > 0, else slope * n

Plain PyTorch keeps u for batch norm, n for the activation and z for the next convolution. Here u
alone is kept: z and all gradients follow from it and a few vectors. A block of u, at most `BLOCK`
values for each thread of a CPU, goes through all operations before the next one, so that what lies between stays
in the cache and never becomes a map. Sums are taken per block and then added, always in the same
order: more exact than one long sum, and the same bits twice. On a CPU this takes half the time of
PyTorch's batch norm and PReLU.

Letters: u the raw map [N, C, H, W], n the normalised one, z the activated one; M = N * H * W.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from revseg.kernels.shapes import has_values

BLOCK = 1 << 16  # values for each thread of a CPU, 256 KiB in float32
BLOCK_ELSEWHERE = 1 << 25  # few launches count more than the cache


@dataclass(frozen=True)
class Norm:
    """What turns a raw map into an activated one; all vectors are [C].

    Attributes:
        mean: Mean by channel, float64, of the batch or running.
        var: Variance by channel, float64, biased.
        weight: Of batch norm; None for 1.
        bias: Of batch norm; None for 0.
        slope: Of the activation below 0: PReLU's weight, [C] or [1]; a number for a constant; 1.0 for none.
        eps: Added to the variance.
    """

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    slope: Tensor | float
    eps: float

    def inverse_deviation(self) -> Tensor:
        return (self.var + self.eps).rsqrt()

    def vectors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean, scale, bias and slope of each channel [C]."""
        scale = self.inverse_deviation()
        if self.weight is not None:
            scale = scale * self.weight
        bias = torch.zeros_like(self.mean) if self.bias is None else self.bias
        if isinstance(self.slope, Tensor):
            return self.mean, scale, bias, self.slope.expand(self.mean.shape)
        return self.mean, scale, bias, torch.full_like(self.mean, self.slope)


def reference(u: Tensor, norm: Norm) -> Tensor:
    """The activated map from the raw one, in a few lines of differentiable PyTorch."""
    wide = torch.promote_types(u.dtype, torch.float32)
    mean, scale, bias, slope = (v.to(wide)[:, None, None] for v in norm.vectors())
    n = (u.to(wide) - mean) * scale + bias
    return torch.where(n > 0, n, n * slope).to(u.dtype)


def batch_statistics(u: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance by channel, of all images.

    Args:
        u: A map [N, C, H, W].

    Returns:
        Two vectors [C], float64.
    """
    flat = _Flat(u)
    if not has_values(u):
        flat.one_block(2)
        mean = u.new_empty(u.shape[1], dtype=torch.float64)
        return mean, torch.empty_like(mean)
    means, squares = [], []
    for x, t in zip(flat.blocks(), flat.scratch(), strict=True):
        x = x.to(flat.dtype)
        mean = x.mean(flat.dim, keepdim=True)
        rest = torch.sub(x, mean, out=t).mean(flat.dim).double()  # what rounding left of the mean
        square = t.square_().sum(flat.dim).double()
        means.append(mean.flatten().double() + rest)
        squares.append(square - rest.square() * (x.numel() / rest.numel()))
    return flat.merged(means, squares)


def bn_act(u: Tensor, norm: Norm, out: Tensor | None = None) -> Tensor:
    """The activated map z [N, C, H, W], of the dtype and strides of u.

    Args:
        u: The raw map.
        norm: Statistics and parameters.
        out: Written to instead of new memory; may be u itself.
    """
    z = torch.empty_like(u) if out is None else out
    flat, written = _Flat(u), _Flat(z)
    if not has_values(u):
        flat.one_block(2)
        return z
    fixed = norm.slope if isinstance(norm.slope, float) else None
    spread = map(flat.spread, norm.vectors())
    results = written.blocks() if flat.direct else flat.scratch()
    for x, mean, scale, bias, slope, n, t, y in zip(
        flat.blocks(), *spread, results, flat.scratch(), written.blocks(), strict=True
    ):
        torch.sub(x, mean, out=n).mul_(scale).add_(bias)
        if fixed == 0.0:
            n.clamp_min_(0)
        elif fixed != 1.0:
            torch.clamp(n, max=0, out=t).mul_(slope)
            n.clamp_min_(0).add_(t)
        if not flat.direct:
            y.copy_(n)
    return z


def bn_act_backward(
    u: Tensor, dz: Tensor, norm: Norm, batch: bool, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `bn_act`, through the statistics too if they are the batch's.

    Args:
        u: The raw map [N, C, H, W].
        dz: The gradient of the activated map, of any strides.
        norm: Statistics and parameters.
        batch: Whether mean and variance are those of u.
        out: Written to instead of new memory; may be dz itself, or u, which takes a little longer.

    Returns:
        du [N, C, H, W], of the dtype and strides of u, and the gradients of weight, bias and
        slope, each [C], float64.
    """
    du = torch.empty_like(u) if out is None else out
    if dz.stride() != u.stride():
        dz = dz.contiguous(memory_format=_layout(u)) if du is u else du.copy_(dz)
    maps = _Flat(u), _Flat(dz), _Flat(du)
    if not has_values(u):
        maps[0].one_block(4)
        vector = norm.mean.new_empty(u.shape[1])
        return du, vector, vector, vector
    once = (
        du is not u and maps[0].direct
    )  # the first pass writes dn, so that the second need not make it again
    dbias, dot, dslope = _sums(*maps, norm, once)
    dweight = dot * norm.inverse_deviation()
    m = u.numel() // u.shape[1]
    _apply(*maps, norm, once, (dweight / m, dbias / m) if batch else None)
    return du, dweight, dbias, dslope


def _sums(u: _Flat, dz: _Flat, du: _Flat, norm: Norm, write: bool) -> Tensor:
    """The sums of dn, of dn * (u - mean) and of dz * n below 0, by channel [3, C]; dn itself into du."""
    sums = []
    for x, g, y, mean, scale, bias, slope, c, n, t in zip(
        *(each.blocks() for each in (u, dz, du)),
        *map(u.spread, norm.vectors()),
        *(u.scratch() for _ in range(3)),
        strict=True,
    ):
        g = g.to(u.dtype)
        torch.mul(torch.sub(x, mean, out=c), scale, out=n).add_(bias)
        dslope = torch.clamp(n, max=0, out=t).mul_(g).sum(u.dim)
        dn = torch.mul(_factor_(n, slope), g, out=y if write else n)
        sums.append(torch.stack((dn.sum(u.dim), c.mul_(dn).sum(u.dim), dslope)).double())
    return u.added(sums)


def _apply(
    u: _Flat, dz: _Flat, du: _Flat, norm: Norm, written: bool, of_batch: tuple[Tensor, Tensor] | None
) -> None:
    """The gradient of the raw map into du: (dn - dbias - (u - mean) / deviation * dweight) * scale."""
    mean, scale, bias, slope = norm.vectors()
    dweight, dbias = (torch.zeros_like(mean),) * 2 if of_batch is None else of_batch
    by_u, constant = -scale * norm.inverse_deviation() * dweight, scale * dbias
    for x, g, y, m, k, b, s, p, q, c, n in zip(
        *(each.blocks() for each in (u, dz, du)),
        *map(u.spread, (mean, scale, bias, slope, by_u, constant)),
        *(u.scratch() for _ in range(2)),
        strict=True,
    ):
        torch.sub(x, m, out=c)
        if not written:
            torch.mul(_factor_(torch.mul(c, k, out=n).add_(b), s), g.to(u.dtype), out=n)
        dn = (y if written else n).mul_(k)
        if of_batch is not None:  # else an infinity in u would make NaN of zero
            dn.add_(c.mul_(p).sub_(q))
        if not written:
            y.copy_(dn)


def _factor_(n: Tensor, slope: Tensor) -> Tensor:
    """The derivative of the activation: 1 above 0, else the slope; in place of n."""
    return n.gt_(0).mul_(1 - slope).add_(slope)


def _layout(u: Tensor) -> torch.memory_format:
    return torch.contiguous_format if u.is_contiguous() else torch.channels_last


class _Flat:
    """A map as a matrix, and the rows of it that go through all operations together.

    Contiguous maps have a row for each channel of each image, or several if a channel is large;
    maps in channels_last have a row for each pixel, and a column for each channel.
    """

    def __init__(self, u: Tensor) -> None:
        self.images, self.channels, height, width = u.shape
        self.by_row = u.is_contiguous() or not u.is_contiguous(memory_format=torch.channels_last)
        limit = BLOCK * torch.get_num_threads() if u.device.type == "cpu" else BLOCK_ELSEWHERE
        self.parts = 1  # rows of one channel of one image
        if self.by_row:
            while height * width // self.parts > limit and height * width % (2 * self.parts) == 0:
                self.parts *= 2
            self.data = u.view(self.images * self.channels * self.parts, -1)
        else:
            self.data = u.permute(0, 2, 3, 1).view(-1, self.channels)
        self.step = max(1, limit // max(1, self.data.shape[1]))
        self.dim = 1 if self.by_row else 0  # what a sum by channel adds up
        self.dtype = torch.promote_types(u.dtype, torch.float32)
        self.direct = self.dtype == u.dtype

    def blocks(self) -> Sequence[Tensor]:
        return torch.split(self.data, self.step)

    def scratch(self) -> Iterator[Tensor]:
        """Memory for one block, cut to the size of each; every block gets the same."""
        rows, columns = self.data.shape
        memory = torch.empty((min(self.step, rows), columns), dtype=self.dtype, device=self.data.device)
        whole, rest = divmod(rows, self.step)
        yield from repeat(memory, whole)
        if rest:
            yield memory[:rest]

    def one_block(self, count: int) -> None:
        """Memory as every block takes it, for tensors without values: taken once, where its peak is counted."""
        assert [next(self.scratch()) for _ in range(count)]

    def spread(self, vector: Tensor) -> Sequence[Tensor]:
        """A value for each channel [C], for each block: as a column, or as one row."""
        vector = vector.to(self.dtype)
        if not self.by_row:
            return [vector[None]] * len(self.blocks())
        column = vector.repeat(self.images).repeat_interleave(self.parts)[:, None]
        return torch.split(column, self.step)

    def added(self, sums: list[Tensor]) -> Tensor:
        """Sums [K, rows or C] of every block as sums [K, C]."""
        if not self.by_row:
            return torch.stack(sums).sum(0)
        return torch.cat(sums, 1).view(-1, self.images, self.channels, self.parts).sum((1, 3))

    def merged(self, means: list[Tensor], squares: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and variance [C] from those of every row, or of every block."""
        if self.by_row:
            shape = (self.images, self.channels, self.parts)
            each, square = (torch.cat(v).view(shape).transpose(0, 1).flatten(1) for v in (means, squares))
            counts = torch.full_like(each, self.data.shape[1])  # [C, rows]
        else:
            each, square = torch.stack(means, 1), torch.stack(squares, 1)  # [C, blocks]
            counts = torch.full_like(each, self.step)
            counts[:, -1] = len(self.data) - self.step * (len(means) - 1)
        total = counts.sum(1)
        mean = (each * counts).sum(1) / total
        var = (square + (each - mean[:, None]).square() * counts).sum(1) / total
        return mean, var
