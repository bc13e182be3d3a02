"""What a layer of a stack reads: a map that is there, or one that follows from the raw map before it.

A stack keeps raw maps. The input of a layer is computed from one where it is needed: all of it, an image at a
time, or the pixels that are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from revseg import ops
from revseg.layers.norms import bn_act
from revseg.tensors import CHANNELS_LAST, is_channels_last

# Values of one image, 1 MiB in float32, from which a batch goes through an op image by image.
_LARGE = 1 << 18


def _whole(x: Tensor) -> Tensor:
    return x


@dataclass(eq=False, slots=True)
class LayerInput:
    """The input of a layer, [N, C, L], [N, C, H, W] or [N, C, D, H, W].

    Args:
        raw: A map of its shape and strides; without a norm the input itself.
        norm: What follows the raw map and gives the input.
        cast: The dtype to which autocast casts the input; None for its own.
        computed: Whether the input follows from another raw map, so that a part at a time takes less
            memory where it is made for this. The same in both runs: parts may round otherwise.
        held: The input, if it has been computed.
    """

    raw: Tensor
    norm: ops.Norm | None = None
    cast: torch.dtype | None = None
    computed: bool = False
    held: Tensor | None = None

    def values(self, pick: Callable[[Tensor], Tensor] = _whole) -> Tensor:
        """The input, or the pixels that `pick` takes of a map. Ask for no more than is needed, once, and let it go."""
        if self.held is not None:
            return pick(self.held)
        if self.norm is not None:
            return bn_act(pick(self.raw), self.norm)
        return lowered(pick(self.raw), self.cast)

    def images(self) -> Iterator[Tensor]:
        """The input [1, C, ...], one image at a time."""
        for i in range(len(self.raw)):
            yield self.values(lambda whole, i=i: whole[i : i + 1])  # type: ignore[misc]

    def before_norm(self) -> tuple[Tensor, ops.Norm | None]:
        """The raw map as an op reads it that activates it itself, and what follows it."""
        return lowered(self.raw, self.cast), self.norm

    def hold(self) -> LayerInput:
        """The same input, computed once."""
        return replace(self, held=self.values())

    def overwritten(self) -> LayerInput:
        """The same input in the memory of the raw map, which is gone then."""
        if self.norm is None:
            return self
        return replace(self, raw=bn_act(self.raw, self.norm, out=self.raw), norm=None)


def lowered(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """As autocast casts the arguments of a convolution."""
    castable = dtype is not None and x.is_floating_point() and x.dtype != torch.float64
    return x.to(dtype) if castable else x


def is_large(image: Tensor) -> bool:
    """Whether copies of a map of this size are worth a loop."""
    return image.numel() >= _LARGE


def by_image(x: Tensor) -> bool:
    """Whether a batch like this goes through a convolution image by image, for the sake of its copies in other layouts."""
    needs_none = x.element_size() >= 4 and is_channels_last(x)
    return is_large(x[0]) and not needs_none


def gather(maps: Iterable[Tensor], count: int) -> Tensor:
    """Maps [1, C, ...], made one at a time, as a batch [count, C, ...]."""
    maps = iter(maps)
    first = next(maps)
    if count == 1:
        return first
    layout = CHANNELS_LAST[first.ndim] if is_channels_last(first) else torch.contiguous_format
    shape = (count, *first.shape[1:])
    batch = torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=layout)
    batch[0] = first[0]
    del first  # no map is held while the next one is made
    for i in range(1, count):
        batch[i] = next(maps)[0]
    return batch
