"""Images with more than three channels or more than 8 bits, as three channels of bytes.

Networks here take three channels of bytes. Which channels these are and which values are black and
white is for the class table to say: nobody can tell 12 bits in a file of 16 from a dark picture.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from revseg.data.class_file import LabelMeaning
from revseg.data.images import opened, raw_mode, upright

ARRAY_ENDINGS = (".npy",)
TIFF_ENDINGS = (".tif", ".tiff")


def read_channels(path: Path, meaning: LabelMeaning) -> Tensor:
    """The image of a file [3, H, W], uint8, by the channels and the range of the class table.

    Raises:
        ValueError: If the file cannot be decoded, lacks a channel, or holds other than bytes and no range is given.
    """
    pixels = read_array(path)
    count = pixels.shape[2]
    chosen = meaning.channels or ((1,) if count in (1, 2) else (1, 2, 3))
    if max(chosen) > count:
        raise ValueError(
            f"expected an image with channel {max(chosen)}, got {count} channels: {path}; see image in {meaning.path}"
        )
    if meaning.channels is None and count > 4:
        raise ValueError(
            f"expected an image of 1, 3 or 4 channels, got {count}: {path}; name three of them as "
            f"image: {{channels: [...]}} in {meaning.path}"
        )
    pixels = pixels[:, :, [channel - 1 for channel in chosen]]
    bytes_ = scaled(pixels, meaning.range, path)
    return torch.from_numpy(np.ascontiguousarray(bytes_.transpose(2, 0, 1))).expand(3, -1, -1).contiguous()


def scaled(pixels: npt.NDArray[Any], values: tuple[float, float] | None, path: Path) -> npt.NDArray[np.uint8]:
    """Bytes from any numbers: the range's lower end is 0, its upper end 255, beyond is cut off."""
    if values is None:
        if pixels.dtype == np.uint8:
            return pixels.view(np.uint8)
        raise ValueError(
            f"expected an image with 8 bits a channel, got {pixels.dtype} from {pixels.min()} to {pixels.max()}: "
            f"{path}; say what is black and white as image: {{range: [..., ...]}} in the class table"
        )
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise ValueError(f"expected finite numbers, got NaN or infinity: {path}")
    low, high = values
    levels = (pixels.astype(np.float64) - low) * (255 / (high - low))
    rounded: npt.NDArray[np.uint8] = np.rint(levels.clip(0, 255)).astype(np.uint8)
    return rounded


def read_array(path: Path) -> npt.NDArray[Any]:
    """The numbers of an image file [H, W, C] as they are stored, upright."""
    if path.suffix.lower() in ARRAY_ENDINGS:
        pixels = _loaded(path)
    elif path.suffix.lower() in TIFF_ENDINGS:
        pixels = _read_tiff(path)
    else:
        pixels = _read_with_pillow(path)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def array_size(path: Path) -> tuple[int, int]:
    """(H, W) of an array file or a TIFF file."""
    pixels = _loaded(path, mapped=True) if path.suffix.lower() in ARRAY_ENDINGS else _read_tiff(path)
    return pixels.shape[0], pixels.shape[1]


def read_id_array(path: Path) -> npt.NDArray[Any]:
    """The ids of an array file [H, W]."""
    ids = _loaded(path)
    if ids.ndim != 2 or ids.dtype.kind not in "ui":
        raise ValueError(f"expected a label of ids [H, W], got {list(ids.shape)} of {ids.dtype}: {path}")
    return ids


def _loaded(path: Path, mapped: bool = False) -> npt.NDArray[Any]:
    try:
        pixels: npt.NDArray[Any] = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"cannot read the array {path}: {error}") from error
    if pixels.ndim not in (2, 3) or pixels.dtype.kind not in "uif" or 0 in pixels.shape:
        raise ValueError(
            f"expected numbers [H, W] or [H, W, C], got {list(pixels.shape)} of {pixels.dtype}: {path}"
        )
    return pixels


def _read_tiff(path: Path) -> npt.NDArray[Any]:
    try:
        import tifffile
    except ImportError as error:
        raise ImportError(
            "reading TIFF with more than 8 bits needs tifffile: pip install revseg[data]"
        ) from error
    try:
        with tifffile.TiffFile(path) as file:
            series = file.series[0]
            axes, pixels = series.axes, np.asarray(series.asarray())
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"cannot read the image {path}: {error}") from error
    if axes in ("SYX", "CYX"):
        return np.moveaxis(pixels, 0, 2)
    if axes[:2] != "YX" or pixels.ndim > 3:
        raise ValueError(f"expected one picture in a file, got axes {axes} of {list(pixels.shape)}: {path}")
    return pixels


def _read_with_pillow(path: Path) -> npt.NDArray[Any]:
    with opened(path) as image:
        deep = raw_mode(image).endswith(";16B") and image.format == "PNG" and len(image.getbands()) > 2
        if image.mode in ("P", "1", "CMYK", "YCbCr"):
            return np.array(upright(image).convert("RGB"))
        high = np.array(upright(image))
    if not deep:
        return high
    with opened(
        path
    ) as image:  # Pillow keeps the first byte of two; told that the order is the other one, the second
        tiles: Any = image
        kind = raw_mode(image)[:-1] + "L"
        tiles.tile = [  # a tuple before Pillow 11
            tile._replace(args=kind) if hasattr(tile, "_replace") else (*tile[:3], kind)
            for tile in tiles.tile
        ]
        low = np.array(upright(image))
    both: npt.NDArray[Any] = high.astype(np.uint16) << 8 | low
    return both
