"""The asymmetric convolution as a Triton kernel, backward.

The gradient of the activated map becomes that of the raw map on load, and is not stored. Seen from a
pixel of x, both gradients need the same pixels of du, one a tap:

    dz_x[q] = sum over k of du[q - k] weight[k]ᵀ,   dweight[k] = sum over q of z_x[q]ᵀ du[q - k]

so with few channels one pass makes both; with many, the gradient of the weight fills the registers,
and each has a pass. The sums that the norm before needs are taken from the tile of dz_x while it is at
hand, a row each tile; the gradient of the weight in a fixed number of programs. Parts are then added in
order.

Letters: as in `gpu`; du [N, D, H, W] the gradient of u.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code=assignment

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from revseg.kernels.asymmetric_conv.gpu import (
    NO_NORM,
    Products,
    Tiles,
    activated,
    dense,
    padded,
    pixels_of,
    place_of,
    vector_at,
)
from revseg.kernels.asymmetric_conv.gpu_norms import vectors_of
from revseg.kernels.gpu.norm import parameters_of
from revseg.kernels.gpu.rounding import rounded
from revseg.kernels.norm import Norm
from revseg.kernels.strides import as_dense

PROGRAMS = 256  # that share the gradient of the weight: neither sums nor memory depend on the GPU's size
ACCUMULATED = 48  # numbers of that gradient that a thread holds where there is room, else half


def asymmetric_conv_backward(
    u: Tensor, dz: Tensor, norm: Norm, sums: Tensor, batch: bool, x: Tensor, norm_x: Norm | None,
    weight: Tensor, dilation: int, wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """As `revseg.kernels.asymmetric_conv.op.asymmetric_conv_backward`."""
    if not any(wanted):
        return None, None, None
    x = dense(x)
    dz_x, dweight, sums_x = _asymmetric_conv_backward(
        as_dense(u, x), as_dense(dz, x), *parameters_of(norm), sums if batch else None,
        x, *(NO_NORM if norm_x is None else parameters_of(norm_x)),
        weight, dilation, *wanted,
    )  # fmt: skip
    has_sums = wanted[0] and norm_x is not None
    return dz_x if wanted[0] else None, dweight if wanted[1] else None, sums_x if has_sums else None


@torch.library.custom_op("revseg::asymmetric_conv_backward", mutates_args=())
def _asymmetric_conv_backward(
    u: Tensor, dz: Tensor, mean: Tensor, var: Tensor, scale: Tensor | None, bias: Tensor | None,
    slope: Tensor | None, fixed: float, eps: float, sums: Tensor | None,
    x: Tensor, mean_x: Tensor | None, var_x: Tensor | None, scale_x: Tensor | None, bias_x: Tensor | None,
    slope_x: Tensor | None, fixed_x: float, eps_x: float,
    weight: Tensor, dilation: int, input_wanted: bool, weight_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tiles, products = Tiles.of(x, weight, dilation), Products.of(x)
    with torch.cuda.device_of(x):
        pixels = u.numel() // u.shape[1]
        of_u = vectors_of((mean, var, scale, bias, slope, fixed, eps), sums, pixels)
        of_x = None
        if mean_x is not None:
            of_x = vectors_of((mean_x, var_x, scale_x, bias_x, slope_x, fixed_x, eps_x))
        given = u, dz, of_u, x, of_x, weight, tiles, products
        if input_wanted and weight_wanted and not _fits_one_pass(products, weight):
            dz_x, sums_x, _ = _launch(*given, True, False)
            _, _, dweight = _launch(*given, False, True)
            return dz_x, dweight, sums_x
        dz_x, sums_x, dweight = _launch(*given, input_wanted, weight_wanted)
        return dz_x, dweight, sums_x


@_asymmetric_conv_backward.register_fake
def _(u: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, x, mean_x, _, _, _, _, _, _, weight, _, input_wanted, weight_wanted = others
    sums = x.new_empty(3, x.shape[1], dtype=torch.float64)
    return (
        torch.empty_like(x) if input_wanted else x.new_empty(0),
        weight.new_empty(weight.shape if weight_wanted else 0),
        sums if input_wanted and mean_x is not None else sums.new_empty(0),
    )


def _launch(
    u: Tensor, dz: Tensor, of_u: Tensor, x: Tensor, of_x: Tensor | None, weight: Tensor, tiles: Tiles,
    products: Products, input_wanted: bool, weight_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One pass: the gradient of the input and the sums of its norm, that of the weight; empty if not wanted."""
    out, channels, *size = weight.shape
    programs = min(PROGRAMS, tiles.count) if weight_wanted else tiles.count
    block_in, block_out = padded(channels), padded(out)
    if not weight_wanted:
        block_in, block_out = products.columns(channels), products.summed(out)
    elif not input_wanted:
        block_in, block_out = min(block_in, 2 * products.columns(channels)), _held(products, weight)
    both = input_wanted and weight_wanted
    dz_x = by = partials = parts = None
    if input_wanted:
        dz_x, by = torch.empty_like(x), weight.flatten(2).permute(2, 0, 1).contiguous()
        if of_x is not None:
            partials = x.new_empty(tiles.count, 3, channels, dtype=torch.float32)
    if weight_wanted:
        parts = x.new_empty(programs, tiles.constants["TAPS"], channels, out, dtype=torch.float32)
    grid = programs, triton.cdiv(channels, block_in), triton.cdiv(out, block_out) if weight_wanted else 1
    _backward_kernel[grid](
        u, dz, of_u, x, of_x, by, dz_x, partials, parts, tiles.count, *tiles.sizes,
        C=channels, D=out, BC=block_in, BD=block_out, BATCH=len(of_u) == 6,
        **tiles.constants, **products.constants, num_warps=products.warps(channels, out, both=both), num_stages=1,
    )  # fmt: skip
    nothing = x.new_empty(0)
    if parts is None:
        dweight = nothing
    else:
        dweight = parts.sum(0).permute(2, 1, 0).contiguous().view(out, channels, *size).to(weight.dtype)
    return (
        nothing if dz_x is None else dz_x,
        nothing.double() if partials is None else partials.sum(0, dtype=torch.float64),
        dweight,
    )


