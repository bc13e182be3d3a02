"""Pictures of a data set: images under their labels, and how much there is of each class."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from revseg.data.base import Pair
from revseg.data.classes import ClassTable
from revseg.data.examine import SplitReport
from revseg.data.resize import resized
from revseg.files import write_atomically

if TYPE_CHECKING:
    from PIL import Image

WIDTH = 480  # pixels of an image in a sheet
GAP = 4
LINE = 18  # pixels of a row of the chart
OPACITY = 0.55  # of the label over the image


def overlay(image: Tensor, label: Tensor, classes: ClassTable) -> Tensor:
    """The image with its label in colours over it; pixels without a class stay as they are.

    Args:
        image: [3, H, W], uint8.
        label: [H, W], uint8.
        classes: The table of the classes.

    Returns:
        The picture [3, H, W], uint8.
    """
    colours = classes.colorize(label).permute(2, 0, 1).float()
    mixed = image.float().lerp(colours, OPACITY).round().to(torch.uint8)
    return torch.where(label == classes.ignore, image, mixed)


def draw_sheet(path: Path, pairs: Sequence[Pair], classes: ClassTable) -> None:
    """Writes a picture with a row for each sample: the image, its label, one over the other."""
    rows = []
    for image, label in pairs:
        height = max(1, round(WIDTH * label.shape[0] / label.shape[1]))
        image, label = resized(image, label, (height, WIDTH))
        cells = [image, classes.colorize(label).permute(2, 0, 1), overlay(image, label, classes)]
        rows.append(
            torch.cat([torch.nn.functional.pad(cell, (0, GAP, 0, GAP), value=255) for cell in cells], 2)
        )
    _save(path, torch.cat(rows, 1))


def draw_statistics(path: Path, reports: dict[str, SplitReport]) -> None:
    """Writes a chart with a row for each class: its colour, its name, and its share of the pixels by split.

    Bars are on a logarithmic scale, for the rarest classes are what one looks for.
    """
    from PIL import Image, ImageDraw

    classes = next(iter(reports.values())).classes
    block = LINE * len(reports) + GAP
    picture = Image.new("RGB", (900, LINE * 2 + block * len(classes)), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((10, 3), f"share of the labelled pixels, {' / '.join(reports)}, from 1e-6 to 1", fill="black")
    for c, name in enumerate(classes.names):
        top = LINE * 2 + c * block
        draw.rectangle((10, top, 26, top + block - GAP - 2), fill=classes.colours[c], outline="black")
        draw.text((34, top + 2), name[:24], fill="black")
        for row, report in enumerate(reports.values()):
            y = top + row * LINE
            share = report.pixels[c] / max(1, sum(report.pixels))
            length = 500 * max(0.0, 1 + np.log10(max(share, 1e-6)) / 6)
            draw.rectangle((200, y + 2, 200 + length, y + LINE - 4), fill=classes.colours[c], outline="grey")
            text = f"{share:.2e} in {report.images_with[c]} samples" if share else "never"
            draw.text((206 + length, y + 2), text, fill="black")
    _save(path, picture)


def _save(path: Path, picture: "Tensor | Image.Image") -> None:
    from PIL import Image

    if isinstance(picture, Tensor):
        picture = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    image = picture
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda part: image.save(part, format="PNG"))
