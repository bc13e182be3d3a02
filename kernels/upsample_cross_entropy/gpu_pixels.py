"""The steps of cross-entropy inside of a Triton kernel, for the pixels [R, X] of one program.

Letters: C classes; R rows and X columns of a program; z the scores of one class [R, X].
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from revseg.kernels.gpu.bilinear import scores

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def softmax(
    low_row, high_row, c_stride, low, high, row_weight, column_weight, there, target, classes,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The highest score, the sum of exponentials by its own, the score of the true class, the class of the highest.

    One pass over the classes: the sum is corrected whenever a higher score comes.
    """
    highest = tl.full([ROWS, COLUMNS], LOWEST, tl.float32)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    true = tl.zeros([ROWS, COLUMNS], tl.float32)
    predicted = tl.zeros([ROWS, COLUMNS], tl.int32)
    for c in range(classes):
        z = scores(low_row, high_row, low, high, row_weight, column_weight, there)
        predicted = tl.where(z > highest, c, predicted)  # the first of equal ones
        true = tl.where(target == c, z, true)
        above = z - highest
        lower = tl.exp(-tl.abs(above))  # the exponential of the lower of the two, by that of the higher
        total = tl.where(above > 0, total * lower + 1, total + lower)
        highest = tl.maximum(highest, z)
        low_row += c_stride
        high_row += c_stride
    return highest, total, true, predicted


@triton.jit
def weight_of_all(weight, share, classes):
    """The sum over the classes of what label smoothing gives to each."""
    if weight is None:
        total = share * classes
    else:
        total = share * tl.load(weight)
        for c in range(1, classes):
            total += share * tl.load(weight + c)
    return total


@triton.jit
def count(counts, target, predicted, counted, classes, BINS: tl.constexpr):
    """Adds pixels to the counts; BINS, above the number of cells, is that of a histogram, or 0 for none."""
    cell = target * classes + predicted
    if BINS:
        cells = tl.histogram(tl.ravel(tl.where(counted, cell, classes * classes)), BINS)
        i = tl.arange(0, BINS)
        here = (cells > 0) & (i < classes * classes)
        tl.atomic_add(counts + i, cells.to(tl.int64), mask=here, sem="relaxed")
    else:
        tl.atomic_add(counts + cell, counted.to(tl.int64), mask=counted, sem="relaxed")
