"""The asymmetric convolution as Triton kernels, forward.

As n shifted matrix products of pixels by channels; what is read is normalised and activated on the
way, what is written is counted on the way. The activated map is not stored, and statistics take no
pass of their own: each program writes mean and squared deviations of its pixels, and small programs
merge them (`gpu_statistics`).

Letters: x [N, C, H, W], u [N, D, H, W] as in `asymmetric_conv`; P pixels of a tile, BH x BW, and B
channels of a block.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from revseg.kernels.asymmetric_conv.gpu_norms import vectors_of
from revseg.kernels.asymmetric_conv.gpu_statistics import merged
from revseg.kernels.dispatch import is_interpreting
from revseg.kernels.gpu.norm import parameters_of
from revseg.kernels.gpu.rounding import rounded
from revseg.kernels.norm import Norm

NO_NORM = (None,) * 5 + (1.0, 0.0)


def asymmetric_conv(
    x: Tensor, norm: Norm | None, weight: Tensor, dilation: int, statistics: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `revseg.kernels.asymmetric_conv.op.asymmetric_conv`."""
    parameters = NO_NORM if norm is None else parameters_of(norm)
    u, moments = _asymmetric_conv(dense(x), *parameters, weight, dilation, statistics)
    return (u, moments[0], moments[1]) if statistics else (u, None, None)


