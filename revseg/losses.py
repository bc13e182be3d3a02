"""From logits at a model's stride to a loss, and to labels, at the size of the labels.

The maps at full size would be the largest tensors of a training step: 19 classes at 1024 x 2048 are
159 MB an image. None of the losses here has one: `revseg.ops` computes them piece by piece. Of a volume one slice
after another is an image, whose logits at low resolution lie between those of two.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from revseg import ops
from revseg.ops import upsample_argmax, upsample_cross_entropy

Logits = Tensor | Sequence[Tensor]  # of one head, or the main head's first and then those of auxiliary heads


class UpsampleCrossEntropy(nn.Module):
    """Cross-entropy of the logits after linear upsampling to the size of the labels: bilinear of images.

    Signals [N, C, l] and volumes [N, C, d, h, w] are taken as images are, with labels [N, L] and [N, D, H, W]. The
    options are those of `nn.CrossEntropyLoss` and of `F.interpolate`, except that a mean over
    nothing is 0. Auxiliary heads add to the loss of the main one.

    Args:
        ignore_index: The label of pixels that do not count.
        weight: Weight of each class [C], moves with the module; all equal if None.
        label_smoothing: Share of the target that is spread over all classes, in [0, 1].
        reduction: "mean", weighted as in PyTorch, "sum" or "none".
        align_corners: As in `F.interpolate`.
        aux_weight: Weight of each auxiliary head beside the main one's 1.

    Raises:
        ValueError: If the weights are no vector, or one is below 0.
    """

    weight: Tensor | None

    def __init__(
        self,
        ignore_index: int = 255,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        align_corners: bool = False,
        *,
        aux_weight: float = 0.4,
    ) -> None:
        super().__init__()
        if weight is not None and (weight.ndim != 1 or bool((weight < 0).any())):
            raise ValueError(f"expected class weights [C], none below 0, got {weight.tolist()}")
        self.register_buffer("weight", weight, persistent=False)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.align_corners = align_corners
        self.aux_weight = aux_weight

    def forward(self, logits: Logits, labels: Tensor, counts: Tensor | None = None) -> Tensor:
        """The loss, a scalar, or the losses [N, H, W] for "none"; float32 at least.

        Args:
            logits: Scores [N, C, h, w] at any stride; or a tuple of such, the main head first and
                then auxiliary heads. A single class is class 1 of two: its score is that against a
                score of 0 for class 0.
            labels: Class indices [N, H, W], uint8 or int64, below C or equal to `ignore_index`.
            counts: Counts of pixels [C, C], int64, to which those of the main head are added: true class
                by row, predicted class by column.

        Raises:
            TypeError: If a tensor is of another type.
            ValueError: If shapes do not fit, or a label or an option is out of its range.
        """
        heads = tuple(map(of_two_classes, (logits,) if isinstance(logits, Tensor) else logits))
        if len({head.shape[1:2] for head in heads}) != 1:
            raise ValueError(f"expected heads with the same classes, got {[list(h.shape) for h in heads]}")
        loss = self.head_loss(heads[0], labels, counts)
        for head in heads[1:]:
            loss = loss + self.aux_weight * self.head_loss(head, labels, None)
        return loss

    def head_loss(self, logits: Tensor, labels: Tensor, counts: Tensor | None) -> Tensor:
        """The loss of one head [N, C, h, w]."""
        return _cross_entropy(
            logits,
            labels,
            ignore_index=self.ignore_index,
            weight=self.weight,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
            align_corners=self.align_corners,
            counts=counts,
        )


class OhemCrossEntropy(UpsampleCrossEntropy):
    """Online hard example mining: cross-entropy of the pixels that the network finds hard.

    A pixel is hard if the probability of its true class is below a threshold, or if fewer than
    `min_kept` pixels of the batch have a lower one. The others are as good as ignored. Each head
    chooses for itself, by probabilities without class weights and smoothing. Counts are of all pixels.

    Args:
        threshold: A probability, in (0, 1].
        min_kept: How many pixels of a batch are kept at the least; a sixteenth of N H W if None.
        **options: Those of `UpsampleCrossEntropy`.

    Memory:
        Seven bytes a pixel while the pixels are chosen.

    Source: Shrivastava et al., Training Region-based Object Detectors with Online Hard Example Mining,
        arXiv:1604.03540; as in the published training code of Yu et al., BiSeNet, arXiv:1808.00897.

    Raises:
        ValueError: If an option is out of its range.
    """

    def __init__(self, threshold: float = 0.7, min_kept: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        if not 0 < threshold <= 1:
            raise ValueError(f"expected a threshold in (0, 1], got {threshold}")
        if min_kept is not None and min_kept < 0:
            raise ValueError(f"expected min_kept of at least 0, got {min_kept}")
        self.threshold = threshold
        self.min_kept = min_kept

    def head_loss(self, logits: Tensor, labels: Tensor, counts: Tensor | None) -> Tensor:
        return super().head_loss(logits, self._hard_labels(logits, labels, counts), None)

    @torch.no_grad()
    def _hard_labels(self, logits: Tensor, labels: Tensor, counts: Tensor | None) -> Tensor:
        """The labels [N, H, W], of which the easy ones are ignored."""
        losses = _cross_entropy(
            logits,
            labels,
            ignore_index=self.ignore_index,
            reduction="none",
            align_corners=self.align_corners,
            counts=counts,
        )
        least = labels.numel() // 16 if self.min_kept is None else self.min_kept
        hard = (losses > -math.log(self.threshold)) | (losses >= _largest(losses, least))
        fits = labels.dtype == torch.int64 or 0 <= self.ignore_index <= 255
        return (labels if fits else labels.long()).where(hard, self.ignore_index)


def ohem_reference(
    logits: Tensor, labels: Tensor, threshold: float = 0.7, min_kept: int | None = None, **options: Any
) -> Tensor:
    """What `OhemCrossEntropy` computes for one head, with all scores at full size: its definition."""
    ignore_index = options.get("ignore_index", 255)
    choice = {key: options[key] for key in ("ignore_index", "align_corners") if key in options}
    reference = ops.KERNELS["upsample_cross_entropy"].reference
    losses: Tensor = reference(logits.detach(), labels, reduction="none", **choice)
    least = labels.numel() // 16 if min_kept is None else min_kept
    hard = losses > -math.log(threshold)
    if least:
        hardest_first = losses.flatten().sort(descending=True).values
        hard |= losses >= hardest_first[:least].amin()
    loss: Tensor = reference(logits, labels.long().where(hard, ignore_index), **options)
    return loss


def predict_labels(logits: Logits, size: Sequence[int], align_corners: bool = False) -> Tensor:
    """The most probable class of every pixel at full size.

    Args:
        logits: Scores [N, C, h, w], C at most 255; of a tuple the main head, the first, counts. A single
            class is class 1 of two, as for the loss.
        size: (H, W); (L,) for signals [N, C, l], (D, H, W) for volumes [N, C, d, h, w].
        align_corners: As in `F.interpolate`, and as for the loss.

    Returns:
        Class indices [N, H, W], uint8, the argmax of the upsampled logits; see `upsample_argmax`.

    Raises:
        ValueError: If there are more than 255 classes.
    """
    main = of_two_classes(logits if isinstance(logits, Tensor) else logits[0])
    if main.ndim == 3:
        return upsample_argmax(main[:, :, None], (1, *size), align_corners=align_corners)[:, 0]
    if main.ndim == 5:
        images = (scores for scores, *_ in _slices(main, size[0], align_corners))
        return torch.stack([upsample_argmax(x, size[1:], align_corners=align_corners) for x in images], 1)
    return upsample_argmax(main, size, align_corners=align_corners)


def of_two_classes(logits: Tensor) -> Tensor:
    """The scores of a single class beside those of what is around it, zeros; others as they are."""
    single = 3 <= logits.ndim <= 5 and logits.shape[1] == 1
    return torch.cat((torch.zeros_like(logits), logits), 1) if single else logits


def _cross_entropy(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """`upsample_cross_entropy` of signals, images or volumes."""
    dims = logits.ndim - 2
    if dims in (1, 3) and labels.ndim != dims + 1:
        raise ValueError(
            f"expected labels of {dims} dimensions besides N for logits {[*logits.shape]}, got {[*labels.shape]}"
        )
    if dims == 1:
        losses = upsample_cross_entropy(logits[:, :, None], labels[:, None], **options)
        return losses[:, 0] if losses.ndim else losses
    if dims != 3:
        return upsample_cross_entropy(logits, labels, **options)
    reduction, align_corners = options.pop("reduction"), options["align_corners"]
    if reduction == "none":
        each = zip(_slices(logits, labels.shape[1], align_corners), labels.unbind(1), strict=True)
        return torch.stack(
            [upsample_cross_entropy(x, of_slice, reduction="none", **options) for (x, *_), of_slice in each],
            1,
        )
    loss = _VolumeLoss.apply(logits, labels, options)  # type: ignore[no-untyped-call]
    if reduction == "sum":
        return loss  # type: ignore[no-any-return]
    ignored, weight = options["ignore_index"], options.get("weight")
    weights = torch.stack([_weight(of_slice, ignored, weight) for of_slice in labels.unbind(1)])
    total = weights.sum().to(loss.dtype)
    return (loss / total.where(total > 0, 1)).where(total > 0, 0)  # type: ignore[no-any-return]


class _VolumeLoss(torch.autograd.Function):
    """The sum over all slices; its gradient, of the size of the logits, is there before the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, options: dict[str, Any]) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        dlogits = torch.zeros_like(logits, dtype=dtype) if ctx.needs_input_grad[0] else None
        loss = logits.new_zeros((), dtype=dtype)
        slices = _slices(logits.detach(), labels.shape[1], options["align_corners"])
        for (scores, below, above, share), of_slice in zip(slices, labels.unbind(1), strict=True):
            with torch.enable_grad():
                scores.requires_grad_(dlogits is not None)
                part = upsample_cross_entropy(scores, of_slice, reduction="sum", **options)
            loss += part.detach()
            if dlogits is not None:
                (dscores,) = torch.autograd.grad(part, scores)
                dlogits[:, :, below] += (1 - share) * dscores
                dlogits[:, :, above] += share * dscores
        ctx.save_for_backward(dlogits)
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the cross-entropy of volumes has no second derivatives: call backward without create_graph=True"
            )
        (dlogits,) = ctx.saved_tensors
        return dloss * dlogits, None, None


