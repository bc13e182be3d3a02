"""Reading a whole data set: what is broken in it, and what is only odd.

Every sample is decoded once. What is broken stops a training run sooner or later; what is odd (a class that
never occurs, the same image in two splits) spoils its result and says nothing.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from revseg.data.base import SegmentationDataset
from revseg.data.classes import ClassTable

RARE = 1e-4  # share of the labelled pixels below which a class is hardly learned
FEW = 0.5  # share of labelled pixels below which a sample is remarked on
SHOWN = 5  # names in a remark


@dataclass(frozen=True)
class Sample:
    """What was found in one sample.

    Attributes:
        name: Its name in the data set.
        problem: Why it cannot be read; empty if it can.
        size: (H, W).
        counts: Pixels by label, 256 numbers.
        digest: Equal for equal images only.
        flat: The image has one colour.
    """

    name: str
    problem: str = ""
    size: tuple[int, int] = (0, 0)
    counts: tuple[int, ...] = ()
    digest: str = ""
    flat: bool = False


@dataclass
class SplitReport:
    """What was found in a split.

    Attributes:
        classes: The table of the classes.
        problems: One sentence for each broken sample.
        samples: Those that could be read.
    """

    classes: ClassTable
    problems: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    @property
    def sizes(self) -> Counter[tuple[int, int]]:
        """How many samples have which size (H, W)."""
        return Counter(sample.size for sample in self.samples)

    @property
    def pixels(self) -> list[int]:
        """The number of pixels of each class."""
        return [sum(sample.counts[c] for sample in self.samples) for c in range(len(self.classes))]

    @property
    def images_with(self) -> list[int]:
        """The number of samples in which each class occurs."""
        return [sum(sample.counts[c] > 0 for sample in self.samples) for c in range(len(self.classes))]

    @property
    def labelled(self) -> float:
        """The share of pixels with a class."""
        return sum(self.pixels) / max(1, sum(h * w * count for (h, w), count in self.sizes.items()))

    def as_json(self) -> dict[str, Any]:
        """The report in types of JSON."""
        names, total = self.classes.names, max(1, sum(self.pixels))
        found = zip(names, self.pixels, self.images_with, strict=True)
        return {
            "samples": len(self.samples),
            "problems": self.problems,
            "sizes": {f"{h}x{w}": count for (h, w), count in sorted(self.sizes.items())},
            "labelled": self.labelled,
            "classes": {
                name: {"pixels": pixels, "share": pixels / total, "samples": images}
                for name, pixels, images in found
            },
        }


def examine(
    dataset: SegmentationDataset, workers: int = 0, show: Callable[[], object] = lambda: None
) -> SplitReport:
    """Reads every sample of a data set.

    Args:
        dataset: Without its transform: samples are examined as they are stored.
        workers: Processes that read.
        show: Called after each sample, for a progress bar.
    """
    report = SplitReport(dataset.classes)
    for sample in DataLoader(_Examined(dataset), batch_size=None, num_workers=workers):
        if sample.problem:
            report.problems.append(sample.problem)
        else:
            report.samples.append(sample)
        show()
    return report


def oddities(reports: Mapping[str, SplitReport]) -> list[str]:
    """What is odd in the splits of a data set, one sentence each."""
    found = [remark for split, report in reports.items() for remark in _of_split(split, report)]
    return [*found, *_duplicates(reports)]


class _Examined(Dataset[Sample]):
    """What is found in each sample of a data set."""

    def __init__(self, dataset: SegmentationDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        name = self.dataset.names[index]
        try:
            image, label = self.dataset.load(index)
        except (ValueError, OSError) as error:
            return Sample(name, problem=str(error))
        shape = f"{list(image.shape)}".encode()
        return Sample(
            name,
            size=(label.shape[0], label.shape[1]),
            counts=tuple(torch.bincount(label.flatten(), minlength=256).tolist()),
            digest=hashlib.blake2b(shape + image.numpy().tobytes(), digest_size=16).hexdigest(),
            flat=bool((image == image[:, :1, :1]).all()),
        )


def _of_split(split: str, report: SplitReport) -> Iterable[str]:
    if len(report.sizes) > 1:
        most = ", ".join(f"{h} x {w} ({count})" for (h, w), count in report.sizes.most_common(SHOWN))
        yield f"{split}: samples of {len(report.sizes)} sizes: {most}; batches need --size or a crop"
    total = max(1, sum(report.pixels))
    shares = {n: pixels / total for n, pixels in zip(report.classes.names, report.pixels, strict=True)}
    if never := [name for name, share in shares.items() if share == 0]:
        yield f"{split}: classes that never occur: {', '.join(never)}"
    if rare := [f"{name} ({share:.1e})" for name, share in shares.items() if 0 < share < RARE]:
        yield f"{split}: classes with less than {RARE:g} of the pixels: {', '.join(rare)}"
    unlabelled = [s.name for s in report.samples if not sum(s.counts[: len(report.classes)])]
    if unlabelled:
        yield f"{split}: samples without any labelled pixel: {_names(unlabelled)}"
    few = [
        s.name for s in report.samples
        if 0 < sum(s.counts[: len(report.classes)]) < FEW * s.size[0] * s.size[1]
    ]  # fmt: skip
    if few:
        yield f"{split}: samples with less than half of their pixels labelled: {_names(few)}"
    if flat := [s.name for s in report.samples if s.flat]:
        yield f"{split}: images of one colour: {_names(flat)}"


def _duplicates(reports: Mapping[str, SplitReport]) -> Iterable[str]:
    """Images that occur twice, told apart by their pixels."""
    places: dict[str, list[tuple[str, str]]] = {}
    for split, report in reports.items():
        for sample in report.samples:
            places.setdefault(sample.digest, []).append((split, sample.name))
    twice = [where for where in places.values() if len(where) > 1]
    between = [where for where in twice if len({split for split, _ in where}) > 1]
    within = [where for where in twice if where not in between]
    for kind, groups in (("in two splits", between), ("twice in a split", within)):
        if groups:
            listed = [" = ".join(f"{split}/{name}" for split, name in where) for where in groups]
            yield f"images that occur {kind}: {len(groups)}: {_names(listed)}"


def _names(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
