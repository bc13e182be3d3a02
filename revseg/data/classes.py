"""The classes of a data set: one table holds their ids, names and colours.

The id of a class is its place in the table. Labels are bytes, and 255 marks pixels that no
loss and no metric counts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClassTable:
    """Names and colours by class id.

    Attributes:
        names: The name of each class.
        colours: Red, green and blue of each class, 0 to 255.
        ignore: The label of pixels without a class; drawn black.
    """

    names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    ignore: int = 255

    def __post_init__(self) -> None:
        if len(self.names) != len(self.colours):
            raise ValueError(
                f"expected a colour for each class, got {len(self.names)} names and "
                f"{len(self.colours)} colours"
            )

    def __len__(self) -> int:
        return len(self.names)

    def colorize(self, label: Tensor) -> Tensor:
        """The label map as a picture.

        Args:
            label: Class ids [H, W], uint8.

        Returns:
            Red, green, blue [H, W, 3], uint8.

        Raises:
            ValueError: If a pixel holds neither a class nor `ignore`.
        """
        if label.dtype != torch.uint8 or label.dim() != 2:
            raise ValueError(
                f"expected a label map [H, W] of uint8, got {list(label.shape)} of {label.dtype}"
            )
        unknown = label[(label >= len(self)) & (label != self.ignore)]
        if unknown.numel():
            raise ValueError(f"expected labels below {len(self)} or {self.ignore}, got {int(unknown[0])}")
        colours = torch.zeros(256, 3, dtype=torch.uint8, device=label.device)
        colours[: len(self)] = torch.tensor(self.colours, dtype=torch.uint8)
        return colours[label.int()]


def _table(classes: dict[str, tuple[int, int, int]]) -> ClassTable:
    return ClassTable(tuple(classes), tuple(classes.values()))


# The 19 classes that Cityscapes evaluates, by train id.
CITYSCAPES = _table(
    {
        "road": (128, 64, 128),
        "sidewalk": (244, 35, 232),
        "building": (70, 70, 70),
        "wall": (102, 102, 156),
        "fence": (190, 153, 153),
        "pole": (153, 153, 153),
        "traffic light": (250, 170, 30),
        "traffic sign": (220, 220, 0),
        "vegetation": (107, 142, 35),
        "terrain": (152, 251, 152),
        "sky": (70, 130, 180),
        "person": (220, 20, 60),
        "rider": (255, 0, 0),
        "car": (0, 0, 142),
        "truck": (0, 0, 70),
        "bus": (0, 60, 100),
        "train": (0, 80, 100),
        "motorcycle": (0, 0, 230),
        "bicycle": (119, 11, 32),
    }
)

# The 11 classes of the 360 x 480 edition of CamVid.
CAMVID = _table(
    {
        "sky": (128, 128, 128),
        "building": (128, 0, 0),
        "pole": (192, 192, 128),
        "road": (128, 64, 128),
        "pavement": (60, 40, 222),
        "tree": (128, 128, 0),
        "sign": (192, 128, 128),
        "fence": (64, 64, 128),
        "car": (64, 0, 128),
        "pedestrian": (64, 64, 0),
        "bicyclist": (0, 128, 192),
    }
)
