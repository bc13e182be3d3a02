"""Samples decoded and resized once, read from memory-mapped files ever after.

    folder/images.bin   folder/labels.bin     bytes, one sample after the other
    folder/index.json                         what they were made from, and where each sample begins

Decoding a PNG of 1024 x 2048 takes a quarter of a second, reading its bytes some milliseconds. The samples
are bitwise those of the data set that the cache was made from. The index is written last: without it, or if
a file has changed since, the cache is not used.
"""

import json
import mmap
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from revseg.data.base import Pair, SegmentationDataset
from revseg.files import write_atomically, write_text

FORMAT = 1
FILES = ("images.bin", "labels.bin")
INDEX = "index.json"


class StaleCacheError(ValueError):
    """A cache that was not made from these samples."""


class CachedDataset(SegmentationDataset):
    """The samples of a data set, from its cache.

    Args:
        dataset: What the cache was made from, whole or its first samples; its seed and transform are kept.
        folder: The folder of `write_cache`.

    Raises:
        FileNotFoundError: If there is no complete cache.
        StaleCacheError: If it was made from other samples.
    """

    def __init__(self, dataset: SegmentationDataset, folder: Path):
        super().__init__(
            dataset.classes, dataset.names, dataset.transform, seed=dataset.seed, size=dataset.size
        )
        self.folder = Path(folder)
        self.places = _places(dataset, self.folder)
        self._maps: dict[str, mmap.mmap] = {}
        self._origin = dataset.origin(), [dataset.sample_origin(i) for i in range(len(dataset))]

    def load(self, index: int) -> Pair:
        start, height, width = self.places[index]
        pixels = height * width
        image = self._read("images.bin", 3 * start, 3 * pixels).view(3, height, width)
        return image, self._read("labels.bin", start, pixels).view(height, width)

    def origin(self) -> dict[str, object]:
        return self._origin[0]

    def sample_origin(self, index: int) -> object:
        return self._origin[1][index]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # each process maps the files itself

    def _read(self, name: str, start: int, length: int) -> Tensor:
        if name not in self._maps:
            with open(self.folder / name, "rb") as file:
                self._maps[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        stored = np.frombuffer(self._maps[name], dtype=np.uint8, count=length, offset=start)
        return torch.from_numpy(stored.copy())  # a sample is the caller's to change, the file is not


def write_cache(
    dataset: SegmentationDataset, folder: Path, show: Callable[[], object] = lambda: None
) -> CachedDataset:
    """Writes the cache of a data set and opens it.

    Args:
        dataset: Samples are cached at its size, before its transform.
        folder: Made if needed; an older cache in it is replaced.
        show: Called after each sample, for a progress bar.

    Raises:
        ValueError: If a sample is broken; the message names its file.
        OSError: If the disk is full or the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).unlink(missing_ok=True)
    samples: dict[str, list[int]] = {}

    def write_labels(part: Path) -> None:
        with open(part, "wb") as labels:
            write_atomically(
                folder / FILES[0], lambda images: _write_pairs(dataset, images, labels, samples, show)
            )

    write_atomically(folder / FILES[1], write_labels)
    index = {"format": FORMAT, "origin": dataset.origin(), "samples": samples}
    write_text(folder / INDEX, json.dumps(index) + "\n")
    return CachedDataset(dataset, folder)


def _write_pairs(
    dataset: SegmentationDataset,
    images_path: Path,
    labels: BinaryIO,
    samples: dict[str, list[int]],
    show: Callable[[], object],
) -> None:
    start = 0
    with open(images_path, "wb") as images:
        for index in range(len(dataset)):
            image, label = dataset.sized(index)
            if index == 0:
                _check_space(images_path.parent, 4 * label.numel() * len(dataset))
            images.write(image.contiguous().numpy().tobytes())
            labels.write(label.contiguous().numpy().tobytes())
            samples[_key(dataset, index)] = [start, *label.shape]
            start += label.numel()
            show()


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"the cache needs about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free in {folder}: "
            "choose another folder or a smaller size"
        )


def _places(dataset: SegmentationDataset, folder: Path) -> list[tuple[int, int, int]]:
    """Where each sample begins in the cache, in pixels, with its height and width."""
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"no complete cache in {folder}: make it with revseg data cache")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        stored, samples, version = index["origin"], index["samples"], index["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise StaleCacheError(f"{path} is damaged: make the cache again with revseg data cache") from error
    again = "make it again with revseg data cache"
    if version != FORMAT:
        raise StaleCacheError(f"the cache {folder} has format {version}, expected {FORMAT}: {again}")
    wanted = json.loads(json.dumps(dataset.origin()))
    if different := sorted(
        key for key in wanted.keys() | stored.keys() if wanted.get(key) != stored.get(key)
    ):
        changes = ", ".join(
            f"{key} {stored.get(key)!s:.60} there, {wanted.get(key)!s:.60} here" for key in different
        )
        raise StaleCacheError(f"the cache {folder} was made from other samples ({changes}): {again}")
    keys = [_key(dataset, i) for i in range(len(dataset))]
    if missing := [name for key, name in zip(keys, dataset.names, strict=True) if key not in samples]:
        raise StaleCacheError(
            f"{len(missing)} of {len(keys)} samples are not in the cache {folder} or have changed since, "
            f"first {missing[0]}: {again}"
        )
    pixels = sum(height * width for _, height, width in samples.values())
    for name, length in zip(FILES, (3 * pixels, pixels), strict=True):
        if not (folder / name).is_file() or os.path.getsize(folder / name) != length:
            raise StaleCacheError(f"{folder / name} is damaged: {again}")
    return [(start, height, width) for start, height, width in (samples[key] for key in keys)]


def _key(dataset: SegmentationDataset, index: int) -> str:
    return json.dumps(dataset.sample_origin(index))