def _fits_one_pass(products: Products, weight: Tensor) -> bool:
    """Whether registers hold both: of three taps, 32 channels of two bytes where there is room, else 16."""
    channels, taps = max(weight.shape[:2]), max(weight.shape[2:])
    most = (32 if products.room else 16) // (2 if products.wide else 1)
    return channels <= most and taps <= 3 and not products.tripled


def _held(products: Products, weight: Tensor) -> int:
    """Channels of u whose part of the gradient of the weight a program holds."""
    out, channels, *size = weight.shape
    most, held = ACCUMULATED * 32 * products.warps(out, channels), products.columns(out)
    most //= 1 if products.room else 2
    while held > 16 and held * padded(channels) * max(size) > most:
        held //= 2
    return held


@triton.jit
def _gradient(
    u, dz, place, inside, mean, scale, bias, slope, by_u, constant, BATCH: tl.constexpr
):  # fmt: skip
    """The gradient of the raw map, zero outside [P, BD]."""
    apart = tl.load(u + place, mask=inside, other=0.0).to(tl.float32) - mean
    dn = tl.load(dz + place, mask=inside, other=0.0).to(tl.float32)
    dn = tl.where(apart * scale + bias > 0, dn, dn * slope) * scale
    if BATCH:
        dn = tl.where(inside, dn + apart * by_u + constant, 0.0)
    return rounded(dn, u.dtype.element_ty)


@triton.jit
def _backward_kernel(
    u, dz, of_u, x, of_x, by, dz_x, partials, parts, tiles, H, W, DH, DW,
    C: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, BATCH: tl.constexpr,
    TAPS: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # a program owns every S-th tile of BC channels of x, and of the weight those by BD channels of u
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    dweight = ()
    if parts is not None:
        for _ in tl.static_range(TAPS):
            dweight = dweight + (tl.zeros([BC, BD], tl.float32),)  # noqa: RUF005
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        image, h, w = pixels_of(tile, H, W, BH, BW, LARGE)
        place, inside = place_of(image, h, w, c, H, W, C, CHANNELS_LAST, LARGE)
        if of_x is not None:  # vectors are read again for each tile: there are too few registers to keep them
            mean_x, scale_x = vector_at(of_x, 0, c, C), vector_at(of_x, 1, c, C)
            bias_x, slope_x = vector_at(of_x, 2, c, C), vector_at(of_x, 3, c, C)
        if parts is not None or of_x is not None:
            raw = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)  # [P, BC]
        if parts is not None:
            z = raw
            if of_x is not None:
                z = rounded(activated(raw, inside, mean_x, scale_x, bias_x, slope_x), x.dtype.element_ty)
            z = tl.trans(z.to(DOT))
        total = tl.zeros([BH * BW, BC], tl.float32)
        for block in range(1 if parts is not None else tl.cdiv(D, BD)):
            d = (tl.program_id(2) + block) * BD + tl.arange(0, BD)
            mean, scale = vector_at(of_u, 0, d, D), vector_at(of_u, 1, d, D)
            bias, slope = vector_at(of_u, 2, d, D), vector_at(of_u, 3, d, D)
            by_u, constant = mean, mean
            if BATCH:
                by_u, constant = vector_at(of_u, 4, d, D), vector_at(of_u, 5, d, D)
            more = ()
            for k in tl.static_range(TAPS):
                shift = TAPS // 2 - k
                at, within = place_of(image, h + shift * DH, w + shift * DW, d, H, W, D, CHANNELS_LAST, LARGE)
                du = _gradient(u, dz, at, within, mean, scale, bias, slope, by_u, constant, BATCH).to(DOT)
                if dz_x is not None:
                    at = (k * D + d)[:, None] * C + c[None, :]
                    weight = tl.load(by + at, mask=(d < D)[:, None] & (c < C)[None, :], other=0.0)  # [BD, BC]
                    total = tl.dot(du, weight.to(DOT), total, input_precision=PRECISION)
                if parts is not None:
                    more = more + (tl.dot(z, du, dweight[k], input_precision=PRECISION),)  # noqa: RUF005
            dweight = more
        if dz_x is not None:
            g = rounded(total, dz_x.dtype.element_ty)
            tl.store(dz_x + place, g, mask=inside)
            if of_x is not None:
                g = tl.where(inside, g.to(tl.float32), 0.0)
                apart = raw - mean_x
                n = apart * scale_x + bias_x
                dn = tl.where(n > 0, g, g * slope_x)
                to = partials + tl.full([BC], 3 * C, tl.int64) * tile + c
                tl.store(to, tl.sum(dn, 0), mask=c < C)
                tl.store(to + C, tl.sum(dn * apart, 0), mask=c < C)
                tl.store(to + 2 * C, tl.sum(g * tl.minimum(n, 0.0), 0), mask=c < C)
    if parts is not None:
        d = tl.program_id(2) * BD + tl.arange(0, BD)
        for k in tl.static_range(TAPS):
            at = ((tl.program_id(0) * TAPS + k) * C + c)[:, None].to(tl.int64) * D + d[None, :]
            tl.store(parts + at, dweight[k], mask=(c < C)[:, None] & (d < D)[None, :])