def _slices(logits: Tensor, depth: int, align_corners: bool) -> Iterator[tuple[Tensor, int, int, float]]:
    """For each slice of a volume its logits [N, C, h, w], float32 at least, and between which of [N, C, d, h, w] they lie."""
    low = logits.shape[2]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    for z in range(depth):
        if align_corners:
            place = z * (low - 1) / max(1, depth - 1)
        else:
            place = max(0.0, (z + 0.5) * low / depth - 0.5)
        below = min(int(place), low - 1)
        above = min(below + 1, low - 1)
        share = place - below
        yield (
            torch.lerp(logits[:, :, below].to(dtype), logits[:, :, above].to(dtype), share),
            below,
            above,
            share,
        )


def _weight(labels: Tensor, ignore_index: int, weight: Tensor | None) -> Tensor:
    """The sum of the weights of the true classes, of pixels that count."""
    labels = labels.long()
    counted = labels != ignore_index
    return counted.sum() if weight is None else weight[labels.where(counted, 0)].where(counted, 0).sum()


def _largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest of values that are not negative; 0 if there are fewer, NaN for k = 0.

    Found bit by bit, highest first: as integers, such floats have the same order. To sort them would
    take several times their memory.
    """
    integer = {4: torch.int32, 8: torch.int64}[values.itemsize]
    integers = values.view(integer)
    found = torch.zeros((), dtype=integer, device=values.device)
    for bit in reversed(range(8 * values.itemsize - 1)):
        candidate = found + 2**bit
        found = torch.where(torch.count_nonzero(integers >= candidate) >= k, candidate, found)
    return found.view(values.dtype)
