"""Passes over all pixels of an upsampled map as one Triton kernel.

What the passes in `cpu` compute, without scores in memory. A program goes through
the classes of its pixels twice. First for the highest score and the sum of exponentials, corrected whenever a
higher score comes; then, each score computed again, for what is due to the sources. So what it holds does
not depend on the number of classes. It leaves 4 numbers for each class and piece of the map in `parts`, of some rows
at a time, and its sums in a row of their own; both are added in a fixed order. Counts of pixels are integers:
a program adds its histogram to them, unless there are too many classes for one.

Letters: N images, C classes, h w size of the logits, H W size of the labels; P pieces of an axis, Q rows of
pieces of all images; R rows and X columns of a program; z the scores of a class.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from revseg.kernels.gpu.bilinear import add_pieces, column_pieces, grid, pieces_parts, row_piece, scores
from revseg.kernels.upsample_cross_entropy.gpu_pixels import count, softmax, weight_of_all
from revseg.kernels.upsample_cross_entropy.inputs import check_range
from revseg.kernels.upsample_cross_entropy.targets import Targets

PARTS_BYTES = 2**25  # unless one row takes more; fits into the second-level cache of a large GPU
MOST_BINS = 2048  # of a histogram in shared memory


def sums(
    logits: Tensor, targets: Targets, align_corners: bool, dloss: float | None
) -> tuple[Tensor, Tensor | None]:
    """Sums over all pixels, and the gradient of that of the losses; see `cpu`."""
    found, dlogits, _ = _checked_pass(logits, targets, align_corners, dloss, losses=False)
    return found, dlogits if dloss is not None else None


def losses(logits: Tensor, targets: Targets, align_corners: bool) -> Tensor:
    """The loss of every pixel [N, H, W], float32."""
    return _checked_pass(logits, targets, align_corners, None, losses=True)[2]


def gradient(logits: Tensor, targets: Targets, align_corners: bool, dlosses: Tensor) -> Tensor:
    """The gradient of the logits [N, C, h, w], float32, from that of the losses [N, H, W]."""
    labels, ignore_index, weight, smoothing, _ = targets
    dlogits: Tensor = pixel_pass(
        logits, labels, weight, dlosses, None, ignore_index, smoothing, align_corners, 1.0, False
    )[2]
    return dlogits


def _checked_pass(
    logits: Tensor, targets: Targets, align_corners: bool, dloss: float | None, losses: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums, gradient and losses; looks at the labels before it adds to the counts."""
    labels, ignore_index, weight, smoothing, counts = targets
    added = None if counts is None else torch.zeros_like(counts)
    found, ends, dlogits, each = pixel_pass(
        logits, labels, weight, None, added, ignore_index, smoothing, align_corners, dloss, losses
    )
    check_range(ends, ignore_index, logits.shape[1])
    if counts is not None and added is not None:
        counts += added
    return found, dlogits, each


