"""Lovász-softmax: a loss that falls as the mean IoU rises, for classes that are rare or thin.

Cross-entropy asks for the likelihood of the labels, and a class of few pixels hardly counts in it. The IoU of a class, as
a function of which of its pixels are wrong, has a convex extension to errors between 0 and 1, of which the gradient
follows from the order of the errors alone.

Source: Berman, Rannen Triki and Blaschko, The Lovász-Softmax Loss, CVPR 2018, arXiv:1705.08790, equations 8 to 12.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from revseg.losses import UpsampleCrossEntropy


class LovaszCrossEntropy(UpsampleCrossEntropy):
    """Cross-entropy at the size of the labels, and Lovász-softmax at that of the logits, each with a weight of 1.

    Lovász-softmax is the mean over the classes that the labels of the batch have. It reads labels at the pixels
    that the logits are nearest to, so thin things count in it as far as the logits are fine.

    Args:
        **options: Those of `UpsampleCrossEntropy`; class weights, smoothing and reduction are of the cross-entropy.

    Raises:
        ValueError: If the reduction is "none".

    Memory:
        Beside that of the cross-entropy the gradient of the logits, and while it is computed two more maps of their size and
        the order of the pixels of one class.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.reduction == "none":
            raise ValueError('expected reduction "mean" or "sum" for a loss of whole batches, got "none"')

    def head_loss(self, logits: Tensor, labels: Tensor, counts: Tensor | None) -> Tensor:
        loss = super().head_loss(logits, labels, counts)
        for dim, length in enumerate(logits.shape[2:], 1):
            centres = torch.arange(length, device=labels.device) + 0.5
            labels = labels.index_select(dim, (centres * (labels.shape[dim] / length)).long())
        return loss + _Lovasz.apply(logits, labels.long(), self.ignore_index)  # type: ignore[no-untyped-call, no-any-return]


class _Lovasz(torch.autograd.Function):
    """Keeps the gradient of the logits alone."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        truth, scores = labels.flatten(), logits.movedim(1, 0).flatten(1)
        ignored = truth == ignore_index
        p = scores.to(torch.promote_types(logits.dtype, torch.float32)).softmax(0)
        slopes = torch.empty_like(p)  # of the loss by each probability
        loss, present = p.new_zeros(()), p.new_zeros(())
        for k in range(len(p)):
            is_class = (truth == k) & ~ignored
            errors = torch.where(is_class, 1 - p[k], p[k]).masked_fill_(ignored, -1)
            errors, order = errors.sort(descending=True)  # the ignored ones come last
            is_class = is_class[order]
            weights = jaccard_slopes(is_class, p.dtype)
            loss += errors.clamp_(min=0) @ weights
            present += is_class.any()
            slopes[k, order] = torch.where(is_class, -weights, weights)
        slopes.masked_fill_(ignored, 0)
        slopes -= (slopes * p).sum(0)
        slopes *= p / present.clamp_(min=1)
        shape = len(p), len(logits), *logits.shape[2:]
        ctx.save_for_backward(slopes.to(logits.dtype).view(shape).movedim(0, 1))
        return loss / present

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * dloss.to(gradient.dtype), None, None


def jaccard_slopes(is_class: Tensor, dtype: torch.dtype) -> Tensor:
    """By how much 1 - IoU rises with each pixel more that is wrong [P]: algorithm 1 of the paper, without its differences.

    A pixel of the class leaves the intersection I, and any other one joins the union U: 1 / U, and I / (U (U - 1)).

    Args:
        is_class: Whether each pixel is of the class [P], bool, the one with the largest error first.
        dtype: Of the result.
    """
    wrong = is_class.cumsum(0)
    intersection = wrong[-1] - wrong
    union = (torch.arange(1, len(is_class) + 1, device=is_class.device) + intersection).to(dtype)
    return torch.where(is_class, 1, intersection / (union - 1).clamp_(min=1)) / union
