"""Reading images and label maps from files, with Pillow.

Pillow is imported when the first file is read, so that the library works without it. Whatever
is wrong with a file, the error names the file.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm")


def read_image(path: Path) -> Tensor:
    """The image of a file [3, H, W], uint8.

    Raises:
        ValueError: If the file cannot be decoded or has more than 8 bits a channel.
    """
    image = _decode(path)
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"):
        raise ValueError(f"expected an image with 8 bits a channel, got mode {image.mode}: {path}")
    pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def read_label(path: Path) -> Tensor:
    """The class ids of a label file [H, W], uint8. A palette is for viewers: its indices are the ids.

    Raises:
        ValueError: If the file cannot be decoded or holds colours instead of ids.
    """
    label = _decode(path)
    if label.mode not in ("1", "L", "P"):
        raise ValueError(f"expected a label of one 8-bit channel of class ids, got mode {label.mode}: {path}")
    return torch.from_numpy(np.array(label, dtype=np.uint8))


def _decode(path: Path) -> "Image.Image":
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading images needs Pillow: pip install revseg[data]") from error
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise ValueError(f"cannot read the image {path}: {error}") from error
