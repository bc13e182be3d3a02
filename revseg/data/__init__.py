"""Data sets and the transforms of an image together with its label map."""

from collections.abc import Callable
from pathlib import Path

from revseg.data.base import SegmentationDataset as SegmentationDataset
from revseg.data.base import Transform
from revseg.data.camvid import CamVid as CamVid
from revseg.data.classes import CAMVID as CAMVID
from revseg.data.classes import CITYSCAPES as CITYSCAPES
from revseg.data.classes import ClassTable as ClassTable
from revseg.data.synthetic.dataset import SyntheticStreets as SyntheticStreets
from revseg.data.transforms import Compose as Compose
from revseg.data.transforms import PhotometricJitter as PhotometricJitter
from revseg.data.transforms import RandomHorizontalFlip as RandomHorizontalFlip
from revseg.data.transforms import RandomScaleCrop as RandomScaleCrop
from revseg.data.transforms import Resize as Resize

DATASETS: dict[str, Callable[..., SegmentationDataset]] = {}


def list_datasets() -> list[str]:
    """The names that `create_dataset` takes."""
    return sorted(DATASETS)


def create_dataset(
    name: str,
    split: str,
    *,
    root: str | Path | None = None,
    size: tuple[int, int] | None = None,
    seed: int = 0,
    samples: int | None = None,
    transform: Transform | None = None,
) -> SegmentationDataset:
    """A data set by its name.

    Args:
        name: One of `list_datasets()`.
        split: "train", "val" or "test".
        root: The folder of the files; for data sets that are read from files only.
        size: (H, W) of the samples before the transform. Images and labels of files are resized,
            generated ones are made at this size.
        seed: Which scenes are generated; has no meaning for files.
        samples: How many samples: the first ones of files, any number of generated ones.
        transform: Called with image [3, H, W] and label [H, W], both uint8; returns both.

    Returns:
        Pairs (image, label) by index, with `.classes` and `.names`.

    Raises:
        ValueError: If the name or the split is unknown, or `root` is missing or has no meaning.
        FileNotFoundError: If files are missing.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; choose one of {', '.join(list_datasets())}")
    return DATASETS[name](split=split, root=root, size=size, seed=seed, samples=samples, transform=transform)


def _create_camvid(
    split: str,
    root: str | Path | None,
    size: tuple[int, int] | None,
    seed: int,
    samples: int | None,
    transform: Transform | None,
) -> SegmentationDataset:
    if root is None:
        raise ValueError("the data set camvid needs the folder of its files as root, got None")
    if size is not None:
        transform = Resize(size) if transform is None else Compose([Resize(size), transform])
    return CamVid(root, split, samples=samples, transform=transform)


def _create_synthetic(
    split: str,
    root: str | Path | None,
    size: tuple[int, int] | None,
    seed: int,
    samples: int | None,
    transform: Transform | None,
) -> SegmentationDataset:
    if root is not None:
        raise ValueError(f"the data set synthetic is generated and has no root, got {root}")
    return SyntheticStreets(split, size=size or (256, 512), seed=seed, samples=samples, transform=transform)


DATASETS |= {"camvid": _create_camvid, "synthetic": _create_synthetic}
