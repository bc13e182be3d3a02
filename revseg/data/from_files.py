"""Data sets that are read from pairs of files.

The pairing is decided when the data set is made. `verify` opens the headers of all files, which takes
seconds where decoding takes minutes, so that a run does not meet a broken file after an hour.
"""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from revseg.data.base import Pair, SegmentationDataset, Transform, check_samples
from revseg.data.classes import ClassTable
from revseg.data.images import EIGHT_BITS, read_header, read_image, read_label
from revseg.data.pairs import BrokenDatasetError, FilePair, unique_names


class FileDataset(SegmentationDataset):
    """Pairs of an image file and a label file.

    Args:
        classes: The table of the classes.
        pairs: The files of each sample.
        names: A name for each sample; by default made of the names of the images.
        size: (H, W) that image and label are resized to; as stored by default.
        seed: Of what the transform draws.
        samples: Only the first so many; all by default.
        transform: Called with the image, the label and a generator for every sample.
    """

    def __init__(
        self,
        classes: ClassTable,
        pairs: Sequence[FilePair],
        names: Sequence[str] | None = None,
        *,
        size: tuple[int, int] | None = None,
        seed: int = 0,
        samples: int | None = None,
        transform: Transform | None = None,
    ):
        check_samples(samples)
        self.pairs = tuple(pairs[:samples])
        if names is None:
            names = unique_names([pair.image for pair in self.pairs])
        super().__init__(classes, names[:samples], transform, seed=seed, size=size)

    def load(self, index: int) -> Pair:
        files = self.pairs[index]
        image, label = self.load_image(files.image), self.load_label(files.label)
        if image.shape[1:] != label.shape:
            raise ValueError(_sizes_differ(files, tuple(image.shape[1:]), tuple(label.shape)))
        return image, label

    def load_image(self, path: Path) -> Tensor:
        """The image of a file [3, H, W], uint8."""
        return read_image(path)

    def load_label(self, path: Path) -> Tensor:
        """The classes of a label file [H, W], uint8, with 255 where there is none."""
        return read_label(path)

    def verify(self) -> None:
        problems = [problem for files in self.pairs for problem in self.header_problems(files)]
        if problems:
            raise BrokenDatasetError(problems)

    def header_problems(self, files: FilePair) -> list[str]:
        """What the headers of two files tell against them."""
        problems, sizes = [], []
        for path, problem in ((files.image, self.image_problem), (files.label, self.label_problem)):
            try:
                if found := problem(path):
                    problems.append(found)
                sizes.append(self.stored_size(path))
            except (ValueError, OSError) as error:
                problems.append(str(error))
        if len(set(sizes)) > 1 and not problems:
            problems.append(_sizes_differ(files, *sizes))
        return problems

    def stored_size(self, path: Path) -> tuple[int, int]:
        """(H, W) of a file."""
        return read_header(path).size

    def image_problem(self, path: Path) -> str:
        """Why a file cannot be an image of this data set, by its header; empty if it can."""
        header = read_header(path)
        if header.mode in EIGHT_BITS and header.depth <= 8:
            return ""
        return f"expected an image with 8 bits a channel, got mode {header.mode}: {path}"

    def label_problem(self, path: Path) -> str:
        """Why a file cannot be a label of this data set, by its header; empty if it can."""
        header = read_header(path)
        if header.lossy:
            return f"expected a label without loss, as PNG, got one whose compression changes ids: {path}"
        if header.mode in ("1", "L", "P"):
            return ""
        return f"expected a label of one 8-bit channel of class ids, got mode {header.mode}: {path}"

    def origin(self) -> dict[str, object]:
        return {"kind": type(self).__name__, "classes": self.classes.names, "size": self.size}

    def sample_origin(self, index: int) -> object:
        return [_stamp(path) for path in self.pairs[index]]


def _stamp(path: Path) -> list[object]:
    """A file's name, length and time of its last change: the same after both were copied elsewhere."""
    status = path.stat()
    return ["/".join(path.parts[-3:]), status.st_size, status.st_mtime_ns]


def _sizes_differ(files: FilePair, image: tuple[int, ...], label: tuple[int, ...]) -> str:
    return (
        f"expected image and label of one size, got {list(image)} for {files.image} "
        f"and {list(label)} for {files.label}"
    )
