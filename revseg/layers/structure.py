"""A nested value taken apart: the tensors in it, and the rest without them.

Opened are tuples, lists, dictionaries and whatever else `torch.utils._pytree` knows, and dataclasses. All other objects
stay closed: tensors inside of them are not found.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

Structure = tuple[list[Any], Any]  # leaves, with places for tensors, and the tree they hang on

_WITHOUT_TENSORS = (
    *(type(None), bool, int, float, complex, str, bytes, range, slice, type, enum.Enum),
    *(np.generic, np.ndarray, torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
)


@dataclass(frozen=True)
class Place:
    """Where a tensor stood: its index among the tensors."""

    index: int


@dataclass(frozen=True)
class Opened:
    """A dataclass without its attributes, and these, taken apart."""

    kind: type
    attributes: Structure


def take_apart(value: Any) -> tuple[list[Tensor], Structure]:
    """The tensors in the value, each once, and what is left without them."""
    found: dict[int, tuple[Place, Tensor]] = {}
    structure = _opened(value, found)
    return [x for _, x in found.values()], structure


def put_together(tensors: Sequence[Tensor], structure: Structure) -> Any:
    """The value with these tensors in their places."""
    leaves, tree = structure
    return tree_unflatten([_filled(tensors, leaf) for leaf in leaves], tree)


def closed_objects(structure: Structure) -> list[Any]:
    """The objects that were not opened and might hold tensors."""
    found: list[Any] = []
    for leaf in structure[0]:
        if isinstance(leaf, Opened):
            found += closed_objects(leaf.attributes)
        elif not isinstance(leaf, (Place, *_WITHOUT_TENSORS)):
            found.append(leaf)
    return found


def _opened(value: Any, found: dict[int, tuple[Place, Tensor]]) -> Structure:
    leaves, tree = tree_flatten(value)
    return [_emptied(leaf, found) for leaf in leaves], tree


def _emptied(leaf: Any, found: dict[int, tuple[Place, Tensor]]) -> Any:
    if isinstance(leaf, Tensor):
        return found.setdefault(id(leaf), (Place(len(found)), leaf))[0]
    if not is_dataclass(leaf) or isinstance(leaf, (type, dict, list, tuple)):
        return leaf
    names = dict.fromkeys([*(field.name for field in fields(leaf)), *getattr(leaf, "__dict__", ())])
    attributes = {name: getattr(leaf, name) for name in names if hasattr(leaf, name)}
    return Opened(type(leaf), _opened(attributes, found))


def _filled(tensors: Sequence[Tensor], leaf: Any) -> Any:
    if isinstance(leaf, Place):
        return tensors[leaf.index]
    if not isinstance(leaf, Opened):
        return leaf
    value: Any = object.__new__(leaf.kind)
    for name, attribute in put_together(tensors, leaf.attributes).items():
        object.__setattr__(value, name, attribute)  # frozen ones too
    return value
