"""Large TIFF files, read and written by rows, so that no image is in memory as a whole.

A TIFF is a row of strips or a grid of tiles, each compressed for itself. Those that hold the rows asked for are
decoded, and those of the last call are kept, as rows of windows overlap.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

TILE = 256  # of files that are written
LARGE = 1 << 26  # pixels, 8192 x 8192, from which a file is not read as a whole


def is_large_tiff(path: Path) -> bool:
    """Whether the file is a TIFF of at least `LARGE` pixels; its header alone is read."""
    if path.suffix.lower() not in (".tif", ".tiff"):
        return False
    with _tifffile().TiffFile(path) as file:
        page = file.pages[0]
        return int(page.imagelength) * int(page.imagewidth) >= LARGE


class TiffRows:
    """The rows of the first page of a TIFF file of bytes: grey, RGB, or RGB with more channels behind.

    Args:
        path: The file.

    Raises:
        ValueError: If its values are no bytes, or its channels lie in planes of their own.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = _tifffile().TiffFile(path)
        page = self.file.pages[0]
        self.page: Any = page
        self.height, self.width = int(page.imagelength), int(page.imagewidth)
        if page.dtype != np.uint8 or (page.samplesperpixel > 1 and page.planarconfig != 1):
            raise ValueError(
                f"expected 8 bits a channel and channels side by side, got {page.dtype} in layout {page.planarconfig}: {path}"
            )
        if page.samplesperpixel not in (1, 3, 4):
            raise ValueError(f"expected 1, 3 or 4 channels, got {page.samplesperpixel}: {path}")
        self.depth = int(page.tilelength if page.is_tiled else page.rowsperstrip)  # rows of a piece
        across = -(-self.width // int(page.tilewidth)) if page.is_tiled else 1
        self.pieces = [range(i, i + across) for i in range(0, len(page.dataoffsets), across)]
        self.decoded: dict[int, Any] = {}  # rows of pieces [rows, W, channels]

    def read(self, top: int, bottom: int) -> Tensor:
        """The pixels [3, bottom - top, W], uint8.

        Raises:
            ValueError: If a piece of the file cannot be decoded.
        """
        needed = range(top // self.depth, -(-bottom // self.depth))
        self.decoded = {k: self.decoded[k] if k in self.decoded else self._decode(k) for k in needed}
        rows = np.concatenate([self.decoded[k] for k in needed])[top - needed[0] * self.depth :][
            : bottom - top
        ]
        pixels = torch.from_numpy(np.ascontiguousarray(rows[..., :3])).permute(2, 0, 1)
        return pixels.expand(3, -1, -1) if len(pixels) == 1 else pixels

    def _decode(self, k: int) -> Any:
        page, height = self.page, min(self.depth, self.height - k * self.depth)
        rows = np.zeros((height, self.width, page.samplesperpixel), dtype=np.uint8)
        for i in self.pieces[k]:
            handle = self.file.filehandle
            handle.seek(page.dataoffsets[i])
            try:
                data, place, _ = page.decode(handle.read(page.databytecounts[i]), i)
            except Exception as error:  # decoders raise nearly anything on damaged files
                raise ValueError(
                    f"cannot read rows {k * self.depth} and on of {self.path}: {error}"
                ) from error
            if data is None:
                continue  # a piece that was never written is black
            part = data[0, :height, : self.width - place[3]]
            rows[:, place[3] : place[3] + part.shape[1]] = part
        return rows


def write_rows(path: Path, strips: Iterator[Tensor], height: int, width: int) -> None:
    """A TIFF of bytes [H, W] or [H, W, 3] from strips that come one at a time, in compressed tiles.

    Args:
        path: The file.
        strips: Rows [n, W] or [n, W, 3], uint8, from the top.
        height: H.
        width: W.
    """
    first = next(strips)
    with _tifffile().TiffWriter(path, bigtiff=height * width >= 1 << 30) as file:
        file.write(
            _tiles(first, strips),
            shape=(height, width, *first.shape[2:]),
            dtype="uint8",
            tile=(TILE, TILE),
            compression="zlib",
            photometric="rgb" if first.ndim == 3 else "minisblack",
        )


def _tiles(first: Tensor, strips: Iterator[Tensor]) -> Iterator[Any]:
    """The tiles of an image, row by row; those at its right and lower border are filled up by zeros."""
    waiting: Tensor | None = first
    while waiting is not None:
        following = next(strips, None)
        while len(waiting) >= TILE or (following is None and len(waiting)):
            yield from map(_filled, torch.split(waiting[:TILE], TILE, 1))
            waiting = waiting[TILE:]
        waiting = None if following is None else torch.cat((waiting, following))


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
