"""From logits at a model's stride to a loss, and to labels, at the size of the labels.

The maps at full size are the largest tensors of a training step: 19 classes at 1024 x 2048 are
159 MB an image. So everything that touches them lives in this file, behind two functions.
`segmentation_loss` is the definition of the loss. `predict_labels` never holds more than two
such maps of a single class, which keeps validation far below training.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = 255


def segmentation_loss(
    logits: Tensor | Sequence[Tensor],
    labels: Tensor,
    *,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    aux_weight: float = 0.4,
) -> Tensor:
    """Cross-entropy of upsampled logits, averaged over the pixels that count.

    The average is weighted, as in PyTorch: the losses times their class weights, divided by
    the sum of these weights. A batch in which no pixel counts has loss 0 and gradient 0.

    Args:
        logits: Scores [N, C, h, w] at any stride; or a tuple of such, the main head first and
            then auxiliary heads.
        labels: Class indices [N, H, W], uint8 or int64; 255 is ignored.
        class_weights: Weight of each class [C]; all equal if None.
        label_smoothing: Share of the target that is spread over all classes, in [0, 1).
        aux_weight: Weight of each auxiliary head beside the main one's 1.

    Returns:
        The loss, a scalar, at least float32.

    Raises:
        ValueError: If shapes do not fit, or a label is neither below C nor 255.
        TypeError: If the labels are neither uint8 nor int64.
    """
    heads = (logits,) if isinstance(logits, Tensor) else tuple(logits)
    _check_labels(heads, labels)
    targets = labels.long()
    total = _weight_of_pixels(targets, class_weights)
    losses = []
    for head in heads:
        scores = _upsample(head, labels.shape[-2:])  # [N, C, H, W]
        loss = F.cross_entropy(
            scores,
            targets,
            class_weights,
            ignore_index=IGNORE,
            reduction="sum",
            label_smoothing=label_smoothing,
        )
        losses.append(loss / total)
    return losses[0] + aux_weight * sum(losses[1:]) if len(losses) > 1 else losses[0]


class SegmentationLoss(nn.Module):
    """`segmentation_loss` with its options kept; `class_weights` moves with the module.

    Args:
        class_weights: Weight of each class [C]; all equal if None.
        label_smoothing: Share of the target that is spread over all classes, in [0, 1).
        aux_weight: Weight of each auxiliary head beside the main one's 1.

    Raises:
        ValueError: If an option is out of its range.
    """

    class_weights: Tensor | None

    def __init__(
        self, class_weights: Tensor | None = None, *, label_smoothing: float = 0.0, aux_weight: float = 0.4
    ) -> None:
        super().__init__()
        if class_weights is not None and (class_weights.ndim != 1 or bool((class_weights < 0).any())):
            raise ValueError(f"expected class weights [C], none below 0, got {class_weights.tolist()}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"expected label_smoothing in [0, 1), got {label_smoothing}")
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.label_smoothing = label_smoothing
        self.aux_weight = aux_weight

    def forward(self, logits: Tensor | Sequence[Tensor], labels: Tensor) -> Tensor:
        return segmentation_loss(
            logits,
            labels,
            class_weights=self.class_weights,
            label_smoothing=self.label_smoothing,
            aux_weight=self.aux_weight,
        )


@torch.no_grad()
def predict_labels(logits: Tensor | Sequence[Tensor], size: Sequence[int]) -> Tensor:
    """The most probable class of every pixel at full size.

    Equal, pixel for pixel, to the argmax of the upsampled logits. Upsampling does not mix
    classes, so it can go class by class and keep only the best score so far. The first of equal
    scores wins.

    Args:
        logits: Scores [N, C, h, w], C at most 255; of a tuple the main head, the first, counts.
        size: (H, W).

    Returns:
        Class indices [N, H, W], uint8.

    Memory:
        Some 10 bytes a pixel beyond the result, whatever C is.

    Raises:
        ValueError: If there are more than 255 classes.
    """
    scores = logits if isinstance(logits, Tensor) else logits[0]
    n, classes = scores.shape[:2]
    if classes > IGNORE:
        raise ValueError(f"expected at most {IGNORE} classes, got {classes}")
    best = _upsample(scores[:, :1], size)  # [N, 1, H, W]
    labels = torch.zeros((n, 1, *size), dtype=torch.uint8, device=scores.device)
    for c in range(1, classes):
        score = _upsample(scores[:, c : c + 1], size)
        labels.masked_fill_(score > best, c)
        torch.maximum(best, score, out=best)
    return labels[:, 0]


def _upsample(scores: Tensor, size: Sequence[int]) -> Tensor:
    """Scores [N, C, H, W], interpolated in float32 at least."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return F.interpolate(scores, size=tuple(size), mode="bilinear", align_corners=False)


def _weight_of_pixels(targets: Tensor, class_weights: Tensor | None) -> Tensor:
    """What the sum of the losses is divided by; never 0."""
    counted = targets != IGNORE
    if class_weights is None:
        return counted.sum().clamp(min=1)
    weights = class_weights[targets.masked_fill(~counted, 0)] * counted
    return weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)


def _check_labels(heads: Sequence[Tensor], labels: Tensor) -> None:
    if labels.dtype not in (torch.uint8, torch.int64):
        raise TypeError(f"expected labels of dtype uint8 or int64, got {labels.dtype}")
    n, classes = heads[0].shape[:2]
    if labels.ndim != 3 or labels.shape[0] != n:
        raise ValueError(f"expected labels [N, H, W] with N = {n}, got shape {list(labels.shape)}")
    if any(head.ndim != 4 or head.shape[:2] != (n, classes) for head in heads):
        raise ValueError(
            f"expected logits [{n}, {classes}, h, w], got {[list(head.shape) for head in heads]}"
        )
    if labels.numel() == 0:
        return
    low, high = torch.stack(
        labels.masked_fill(labels == IGNORE, 0).aminmax()
    ).tolist()  # one wait for the device
    if low < 0 or high >= classes:
        raise ValueError(
            f"expected labels below {classes} (the number of classes) or {IGNORE} (ignored), "
            f"got {low if low < 0 else high}"
        )
