"""Tensors apart from the tuples, lists and dictionaries they stand in.

An autograd function takes and returns tensors alone, a module takes and returns anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


@dataclass(frozen=True)
class Place:
    """Where a tensor stood: its index among the tensors."""

    index: int


Structure = tuple[list[Any], Any]  # leaves, with places for tensors, and the tree they hang on


def take_apart(value: Any) -> tuple[list[Tensor], Structure]:
    """The tensors in the value, each once, and what is left without them."""
    leaves, tree = tree_flatten(value)
    tensors = {id(x): x for x in leaves if isinstance(x, Tensor)}
    places = {key: Place(index) for index, key in enumerate(tensors)}
    return list(tensors.values()), ([places.get(id(x), x) for x in leaves], tree)


def put_together(tensors: Sequence[Tensor], structure: Structure) -> Any:
    """The value with these tensors in their places."""
    leaves, tree = structure
    return tree_unflatten([tensors[x.index] if isinstance(x, Place) else x for x in leaves], tree)
