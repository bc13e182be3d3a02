"""Large TIFF files, read and written by parts, so that no image is in memory as a whole.

A TIFF is a row of strips or a grid of tiles, each compressed for itself. Those that hold the pixels asked for are
decoded one at a time. Those of the last call are kept, as windows overlap, if they are small: the tiles of a window are,
strips of a wide image are not, and are decoded again for each window. A file without compression is mapped instead.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from revseg.inference.windows import Span

TILE = 256  # of files that are written
LARGE = 1 << 26  # pixels, 8192 x 8192, from which a file is not read as a whole
KEPT = 1 << 23  # bytes of decoded pieces that are kept for the next call, at most


def is_large_tiff(path: Path) -> bool:
    """Whether the file is a TIFF of at least `LARGE` pixels; its header alone is read."""
    if path.suffix.lower() not in (".tif", ".tiff"):
        return False
    with _tifffile().TiffFile(path) as file:
        page = file.pages[0]
        return int(page.imagelength) * int(page.imagewidth) >= LARGE


class TiffRows:
    """The pixels of the first page of a TIFF file of bytes: grey, RGB, or RGB with more channels behind.

    Memory: what is asked for, the piece that is decoded, and at most `KEPT` bytes. A file that is one compressed strip is
    one piece.

    Args:
        path: The file.

    Raises:
        ValueError: If its values are no bytes, or its channels lie in planes of their own.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = _tifffile().TiffFile(path)
        self.page: Any = self.file.pages[0]
        page = self.page
        self.height, self.width = int(page.imagelength), int(page.imagewidth)
        if page.dtype != np.uint8 or (page.samplesperpixel > 1 and page.planarconfig != 1):
            raise ValueError(
                f"expected 8 bits a channel and channels side by side, got {page.dtype} in layout {page.planarconfig}: {path}"
            )
        if page.samplesperpixel not in (1, 3, 4):
            raise ValueError(f"expected 1, 3 or 4 channels, got {page.samplesperpixel}: {path}")
        depth, side = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, self.width)
        self.depth, self.side = int(depth), int(side)  # rows and columns of a piece
        self.mapped: Any = page.asarray(out="memmap") if page.is_memmappable else None
        self.decoded: dict[int, Any] = {}  # by number of a piece [n, m, channels]

    def read(self, rows: Span, columns: Span) -> Tensor:
        """These pixels [3, n, m], uint8.

        Raises:
            ValueError: If a piece of the file cannot be decoded.
        """
        channels = int(self.page.samplesperpixel)
        if self.mapped is not None:
            found = self.mapped.reshape(self.height, self.width, channels)[slice(*rows), slice(*columns)]
            return _image(np.array(found[..., :3]))
        across = -(-self.width // self.side)
        pixels = np.empty((rows[1] - rows[0], columns[1] - columns[0], min(channels, 3)), np.uint8)
        kept: dict[int, Any] = {}
        for k in range(rows[0] // self.depth, -(-rows[1] // self.depth)):
            for j in range(columns[0] // self.side, -(-columns[1] // self.side)):
                i = k * across + j
                piece = self.decoded.get(i)
                piece = self._decode(i, k) if piece is None else piece
                here, there = _common(rows, k * self.depth, piece.shape[0])
                aside, beside = _common(columns, j * self.side, piece.shape[1])
                pixels[here, aside] = piece[there, beside, :3]
                kept[i] = piece
                while sum(each.nbytes for each in kept.values()) > KEPT:
                    del kept[next(iter(kept))]
        self.decoded = kept
        return _image(pixels)

    def _decode(self, i: int, k: int) -> Any:
        """A piece, without what lies over the border."""
        page, handle = self.page, self.file.filehandle
        handle.seek(page.dataoffsets[i])
        try:
            data, _, _ = page.decode(handle.read(page.databytecounts[i]), i)
        except Exception as error:  # decoders raise nearly anything on damaged files
            raise ValueError(f"cannot read rows {k * self.depth} and on of {self.path}: {error}") from error
        height = min(self.depth, self.height - k * self.depth)
        width = min(self.side, self.width - (i % -(-self.width // self.side)) * self.side)
        if data is None:  # a piece that was never written is black
            return np.zeros((height, width, page.samplesperpixel), np.uint8)
        return data[0, :height, :width]


def _common(asked: Span, start: int, length: int) -> tuple[slice, slice]:
    """What of a span lies in a piece that begins at a place: as part of the span, and of the piece."""
    first, last = max(asked[0], start), min(asked[1], start + length)
    return slice(first - asked[0], last - asked[0]), slice(first - start, last - start)


def _image(pixels: Any) -> Tensor:
    """The pixels [n, m, 1 or 3] as an image [3, n, m]."""
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    return image.expand(3, -1, -1) if len(image) == 1 else image


def write_rows(path: Path, strips: Iterator[Tensor], height: int, width: int) -> None:
    """A TIFF of bytes [H, W] or [H, W, 3] from strips that come one at a time, in compressed tiles.

    Args:
        path: The file.
        strips: Rows [n, W] or [n, W, 3], uint8, from the top.
        height: H.
        width: W.
    """
    first = next(strips)
    kind = first.shape[2:]
    with _tifffile().TiffWriter(path, bigtiff=height * width >= 1 << 30) as file:
        file.write(
            _tiles(itertools.chain([first], strips)),
            shape=(height, width, *kind),
            dtype="uint8",
            tile=(TILE, TILE),
            compression="zlib",
            photometric="rgb" if kind else "minisblack",
            maxworkers=1,  # several take hundreds of megabytes of tiles before they write one
            buffersize=1,
        )


def _tiles(strips: Iterator[Tensor]) -> Iterator[Any]:
    """The tiles of an image, row by row; those at its right and lower border are filled up by zeros."""
    waiting: list[Tensor] = []  # strips of which fewer rows than a tile's have come
    for strip in strips:
        waiting.append(strip)
        del strip
        if sum(map(len, waiting)) >= TILE:
            rows = torch.cat(waiting)
            whole = len(rows) // TILE * TILE
            waiting = [rows[whole:].clone()]
            for part in torch.split(rows[:whole], TILE):
                yield from map(_filled, torch.split(part, TILE, 1))
            del rows, part
    if sum(map(len, waiting)):
        yield from map(_filled, torch.split(torch.cat(waiting), TILE, 1))


def _filled(part: Tensor) -> Any:
    tile = part.new_zeros(TILE, TILE, *part.shape[2:])
    tile[: part.shape[0], : part.shape[1]] = part
    return tile.numpy()


def _tifffile() -> Any:
    try:
        import tifffile
    except ImportError as error:
        raise ImportError("TIFF files of this kind need tifffile: pip install 'revseg[data]'") from error
    return tifffile
