"""Bilinear upsampling and cross-entropy in one, without a map of scores at full size.

Written out, the scores at full size exist four times in a training step: themselves, their logarithms of
probabilities, and the gradients of both. Here a band of rows is upsampled, its losses and the gradient
of its scores are computed at once, and this gradient is summed back to low resolution before the next
band. What is kept for the backward pass is the gradient of the logits alone.

Letters: N images, C classes, h w size of the logits, H W size of the labels; n images and R rows of a
band; z scores of a band [n, C, R, W].
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable, without importing the compiler

from revseg.kernels.bilinear import DTYPES, Upsampling
from revseg.kernels.cross_entropy import Targets, cross_entropy, equal
from revseg.kernels.shapes import has_values
from revseg.kernels.upsample_argmax import MOST_CLASSES

REDUCTIONS = ("mean", "sum", "none")
_CHECKED = 2**20  # labels that are looked at in one piece


@_disable_dynamo
def upsample_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = 255,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    align_corners: bool = False,
    counts: Tensor | None = None,
) -> Tensor:
    """`F.cross_entropy` of the logits after bilinear upsampling to the size of the labels.

    Args:
        logits: Scores [N, C, h, w], finite; float16, bfloat16, float32 or float64.
        labels: Class indices [N, H, W], uint8 or int64, below C or equal to `ignore_index`.
        ignore_index: The label of pixels that do not count.
        weight: Weight of each class [C], floating; all 1 if None. Gets no gradient.
        label_smoothing: Share of the target that is spread over all classes, in [0, 1].
        reduction: "mean", "sum" or "none". The mean is weighted as in PyTorch: the sum of the losses,
            divided by the sum of the weights of the true classes.
        align_corners: As in `F.interpolate`.
        counts: Counts of pixels [C, C], int64, by true class (rows) and by the class of the highest
            score (columns), the first of equal ones; the pixels that count are added to it. C at
            most 255.

    Returns:
        The loss, a scalar, or the losses [N, H, W] for "none", 0 where a pixel is ignored; float32, or
        float64 for such logits. A mean over nothing is 0, with gradient 0.

    Memory:
        The gradient of the logits and some MiB; while half precision logits are summed up, their
        gradient is float32. "none" keeps the logits and computes the bands again in the backward pass.
        Under function transforms (torch.func) it is the `reference`, which stores all scores.

    Numerics:
        Scores and losses are float32 at least, their sum over the bands float64. The same input gives
        the same bits.

    Raises:
        TypeError: If the logits, the weights, the labels or the counts are of another type.
        ValueError: If a shape, a device, an option or a label does not fit. To look at the labels waits
            for the device.
        RuntimeError: In a backward pass with `create_graph=True`; `reference` has second derivatives.
    """
    _check(logits, labels, weight, counts, label_smoothing, reduction)
    if torch._C._are_functorch_transforms_active():  # they follow plain operations only
        return reference(
            logits,
            labels,
            ignore_index=ignore_index,
            weight=weight,
            label_smoothing=label_smoothing,
            reduction=reduction,
            align_corners=align_corners,
            counts=counts,
        )
    _check_range(labels, ignore_index, logits.shape[1])
    dtype = torch.promote_types(logits.dtype, torch.float32)
    weight = None if weight is None else weight.detach().to(dtype)
    targets = Targets(labels, ignore_index, weight, label_smoothing, counts)
    if reduction == "none":
        return _Losses.apply(logits, targets, align_corners)  # type: ignore[no-any-return, no-untyped-call]
    needs_gradient = torch.is_grad_enabled() and logits.requires_grad
    mean = reduction == "mean"
    return _Loss.apply(logits, targets, align_corners, mean, needs_gradient)  # type: ignore[no-any-return, no-untyped-call]


def reference(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = 255,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    align_corners: bool = False,
    counts: Tensor | None = None,
) -> Tensor:
    """What `upsample_cross_entropy` computes, with all scores at full size."""
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = F.interpolate(scores, labels.shape[-2:], mode="bilinear", align_corners=align_corners)
    targets = labels.long()
    weight = scores.new_ones(scores.shape[1]) if weight is None else weight.to(scores.dtype)
    losses = F.cross_entropy(
        scores, targets, weight, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
    )
    counted = targets != ignore_index
    if counts is not None:
        cells = targets * scores.shape[1] + scores.argmax(dim=1)
        counts += torch.bincount(cells[counted], minlength=counts.numel()).view_as(counts)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    total = weight[targets.where(counted, 0)].where(counted, 0).sum()
    return (losses.sum() / total.where(total > 0, 1)).where(total > 0, 0)


def _check(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    counts: Tensor | None,
    smoothing: float,
    reduction: str,
) -> None:
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


def _check_range(labels: Tensor, ignore_index: int, classes: int) -> None:
    if labels.numel() == 0 or not has_values(labels):
        return
    ends = [
        piece.masked_fill(equal(piece, ignore_index), 0).aminmax()
        for piece in torch.split(labels.flatten(), _CHECKED)
    ]
    lowest, highest = (torch.stack(values) for values in zip(*ends, strict=True))
    low, high = torch.stack((lowest.amin(), highest.amax())).tolist()  # one wait for the device
    if low < 0 or high >= classes:
        raise ValueError(
            f"expected labels below {classes} (the number of classes) or {ignore_index} (ignored), "
            f"got {low if low < 0 else high}"
        )


class _Loss(torch.autograd.Function):
    """The sum or the mean; its gradient is there before the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Targets, align_corners: bool, mean: bool, needs_gradient: bool
    ) -> Tensor:
        size = targets.labels.shape[-2:]
        upsampling = Upsampling(logits, size, align_corners)
        dlogits = torch.zeros_like(logits, dtype=upsampling.dtype) if needs_gradient else None
        # Averaged over its pixels, a gradient fits into float16. A power of two, so that nothing is rounded.
        pixels = 2.0 ** round(math.log2(math.prod(size) / math.prod(logits.shape[-2:])))
        dlosses = torch.full((), 1 / pixels, dtype=upsampling.dtype, device=logits.device)
        sums = [torch.zeros(2, dtype=torch.float64, device=logits.device)]
        for band in upsampling.bands():
            z = upsampling.forward(band)
            targets_here = targets.at(band.images, band.rows)
            losses, weights = cross_entropy(z, targets_here, dlosses if needs_gradient else None)
            sums.append(torch.stack([x.sum(dtype=torch.float64) for x in (losses, weights)]))
            if dlogits is not None:
                upsampling.add_gradient(band, z, dlogits)
        loss, total = torch.stack(sums).sum(dim=0).unbind()
        factor = torch.full_like(total, pixels)
        if mean:
            loss, factor = (loss / total).where(total > 0, 0), (factor / total).where(total > 0, 0)
        if dlogits is not None:
            ctx.save_for_backward(dlogits.to(logits.dtype), factor.to(upsampling.dtype))
        return loss.to(upsampling.dtype)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivatives()
        kept, factor = ctx.saved_tensors
        factor = dloss * factor
        if kept.dtype == factor.dtype:
            dlogits = kept * factor
        else:  # in half precision the factor could be too small a number, so an image at a time is widened
            dlogits = torch.empty_like(kept)
            for image, result in zip(kept, dlogits, strict=True):
                result.copy_(image.to(factor.dtype) * factor)
        return dlogits, None, None, None, None


