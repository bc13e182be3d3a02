"""What `revseg predict` can be given: files, folders, patterns, lists, videos and cameras, as named images.

Every image has a name of its own, its path below the source, so that results keep the folder structure.
"""

from __future__ import annotations

import glob
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from revseg.data.images import IMAGE_ENDINGS, read_image
from revseg.inference.tiff import TiffRows, is_large_tiff
from revseg.inference.windows import Rows

VIDEO_ENDINGS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v")
CAMERA = "camera:"  # and a number


@dataclass(frozen=True)
class Source:
    """One image that is to be predicted.

    Args:
        name: Its path below what was given, without an ending.
        origin: Where it comes from, for messages.
        read: Gives the image [3, H, W], uint8.
        rows: Its rows, if it is too large to be read as a whole; None for all others.
        coming: How many images follow, at least; None where nobody knows.
    """

    name: PurePath
    origin: str
    read: Callable[[], Tensor]
    rows: Callable[[], Rows] | None = None
    coming: int | None = None


def sources_of(given: Sequence[str], frames: int | None = None) -> Iterator[Source]:
    """The images that the words of the command line name, each once, in their order.

    Args:
        given: Files, folders (with all that is below them), patterns (`photos/*.png`, `**` for any depth), videos,
            "camera:0", and "-" for a list of paths on the standard input, one a line.
        frames: At most so many frames of each video or camera; all by default.

    Raises:
        FileNotFoundError: If a file, or anything that fits a pattern, is missing.
        ValueError: If a file is no image, or two images have one name.
    """
    taken: dict[PurePath, str] = {}
    for i, word in enumerate(given):
        for source in _of_word(word, frames, len(given) - 1 - i):
            if source.name in taken:
                if taken[source.name] == source.origin:
                    continue
                raise ValueError(
                    f"{taken[source.name]} and {source.origin} would both be written as {source.name}: "
                    "predict them into two folders"
                )
            taken[source.name] = source.origin
            yield source


def _of_word(word: str, frames: int | None, following: int) -> Iterator[Source]:
    if word == "-":
        lines = (line.strip() for line in sys.stdin)
        yield from (_file(Path(line), Path(line).parent) for line in lines if line)
        return
    if word.startswith(CAMERA):
        yield from _camera(word, frames)
        return
    path = Path(word).expanduser()
    if path.is_dir():
        found = sorted(each for each in path.rglob("*") if each.suffix.lower() in IMAGE_ENDINGS)
        if not found:
            raise FileNotFoundError(
                f"no images in {path}; expected files that end in {', '.join(IMAGE_ENDINGS)}"
            )
        yield from _files(found, path, following)
    elif path.is_file():
        yield from (
            _video(path, frames)
            if path.suffix.lower() in VIDEO_ENDINGS
            else _files([path], path.parent, following)
        )
    elif any(mark in word for mark in "*?["):
        names = sorted(glob.glob(str(path), recursive=True))
        files = [Path(name) for name in names if Path(name).suffix.lower() in IMAGE_ENDINGS]
        if not files:
            raise FileNotFoundError(f"no image fits {word}")
        parts = path.parts
        fixed = next(i for i, part in enumerate(parts) if any(mark in part for mark in "*?["))
        root = Path(*parts[:fixed])
        yield from _files(files, root, following)
    else:
        raise FileNotFoundError(f"expected a file, a folder, a pattern, a video, camera:0 or -, got {word}")


def _files(paths: list[Path], root: Path, following: int) -> Iterator[Source]:
    for i, path in enumerate(paths):
        yield _file(path, root, len(paths) - 1 - i + following)


def _file(path: Path, root: Path, coming: int | None = None) -> Source:
    if path.suffix.lower() not in IMAGE_ENDINGS:
        raise ValueError(f"expected an image ({', '.join(IMAGE_ENDINGS)}), got {path}")
    name = PurePath(path.relative_to(root)).with_suffix("")
    if is_large_tiff(path):
        return Source(name, str(path), lambda: read_image(path), lambda: TiffRows(path), coming)
    return Source(name, str(path), lambda: read_image(path), coming=coming)


def _video(path: Path, frames: int | None) -> Iterator[Source]:
    for i, frame in enumerate(_frames(str(path), str(path), frames)):
        yield Source(PurePath(path.stem) / f"{i:06d}", f"{path}, frame {i}", partial(_held, frame))


def _camera(word: str, frames: int | None) -> Iterator[Source]:
    number = word.removeprefix(CAMERA)
    if not number.isdigit():
        raise ValueError(f"expected a camera as camera:0, camera:1, ..., got {word}")
    for i, frame in enumerate(_frames(int(number), word, frames)):
        yield Source(PurePath(f"camera{number}") / f"{i:06d}", f"{word}, frame {i}", partial(_held, frame))


def _held(frame: Tensor) -> Tensor:
    return frame


def _frames(where: str | int, name: str, frames: int | None) -> Iterable[Tensor]:
    """The frames [3, H, W], uint8, one at a time."""
    try:
        import cv2
    except ImportError as error:
        raise ImportError(f"reading {name} needs OpenCV: pip install 'revseg[fast]'") from error
    capture: Any = cv2.VideoCapture(where)
    try:
        if not capture.isOpened():
            raise ValueError(f"cannot open {name} as a video")
        count = 0
        while frames is None or count < frames:
            there, frame = capture.read()
            if not there:
                break
            yield torch.from_numpy(frame[:, :, ::-1].copy()).permute(2, 0, 1).contiguous()
            count += 1
        if not count:
            raise ValueError(f"{name} holds no frame")
    finally:
        capture.release()
