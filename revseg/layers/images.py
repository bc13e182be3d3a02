"""Images at the door of a network.

Images reach a model as bytes and are normalised where they are used: four times less to move
and to keep than float32.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from revseg import ops
from revseg.engine.tracing import is_traced

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize_images(images: Tensor) -> Tensor:
    """Images with the mean and deviation of ImageNet taken out.

    Args:
        images: Bytes [N, 3, H, W], uint8, or images already normalised, of a float type, which
            are returned as they are.

    Returns:
        Images [N, 3, H, W]: float32 from bytes, on a CPU in channels_last, in which its convolutions
        need no copies of their maps; else the argument itself.

    Raises:
        ValueError: If the shape is not [N, 3, H, W].
        TypeError: If the images are neither uint8 nor float.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"expected images [N, 3, H, W], got shape {list(images.shape)}")
    if images.is_floating_point():
        return images
    if images.dtype != torch.uint8:
        raise TypeError(f"expected images of dtype uint8 or float, got {images.dtype}")
    mean = torch.tensor(IMAGENET_MEAN, device=images.device).view(3, 1, 1) * 255
    std = torch.tensor(IMAGENET_STD, device=images.device).view(3, 1, 1) * 255
    floats = images.float().sub_(mean).div_(std)
    plain = torch.compiler.is_compiling() or not ops.kernels_are_on() or is_traced([images])
    return floats if plain or images.device.type != "cpu" else ops.relaid(floats, torch.channels_last)


def of_each_image(fn: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """`fn` of the normalised images; bytes are normalised one image at a time.

    Args:
        fn: Takes floats [n, 3, H, W] to a tensor [n, ...], each image for itself.
        images: Bytes or floats [N, 3, H, W], as for `normalize_images`.
    """
    if images.is_floating_point():
        return fn(normalize_images(images))
    return torch.cat([fn(normalize_images(image)) for image in torch.split(images, 1)])


def image_pyramid(images: Tensor, depth: int) -> list[Tensor]:
    """The images at 1/2, 1/4, ... of their size, which small networks feed in again further on.

    Average pools of 3 x 3 with stride 2, one after another, that count their padding as zeros.

    Args:
        images: Bytes or floats [N, 3, H, W], as for `normalize_images`.
        depth: How many sizes.

    Returns:
        Images [N, 3, h, w], float, h = ceil(H / 2) and so on.
    """
    halve = partial(F.avg_pool2d, kernel_size=3, stride=2, padding=1)
    pyramid = [of_each_image(halve, images)]
    while len(pyramid) < depth:
        pyramid.append(halve(pyramid[-1]))
    return pyramid


def crop(x: Tensor, size: Sequence[int]) -> Tensor:
    """The top left corner [N, C, H, W] of a map, for a size (H, W).

    What was halved to ceil(size / 2) and doubled again is one row or column too large where the size
    was odd.
    """
    return x[..., : size[0], : size[1]]