class _Losses(torch.autograd.Function):
    """The losses [N, H, W]; only the backward pass knows how each of them counts."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Targets, align_corners: bool) -> Tensor:
        upsampling = Upsampling(logits, targets.labels.shape[-2:], align_corners)
        result = torch.empty(targets.labels.shape, dtype=upsampling.dtype, device=logits.device)
        for band in upsampling.bands():
            z = upsampling.forward(band)
            losses, _ = cross_entropy(z, targets.at(band.images, band.rows), None)
            result[band.images, band.rows] = losses
        ctx.save_for_backward(logits, targets.labels, targets.weight)
        ctx.options = targets.ignore_index, targets.smoothing, align_corners
        return result

    @staticmethod
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivatives()
        logits, labels, weight = ctx.saved_tensors
        ignore_index, smoothing, align_corners = ctx.options
        targets = Targets(labels, ignore_index, weight, smoothing, counts=None)
        upsampling = Upsampling(logits, labels.shape[-2:], align_corners)
        dlogits = torch.zeros_like(logits, dtype=upsampling.dtype)
        for band in upsampling.bands():
            z = upsampling.forward(band)
            cross_entropy(z, targets.at(band.images, band.rows), dlosses[band.images, band.rows])
            upsampling.add_gradient(band, z, dlogits)
        return dlogits.to(logits.dtype), None, None


def _refuse_second_derivatives() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "upsample_cross_entropy has no second derivatives: call backward without create_graph=True, "
            "or use revseg.kernels.upsample_cross_entropy.reference"
        )
