"""The class of the largest upsampled score, as a Triton kernel.

One launch: a program goes through the classes of its pixels one after another and keeps the highest score
and its class. No score leaves the registers, and no number of classes is padded.

Letters: N images, C classes, h w size of the scores, H W size of the result; R rows and X columns of a program.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from revseg.kernels.gpu.bilinear import column_pieces, grid, row_piece, scores

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@torch.library.custom_op(
    "revseg::upsample_argmax",
    mutates_args=(),
    schema="(Tensor logits, int[] size, bool align_corners) -> Tensor",
)
def argmax(logits: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """Class indices [N, H, W], uint8, of logits [N, C, h, w]; at least one image, at most 255 classes."""
    height, width = size
    pixels = grid(logits, (height, width), align_corners)
    labels = logits.new_empty((len(logits), height, width), dtype=torch.uint8)
    with torch.cuda.device_of(logits):
        _argmax_kernel[(len(logits) * pixels.rows.number, pixels.tiles)](
            logits,
            labels,
            pixels.rows.bounds,
            pixels.rows.weights,
            pixels.columns.bounds,
            pixels.columns.weights,
            logits.shape[1],
            height,
            width,
            pixels.rows.number,
            pixels.columns.number,
            *logits.stride(),
            **pixels.constants(),
            num_warps=4,
        )
    return labels


@argmax.register_fake
def _(logits: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    return logits.new_empty((len(logits), *size), dtype=torch.uint8)


@triton.jit
def _argmax_kernel(
    logits,
    labels,
    row_bounds,
    row_weights,
    column_bounds,
    column_weights,
    classes,
    height,
    width,
    row_count,
    column_count,
    n_stride,
    c_stride,
    h_stride,
    w_stride,
    ROWS: tl.constexpr,
    CELLS: tl.constexpr,
    SIDE: tl.constexpr,
):
    # a program owns the pixels of one piece of rows and of CELLS pieces of columns
    image = (tl.program_id(0) // row_count).to(tl.int64)
    y, y_there, low_y, high_y, y_weight = row_piece(
        row_bounds, row_weights, tl.program_id(0) % row_count, ROWS
    )
    x, x_there, low, high, x_weight = column_pieces(
        column_bounds, column_weights, tl.program_id(1), column_count, CELLS, SIDE
    )
    low, high = low * w_stride, high * w_stride
    low_row = logits + (image * n_stride + low_y * h_stride)
    high_row = logits + (image * n_stride + high_y * h_stride)
    highest = tl.full([ROWS, CELLS * SIDE], LOWEST, tl.float32)
    found = tl.zeros([ROWS, CELLS * SIDE], tl.int32)
    for c in range(classes):
        z = scores(low_row, high_row, low, high, y_weight, x_weight, x_there)
        found = tl.where(z > highest, c, found)  # the first of equal ones
        highest = tl.maximum(highest, z)
        low_row += c_stride
        high_row += c_stride
    at = (image * height + y).to(tl.int64)[:, None] * width + x[None, :]
    tl.store(labels + at, found.to(tl.uint8), mask=y_there[:, None] & x_there[None, :])
