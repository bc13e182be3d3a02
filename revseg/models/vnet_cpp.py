"""Contextual pyramid pooling, the down-sampling of VNet.

A reconstruction like the rest of `revseg.models.vnet`: the paper says what is concatenated, a
point-wise convolution with stride 2 and the sum of a pyramid of pools, but not which pools.

Source: Lin, Lu, Gao, Qiao and Li, VNet: A Versatile Network for Efficient Real-Time Semantic
Segmentation, section III.1 and figure 2 (b).
"""

from collections.abc import Callable, Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revseg import ops
from revseg.engine.gradients import Grads
from revseg.engine.tracing import has_hooks
from revseg.layers.bands.rows import Band
from revseg.layers.bands.window import Window
from revseg.layers.blocks import BNAct
from revseg.layers.convolution import Convolution
from revseg.layers.layer_input import LayerInput, gather
from revseg.layers.layer_module import LayerModule, Linear
from revseg.layers.linear import LinearOp, summed
from revseg.tensors import dense

POOLS = ("avg", "max")
MERGES = ("sum", "mean")
STYLES = ("strided", "bins")


class CPP(LayerModule):
    """Contextual pyramid pooling: half the size, more channels, hardly a parameter.

    A 1 x 1 convolution with stride 2 makes the new channels; the sum of a pyramid of pools
    carries the old ones over. Both are concatenated.

    Args:
        in_channels: Channels that come in, and that the pools keep.
        out_channels: Channels that go out, more than come in.
        pool: "avg" or "max".
        style: "strided": pools with stride 2; "bins": pools to a grid of k x k cells, upsampled.
        sizes: The kernels (strided, odd) or the grids (bins) of the pyramid.
        merge: "sum" or "mean" of the pyramid.
        post_norm: Batch norm and activation after the concatenation; without it only the
            convolution's channels get them.
        activation: See `revseg.layers.blocks.BNAct`.
        eps: See `revseg.layers.blocks.BNAct`.
        momentum: See `revseg.layers.blocks.BNAct`.

    Raises:
        ValueError: If an option is unknown or out of its range.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        pool: str = "avg",
        style: str = "strided",
        sizes: Sequence[int] = (3, 5, 7),
        merge: str = "sum",
        post_norm: bool = True,
        activation: str = "prelu",
        eps: float = 1e-3,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        if out_channels <= in_channels:
            raise ValueError(f"expected more than {in_channels} channels after CPP, got {out_channels}")
        check_choice("pool", pool, POOLS)
        check_choice("CPP style", style, STYLES)
        check_choice("CPP merge", merge, MERGES)
        if not sizes or min(sizes) < 1 or (style == "strided" and any(k % 2 == 0 for k in sizes)):
            raise ValueError(f"expected one or more CPP sizes, positive, odd if strided, got {sizes}")
        self.pointwise = nn.Conv2d(
            in_channels, out_channels - in_channels, 1, bias=False
        )  # of every second pixel
        self.pools = nn.ModuleList(_pool(pool, style, k) for k in sizes)
        self.merge, self.sizes, self.style = merge, tuple(sizes), style
        self.post_norm = post_norm
        normed = out_channels if post_norm else out_channels - in_channels
        self.norm = BNAct(normed, activation=activation, eps=eps, momentum=momentum)

    def plain(self, x: Tensor) -> Tensor:  # [N, in_channels, H, W] -> [N, out_channels, h, w]
        # picked here, as the gradient of a strided 1 x 1 convolution can crash, see `revseg.layers.convolution`
        new = self.pointwise(_every_second(x))
        pooled = self.pooled(x)
        if self.post_norm:
            return self.norm(torch.cat((new, pooled), dim=1))  # type: ignore[no-any-return]
        return torch.cat((self.norm(new), pooled), dim=1)

    def pooled(self, x: Tensor) -> Tensor:
        """The pyramid [N, in_channels, h, w]."""
        size = [(length + 1) // 2 for length in x.shape[-2:]]
        pyramid = reduce(torch.add, (_fit(pool(x), size) for pool in self.pools))
        return pyramid / len(self.pools) if self.merge == "mean" else pyramid

    def linear(self) -> Linear | None:
        pointwise = Convolution.of(self.pointwise)
        if pointwise is None or not self.post_norm or has_hooks(self.pools, *self.pools):
            return None
        reach = max(self.sizes) // 2 if self.style == "strided" else None
        op = _CPPOp(pointwise, self.pooled, reach)
        if all(isinstance(pool, nn.AvgPool2d) for pool in self.pools):
            share = 1 / len(self.sizes) if self.merge == "mean" else 1.0
            op = _AveragePools(pointwise, self.pooled, max(self.sizes) // 2, self.sizes, share)
        return op, (self.pointwise.weight,)


class _CPPOp(LinearOp):
    """The raw map of CPP, an image at a time: new channels from every second pixel, old ones from the pools.

    Args:
        pointwise: Makes the new ones.
        pooled: Makes the old ones.
        reach: How far a pool sees up and down; None if it sees the whole map.
    """

    def __init__(self, pointwise: Convolution, pooled: Callable[[Tensor], Tensor], reach: int | None) -> None:
        self.pointwise, self.pooled, self.reach = pointwise, pooled, reach

    def window(self) -> Window | None:
        if self.reach is None:
            return None
        above = self.reach + self.reach % 2  # so that a band begins at a row of its own
        return Window(above + self.reach + 1, 2, above, self.reach)

    def shape(self, x: Sequence[int], parameters: Sequence[Tensor]) -> tuple[int, int, int, int]:
        n, old, height, width = x
        return n, len(parameters[0]) + old, (height + 1) // 2, (width + 1) // 2

    def forward(self, x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.cat((self.pointwise.forward(_every_second(x), *parameters), self.pooled(x)), 1)

    def make(self, x: LayerInput, parameters: Sequence[Tensor]) -> Tensor:
        maps = (
            torch.cat((self.pointwise.forward(_every_second(image), *parameters), self.pool(image)), 1)
            for image in x.images()
        )
        return gather(maps, len(x.raw))

    def backward(
        self, du: Tensor, x: LayerInput, parameters: Sequence[Tensor], wanted: Sequence[bool]
    ) -> Grads:
        old = x.raw.shape[1]
        points = x.values(_every_second)
        shapes = self.input_of_pools(x) if wanted[0] else x.raw
        alone = len(x.raw) == 1  # then its gradient is all of it
        dx = torch.empty_like(x.raw, dtype=du.dtype) if wanted[0] and not alone else None
        of_weight: Grads = [None]
        for i, (d, point, image) in enumerate(
            zip(torch.split(du, 1), torch.split(points, 1), torch.split(shapes, 1), strict=True)
        ):
            dpoint, *more = self.pointwise.backward(d[:, :-old], LayerInput(point), parameters, wanted)
            of_weight = summed(of_weight, more)
            if dpoint is not None:
                of_image = self.pool_backward(d[:, -old:], image.to(du.dtype))
                if dx is None:
                    dx = of_image
                else:
                    dx[i : i + 1] = of_image
                dx[i : i + 1, :, ::2, ::2] += dpoint
        return [dx, *of_weight]

    def input_of_pools(self, x: LayerInput) -> Tensor:
        return x.values()  # the gradient of a maximum depends on where it was

    def pool(self, image: Tensor) -> Tensor:
        return self.pooled(image)

    def pool_backward(self, dy: Tensor, image: Tensor) -> Tensor:
        with torch.enable_grad():
            image = image.detach().requires_grad_()
            pooled = self.pooled(image)
        return torch.autograd.grad(pooled, image, dy)[0]


class _AveragePools(_CPPOp):
    """The same for average pools at stride 2, whose gradient does not depend on their input."""

    input_gradient_reads_input = False

    def __init__(
        self,
        pointwise: Convolution,
        pooled: Callable[[Tensor], Tensor],
        reach: int,
        sizes: Sequence[int],
        share: float,
    ) -> None:
        super().__init__(pointwise, pooled, reach)
        self.sizes, self.share = sizes, share

    def make_band(self, x: Band, first: int, last: int, parameters: Sequence[Tensor]) -> Tensor:
        if x.values.device.type != "cpu":
            return super().make_band(x, first, last, parameters)
        points = dense(x.rows(2 * first, 2 * last - 1)[:, :, ::2, ::2])
        pooled = reduce(torch.Tensor.add_, (self._pooled_band(k, x, first, last) for k in self.sizes))
        return torch.cat((self.pointwise.forward(points, *parameters), pooled.mul_(self.share)), 1)

    def _pooled_band(self, k: int, x: Band, first: int, last: int) -> Tensor:
        """The pool of this size, of a map that goes on with zeros; where it does not, of the pixels that there are."""
        covered = x.padded(*_covered(k, first, last))
        pooled = F.avg_pool2d(covered, k, 2, (0, k // 2), count_include_pad=False)
        return _at_rims(pooled, k, first, x.height)

    def band_input_gradient(
        self, du: Band, x: Band, first: int, last: int, parameters: Sequence[Tensor]
    ) -> Tensor:
        window = self.window()
        assert window is not None
        start, stop = window.readers(first, last, du.height)
        if x.values.device.type != "cpu" or stop <= start:
            return super().band_input_gradient(du, x, first, last, parameters)
        rows, (n, old, _, width) = du.rows(start, stop), x.values.shape
        dx = _zeros(rows, (n, old, last - first, width))
        for k in self.sizes:
            low, high = _covered(k, start, stop)
            of_pool = _at_rims(rows[:, -old:] * self.share, k, start, x.height)
            covered = _zeros(rows, (n, old, high - low, width))
            part = torch.ops.aten.avg_pool2d_backward(
                of_pool, covered, [k, k], [2, 2], [0, k // 2], False, False, None
            )
            top, end = max(low, first), min(high, last)
            dx[:, :, top - first : end - first] += part[:, :, top - low : end - low]
            del part, covered
        top, end = (first + 1) // 2, (last + 1) // 2
        if end > top:
            points = dense(rows[:, :-old, top - start : end - start])
            like = _zeros(rows, (n, old, *points.shape[2:]))
            dpoint = self.pointwise.backward(points, LayerInput(like), parameters, [True, False])[0]
            assert dpoint is not None
            dx[:, :, 2 * top - first :: 2, ::2] += dpoint
        return dx

    def input_of_pools(self, x: LayerInput) -> Tensor:
        return x.raw

    def pool(self, image: Tensor) -> Tensor:
        return ops.sum_of_pools(image, self.sizes).mul_(self.share)

    def pool_backward(self, dy: Tensor, image: Tensor) -> Tensor:
        return ops.sum_of_pools_backward(dy, image, self.sizes).mul_(self.share)


def _covered(size: int, first: int, last: int) -> tuple[int, int]:
    """The rows that a pool of this size covers for outputs first to last (excluded), if the map goes on."""
    return 2 * first - size // 2, 2 * last - 1 + size // 2


def _at_rims(pooled: Tensor, size: int, first: int, height: int) -> Tensor:
    """Rows of a pool from `first` on, or of its gradient, where less than all of its pixels are inside of the map; in place."""
    reach = size // 2
    for row in range(pooled.shape[2]):
        center = 2 * (first + row)
        inside = min(center + reach, height - 1) - max(center - reach, 0) + 1
        if inside < size:
            pooled[:, :, row] *= size / inside
    return pooled


def _zeros(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Of the layout that bands have on a CPU."""
    return like.new_zeros(shape).contiguous(memory_format=torch.channels_last)


def _every_second(x: Tensor) -> Tensor:
    """The pixels that a 1 x 1 convolution with stride 2 reads, in the layout of the map."""
    return dense(x[:, :, ::2, ::2])


def _pool(pool: str, style: str, size: int) -> nn.Module:
    if style == "bins":
        return nn.AdaptiveAvgPool2d(size) if pool == "avg" else nn.AdaptiveMaxPool2d(size)
    if pool == "avg":  # counting the padding would darken the borders
        return nn.AvgPool2d(size, stride=2, padding=size // 2, count_include_pad=False)
    return nn.MaxPool2d(size, stride=2, padding=size // 2)


def _fit(x: Tensor, size: Sequence[int]) -> Tensor:
    """A pooled map at the size of the others; only bins have another one."""
    if x.shape[-2:] == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def check_choice(what: str, choice: str, choices: Sequence[str]) -> None:
    """Refuse an option that is none of the choices."""
    if choice not in choices:
        raise ValueError(f"unknown {what} {choice!r}; choose one of {', '.join(choices)}")
