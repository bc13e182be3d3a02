"""Cityscapes in the folders it is distributed in.

    root/leftImg8bit/<split>/<city>/<city>_<sequence>_<frame>_leftImg8bit.png
    root/gtFine/<split>/<city>/<city>_<sequence>_<frame>_gtFine_labelIds.png
    root/gtCoarse/<split>/<city>/<city>_<sequence>_<frame>_gtCoarse_labelIds.png

Splits with fine labels are train, val and test (whose labels are empty), with coarse ones train_extra,
train and val. The 34 label ids of the files become the 19 classes that are evaluated as they are
loaded; where `_labelTrainIds.png` stand beside them and no `_labelIds.png`, those are used.

Source: Cordts et al., The Cityscapes Dataset for Semantic Urban Scene Understanding, arXiv:1604.01685;
ids of cityscapesScripts, helpers/labels.py.
"""

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from revseg.data.base import Transform, check_split
from revseg.data.classes import CITYSCAPES
from revseg.data.from_files import FileDataset
from revseg.data.images import IMAGE_ENDINGS, read_ids, read_label
from revseg.data.pairs import FilePair, paired, unique_names

SPLITS = ("train", "val", "test", "train_extra")

LABELS = ("fine", "coarse")

# By train id: road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation, terrain,
# sky, person, rider, car, truck, bus, train, motorcycle, bicycle.
LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)

HIGHEST_ID = 33  # label ids 0 to 33 occur; 255 stands for -1, the license plate


class Cityscapes(FileDataset):
    """Cityscapes: 2,975 training, 500 validation and 1,525 test images, 1024 x 2048, 19 classes.

    Args:
        root: The folder that holds `leftImg8bit` and `gtFine`.
        split: "train", "val", "test" or "train_extra".
        labels: "fine", or "coarse" for those of gtCoarse; by default coarse for train_extra only.
        size: (H, W) that image and label are resized to; full size by default.
        seed: Of what the transform draws.
        samples: Only the first so many; all by default.
        transform: Called with the image, the label and a generator for every sample.

    Raises:
        FileNotFoundError: If a folder is missing.
        ValueError: If there are no images, or images and labels do not belong together.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        labels: str | None = None,
        size: tuple[int, int] | None = None,
        seed: int = 0,
        samples: int | None = None,
        transform: Transform | None = None,
    ):
        check_split(split, SPLITS, "cityscapes")
        labels = labels or ("coarse" if split == "train_extra" else "fine")
        if labels not in LABELS:
            raise ValueError(f"unknown labels {labels!r} of cityscapes; choose one of {', '.join(LABELS)}")
        if labels == "fine" and split == "train_extra":
            raise ValueError("the split train_extra has coarse labels only, got labels 'fine'")
        pairs, self.are_train_ids = _pairs(Path(root).expanduser(), split, f"gt{labels.capitalize()}")
        super().__init__(
            CITYSCAPES,
            pairs,
            unique_names([_frame(pair.image) for pair in pairs]),
            size=size, seed=seed, samples=samples, transform=transform,
        )  # fmt: skip
        self._classes_of = _train_ids() if not self.are_train_ids else _own_ids()

    def load_label(self, path: Path) -> Tensor:
        label = read_label(path)
        classes = self._classes_of[label.int()]
        unknown = label[classes < 0]
        if unknown.numel():
            kind = "train ids 0 to 18 or 255" if self.are_train_ids else f"label ids 0 to {HIGHEST_ID} or 255"
            raise ValueError(f"expected {kind}, got {int(unknown[0])} in {unknown.numel()} pixels: {path}")
        return classes.to(torch.uint8)

    def load_instances(self, index: int) -> Tensor:
        """The instance ids of a sample [H, W], int32: label id * 1000 + number, or the label id where there is no instance.

        Raises:
            FileNotFoundError: If `_instanceIds.png` does not stand beside the labels.
        """
        label = self.pairs[index].label
        path = label.with_name(re.sub(r"_label(Train)?Ids$", "_instanceIds", label.stem) + ".png")
        if not path.is_file():
            raise FileNotFoundError(f"missing {path}; expected instance ids beside the labels")
        return torch.from_numpy(read_ids(path).astype(np.int32))


def _pairs(root: Path, split: str, ground_truth: str) -> tuple[list[FilePair], bool]:
    """The files of a split, and whether the labels are train ids already."""
    image_folder, label_folder = root / "leftImg8bit" / split, root / ground_truth / split
    for folder in (image_folder, label_folder):
        if not folder.is_dir():
            raise FileNotFoundError(
                f"missing folder {folder}; expected the folder of Cityscapes as root, with leftImg8bit and "
                f"{ground_truth} in it"
            )
    images = _by_frame(image_folder, "_leftImg8bit", IMAGE_ENDINGS)
    if not images:
        raise ValueError(f"no images in {image_folder}; expected <city>/*_leftImg8bit.png")
    labels = _by_frame(label_folder, f"_{ground_truth}_labelIds", (".png",))
    train_ids = _by_frame(label_folder, f"_{ground_truth}_labelTrainIds", (".png",))
    are_train_ids = len(train_ids) > len(labels)
    return paired(images, train_ids if are_train_ids else labels, image_folder, label_folder), are_train_ids


def _by_frame(folder: Path, suffix: str, endings: tuple[str, ...]) -> dict[str, Path]:
    """The files of one kind by `<city folder>/<frame>`: two cities may have frames of one name."""
    return {
        f"{path.parent.name}/{path.stem.removesuffix(suffix)}": path
        for path in sorted(folder.glob(f"*/*{suffix}.*"))
        if path.suffix.lower() in endings and not path.name.startswith(".")
    }


def _frame(image: Path) -> Path:
    return image.with_name(image.name.replace("_leftImg8bit", ""))


def _train_ids() -> Tensor:
    """The class of each label id [256], -1 where there is no such id."""
    classes = torch.full((256,), -1, dtype=torch.int16)
    classes[: HIGHEST_ID + 1] = CITYSCAPES.ignore
    classes[255] = CITYSCAPES.ignore
    classes[torch.tensor(LABEL_IDS)] = torch.arange(len(LABEL_IDS), dtype=torch.int16)
    return classes


def _own_ids() -> Tensor:
    """The class of each train id [256], -1 where there is no such id."""
    classes = torch.full((256,), -1, dtype=torch.int16)
    classes[: len(CITYSCAPES)] = torch.arange(len(CITYSCAPES), dtype=torch.int16)
    classes[255] = CITYSCAPES.ignore
    return classes