@torch.library.custom_op("revseg::upsample_cross_entropy", mutates_args=("counts",))
def pixel_pass(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    dlosses: Tensor | None,
    counts: Tensor | None,
    ignore_index: int,
    smoothing: float,
    align_corners: bool,
    dloss: float | None,
    losses: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All that can be computed of the pixels.

    Args:
        logits: Scores [N, C, h, w], N at least 1.
        labels: Class indices [N, H, W], uint8 or int64; wrong ones give wrong results, but no fault.
        weight: Weight of each class [C], float32.
        dlosses: Gradient of the losses [N, H, W], float32; 1 if None.
        counts: Counts of pixels [C, C], int64, added to.
        ignore_index: The label of pixels that do not count.
        smoothing: Share of the target that is spread over all classes.
        align_corners: As in `F.interpolate`.
        dloss: Factor of the gradient; None if none is wanted.
        losses: Whether the losses of the pixels are wanted.

    Returns:
        The sums of the losses and of their weights [2], float64; the lowest and the highest label that is not
        ignored, and 0, [2], int64; the gradient [N, C, h, w], float32, and the losses [N, H, W], float32, each
        empty if it is not wanted.
    """
    n, classes = logits.shape[:2]
    weight = None if weight is None else weight.contiguous()
    pixels = grid(logits, (labels.shape[1], labels.shape[2]), align_corners)
    rows, columns = n * pixels.rows.number, pixels.columns.number
    sums = logits.new_empty((rows * pixels.tiles, 2), dtype=torch.float64)
    ends = logits.new_empty((rows * pixels.tiles, 2), dtype=torch.int64)
    each = logits.new_empty(labels.shape if losses else 0, dtype=torch.float32)
    dlogits, parts, step = logits.new_empty(0, dtype=torch.float32), None, rows
    if dloss is not None:
        dlogits = torch.zeros_like(logits, dtype=torch.float32)
        step = min(rows, max(1, PARTS_BYTES // (16 * classes * columns)))
        parts = logits.new_empty((step, classes, columns, 4), dtype=torch.float32)
    bins = triton.next_power_of_2(classes**2 + 1)  # one more for pixels that do not count
    with torch.cuda.device_of(logits):
        for first_row in range(0, rows, step):
            here = min(step, rows - first_row)
            here_parts = None if parts is None else parts[:here]
            _pass_kernel[(here, pixels.tiles)](
                logits,
                labels,
                weight,
                dlosses,
                each if losses else None,
                here_parts,
                sums,
                ends,
                counts,
                pixels.rows.bounds,
                pixels.rows.weights,
                pixels.columns.bounds,
                pixels.columns.weights,
                classes,
                labels.shape[1],
                labels.shape[2],
                pixels.rows.number,
                columns,
                first_row,
                *logits.stride(),
                *labels.stride(),
                *(labels if dlosses is None else dlosses).stride(),
                ignore_index,
                smoothing / classes,
                1 - smoothing,
                1.0 if dloss is None else dloss,
                SMOOTHED=smoothing > 0,
                BINS=bins if bins <= MOST_BINS else 0,
                **pixels.constants(),
                num_warps=4,
            )
            if here_parts is not None:
                add_pieces(here_parts, dlogits, pixels, first_row)
    return (
        sums.sum(dim=0),
        torch.stack((ends[:, 0].amin(), ends[:, 1].amax())),
        dlogits,
        each,
    )


@pixel_pass.register_fake
def _(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    dlosses: Tensor | None,
    counts: Tensor | None,
    ignore_index: int,
    smoothing: float,
    align_corners: bool,
    dloss: float | None,
    losses: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    nothing = logits.new_empty(0, dtype=torch.float32)
    return (
        logits.new_empty(2, dtype=torch.float64),
        logits.new_empty(2, dtype=torch.int64),
        nothing if dloss is None else torch.empty_like(logits, dtype=torch.float32),
        logits.new_empty(labels.shape if losses else 0, dtype=torch.float32),
    )


@triton.jit
def _pass_kernel(
    logits,
    labels,
    weight,
    dlosses,
    losses,
    parts,
    sums,
    ends,
    counts,
    row_bounds,
    row_weights,
    column_bounds,
    column_weights,
    classes,
    height,
    width,
    row_count,
    column_count,
    first_row,
    n_stride,
    c_stride,
    h_stride,
    w_stride,
    labels_n_stride,
    labels_h_stride,
    labels_w_stride,
    dlosses_n_stride,
    dlosses_h_stride,
    dlosses_w_stride,
    ignore_index,
    share,
    rest,
    dloss,
    SMOOTHED: tl.constexpr,
    BINS: tl.constexpr,
    ROWS: tl.constexpr,
    CELLS: tl.constexpr,
    SIDE: tl.constexpr,
):
    # a program owns the pixels of one piece of rows and of CELLS pieces of columns
    row = first_row + tl.program_id(0)
    image = (row // row_count).to(tl.int64)
    y, y_there, low_y, high_y, y_weight = row_piece(row_bounds, row_weights, row % row_count, ROWS)
    x, x_there, low, high, x_weight = column_pieces(
        column_bounds, column_weights, tl.program_id(1), column_count, CELLS, SIDE
    )
    low, high = low * w_stride, high * w_stride
    low_row = logits + (image * n_stride + low_y * h_stride)
    high_row = logits + (image * n_stride + high_y * h_stride)
    there = y_there[:, None] & x_there[None, :]  # [R, X], as all that follows
    y, x = y.to(tl.int64)[:, None], x.to(tl.int64)[None, :]

    at = image * labels_n_stride + y * labels_h_stride + x * labels_w_stride
    label = tl.load(labels + at, mask=there, other=0).to(tl.int64)
    counted = there & (label != ignore_index)
    label = tl.where(counted, label, 0)
    program = row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(ends + 2 * program, tl.min(label))
    tl.store(ends + 2 * program + 1, tl.max(label))
    target = label.to(tl.int32)

    highest, total, score, predicted = softmax(
        low_row,
        high_row,
        c_stride,
        low,
        high,
        y_weight,
        x_weight,
        x_there,
        target,
        classes,
        ROWS,
        CELLS * SIDE,
    )
    # as in `cross_entropy`, where the formula is
    known = counted & (target >= 0) & (target < classes)
    weights = counted.to(tl.float32) if weight is None else tl.load(weight + target, mask=known, other=0.0)
    tl.store(sums + 2 * program + 1, tl.sum(tl.sum(weights, 0).to(tl.float64)))
    true = rest * weights
    both = true
    if SMOOTHED:
        both += tl.where(counted, weight_of_all(weight, share, classes), 0.0)
    loss = both * tl.log(total) - true * (score - highest)

    if parts is not None:
        dloss = tl.where(counted, dloss, 0.0)
        if dlosses is not None:
            at = image * dlosses_n_stride + y * dlosses_h_stride + x * dlosses_w_stride
            dloss *= tl.load(dlosses + at, mask=counted, other=0.0)
        by_probability, by_truth = both / total * dloss, true * dloss
        piece = tl.program_id(1) * CELLS + tl.arange(0, CELLS)
        part = tl.program_id(0).to(tl.int64) * classes * column_count + piece
        part = parts + (4 * part[:, None] + tl.arange(0, 4)[None, :])
        by_low, by_high = (1 - y_weight)[:, None], y_weight[:, None]
    if SMOOTHED or parts is not None:
        for c in range(classes):
            z = scores(low_row, high_row, low, high, y_weight, x_weight, x_there) - highest
            low_row += c_stride
            high_row += c_stride
            if SMOOTHED:
                each = share if weight is None else share * tl.load(weight + c)
                loss -= each * z
            if parts is not None:
                dz = tl.exp(z) * by_probability - tl.where(target == c, by_truth, 0.0)
                if SMOOTHED:
                    dz -= each * dloss
                upper, under = tl.sum(dz * by_low, 0), tl.sum(dz * by_high, 0)  # [X]
                four = pieces_parts(upper, under, x_weight, CELLS, SIDE)
                tl.store(part, four, mask=(piece < column_count)[:, None])
                part += 4 * column_count

    loss = tl.where(counted, loss, 0.0)
    if losses is not None:
        tl.store(losses + (image * height + y) * width + x, loss, mask=there)
    tl.store(sums + 2 * program, tl.sum(tl.sum(loss, 0).to(tl.float64)))
    if counts is not None:
        count(counts, target, predicted, known, classes, BINS)
