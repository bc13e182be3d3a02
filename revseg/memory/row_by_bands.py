"""Modules called one after the other that go by bands: what a plan chooses where running again is not enough.

Convolutions, norms, activations and pools in a row, whoever calls them, are layers of `revseg.layers.bands`. Maps that are
joined, raised or pooled before are made as they are read, and never exist.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from revseg.engine.tracing import has_hooks
from revseg.layers.bands.cut import BandPlan, Bands
from revseg.layers.bands.dropped import Dropped
from revseg.layers.bands.local import Joined, Local, Rule
from revseg.layers.bands.rows import Whole
from revseg.layers.bands.run import run_by_bands
from revseg.layers.bands.sources import run_of_source
from revseg.layers.stack import stacks_are_right
from revseg.layers.stack_layer import Layer
from revseg.layers.stack_row import layers_in
from revseg.layers.structure import Structure, put_together, take_apart
from revseg.memory.handed_on import HandedOn
from revseg.memory.made_later import joined_maps, rule_of
from revseg.memory.remake import Recipe, maps_may_wait, recipe_of
from revseg.memory.waiting import is_step, materialized

BANDS = Bands(kept=0, part=16)  # the least memory; and so few that a plan is predicted in seconds
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
        hands_on: Whether a convolution behind may take the row in (`revseg.memory.handed_on`).
    """

    begins_again = True

    def __init__(
        self, row: Iterable[nn.Module], again: nn.Module, bands: Bands, hands_on: bool = False
    ) -> None:
        super().__init__()
        self.row, self.again, self.bands, self.hands_on = nn.ModuleList(row), again, bands, hands_on

    @_disable_dynamo
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the last of the modules returns.

        Args:
            args: A map, or a recipe of one, for the first.
            kwargs: None, if it is to go by bands.
        """
        if len(args) != 1 or kwargs or not is_step():
            return self.again(*args, **kwargs)
        read = _Input(args[0])
        found = self._handed_on(read) if self.hands_on and maps_may_wait() else None
        if found is None:
            found = self._by_bands(read)
        return self.again(*args) if found is None else found

    def _by_bands(self, read: _Input, *more: nn.Module, scale: Tensor | None = None) -> Tensor | None:
        """What the row, and more modules behind it, make; None if they do not go by bands.

        Args:
            read: The input.
            more: The modules.
            scale: Of each channel of what the last of them reads, where some were dropped [N, C, 1, ...].
        """
        layers = self._layers(read, more)
        if layers is None:
            return None
        if scale is not None:
            if any(layer.is_by_image() for layer in layers):
                return None
            layers[-1] = replace(layers[-1], op=Dropped(layers[-1].op, scale))
        if read.is_whole:
            return run_by_bands(layers, (read.tensors[0],), self.bands)[0]
        return run_of_source(layers, read.make, read.tensors, self.bands)

    def _handed_on(self, read: _Input) -> Tensor | None:
        """The output, not made yet; None if it has no gradient, or is not made by bands."""
        layers = self._layers(read)
        if layers is None:
            return None
        plan = BandPlan(layers, read.make(*read.tensors), self.bands)
        if not any(x.requires_grad for x in (*read.tensors, *plan.parameters)):
            return None
        like = torch.empty((), dtype=plan.dtype, device=read.tensors[0].device)
        return HandedOn(plan.shapes[-1], like, partial(self._by_bands, read), read.tensors)

    def _layers(self, read: _Input, more: Iterable[nn.Module] = ()) -> list[Layer] | None:
        """The layers of the row; None if it cannot go by bands."""
        source = read.make(*read.tensors)
        maps = [x for x in read.tensors if x.ndim == len(source.shape)]
        once = [*map(id, source.parts)] == [*map(id, read.tensors)]  # each, in the order of their gradients
        if not once or not all(stacks_are_right(x, _DIMS) for x in maps):
            return None
        return layers_of_row((*self.row, *more), maps[0])


class _Input:
    """What a row reads.

    Args:
        value: A map, or a recipe of one.

    Attributes:
        tensors: What the map is made of.
        is_whole: Whether that is the map.
        make: Makes a source of such tensors, and holds none.
    """

    def __init__(self, value: Any) -> None:
        described = _described(value)
        self.tensors, structure = take_apart(described)
        self.is_whole = described is self.tensors[0]
        self.make = partial(_source, structure)


def _source(structure: Structure, *parts: Tensor) -> Any:
    return _built(put_together(parts, structure))


def layers_of_row(modules: Iterable[nn.Module], x: Tensor) -> list[Layer] | None:
    """The layers that these modules are, if a map like x goes through all of them by bands; else None."""
    layers = layers_in(_flat(modules), x.ndim - 2, without_norm=True)
    return layers if layers and BandPlan.takes(layers, x) else None


def _flat(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The modules that do something as they are without a plan, and in the place of rows what they call."""
    for module in modules:
        plain = as_if_plain(module)
        if type(plain) is nn.Sequential and not has_hooks(plain):
            yield from _flat(plain)
        elif type(plain) is not nn.Identity or has_hooks(plain):
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
