"""Bilinear upsampling and cross-entropy in one, without a map of scores at full size.

Written out, the scores at full size exist four times in a training step: themselves, their logarithms of
probabilities, and the gradients of both. Here one pass computes the losses of some pixels together with
the gradient of their scores, and sums it back to low resolution at once. What is kept for the backward
pass is the gradient of the logits alone.

The passes exist twice, with the same functions: as Triton kernels, and in bands of rows in plain PyTorch.

Letters: N images, C classes, h w size of the logits, H W size of the labels.
"""

import math
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable, without importing the compiler

from revseg.kernels.dispatch import has_kernel
from revseg.kernels.upsample_cross_entropy import cpu
from revseg.kernels.upsample_cross_entropy.inputs import check
from revseg.kernels.upsample_cross_entropy.targets import Targets
from revseg.kernels.verify import Kernel


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
        Scores and losses are float32 at least, their sums float64 where the device has it. The same input gives the same bits.

    Raises:
        TypeError: If the logits, the weights, the labels or the counts are of another type.
        ValueError: If a shape, a device, an option or a label does not fit. To look at the labels waits
            for the device.
        RuntimeError: In a backward pass with `create_graph=True`; `reference` has second derivatives.
    """
    check(logits, labels, weight, counts, label_smoothing, reduction)
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


def example_inputs(device: torch.device | str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits and labels of a small call, a factor of 3.25 by 3.6, some pixels ignored."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 4, 5, generator=generator).to(device, dtype).requires_grad_()
    labels = torch.randint(0, 6, (2, 13, 18), generator=generator, dtype=torch.uint8)
    return logits, labels.masked_fill(labels == 5, 255).to(device)


def _passes(logits: Tensor) -> ModuleType:
    """Whatever goes over all pixels of these logits: the functions `sums`, `losses` and `gradient`."""
    if len(logits) and has_kernel(logits):
        from revseg.kernels.upsample_cross_entropy import gpu

        return gpu
    return cpu


class _Loss(torch.autograd.Function):
    """The sum or the mean; its gradient is there before the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Targets, align_corners: bool, mean: bool, needs_gradient: bool
    ) -> Tensor:
        # Averaged over its pixels, a gradient fits into float16. A power of two, so that nothing is rounded.
        pixels = 2.0 ** round(math.log2(math.prod(targets.labels.shape[-2:]) / math.prod(logits.shape[-2:])))
        dloss = 1 / pixels if needs_gradient else None
        sums, dlogits = _passes(logits).sums(logits, targets, align_corners, dloss)
        loss, total = sums.unbind()
        factor = torch.full_like(total, pixels)
        if mean:
            loss, factor = (loss / total).where(total > 0, 0), (factor / total).where(total > 0, 0)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        if dlogits is not None:
            ctx.save_for_backward(dlogits.to(logits.dtype), factor.to(dtype))
        return loss.to(dtype)  # type: ignore[no-any-return]

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
        ctx.save_for_backward(logits, targets.labels, targets.weight)
        ctx.options = targets.ignore_index, targets.smoothing, align_corners
        return _passes(logits).losses(logits, targets, align_corners)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivatives()
        logits, labels, weight = ctx.saved_tensors
        ignore_index, smoothing, align_corners = ctx.options
        targets = Targets(labels, ignore_index, weight, smoothing, counts=None)
        dlogits = _passes(logits).gradient(logits, targets, align_corners, dlosses)
        return dlogits.to(logits.dtype), None, None


def _refuse_second_derivatives() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "upsample_cross_entropy has no second derivatives: call backward without create_graph=True, "
            "or use revseg.kernels.upsample_cross_entropy.op.reference"
        )


KERNELS = (Kernel(upsample_cross_entropy, reference, example_inputs, differentiable=(0,)),)
