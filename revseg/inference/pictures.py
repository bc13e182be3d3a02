"""What a prediction is written as: a picture in the colours of the classes, an overlay, or ids."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from revseg.data.classes import ClassTable
from revseg.files import write_atomically
from revseg.inference.settings import WRITE

OPACITY = 0.5  # of the classes over the image

# The id in the files of Cityscapes of each of the 19 classes. Source: cityscapesScripts, helpers/labels.py.
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


def converter(kind: str, classes: ClassTable) -> Callable[[Tensor, Tensor | None], Tensor]:
    """The function from labels [n, W] and pixels [3, n, W] to what is written, [n, W] or [n, W, 3], uint8.

    Args:
        kind: One of `WRITE`. "train-ids" are the ids of the table, "label-ids" those of the files of Cityscapes, which
            its benchmark server takes.
        classes: Names and colours.

    Raises:
        ValueError: If the kind is unknown, or label ids are asked for of other classes than those of Cityscapes.
    """
    if kind == "colour":
        return lambda labels, pixels: classes.colorize(labels)
    if kind == "overlay":
        return lambda labels, pixels: _overlay(labels, pixels, classes)
    if kind == "train-ids":
        return lambda labels, pixels: labels
    if kind != "label-ids":
        raise ValueError(f"unknown kind of result {kind!r}; choose one of {', '.join(WRITE)}")
    if len(classes) != len(CITYSCAPES_IDS):
        raise ValueError(
            f"label-ids are those of the 19 classes of Cityscapes, the network has {len(classes)}"
        )
    ids = torch.zeros(256, dtype=torch.uint8)
    ids[: len(CITYSCAPES_IDS)] = torch.tensor(CITYSCAPES_IDS, dtype=torch.uint8)
    return lambda labels, pixels: ids[labels.int()]


def write_png(path: Path, pixels: Tensor, classes: ClassTable | None = None) -> None:
    """A PNG of [H, W, 3], or of ids [H, W], to which a table gives a palette for viewers; atomically.

    Args:
        path: The file.
        pixels: uint8.
        classes: Gives the palette.
    """
    from PIL import Image

    image: Any = Image.fromarray(pixels.contiguous().numpy())
    if pixels.ndim == 2 and classes is not None:
        palette = classes.colorize(torch.arange(len(classes), dtype=torch.uint8)[None])[0].flatten().tolist()
        image = image.convert("P") if image.mode != "P" else image
        image.putpalette(palette + [0] * (768 - len(palette)))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda part: image.save(part, format="PNG"))


def _overlay(labels: Tensor, pixels: Tensor | None, classes: ClassTable) -> Tensor:
    assert pixels is not None, "an overlay needs the image"
    colours = classes.colorize(labels).float()
    return colours.mul_(OPACITY).add_(pixels.permute(1, 2, 0), alpha=1 - OPACITY).round_().to(torch.uint8)
