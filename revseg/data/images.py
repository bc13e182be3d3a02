"""Reading images and label maps from files, with Pillow.

A file is read as it is meant or not at all. Decoders change more than they say: they leave a photo on
its side whose camera noted how it was held, cut 16 bits to the upper 8, and stretch class ids of 2 or
4 bits over the range of a byte. All of that is put right here, or refused with a message that names
the file.

Pillow is imported when the first file is read, so that the library works without it.
"""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
LABEL_ENDINGS = (".png", ".tif", ".tiff", ".bmp")

EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
ORIENTATION = 0x0112  # the tag of EXIF that says how the camera was held; from 5 on it lay on its side
STRIPS_OR_TILES = ((273, 324), (279, 325))  # the tags of TIFF: where they begin, how many bytes they have
TEXTS = (b"tEXt", b"zTXt", b"iTXt")  # chunks of a PNG file that hold text under a keyword


class Header(NamedTuple):
    """What a file says about itself before its pixels are decoded."""

    size: tuple[int, int]  # (H, W), upright
    mode: str  # Pillow's
    depth: int  # bits a channel, as stored
    lossy: bool


def read_image(path: Path) -> Tensor:
    """The image of a file [3, H, W], uint8, upright.

    Raises:
        ValueError: If the file cannot be decoded, has more than 8 bits a channel, or several pictures.
    """
    with opened(path) as image:
        _check_image(image, path)
        pixels = np.array(upright(image).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def read_label(path: Path) -> Tensor:
    """The class ids of a label file [H, W], uint8. A palette is for viewers: its indices are the ids.

    Raises:
        ValueError: If the file cannot be decoded, holds colours instead of ids, or is compressed with loss.
    """
    ids = read_ids(path)
    if ids.dtype != np.uint8:
        raise ValueError(f"expected a label of one 8-bit channel of class ids, got {ids.dtype}: {path}")
    return torch.from_numpy(ids)


def read_ids(path: Path) -> npt.NDArray[Any]:
    """The ids of a label file [H, W] as they are stored: uint8, or uint16 or int32 where it is wider."""
    with opened(path) as label:
        check_label(label, path)
        if label.mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
            raise _RefusedError(
                f"expected a label of one 8-bit channel of class ids, got mode {label.mode}: {path}"
            )
        stretch, inverted = _stretch(label), "I" in raw_mode(label).partition(";")[2]
        turned = upright(label)
        ids: npt.NDArray[Any] = np.array(turned, dtype=np.uint8 if turned.mode == "1" else None)
    if turned.mode == "1":
        return 1 - ids if inverted else ids
    if ids.dtype == np.uint8:
        return (255 - ids if inverted else ids) // np.uint8(stretch)
    return ids.astype(np.uint16 if ids.dtype.itemsize == 2 else np.int32)


def read_colours(path: Path) -> npt.NDArray[np.uint8]:
    """The colours of a label file [H, W, 3]; those of the palette where it has one."""
    with opened(path) as label:
        check_label(label, path)
        _check_image(label, path)
        return np.array(upright(label).convert("RGB"))


def read_header(path: Path) -> Header:
    """Size and kind of a file, without its pixels.

    Raises:
        ValueError: If this is no image, or it ends too early.
    """
    with opened(path) as image:
        mode, depth, lossy = image.mode, _depth(image), _is_lossy(image, path)
        # of a PNG that is not simple Pillow decodes the pixels to find its EXIF data
        is_simple = image.format == "PNG" and _is_simple_png(path)
        orientation = 1 if is_simple else image.getexif().get(ORIENTATION, 1)
        if not is_simple and not _is_whole(image, path):
            image.load()  # what is cut off is found here
        if image.format == "TIFF" and orientation != 1:
            image, orientation = upright(image), 1  # Pillow's versions differ in when they turn it
        width, height = image.size
        if orientation >= 5:
            width, height = height, width
    return Header((height, width), mode, depth, lossy)


@contextmanager
def opened(path: Path) -> Iterator["Image.Image"]:
    """The image of a file, not decoded yet; whatever goes wrong inside is a ValueError that names the file."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading images needs Pillow: pip install revseg[data]") from error
    try:
        with Image.open(path) as image:
            yield image
    except (FileNotFoundError, MemoryError, _RefusedError):
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise ValueError(f"cannot read the image {path}: {error}") from error


def check_label(label: "Image.Image", path: Path) -> None:
    """Refuses what cannot hold class ids."""
    if _is_lossy(label, path):
        raise _RefusedError(
            f"expected a label without loss, as PNG, got {label.format}, whose compression changes the ids of "
            f"pixels: {path}"
        )
    _check_single(label, path)


class _RefusedError(ValueError):
    """A file that can be decoded, but not be used; its message is complete."""


def _check_image(image: "Image.Image", path: Path) -> None:
    if image.mode not in EIGHT_BITS or _depth(image) > 8:
        depth = f" with {_depth(image)} bits" if _depth(image) > 8 else ""
        raise _RefusedError(
            f"expected an image with 8 bits a channel, got mode {image.mode}{depth}: {path}; the data set "
            "`folder` scales others by the range that its class table gives"
        )
    samples = getattr(image, "tag_v2", {}).get(277, 0)  # the number of channels of a TIFF file
    if samples > max(4, len(image.getbands())):
        raise _RefusedError(
            f"expected an image of 1, 3 or 4 channels, got {samples}: {path}; the data set `folder` takes those "
            "that its class table names"
        )
    _check_single(image, path)


def _check_single(image: "Image.Image", path: Path) -> None:
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # MPO: a photo with its preview
    if frames > 1:
        raise _RefusedError(f"expected one picture in a file, got {frames}: {path}")


def upright(image: "Image.Image") -> "Image.Image":
    """The decoded image, turned as its EXIF data says the camera was held."""
    from PIL import ImageOps

    image.load()
    return ImageOps.exif_transpose(image)


def raw_mode(image: "Image.Image") -> str:
    """How the decoder names the stored pixels, as in "L;4" or "RGB;16B"; empty if it does not say."""
    tiles: Any = getattr(image, "tile", None)
    if not tiles:
        return ""
    arguments = tiles[0][3]
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _depth(image: "Image.Image") -> int:
    """Bits a channel."""
    if image.mode in ("I", "F"):
        return 32
    return 16 if "16" in image.mode or "16" in raw_mode(image) else 8


def _stretch(label: "Image.Image") -> int:
    """By how much Pillow multiplies the ids of this file: those of 2 or 4 bits reach over a byte."""
    kind, _, bits = raw_mode(label).partition(";")
    return {"2": 85, "4": 17}.get(bits[:1], 1) if kind == "L" else 1


def _is_lossy(image: "Image.Image", path: Path) -> bool:
    if image.format == "WEBP":
        with open(path, "rb") as file:
            return b"VP8 " in file.read(64)  # the lossless kind is named VP8L
    return image.format in ("JPEG", "MPO", "JPEG2000")


def _is_simple_png(path: Path) -> bool:
    """Whether the chunks of a PNG file are all there, and none can say how the camera was held."""
    length = path.stat().st_size
    with open(path, "rb") as file:
        place = 8  # after the signature
        while place + 12 <= length:
            file.seek(place)
            size, name = struct.unpack(">I4s", file.read(8))
            place += 12 + size
            keyword = file.read(min(size, 80)).partition(b"\0")[0] if name in TEXTS else b""
            if name == b"eXIf" or b"exif" in keyword or b"xmp" in keyword:
                return False
            if name == b"IEND":
                return True
    return False


def _is_whole(image: "Image.Image", path: Path) -> bool:
    """Whether the end of a file is surely there, as far as its format tells without the pixels being decoded."""
    length = path.stat().st_size
    with open(path, "rb") as file:
        if image.format in ("JPEG", "MPO"):
            file.seek(max(0, length - 4096))
            return file.read().rstrip(b"\0").endswith(b"\xff\xd9")
        if image.format == "WEBP":
            return 8 + int(struct.unpack("<4xI", file.read(8))[0]) <= length
    if image.format == "TIFF":
        tags: Any = image.tag_v2  # type: ignore[attr-defined]
        places, sizes = (tags.get(first, tags.get(second, ())) for first, second in STRIPS_OR_TILES)
        return len(places) > 0 and max(map(sum, zip(places, sizes, strict=True))) <= length
    return False
