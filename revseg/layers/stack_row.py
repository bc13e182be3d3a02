"""Modules called one after the other, read as the layers of a stack."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from revseg.engine.tracing import has_hooks
from revseg.layers.bands.nothing import Nothing
from revseg.layers.convolution import Convolution
from revseg.layers.max_pool import MaxPool
from revseg.layers.stack_layer import (
    NORMS,
    Layer,
    layer_by_image,
    layer_of,
    layer_without_norm,
    with_elementwise,
)

_OF_NORMS: dict[type[nn.Module], int] = {norm: dims for dims, norm in NORMS.items()}


def layers_in(modules: Iterable[nn.Module], dims: int = 2, without_norm: bool = False) -> list[Layer] | None:
    """The layers that modules called one after the other are, as in `revseg.layers.stack.layers_of`."""
    parts = list(parts_in(modules, dims, without_norm))
    layers = [part for part in parts if isinstance(part, Layer)]
    return layers if len(layers) == len(parts) else None


def parts_in(
    modules: Iterable[nn.Module], dims: int, without_norm: bool = False
) -> Iterator[Layer | nn.Module]:
    """Layers of maps of so many dimensions, and the modules that are part of none."""
    row, layer = list(modules), None
    while row:
        before = layer
        layer, length = _first_layer(row)
        if layer is None and without_norm:
            layer, length = _first_by_bands(row, before)
        followed = with_elementwise(layer, row[length]) if without_norm and length < len(row) else None
        if followed is not None:
            layer, length = followed, length + 1
        if layer is None or layer.op.dims != dims:
            yield from row[:length]
        else:
            yield layer
        del row[:length]


def _first_layer(row: Sequence[nn.Module]) -> tuple[Layer | None, int]:
    """The layer that the row begins with, None if it begins with another module; and how many modules it is."""
    first: Any = row[0]
    as_layer = getattr(first, "as_layer", None)
    if callable(as_layer):
        return None if has_hooks(first) else as_layer(), 1
    op = Convolution.of(first) if len(row) > 1 else None
    if op is None:  # a weight that is made anew for each use must not be asked for
        return None, 1
    parameters = first.weight, first.bias
    layer = layer_of(op, parameters, row[1], row[2]) if len(row) > 2 else None
    if layer is not None:
        return layer, 3
    layer = layer_of(op, parameters, row[1], nn.Identity())
    return layer, 1 if layer is None else 2


def _first_by_bands(row: Sequence[nn.Module], before: Layer | None) -> tuple[Layer | None, int]:
    """A convolution with instance norm and activation behind it or without, or a pool behind a layer; None for others."""
    first: Any = row[0]
    pool = MaxPool.of(first)
    if pool is not None:
        like = None if before is None else before.by_channel()
        return layer_without_norm(pool, (), nn.Identity(), like), 1
    op = Convolution.of(first)
    dims = _OF_NORMS.get(type(first))
    if dims is not None and not has_hooks(first):  # what comes before an activation
        with_act = layer_of(Nothing(dims), (), first, row[1]) if len(row) > 1 else None
        alone = layer_of(Nothing(dims), (), first, nn.Identity())
        return (with_act, 2) if with_act is not None else (alone, 1)
    if op is None or op.window() is None:
        return None, 1
    parameters, weight, nothing = (first.weight, first.bias), first.weight, nn.Identity()
    _, norm, act, *_ = *row, nothing, nothing
    return next(
        (layer, length)
        for layer, length in (
            (layer_by_image(op, parameters, norm, act), min(3, len(row))),
            (layer_by_image(op, parameters, norm, nothing), 2),
            (layer_without_norm(op, parameters, norm, weight), min(2, len(row))),
            (layer_without_norm(op, parameters, nothing, weight), 1),
        )
        if layer is not None
    )
