"""Cross-entropy of a piece of a map of scores, which becomes its own gradient.

The steps of `F.cross_entropy` and of its derivative, on memory that is there: the scores, of which no
one needs a second copy. Plain PyTorch, for pieces that stay in the cache of a processor.

Letters: C classes; n images, R rows and W columns of the piece; z its scores [n, C, R, W].
"""

from torch import Tensor

from revseg.kernels.cpu.argmax import first_max
from revseg.kernels.upsample_cross_entropy.targets import Targets, equal


def cross_entropy(z: Tensor, targets: Targets, dlosses: Tensor | None) -> tuple[Tensor, Tensor]:
    """The loss of every pixel, and the weight with which it counts in a mean.

    With s the label smoothing, w the weights, t the true class and p the probabilities,

        loss = (1 - s) w_t (-log p_t) + s / C sum_c w_c (-log p_c)
        dz_k = p_k ((1 - s) w_t + s / C sum_c w_c) - (1 - s) w_t [k = t] - s / C w_k.

    Args:
        z: Scores [n, C, R, W]. Overwritten: by the gradient if there is a `dlosses`.
        targets: With labels [n, R, W].
        dlosses: Gradient of the losses, [n, R, W] or [] for all of them; None if none is wanted.

    Returns:
        Losses and weights [n, R, W], of the type of z, both 0 where the label is the ignored one.
    """
    classes = z.shape[1]
    ignored = equal(targets.labels, targets.ignore_index)
    target = targets.labels.long().masked_fill(ignored, 0).unsqueeze(1)  # [n, 1, R, W]
    highest = z.amax(dim=1, keepdim=True)
    if targets.counts is not None:
        _count(targets.counts, target.squeeze(1), first_max(z, highest), ~ignored)

    each = z.new_full((classes, 1, 1), targets.smoothing / classes)  # s / C w_c, [C, 1, 1]
    counted = (~ignored).to(z.dtype)
    weights = counted
    if targets.weight is not None:
        each *= targets.weight.view(-1, 1, 1)
        weights = counted * targets.weight[target.squeeze(1)]
    true = (1 - targets.smoothing) * weights  # (1 - s) w_t, [n, R, W]
    both = true + each.sum() * counted

    z -= highest  # now the largest is 0, and no exponential overflows
    score = true * z.gather(1, target).squeeze(1)
    if targets.smoothing:
        score += (z * each).sum(dim=1)
    total = z.exp_().sum(dim=1)
    losses = (both * total.log() - score).masked_fill_(ignored, 0)
    if dlosses is not None:
        dlosses = dlosses.masked_fill(ignored, 0)  # [n, R, W]
        z *= (both / total * dlosses).unsqueeze(1)
        z.scatter_add_(1, target, (true * -dlosses).unsqueeze(1))
        if targets.smoothing:
            z.addcmul_(dlosses.unsqueeze(1), each, value=-1)
    return losses, weights


def _count(counts: Tensor, target: Tensor, predicted: Tensor, counted: Tensor) -> None:
    """Adds 1 to the cells of the pixels that count; integers, so that their order does not matter."""
    cells = (target * counts.shape[1] + predicted).flatten()
    counts.view(-1).scatter_add_(0, cells, counted.flatten().to(counts.dtype))