@torch.library.custom_op("revseg::asymmetric_conv", mutates_args=())
def _asymmetric_conv(
    x: Tensor, mean: Tensor | None, var: Tensor | None, scale: Tensor | None, bias: Tensor | None,
    slope: Tensor | None, fixed: float, eps: float, weight: Tensor, dilation: int, statistics: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, channels = weight.shape[:2]
    tiles = Tiles.of(x, weight, dilation)
    products = Products.of(x)
    block = products.columns(out)
    u = _like(x, out)
    with torch.cuda.device_of(x):
        vectors = None if mean is None else vectors_of((mean, var, scale, bias, slope, fixed, eps))
        partials = counts = None
        if statistics:
            counts = x.new_empty(tiles.count, dtype=torch.float32)
            partials = x.new_empty(tiles.count, 3, out, dtype=torch.float32)
        _forward_kernel[(tiles.count, triton.cdiv(out, block))](
            x, vectors, weight.flatten(2).permute(2, 1, 0).contiguous(), u, counts, partials,
            *tiles.sizes, C=channels, D=out, BC=products.summed(channels), BD=block,
            **tiles.constants, **products.constants, num_warps=products.warps(channels, out), num_stages=1,
        )  # fmt: skip
        if counts is None or partials is None:
            return u, x.new_empty(2, 0, dtype=torch.float64)
        return u, merged(counts, partials)


@_asymmetric_conv.register_fake
def _(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *_, weight, _, statistics = others
    out = weight.shape[0]
    return _like(x, out), x.new_empty(2, out if statistics else 0, dtype=torch.float64)


@dataclass(frozen=True)
class Tiles:
    """How a map is cut for the programs.

    Attributes:
        count: Of tiles, each of one image.
        sizes: H, W and the rows and columns between two taps.
        constants: What kernels are compiled for.
    """

    count: int
    sizes: tuple[int, int, int, int]
    constants: dict[str, Any]

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, dilation: int) -> "Tiles":
        images, _, height, width = x.shape
        vertical, channels_last = weight.shape[2] > 1, not x.is_contiguous()
        bh, bw = tile_size(vertical, channels_last)
        constants = {
            "TAPS": weight.shape[2] * weight.shape[3],
            "BH": bh,
            "BW": bw,
            "CHANNELS_LAST": channels_last,
            "LARGE": len(x) * max(weight.shape[:2]) * height * width >= 2**31,
        }
        count: int = images * triton.cdiv(height, bh) * triton.cdiv(width, bw)
        step = (dilation, 0) if vertical else (0, dilation)
        return cls(count, (height, width, *step), constants)


def dense(x: Tensor) -> Tensor:
    """A map without gaps, in channels_last or contiguous."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def tile_size(vertical: bool, channels_last: bool) -> tuple[int, int]:
    """Rows and columns of a tile: long where the taps lie, but wide where pixels are neighbours in memory."""
    return (16, 4) if vertical and channels_last else (4, 16)


def padded(channels: int) -> int:
    """Channels of a block that holds all; tl.dot takes no fewer than 16."""
    return max(16, int(triton.next_power_of_2(channels)))


@dataclass(frozen=True)
class Products:
    """How matrices are multiplied, as PyTorch was told for convolutions, and how large they may be.

    Attributes:
        constants: What kernels are compiled for.
        wide: Whether numbers have four bytes.
        room: Whether operands lie in shared memory, which leaves more registers: Hopper and later.
    """

    constants: dict[str, Any]
    wide: bool
    room: bool

    @classmethod
    def of(cls, x: Tensor) -> "Products":
        wide = x.dtype == torch.float32
        if is_interpreting():
            return cls({"DOT": tl.float32, "PRECISION": "ieee"}, wide, True)
        names = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
        target = triton.runtime.driver.active.get_current_target()
        on_cuda = target.backend == "cuda"
        precision = "ieee"
        if wide and on_cuda and target.arch >= 80:
            precision = "tf32" if _tf32_is_allowed() else "tf32x3"
        elif wide and target.arch == "gfx942" and _tf32_is_allowed():
            precision = "tf32"
        room = bool(on_cuda and target.arch >= 90)
        return cls({"DOT": names[x.dtype], "PRECISION": precision}, wide, room)

    @property
    def tripled(self) -> bool:
        """Whether three products make one, which takes more registers."""
        return bool(self.constants["PRECISION"] == "tf32x3")

    def columns(self, channels: int) -> int:
        """Channels of a block that a product makes."""
        most = 64 if self.room or not self.wide else 32
        return min(padded(channels), 16 if self.tripled else most)

    def summed(self, channels: int) -> int:
        """Channels of a block that is summed over in one product."""
        return min(padded(channels), 64 if self.room and not self.wide else 32)

    def warps(self, *channels: int, both: bool = False) -> int:
        """Of a program whose blocks have up to so many channels, and which may make both gradients."""
        few = max(channels) <= (16 if both else 32)
        return 4 if few and not self.tripled else 8


def _tf32_is_allowed() -> bool:
    conv: Any = getattr(torch.backends.cudnn, "conv", None)  # since PyTorch 2.9
    return torch.backends.cudnn.allow_tf32 if conv is None else bool(conv.fp32_precision == "tf32")


def _like(x: Tensor, channels: int) -> Tensor:
    """Memory [N, channels, H, W] in the layout of x."""
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    images, _, height, width = x.shape
    return torch.empty(
        (images, channels, height, width), dtype=x.dtype, device=x.device, memory_format=layout
    )


@triton.jit
def pixels_of(tile, H, W, BH: tl.constexpr, BW: tl.constexpr, LARGE: tl.constexpr):
    """Image, row and column of the pixels of a tile [P]."""
    across, down = tl.cdiv(W, BW), tl.cdiv(H, BH)
    i = tl.arange(0, BH * BW)
    h = tile // across % down * BH + i // BW
    w = tile % across * BW + i % BW
    image = tile // across // down + tl.zeros_like(i)
    if LARGE:
        image = image.to(tl.int64)
    return image, h, w


@triton.jit
def place_of(
    image, h, w, c, H, W, C: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr
):  # fmt: skip
    """Offsets of pixels and channels [P, B], and which of them lie inside of a map [N, C, H, W]."""
    inside = ((h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None] & (c < C)[None, :]
    if LARGE:
        c = c.to(tl.int64)
    if CHANNELS_LAST:
        place = ((image * H + h) * W + w)[:, None] * C + c[None, :]
    else:
        place = (image * (C * H * W) + h * W + w)[:, None] + c[None, :] * (H * W)
    return place, inside


@triton.jit
def vector_at(vectors, i: tl.constexpr, c, C: tl.constexpr):
    """One of the vectors of a norm [1, B]."""
    return tl.load(vectors + i * C + c, mask=c < C, other=0.0)[None, :]


@triton.jit
def activated(x, inside, mean, scale, bias, slope):
    """The activated map, zero outside [P, B]."""
    n = (x - mean) * scale + bias
    return tl.where(inside, tl.where(n > 0, n, n * slope), 0.0)


@triton.jit
def _forward_kernel(
    x, vectors, weight, u, counts, partials, H, W, DH, DW,
    C: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, TAPS: tl.constexpr,
    BH: tl.constexpr, BW: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # a program owns one tile of BD channels of u
    tile = tl.program_id(0)
    image, h, w = pixels_of(tile, H, W, BH, BW, LARGE)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    total = tl.zeros([BH * BW, BD], tl.float32)
    for first in range(0, C, BC):
        c = first + tl.arange(0, BC)
        if vectors is not None:
            mean, scale = vector_at(vectors, 0, c, C), vector_at(vectors, 1, c, C)
            bias, slope = vector_at(vectors, 2, c, C), vector_at(vectors, 3, c, C)
        for k in tl.static_range(TAPS):
            shift = k - TAPS // 2
            place, inside = place_of(image, h + shift * DH, w + shift * DW, c, H, W, C, CHANNELS_LAST, LARGE)
            z = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)  # [P, BC]
            if vectors is not None:
                z = rounded(activated(z, inside, mean, scale, bias, slope), x.dtype.element_ty)
            at = (k * C + c)[:, None] * D + d[None, :]
            by = tl.load(weight + at, mask=(c < C)[:, None] & (d < D)[None, :], other=0.0)  # [BC, BD]
            total = tl.dot(z.to(DOT), by.to(DOT), total, input_precision=PRECISION)
    place, inside = place_of(image, h, w, d, H, W, D, CHANNELS_LAST, LARGE)
    made = rounded(total, u.dtype.element_ty)
    tl.store(u + place, made, mask=inside)
    if partials is not None:
        made = made.to(tl.float32)
        count = tl.sum(((h < H) & (w < W)).to(tl.float32), 0)
        mean = tl.sum(tl.where(inside, made, 0.0), 0) / count  # [BD]
        apart = tl.where(inside, made - mean[None, :], 0.0)
        rest = tl.sum(apart, 0) / count  # what rounding left of the mean
        to = partials + tile.to(tl.int64) * 3 * D + d
        tl.store(to, mean, mask=d < D)
        tl.store(to + D, tl.sum(apart * apart, 0) - rest * rest * count, mask=d < D)
        tl.store(to + 2 * D, rest, mask=d < D)
        if tl.program_id(1) == 0:
            tl.store(counts + tile, count)
