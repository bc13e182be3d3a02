"""Segmentation metrics from counts of pixels.

Everything is read off one confusion matrix over all images: intersection over union is not a
mean over images. Rows are the true classes, so every pixel with a valid label counts, whatever
was predicted there; pixels labelled 255 are left out.
"""

import torch
from torch import Tensor

IGNORE = 255

# ConfusionMatrix counts values 0 to 255 as they are and everything else in one more bin.
_BINS = 257


def confusion_matrix(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Counts of pixels by true class (rows) and predicted class (columns).

    Args:
        predicted: Class indices [N, H, W], any integer type, in [0, classes).
        labels: Class indices [N, H, W], any integer type; pixels outside [0, classes) are skipped.
        classes: C, the number of classes.

    Returns:
        Counts [C, C], int64, on the device of the labels.

    Raises:
        TypeError: If one of the two holds no integers.
        ValueError: If the two shapes or devices differ, or a prediction is outside [0, classes).
    """
    _check_pair(predicted, labels)
    if classes < 1:
        raise ValueError(f"expected at least one class, got {classes}")
    if predicted.numel():
        lowest, highest = (int(value) for value in predicted.aminmax())
        if lowest < 0 or highest >= classes:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(f"expected predictions in [0, {classes}), got {wrong}")
    counts = torch.zeros(classes * classes, dtype=torch.int64, device=labels.device)
    for guess, truth in zip(_images(predicted), _images(labels), strict=True):
        valid = (truth >= 0) & (truth < classes)
        counts += torch.bincount(truth[valid].long() * classes + guess[valid], minlength=classes * classes)
    return counts.view(classes, classes)


class ConfusionMatrix:
    """A confusion matrix that is added to batch by batch, and the scores read off it.

    `update` never waits for a GPU. So it cannot look at the values, and values out of range are
    refused later, by whatever reads the counts.

    Attributes:
        classes: C, the number of classes.
        tally: Counts [257, 257], int64, by label and prediction in [0, 256), the last row and
            column for everything else. Summing it over processes sums the metric.
    """

    def __init__(self, classes: int):
        if not 1 <= classes <= IGNORE:
            raise ValueError(f"expected 1 to {IGNORE} classes, got {classes}")
        self.classes = classes
        self.tally = torch.zeros(_BINS, _BINS, dtype=torch.int64)

    def update(self, predicted: Tensor, labels: Tensor) -> None:
        """Counts the pixels of a batch.

        Args:
            predicted: Class indices [N, H, W], any integer type.
            labels: Class indices [N, H, W], any integer type; 255 is skipped.

        Memory: At most 24 bytes a pixel, of one image at a time.

        Raises:
            TypeError: If one of the two holds no integers (logits need an argmax first).
            ValueError: If the two shapes or devices differ.
        """
        _check_pair(predicted, labels)
        with torch.inference_mode(False):  # a tensor made in that mode could not be added to outside
            self.tally = self.tally.to(labels.device)
        for guess, truth in zip(_images(predicted), _images(labels), strict=True):
            _add_counts(self.tally.view(-1), _bin(truth) * _BINS + _bin(guess))

    def add(self, counts: Tensor) -> None:
        """Adds the counts of pixels that were counted elsewhere.

        Args:
            counts: Counts [C, C], int64: true class by row, predicted class by column.

        Raises:
            TypeError: If the counts are not int64.
            ValueError: If their shape is another.
        """
        if counts.dtype != torch.int64:
            raise TypeError(f"expected counts of dtype int64, got {counts.dtype}")
        if counts.shape != (self.classes, self.classes):
            raise ValueError(
                f"expected counts [{self.classes}, {self.classes}], got shape {list(counts.shape)}"
            )
        with torch.inference_mode(False):
            self.tally = self.tally.to(counts.device)
        self.tally[: self.classes, : self.classes] += counts

    def counts(self) -> Tensor:
        """Counts [C, C], int64, on the CPU: true class by row, predicted class by column.

        Raises:
            ValueError: If a label or a prediction that was counted is out of range.
        """
        tally = self.tally.cpu()
        valid = torch.arange(_BINS) < self.classes
        skipped = torch.arange(_BINS) == IGNORE
        _refuse("labels", tally.sum(dim=1), valid | skipped, f"[0, {self.classes}) or {IGNORE}")
        _refuse("predictions", tally.sum(dim=0), valid, f"[0, {self.classes})")
        return tally[: self.classes, : self.classes].clone()

    def iou(self) -> Tensor:
        """Intersection over union by class [C], float64; NaN where neither label nor prediction has it."""
        counts = self.counts().double()
        hits = counts.diagonal()
        return hits / (counts.sum(dim=0) + counts.sum(dim=1) - hits)

    def mean_iou(self) -> float:
        """The mean of `iou` over the classes that occur; NaN if no pixel was counted."""
        return float(self.iou().nanmean())

    def pixel_accuracy(self) -> float:
        """The share of the counted pixels that are predicted right; NaN if no pixel was counted."""
        counts = self.counts().double()
        return float(counts.diagonal().sum() / counts.sum())

    def reset(self) -> None:
        """Forgets all that was counted."""
        self.tally.zero_()


def _check_pair(predicted: Tensor, labels: Tensor) -> None:
    for name, tensor in (("predictions", predicted), ("labels", labels)):
        if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool:
            raise TypeError(f"expected {name} to be class indices of an integer type, got {tensor.dtype}")
    if predicted.shape != labels.shape:
        raise ValueError(
            f"expected predictions and labels of one shape, got {list(predicted.shape)} "
            f"and {list(labels.shape)}"
        )
    if predicted.device != labels.device:
        raise ValueError(
            f"expected predictions and labels on one device, got {predicted.device} and {labels.device}"
        )


def _images(batch: Tensor) -> list[Tensor]:
    """The images of a batch one by one, flat: a batch as a whole would take N times the memory."""
    return [image.reshape(-1) for image in batch] if batch.dim() > 2 else [batch.reshape(-1)]


def _bin(values: Tensor) -> Tensor:
    """Values [P] as int32 in [0, 257), 256 for everything outside [0, 256)."""
    if values.dtype == torch.uint8:
        return values.int()
    if values.dtype.itemsize < 4:
        values = values.int()  # 256 must be a number of the type
    return torch.where((values >= 0) & (values < _BINS), values, _BINS - 1).int()


def _add_counts(counts: Tensor, cells: Tensor) -> None:
    """Adds the number of times each cell occurs: `bincount`, which on a GPU would wait for it."""
    if cells.is_cuda:
        cells = cells.long()
        counts.scatter_add_(
            0, cells, torch.ones((), dtype=counts.dtype, device=counts.device).expand_as(cells)
        )
    else:
        counts += torch.bincount(cells, minlength=counts.numel())


def _refuse(name: str, counts: Tensor, allowed: Tensor, expected: str) -> None:
    wrong = ((counts > 0) & ~allowed).nonzero().flatten().tolist()
    if wrong:
        value = str(wrong[0]) if wrong[0] < _BINS - 1 else "a value outside [0, 256)"
        raise ValueError(f"expected {name} in {expected}, got {value} at {int(counts[wrong[0]])} pixels")
