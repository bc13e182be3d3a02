"""Intersection over union by class where every object counts alike, however large it appears: Cityscapes' iIoU.

A pixel of an instance weighs the mean size of its class over the size of the instance. True positives and false negatives
are weighted; false positives are not, as they belong to no instance: iIoU = iTP / (iTP + FP + iFN). Groups, whose
pixels hold a label id and no instance, are left out of iTP and iFN.

Source: Cordts et al., The Cityscapes Dataset for Semantic Urban Scene Understanding, arXiv:1604.01685, section 4.1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from revseg.inference.matrix import CITYSCAPES_CATEGORIES

# Mean pixels of an instance in the training set, by which the benchmark weighs; from cityscapesScripts' evaluation.
MEAN_SIZES = {
    "person": 3462.4756337644,
    "rider": 3930.4788056518,
    "car": 12794.0202738185,
    "truck": 27855.1264367816,
    "bus": 35732.1511111111,
    "train": 67583.7075812274,
    "motorcycle": 6298.7200839748,
    "bicycle": 4672.3249222261,
}


class InstanceScores:
    """Weighted counts of the pixels of instances, added to image by image.

    Args:
        names: Of the C classes; those of `MEAN_SIZES` among them have instances.

    Attributes:
        tally: [2, 2, C], float64: of classes, then of categories; pixels found, then all, by true class. Summing it over
            processes sums the scores.
    """

    def __init__(self, names: Sequence[str]):
        self.names = tuple(names)
        self.tally = torch.zeros(2, 2, len(self.names), dtype=torch.float64)
        self._mean = torch.tensor([MEAN_SIZES.get(name, 0.0) for name in self.names], dtype=torch.float64)
        categories = [CITYSCAPES_CATEGORIES.get(name, name) for name in self.names]
        self._category = torch.tensor([categories.index(category) for category in categories])

    def update(self, predicted: Tensor, labels: Tensor, instances: Tensor) -> None:
        """Counts the pixels of an image.

        Args:
            predicted: Class indices [H, W], any integer type, in [0, C).
            labels: True classes [H, W], any integer type; 255 where there is none.
            instances: Ids [H, W], any integer type: label id * 1000 + number for pixels of an instance, below 1000 for others.

        Raises:
            ValueError: If the three are not of one shape.
        """
        if not predicted.shape == labels.shape == instances.shape:
            shapes = ", ".join(str(list(each.shape)) for each in (predicted, labels, instances))
            raise ValueError(f"expected predictions, labels and instances of one shape, got {shapes}")
        chosen = (instances >= 1000) & (labels < len(self.names))
        guess, truth = predicted[chosen].long(), labels[chosen].long()
        _, which, sizes = torch.unique(instances[chosen], return_inverse=True, return_counts=True)
        weight = self._mean[truth] / sizes[which]
        found = torch.stack([guess == truth, self._category[guess] == self._category[truth]])
        for kind in range(2):
            self.tally[kind, 0].index_add_(0, truth, weight * found[kind])
            self.tally[kind, 1].index_add_(0, truth, weight)

    def iou(self, counts: Tensor) -> dict[str, float | None]:
        """The iIoU of each class that has instances; None for those that do not occur.

        Args:
            counts: The confusion matrix [C, C] of the same images, true class by row.
        """
        false = counts.sum(0) - counts.diagonal()
        return {
            name: _share(self.tally[0, 0, i], self.tally[0, 1, i] + false[i])
            for i, name in enumerate(self.names)
            if name in MEAN_SIZES
        }

    def category_iou(self, counts: Tensor) -> dict[str, float | None]:
        """The iIoU of each category that has instances, human and vehicle.

        Args:
            counts: The confusion matrix [C, C] of the same images, true class by row.
        """
        scores = {}
        for category in dict.fromkeys(
            CITYSCAPES_CATEGORIES[name] for name in self.names if name in MEAN_SIZES
        ):
            inside = torch.tensor([CITYSCAPES_CATEGORIES.get(name) == category for name in self.names])
            false = counts[~inside][:, inside].sum()
            scores[category] = _share(self.tally[1, 0, inside].sum(), self.tally[1, 1, inside].sum() + false)
        return scores


def _share(part: Tensor, whole: Tensor) -> float | None:
    return float(part / whole) if whole else None
