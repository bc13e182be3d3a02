"""Transforms of other libraries as transforms of this one.

They draw from the default generators of Python, numpy and torch. Here these are seeded from the generator of
the sample for the length of a call and are afterwards as they were before.
"""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from revseg.data.base import Pair


class TorchvisionTransform:
    """A callable of image [3, H, W] and label [H, W], such as one of torchvision.transforms.v2.

    Args:
        transform: Takes both and returns both, still uint8. If torchvision is there it is given its own
            `Image` and `Mask`, by which its transforms know what to do with each.
    """

    def __init__(self, transform: Callable[[Any, Any], Any]):
        self.transform = transform

    def __call__(self, image: Tensor, label: Tensor, generator: Generator, /) -> Pair:
        kinds = sys.modules.get("torchvision.tv_tensors")
        given = (image, label) if kinds is None else (kinds.Image(image), kinds.Mask(label))
        with seeded_defaults(generator):
            changed = self.transform(*given)
        if not isinstance(changed, (tuple, list)) or len(changed) != 2:
            raise TypeError(f"expected the transform to return image and label, got {type(changed).__name__}")
        return checked_pair(changed[0], changed[1])


class AlbumentationsTransform:
    """A callable of `image=` [H, W, 3] and `mask=` [H, W] as numpy arrays, such as albumentations.Compose.

    Args:
        transform: Returns a mapping with "image" and "mask", still uint8; the image may be a tensor
            [3, H, W], as ToTensorV2 makes it. If it has `set_random_seed` that is called for every sample.
    """

    def __init__(self, transform: Callable[..., Any]):
        self.transform = transform

    def __call__(self, image: Tensor, label: Tensor, generator: Generator, /) -> Pair:
        with seeded_defaults(generator) as seed:
            if hasattr(self.transform, "set_random_seed"):
                self.transform.set_random_seed(seed)
            changed = self.transform(image=image.permute(1, 2, 0).contiguous().numpy(), mask=label.numpy())
        image, label = changed["image"], changed["mask"]
        if isinstance(image, np.ndarray):
            image = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).contiguous()
        if isinstance(label, np.ndarray):
            label = torch.from_numpy(np.ascontiguousarray(label))
        return checked_pair(image, label)


@contextmanager
def seeded_defaults(generator: Generator) -> Iterator[int]:
    """The default generators of Python, numpy and torch seeded from a number of the generator, then restored."""
    seed = int(torch.randint(2**32, (), generator=generator))
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield seed
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def checked_pair(image: Any, label: Any) -> Pair:
    """The pair as plain tensors, if it is still one of bytes.

    Raises:
        ValueError: If shapes or dtypes are not those of an image and its label.
    """
    for name, tensor, dims in (("image [3, H, W]", image, 3), ("label [H, W]", label, 2)):
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.uint8 or tensor.ndim != dims:
            shape = list(tensor.shape) if hasattr(tensor, "shape") else ""
            raise ValueError(
                f"expected the transform to return an {name} of uint8, got {getattr(tensor, 'dtype', type(tensor))} "
                f"{shape}; networks normalise bytes themselves, so leave that step out"
            )
    if image.shape[1:] != label.shape:
        raise ValueError(
            f"expected image and label of one size, got {list(image.shape)} and {list(label.shape)}"
        )
    return image.as_subclass(Tensor), label.as_subclass(Tensor)
