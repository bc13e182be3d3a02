"""A confusion matrix as a table, as a picture, and summed up by categories."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from revseg.files import write_atomically

# The category of each of the 19 classes. Source: cityscapesScripts, helpers/labels.py.
CITYSCAPES_CATEGORIES = {
    "road": "flat",
    "sidewalk": "flat",
    "building": "construction",
    "wall": "construction",
    "fence": "construction",
    "pole": "object",
    "traffic light": "object",
    "traffic sign": "object",
    "vegetation": "nature",
    "terrain": "nature",
    "sky": "sky",
    "person": "human",
    "rider": "human",
    "car": "vehicle",
    "truck": "vehicle",
    "bus": "vehicle",
    "train": "vehicle",
    "motorcycle": "vehicle",
    "bicycle": "vehicle",
}


def category_iou(counts: Tensor, names: Sequence[str]) -> dict[str, float | None]:
    """Intersection over union of each category of Cityscapes; None for those that do not occur.

    Args:
        counts: Counts [C, C], int64: true class by row, predicted class by column.
        names: Of the C classes.
    """
    categories = list(dict.fromkeys(CITYSCAPES_CATEGORIES.values()))
    place = torch.tensor([categories.index(CITYSCAPES_CATEGORIES[name]) for name in names])
    by_row = torch.zeros(len(categories), len(names), dtype=torch.int64).index_add_(0, place, counts)
    merged = torch.zeros(len(categories), len(categories), dtype=torch.int64).index_add_(1, place, by_row)
    hits = merged.diagonal()
    union = merged.sum(0) + merged.sum(1) - hits
    return {
        name: float(hit / whole) if whole else None
        for name, hit, whole in zip(categories, hits.double().tolist(), union.tolist(), strict=True)
    }


def matrix_csv(counts: Tensor, names: Sequence[str]) -> str:
    """The counts as CSV: a true class a row, a predicted class a column, names in the first ones."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["true class", *names])
    for name, row in zip(names, counts.tolist(), strict=True):
        table.writerow([name, *row])
    return text.getvalue()


def draw_matrix(path: Path, counts: Tensor, names: Sequence[str]) -> None:
    """Writes a PNG: the share of each true class (a row) that is predicted as each class (a column)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shares = counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
    side = 2.5 + 0.42 * len(names)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(100 * shares.numpy(), cmap="viridis", vmin=0, vmax=100)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted", ylabel="true")
    for i, row in enumerate((100 * shares).round().int().tolist()):
        for j, value in enumerate(row):
            if value:
                axes.text(
                    j,
                    i,
                    str(value),
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if value < 60 else "black",
                )
    figure.colorbar(shown, label="% of the pixels of the true class")
    FigureCanvasAgg(figure)  # no window, whatever the user's settings say
    write_atomically(path, lambda part: figure.savefig(part, format="png", dpi=120))
