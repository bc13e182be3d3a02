"""What `upsample_cross_entropy` refuses, before it computes."""

import torch
from torch import Tensor

from revseg.kernels.cpu.argmax import MOST_CLASSES
from revseg.kernels.cpu.bilinear import DTYPES
from revseg.kernels.shapes import has_values
from revseg.kernels.upsample_cross_entropy.targets import equal

REDUCTIONS = ("mean", "sum", "none")
_CHECKED = 2**20  # labels that are looked at in one piece


def check(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    counts: Tensor | None,
    smoothing: float,
    reduction: str,
) -> None:
    """All that can be known without looking at values.

    Raises:
        TypeError: If a tensor is of another type.
        ValueError: If a shape, a device or an option does not fit.
    """
    if logits.dtype not in DTYPES:
        raise TypeError(f"expected floating logits of at least 16 bits, got {logits.dtype}")
    if labels.dtype not in (torch.uint8, torch.int64):
        raise TypeError(f"expected labels of dtype uint8 or int64, got {labels.dtype}")
    if logits.ndim != 4 or 0 in logits.shape[1:]:
        raise ValueError(f"expected logits [N, C, h, w] with C, h, w at least 1, got {list(logits.shape)}")
    n, classes = logits.shape[:2]
    if labels.ndim != 3 or len(labels) != n or 0 in labels.shape[1:]:
        raise ValueError(
            f"expected labels [N, H, W] with N = {n} and H, W at least 1, got {list(labels.shape)}"
        )
    if weight is not None and not weight.is_floating_point():
        raise TypeError(f"expected floating class weights, got {weight.dtype}")
    if weight is not None and weight.shape != (classes,):
        raise ValueError(f"expected class weights [C] with C = {classes}, got {list(weight.shape)}")
    if counts is not None and counts.dtype != torch.int64:
        raise TypeError(f"expected counts of dtype int64, got {counts.dtype}")
    if counts is not None and (counts.shape != (classes, classes) or not counts.is_contiguous()):
        raise ValueError(f"expected contiguous counts [C, C] with C = {classes}, got {list(counts.shape)}")
    if counts is not None and classes > MOST_CLASSES:
        raise ValueError(f"expected at most {MOST_CLASSES} classes to count, got {classes}")
    for name, tensor in (("labels", labels), ("class weights", weight), ("counts", counts)):
        if tensor is not None and tensor.device != logits.device:
            raise ValueError(f"expected {name} on {logits.device}, where the logits are, got {tensor.device}")
    if not 0 <= smoothing <= 1:
        raise ValueError(f"expected label_smoothing in [0, 1], got {smoothing}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"unknown reduction {reduction!r}; choose one of {', '.join(REDUCTIONS)}")


def check_labels(labels: Tensor, ignore_index: int, classes: int) -> None:
    """Looks at every label.

    Raises:
        ValueError: If one is neither below C nor the ignored one.
    """
    if labels.numel() == 0 or not has_values(labels):
        return
    ends = [
        piece.masked_fill(equal(piece, ignore_index), 0).aminmax()
        for piece in torch.split(labels.flatten(), _CHECKED)
    ]
    lowest, highest = (torch.stack(values) for values in zip(*ends, strict=True))
    check_range(torch.stack((lowest.amin(), highest.amax())), ignore_index, classes)


def check_range(ends: Tensor, ignore_index: int, classes: int) -> None:
    """Looks at the lowest and the highest label that are not ignored [2], waiting for the device once.

    Raises:
        ValueError: If one of them is not in [0, C).
    """
    low, high = ends.tolist()
    if low < 0 or high >= classes:
        raise ValueError(
            f"expected labels below {classes} (the number of classes) or {ignore_index} (ignored), "
            f"got {low if low < 0 else high}"
        )
