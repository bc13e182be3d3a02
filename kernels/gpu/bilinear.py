"""Bilinear upsampling inside of Triton kernels: which pixels a program owns, their scores, and the way back.

Along each axis the outputs between the same two sources are cut into pieces: at most `SIDE` columns, or at
most `ROWS` rows. A program owns one piece of rows and `CELLS` neighbouring pieces of columns, all of whose scores
are mixtures of at most four sources. So it can leave at each piece what each of the four is due, 4 numbers
for a class. What the sources are due is added later, by `add_pieces`, always in the same order: no
atomics, and the same bits twice.

Positions and weights are made once for each size, by `interpolation`, and are kept on the device.

Letters: N images, C classes, h w size of the source, H W size of the output; P pieces of an axis, Q rows of
pieces of all images; R rows and X columns of a program.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from revseg.kernels.interpolation import axis

PIXELS = 1024  # of a program
MOST_ROWS = 8
MOST_COLUMNS = 32
COLUMNS_ADDED = 128  # of a program that adds
CLASSES_ADDED = 8


class Pieces(NamedTuple):
    """One axis: the pieces of its outputs."""

    number: int  # P
    most: int  # pieces that one source is the lower, or the higher one of
    side: int  # outputs of a piece at most, a power of two
    bounds: Tensor  # [P, 4], int32: first output, the one after the last, lower and higher source
    users: Tensor  # [size, 4], int32: first piece of which it is the lower source, one after the last; the higher
    weights: Tensor  # [outputs], float32: of the higher source


class Grid(NamedTuple):
    """Both axes of an upsampling, and the shape of a program."""

    rows: Pieces
    columns: Pieces
    cells: int

    @property
    def tiles(self) -> int:
        """Programs side by side."""
        return -(-self.columns.number // self.cells)

    def constants(self) -> dict[str, int]:
        """R and X for a kernel."""
        return {"ROWS": self.rows.side, "CELLS": self.cells, "SIDE": self.columns.side}


def grid(source: Tensor, size: tuple[int, int], align_corners: bool) -> Grid:
    """The pieces of an upsampling of maps [N, C, h, w] to (H, W)."""
    h, w = source.shape[-2:]
    rows = _pieces(h, size[0], align_corners, MOST_ROWS, source.device)
    columns = _pieces(w, size[1], align_corners, MOST_COLUMNS, source.device)
    return Grid(rows, columns, PIXELS // rows.side // columns.side)


@lru_cache(maxsize=64)
def _pieces(size: int, outputs: int, align_corners: bool, most: int, device: torch.device) -> Pieces:
    side = min(most, triton.next_power_of_2(-(-outputs // size)))
    sources = axis(size, outputs, align_corners, torch.float32)
    runs = np.flatnonzero(np.diff(sources.low, prepend=-1, append=-1))
    first = np.concatenate([np.arange(start, stop, side) for start, stop in pairwise(runs)])
    low, high = sources.low[first], sources.high[first]
    bounds = np.stack((first, np.append(first[1:], outputs), low, high), axis=1)
    i = np.arange(size)
    users = np.stack([np.searchsorted(x, i, side) for x in (low, high) for side in ("left", "right")], axis=1)
    most_users = int(max((users[:, 1] - users[:, 0]).max(), (users[:, 3] - users[:, 2]).max()))
    with torch.inference_mode(False):  # they outlive the call
        return Pieces(
            len(first),
            most_users,
            side,
            torch.tensor(bounds.astype(np.int32), device=device),
            torch.tensor(users.astype(np.int32), device=device),
            torch.tensor(sources.high_weight, device=device),
        )


def add_pieces(parts: Tensor, source: Tensor, grid: Grid, first_row: int) -> None:
    """Adds to each source what the pieces of some rows have left for it.

    Args:
        parts: [rows, C, P, 4], float32, for the lower row its lower and higher column, then for the higher row.
        source: [N, C, h, w], float32; added to.
        grid: Of the upsampling.
        first_row: The first of the rows, among the Q of all images.
    """
    classes, h, w = source.shape[1:]
    rows = len(parts)
    first_image, last_image = (i // grid.rows.number for i in (first_row, first_row + rows - 1))
    programs = (
        (last_image - first_image + 1) * h,
        triton.cdiv(w, COLUMNS_ADDED),
        triton.cdiv(classes, CLASSES_ADDED),
    )
    _add_kernel[programs](
        parts,
        source,
        grid.rows.users,
        grid.columns.users,
        classes,
        h,
        w,
        grid.rows.number,
        grid.columns.number,
        grid.columns.most,
        first_row,
        rows,
        first_image,
        *source.stride(),
        CLASSES=CLASSES_ADDED,
        COLUMNS=COLUMNS_ADDED,
        num_warps=4,
    )


@triton.jit
def _add_kernel(
    parts,
    source,
    row_users,
    column_users,
    classes,
    h,
    w,
    row_pieces,
    column_pieces,
    most,
    first_row,
    rows,
    first_image,
    n_stride,
    c_stride,
    h_stride,
    w_stride,
    CLASSES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # a program owns COLUMNS pixels of one row of the source, in CLASSES classes
    image = first_image + tl.program_id(0) // h
    y = tl.program_id(0) % h
    x = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    c = tl.program_id(2) * CLASSES + tl.arange(0, CLASSES)
    inside = (c < classes)[:, None] & (x < w)[None, :]
    at = image.to(tl.int64) * n_stride + y.to(tl.int64) * h_stride
    at = source + (at + c.to(tl.int64)[:, None] * c_stride + x.to(tl.int64)[None, :] * w_stride)
    total = tl.load(at, mask=inside, other=0.0)
    for higher_row in tl.static_range(2):
        start = image * row_pieces + tl.load(row_users + 4 * y + 2 * higher_row) - first_row
        stop = image * row_pieces + tl.load(row_users + 4 * y + 2 * higher_row + 1) - first_row
        for row in range(tl.maximum(start, 0), tl.minimum(stop, rows)):
            for higher_column in tl.static_range(2):
                part = (
                    parts
                    + tl.cast(row, tl.int64) * classes * column_pieces * 4
                    + 2 * higher_row
                    + higher_column
                )
                first = tl.load(column_users + 4 * x + 2 * higher_column, mask=x < w, other=0)
                last = tl.load(column_users + 4 * x + 2 * higher_column + 1, mask=x < w, other=0)
                for i in range(most):
                    there = inside & (first + i < last)[None, :]
                    at_piece = 4 * (c[:, None] * column_pieces + (first + i)[None, :])
                    total += tl.load(part + at_piece, mask=there, other=0.0)
    tl.store(at, total, mask=inside)


@triton.jit
def row_piece(bounds, weights, piece, ROWS: tl.constexpr):
    """The rows of a piece [R], whether they are there, lower and higher source, the weight of the higher."""
    y = tl.load(bounds + 4 * piece) + tl.arange(0, ROWS)
    there = y < tl.load(bounds + 4 * piece + 1)
    low, high = tl.load(bounds + 4 * piece + 2), tl.load(bounds + 4 * piece + 3)
    return y, there, low.to(tl.int64), high.to(tl.int64), tl.load(weights + y, mask=there, other=0.0)


@triton.jit
def column_pieces(bounds, weights, tile, pieces, CELLS: tl.constexpr, SIDE: tl.constexpr):
    """The same for the columns of some pieces [X], with sources [X]."""
    slot = tl.arange(0, CELLS * SIDE)
    piece = tile * CELLS + slot // SIDE
    known = piece < pieces
    x = tl.load(bounds + 4 * piece, mask=known, other=0) + slot % SIDE
    there = x < tl.load(bounds + 4 * piece + 1, mask=known, other=0)
    low = tl.load(bounds + 4 * piece + 2, mask=there, other=0).to(tl.int64)
    high = tl.load(bounds + 4 * piece + 3, mask=there, other=0).to(tl.int64)
    return x, there, low, high, tl.load(weights + x, mask=there, other=0.0)


@triton.jit
def scores(low_row, high_row, low, high, row_weight, column_weight, there):
    """One class [R, X], from pointers to its values in two rows, and the offsets [X] in them."""
    upper = tl.load(low_row + low, mask=there, other=0.0).to(tl.float32) * (1 - column_weight)
    upper += tl.load(low_row + high, mask=there, other=0.0).to(tl.float32) * column_weight
    lower = tl.load(high_row + low, mask=there, other=0.0).to(tl.float32) * (1 - column_weight)
    lower += tl.load(high_row + high, mask=there, other=0.0).to(tl.float32) * column_weight
    return upper[None, :] * (1 - row_weight)[:, None] + lower[None, :] * row_weight[:, None]


@triton.jit
def pieces_parts(upper, under, column_weight, CELLS: tl.constexpr, SIDE: tl.constexpr):
    """What the pieces leave of one class [CELLS, 4], from its gradient for the lower and the higher row [X]."""
    low, high = 1 - column_weight, column_weight
    left = tl.join(_piece_sums(upper * low, CELLS, SIDE), _piece_sums(under * low, CELLS, SIDE))
    right = tl.join(_piece_sums(upper * high, CELLS, SIDE), _piece_sums(under * high, CELLS, SIDE))
    return tl.reshape(tl.join(left, right), [CELLS, 4])  # row by row


@triton.jit
def _piece_sums(values, CELLS: tl.constexpr, SIDE: tl.constexpr):
    return tl.sum(tl.reshape(values, [CELLS, SIDE]), 1)
