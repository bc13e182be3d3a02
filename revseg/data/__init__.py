"""Data sets and the transforms of an image together with its label map."""

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path

from revseg.data.adapters import AlbumentationsTransform as AlbumentationsTransform
from revseg.data.adapters import TorchvisionTransform as TorchvisionTransform
from revseg.data.base import SegmentationDataset as SegmentationDataset
from revseg.data.base import Transform as Transform
from revseg.data.cache import CachedDataset as CachedDataset
from revseg.data.camvid import CamVid as CamVid
from revseg.data.cityscapes import Cityscapes as Cityscapes
from revseg.data.classes import CAMVID as CAMVID
from revseg.data.classes import CITYSCAPES as CITYSCAPES
from revseg.data.classes import ClassTable as ClassTable
from revseg.data.folder import Folder as Folder
from revseg.data.pairs import BrokenDatasetError as BrokenDatasetError
from revseg.data.photometric import PhotometricJitter as PhotometricJitter
from revseg.data.photometric import StrongPhotometric as StrongPhotometric
from revseg.data.sampler import EpochSampler as EpochSampler
from revseg.data.synthetic.dataset import SyntheticStreets as SyntheticStreets
from revseg.data.transforms import Compose as Compose
from revseg.data.transforms import RandomHorizontalFlip as RandomHorizontalFlip
from revseg.data.transforms import RandomScaleCrop as RandomScaleCrop
from revseg.data.transforms import Resize as Resize

# A class, or module:class, imported when it is asked for. Its constructor takes `split`, those of `root`, `size`,
# `seed`, `samples` and `transform` that have a meaning for it, and options of its own.
DATASETS: dict[str, str | Callable[..., SegmentationDataset]] = {
    "camvid": "revseg.data.camvid:CamVid",
    "cityscapes": "revseg.data.cityscapes:Cityscapes",
    "folder": "revseg.data.folder:Folder",
    "synthetic": "revseg.data.synthetic.dataset:SyntheticStreets",
}


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
    cache: str | Path | None = None,
    **options: object,
) -> SegmentationDataset:
    """A data set by its name.

    Args:
        name: One of `list_datasets()`.
        split: "train", "val" or "test".
        root: The folder of the files; for data sets that are read from files only.
        size: (H, W) of the samples before the transform. Images and labels of files are resized,
            generated ones are made at this size.
        seed: Of what the transform draws, and of which scenes are generated.
        samples: How many samples: the first ones of files, any number of generated ones.
        transform: Called with image [3, H, W], label [H, W], both uint8, and a generator; returns image and label.
        cache: The folder that `revseg data cache` wrote: the same samples, without decoding files.
        **options: Further arguments of the class of the data set.

    Returns:
        Pairs (image, label) by index, with `.classes` and `.names`.

    Raises:
        ValueError: If the name, the split or an option is unknown, or `root` is missing or has no meaning.
        FileNotFoundError: If files are missing.
    """
    if name not in DATASETS:
        raise ValueError(
            f"unknown data set {name!r}; choose one of {', '.join(list_datasets())}{_meant(name, DATASETS)}"
        )
    dataset = _dataset_class(name)
    parameters = inspect.signature(dataset).parameters
    if "root" in parameters and root is None:
        raise ValueError(f"the data set {name} needs the folder of its files as root, got None")
    if "root" not in parameters and root is not None:
        raise ValueError(f"the data set {name} is generated and has no root, got {root}")
    for option in options:
        if option not in parameters:
            own = [key for key in parameters if key not in COMMON]
            known = f"choose one of {', '.join(own)}{_meant(option, own)}" if own else "it has none"
            raise ValueError(f"unknown option {option!r} of the data set {name}; {known}")
    common = {"root": root, "size": size, "seed": seed, "samples": samples, "transform": transform}
    given = {key: value for key, value in common.items() if value is not None}
    made = dataset(split=split, **given, **options)
    return made if cache is None else CachedDataset(made, Path(str(cache)).expanduser() / split)


COMMON = ("split", "root", "size", "seed", "samples", "transform")


def _dataset_class(name: str) -> Callable[..., SegmentationDataset]:
    entry = DATASETS[name]
    if not isinstance(entry, str):
        return entry
    module, _, attribute = entry.partition(":")
    found: Callable[..., SegmentationDataset] = getattr(importlib.import_module(module), attribute)
    return found


def _meant(word: str, known: Iterable[str]) -> str:
    """What a user may have meant, as the end of a message."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
