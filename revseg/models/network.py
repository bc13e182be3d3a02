"""What all networks share: images come in by one door, logits go out.

A network is a subclass with a `stride` and a method `logits`. Its layers take images as bytes; what makes
floats of them is the network's `normalization`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from revseg.engine.tracing import is_traced, refuse_symbol
from revseg.exact.modes import Exact
from revseg.layers.images import Normalization


class Network(nn.Module):
    """A network for images [N, in_channels, H, W] of any size.

    Args:
        num_classes: C, the number of classes; 1 for a thing and what is around it, of which the logits are the
            thing's alone.
        in_channels: Channels of the images.

    Raises:
        ValueError: If one of both is below 1.
    """

    stride: int

    # Of the weights that the official code has released: how it normalises, by the number of classes (None for any
    # number), and with which hyperparameters they fit, as a sentence.
    official_normalizations: ClassVar[Mapping[int | None, Normalization]] = {}
    official_files: ClassVar[str] = ""
    official_missing: ClassVar[str] = ""  # why there are none that load, if there are none

    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        check_channels(num_classes, in_channels)
        self.num_classes, self.in_channels = num_classes, in_channels
        self._normalization = Normalization.of_channels(in_channels)
        self._saw_floats = False

    def logits(self, images: Tensor) -> Any:
        """What `forward` returns; the figure of the paper, from its beginning to its end."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Any:
        """Logits [N, C, h, w] at the network's stride; in training with auxiliary heads a tuple, those of the main head first.

        Args:
            images: [N, in_channels, H, W], uint8, or floats that are normalised already.

        Raises:
            ValueError: If the shape is another one, or if training gives a batch norm a single value.
            TypeError: If the images are neither uint8 nor float.
        """
        if torch.compiler.is_compiling():
            return self.logits(images)
        self._check(images)
        try:
            return self.logits(images)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ValueError(
                f"batch norm cannot train on the one pixel that is left of images {list(images.shape)}: give at "
                "least two images in a batch (--batch 2), or larger ones (--size)"
            ) from error

    @property
    def normalization(self) -> Normalization:
        """How bytes become floats; set another one where weights were trained with another."""
        return self._normalization

    @normalization.setter
    def normalization(self, normalization: Normalization) -> None:
        if len(normalization.mean) != self.in_channels:
            raise ValueError(
                f"expected a normalization of {self.in_channels} channels, got one of {len(normalization.mean)}"
            )
        self._normalization = normalization
        module: Any
        for module in self.modules():
            if isinstance(getattr(module, "prepare", None), Normalization):
                module.prepare = normalization

    def _check(self, images: Tensor) -> None:
        refuse_symbol(images)
        if images.ndim != 4 or images.shape[1] != self.in_channels:
            raise ValueError(f"expected images [N, {self.in_channels}, H, W], got shape {list(images.shape)}")
        if images.is_floating_point() and not self._saw_floats and not is_traced([images]):
            self._saw_floats = True  # once a network: to look at values makes a GPU wait
            if looks_like_raw_images(images):
                warnings.warn(
                    f"float images with values from 0 to {images.max():g} are taken as they are, for normalised "
                    "ones: give them as bytes (uint8), or give model.normalization(bytes)",
                    stacklevel=5,  # the call of the network
                )


def check_channels(num_classes: int, in_channels: int) -> None:
    """Refuse numbers below 1."""
    if num_classes < 1:
        raise ValueError(f"expected num_classes of at least 1, got {num_classes}")
    if in_channels < 1:
        raise ValueError(f"expected in_channels of at least 1, got {in_channels}")


def check_edition(reversible: bool, exact: Exact) -> None:
    """Refuse to invert exactly what is not inverted."""
    if exact and not reversible:
        raise ValueError(f"exact={exact!r} is a way to invert: expected reversible=True with it")


def looks_like_raw_images(images: Tensor) -> bool:
    """The values are those of images that nobody normalised: none negative, and not all the same."""
    if type(images) is not Tensor or images.device.type == "meta" or not images.numel():
        return False  # nothing to look at
    low, high = torch.aminmax(images.detach())
    return bool((low >= 0) & (high > low))
