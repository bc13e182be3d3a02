"""Modules called one after the other that go by bands: what a plan chooses where running again is not enough.

Convolutions, norms, activations and pools in a row, whoever calls them, are layers of `revseg.layers.bands`. Maps that are
joined, raised or pooled before are made as they are read, and never exist.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from revseg.engine.tracing import has_hooks
from revseg.layers.bands.cut import BandPlan, Bands
from revseg.layers.bands.local import Joined, Local, Rule
from revseg.layers.bands.rows import Whole
from revseg.layers.bands.run import run_by_bands
from revseg.layers.bands.sources import run_of_source
from revseg.layers.stack import layers_in, stacks_are_right
from revseg.layers.stack_layer import Layer
from revseg.layers.structure import put_together, take_apart
from revseg.memory.made_later import joined_maps, rule_of
from revseg.memory.remake import Recipe, recipe_of
from revseg.memory.waiting import materialized

_DIMS = (1, 2, 3)


@dataclass(frozen=True)
class _Join:
    maps: tuple[Any, ...]


@dataclass(frozen=True)
class _Made:
    rule: Rule
    x: Tensor
    others: tuple[Tensor, ...]


class RowByBands(nn.Module):
    """Modules in a row by bands, in training; else, and where something in it is not local, what `again` does.

    Args:
        row: The modules.
        again: The same, which runs again as a whole.
        bands: How maps are cut.
    """

    begins_again = True

    def __init__(self, row: Iterable[nn.Module], again: nn.Module, bands: Bands) -> None:
        super().__init__()
        self.row, self.again, self.bands = nn.ModuleList(row), again, bands

    @_disable_dynamo
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the last of the modules returns.

        Args:
            args: A map, or a recipe of one, for the first.
            kwargs: None, if it is to go by bands.
        """
        if len(args) != 1 or kwargs or not torch.is_grad_enabled():
            return self.again(*args, **kwargs)
        described = _described(args[0])
        tensors, structure = take_apart(described)

        def make(*parts: Tensor) -> Any:
            return _built(put_together(parts, structure))

        layers = self._layers(tensors, make(*tensors))
        if layers is None:
            return self.again(*args)
        if described is tensors[0]:
            return run_by_bands(layers, (described,), self.bands)[0]
        return run_of_source(layers, make, tensors, self.bands)

    def _layers(self, tensors: list[Tensor], source: Whole) -> list[Layer] | None:
        """The layers of the row; None if it cannot go by bands."""
        maps = [x for x in tensors if x.ndim == len(source.shape)]
        once = [*map(id, source.parts)] == [*map(id, tensors)]  # each, in the order of their gradients
        if not once or not all(stacks_are_right(x, _DIMS) for x in maps):
            return None
        return layers_of_row(self.row, maps[0])


def layers_of_row(modules: Iterable[nn.Module], x: Tensor) -> list[Layer] | None:
    """The layers that these modules are, if a map like x goes through all of them by bands; else None."""
    layers = layers_in(_flat(modules), x.ndim - 2, without_norm=True)
    return layers if layers and BandPlan.takes(layers, x) else None


def _flat(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The modules as they are without a plan, and in the place of rows what they call."""
    for module in modules:
        plain = as_if_plain(module)
        if type(plain) is nn.Sequential and not has_hooks(plain):
            yield from _flat(plain)
        else:
            yield plain


def as_if_plain(module: nn.Module) -> nn.Module:
    """A module that shares all with this one but the class, which is that without a plan."""
    kind = getattr(type(module), "_kind", None)
    if kind is None:
        return module
    plain: nn.Module = kind.__new__(kind)
    object.__setattr__(plain, "__dict__", module.__dict__)
    return plain


def _described(value: Any) -> Any:
    """What a map is made of, as far as that can be read by bands: a tensor, `_Made` of one, or a `_Join` of such."""
    recipe = recipe_of(value)
    if recipe is None:
        return _whole(value)
    function, args, kwargs = recipe
    maps = joined_maps(function, args, kwargs)
    if maps is not None:
        return _Join(tuple(_described(each) for each in maps))
    if args:
        args = (_whole(args[0]), *args[1:])
    else:
        kwargs = {**kwargs, "input": _whole(kwargs["input"])}
    found = rule_of(function, args, kwargs)
    if found is None:
        return _whole(value)
    rule, x, others = found
    return _Made(rule, x, tuple(others))


def _whole(value: Any) -> Any:
    return value.make() if isinstance(value, Recipe) else materialized(value)


def _built(described: Any) -> Whole:
    if isinstance(described, _Join):
        return Joined(*map(_built, described.maps))
    if isinstance(described, _Made):
        return Local(described.rule, described.x, *described.others)
    return Whole(described)
