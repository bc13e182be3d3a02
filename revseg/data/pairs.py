r"""Which image belongs to which label: by file name, or by a list file.

List files travel with the paths of the machine that wrote them (`/SegNet/CamVid/train/x.png`,
`C:\data\train\x.png`), so a path is also looked for under the root by its last parts. What
belongs together is decided here, before any file is opened.
"""

import csv
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

from revseg.data.images import IMAGE_ENDINGS

SHOWN = 5  # of the problems of one kind that a message lists


class FilePair(NamedTuple):
    """The files of a sample."""

    image: Path
    label: Path


class BrokenDatasetError(ValueError):
    """Files of a data set that are missing, alone or broken.

    Args:
        problems: One sentence for each, with the name of the file.
    """

    def __init__(self, problems: Sequence[str]):
        self.problems = tuple(problems)
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        super().__init__("; ".join(self.problems[:SHOWN]) + more)


def paired(
    images: dict[str, Path], labels: dict[str, Path], image_place: Path, label_place: Path
) -> list[FilePair]:
    """The images and labels of the same key, sorted by it.

    Args:
        images: By key.
        labels: By key.
        image_place: The folder of the images, for messages.
        label_place: The folder of the labels, for messages.

    Raises:
        BrokenDatasetError: If one is without the other.
    """
    without_label = sorted(images.keys() - labels.keys())
    without_image = sorted(labels.keys() - images.keys())
    problems = [f"{images[key]}: an image without a label in {label_place}" for key in without_label]
    problems += [f"{labels[key]}: a label without an image in {image_place}" for key in without_image]
    if problems:
        raise BrokenDatasetError(problems)
    return [FilePair(images[key], labels[key]) for key in sorted(images)]


def files_by_stem(folder: Path, endings: tuple[str, ...]) -> dict[str, Path]:
    """The files of a folder and its folders with one of the endings, by their paths without it.

    Raises:
        FileNotFoundError: If there is no such folder.
        BrokenDatasetError: If two files have the same key.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"missing folder {folder}")
    files: dict[str, Path] = {}
    problems = []
    for path in sorted(_files_under(folder)):
        if path.name.startswith(".") or path.suffix.lower() not in endings:
            continue
        key = path.relative_to(folder).with_suffix("").as_posix()
        if key in files:
            problems.append(f"expected one file for {key}, got {files[key]} and {path}")
        files[key] = path
    if problems:
        raise BrokenDatasetError(problems)
    return files


def _files_under(folder: Path) -> Iterator[Path]:
    """The files of a folder and its folders, also of linked ones; nothing that is hidden."""
    for place, folders, names in os.walk(folder, followlinks=True):
        inner = Path(place).relative_to(folder).parts
        above = {os.path.realpath(folder.joinpath(*inner[:depth])) for depth in range(len(inner))}
        if os.path.realpath(place) in above:  # a link to a folder that this one lies in
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        yield from (Path(place, name) for name in names)


def listed_pairs(listing: Path) -> list[FilePair]:
    """The pairs of a list file, in its order.

    A line holds the paths of an image and of its label, parted by a tab, a comma, a semicolon or
    blanks; a path with blanks stands in quotes or is told apart by which files exist. Lines that
    begin with # are comments. The text may be UTF-8 or UTF-16.

    Raises:
        FileNotFoundError: If a file that the list names is missing.
        ValueError: If a line is not a pair, an image is listed twice or there are none.
    """
    pairs: dict[Path, FilePair] = {}
    for place, line in _lines(listing):
        image, label = _split(line, listing.parent, place)
        if image in pairs:
            raise ValueError(f"{place}: the image {image.stem} is listed twice")
        pairs[image] = FilePair(image, label)
    if not pairs:
        raise ValueError(f"no images in the list {listing}")
    return list(pairs.values())


def unique_names(paths: Sequence[Path]) -> list[str]:
    """A name for each file: its stem, and as many of its folders as tell all of them apart."""
    longest = max((len(path.parts) for path in paths), default=1)
    for parts in range(1, longest + 1):
        names = ["_".join(path.with_suffix("").parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    counts: Counter[str] = Counter()
    names = []
    for path in paths:  # files that differ in nothing but their endings
        counts[path.stem] += 1
        names.append(f"{path.stem}_{counts[path.stem]}")
    return names


def _lines(listing: Path) -> Iterator[tuple[str, str]]:
    """The lines that are neither blank nor a comment, with their places for errors."""
    content = listing.read_bytes()
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"expected text in UTF-8 or UTF-16, got other bytes: {listing}: {error}") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield f"{listing}, line {number}", line.strip()


def _split(line: str, root: Path, place: str) -> FilePair:
    """The two files of a line: of the ways to part it, the first whose files exist."""
    missing: FileNotFoundError | None = None
    for words in _partings(line):
        try:
            image, label = (_locate(word, root, place) for word in words)
        except FileNotFoundError as error:
            missing = missing or error
        else:
            return FilePair(image, label)
    if missing is None:
        raise ValueError(f"{place}: expected the paths of an image and its label, got {line!r}")
    raise missing


def _partings(line: str) -> Iterator[tuple[str, str]]:
    """The ways to read a line as two paths, the most likely ones first."""
    for mark in ("\t", ",", ";", " "):
        words = [
            word.strip()
            for word in next(csv.reader([line], delimiter=mark, skipinitialspace=True))
            if word.strip()
        ]
        if len(words) == 2:
            yield words[0], words[1]
    for gap in re.finditer(r"[\s,;]+", line):
        first, second = line[: gap.start()].strip("\"' "), line[gap.end() :].strip("\"' ")
        if first and second:
            yield first, second


def _locate(text: str, root: Path, place: str) -> Path:
    """The file that a list means: there, under root, or under root by its last parts.

    At least a folder and a file name must agree: an image and its label share the file name. The
    ending may be another one, for the images may have been converted since.
    """
    candidates = _candidates(Path(text), root)
    if "\\" in text:
        windows = PureWindowsPath(text)
        candidates += _candidates(Path(windows.relative_to(windows.anchor).as_posix()), root)
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    for candidate in candidates:
        for ending in IMAGE_ENDINGS:
            if (converted := candidate.with_suffix(ending)).is_file():
                return converted
    raise FileNotFoundError(f"{place}: cannot find {text}, also not by its last parts under {root}")


def _candidates(path: Path, root: Path) -> list[Path]:
    """Where a file may be, the likeliest places first."""
    parts = path.parts[1:] if path.is_absolute() else path.parts
    tails = [Path(*parts[start:]) for start in range(max(1, len(parts) - 1))]
    return [path] * path.is_absolute() + [root / path, root.parent / path] + [root / tail for tail in tails]
