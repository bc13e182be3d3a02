"""Batch norm and activation of maps that are joined, by bands: a layer whose linear part does nothing."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from revseg.engine.tracing import has_hooks
from revseg.layers.bands.nothing import Nothing
from revseg.layers.bands.run import run_by_bands
from revseg.layers.stack import bands_of, stacks_are_right
from revseg.layers.stack_layer import layer_of
from revseg.replay.context import is_casting


def normed_by_bands(norm: nn.Sequential, maps: Sequence[Tensor]) -> Tensor | None:
    """What batch norm and activation make of maps joined by their channels; None if they do not go by bands in this call.

    Args:
        norm: Batch norm and activation, with the `bands` that they go by.
        maps: Each [N, c, H, W].
    """
    bands, first = bands_of(norm), maps[0]
    alike = all(each.dtype == first.dtype and stacks_are_right(each) for each in maps)
    if bands is None or len(norm) != 2 or not alike or is_casting(first.device.type) or has_hooks(norm):
        return None
    layer = layer_of(Nothing(), (), *norm)
    return None if layer is None else run_by_bands([layer], tuple(maps), bands)[0]
