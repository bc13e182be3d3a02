"""Inputs of what runs again, made again from what they were made of.

Between modules a network joins maps (`torch.cat`), raises them (`F.interpolate`, `F.conv_transpose2d`) and pools them. What
reads the result and runs again would keep it. What it was made of is smaller, or is kept by others anyway. So inside of
a fitted network these functions note that on their result, and a module that runs again keeps it in the place of the
result, whose own node of autograd, and what that has saved, goes.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from revseg.memory.late import loss_may_take
from revseg.memory.made_later import made_later
from revseg.memory.waiting import Waiting, is_step, materialized, training_step
from revseg.memory.writing import writes

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

_here = threading.local()
_REMADE = {
    *(torch.cat, torch.concat, torch.concatenate, F.interpolate),
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
    *(torch.max_pool1d, torch.max_pool2d, torch.max_pool3d),
    *(F.max_pool1d, F.max_pool2d, F.max_pool3d),
}
_NOTE = "_revseg_made_of"


class Ready:
    """A value that is there already, for the first run."""

    def __init__(self, value: Any) -> None:
        self.value = value


@dataclass
class Recipe:
    """How a map is made; its pieces are tensors or recipes again."""

    function: Any
    args: Any
    kwargs: Any
    ready: Ready
    nodes: range  # of autograd, that made it

    def made_by(self) -> list[int]:
        """All nodes that made it."""
        leaves = tree_leaves((self.args, self.kwargs), is_leaf=lambda x: isinstance(x, Recipe))
        inner = [node for x in leaves if isinstance(x, Recipe) for node in x.made_by()]
        return [*self.nodes, *inner]

    def make(self) -> Any:
        """The map, in the first run that which is there."""
        ready = self.ready.value
        if ready is not None:
            return ready.made_for_now() if isinstance(ready, Waiting) else ready
        args, kwargs = made((self.args, self.kwargs))
        return self.function(*args, **kwargs)


@dataclass
class Note:
    """What a map was made of, as long as nobody writes to either."""

    function: Any
    args: Any
    kwargs: Any
    nodes: range  # of autograd, that made it
    versions: list[tuple[weakref.ref[Tensor], int]]

    @classmethod
    def of(cls, value: Any) -> Note | None:
        """That of a map; None if there is none that still holds."""
        if isinstance(value, Waiting):
            if not value.is_recipe:
                return None
            found = cls(value.function, value.args, value.kwargs, range(0), [])
            return found if value.follows() else None
        note: Note | None = getattr(value, _NOTE, None) if isinstance(value, Tensor) else None
        if note is None or any((x := each()) is None or x._version != v for each, v in note.versions):
            return None
        return note


class Notes(TorchFunctionMode):
    """While it is on, results of these functions know what they were made of.

    Args:
        node: Says how many nodes autograd has made.
        waits: Whether those that are joined or raised wait (`revseg.memory.waiting`).
    """

    def __init__(self, node: Callable[[], int] = lambda: 0, waits: bool = False) -> None:
        super().__init__()
        self.node, self.waits = node, waits
        self.noted: list[weakref.ref[Tensor]] = []
        self.waiting: list[weakref.ref[Waiting]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.waiting and writes(func, args, kwargs):
            self._make_what_reads(args, kwargs)
        if func not in _REMADE or not is_step() or "out" in kwargs:
            return func(*args, **kwargs)
        if self.waits and not loss_may_take(func, args, kwargs):
            waiting = made_later(func, args, kwargs)
            if waiting is not None:
                self.waiting.append(weakref.ref(waiting))
                return waiting
        before = self.node()
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and not isinstance(result, Waiting) and result.requires_grad:
            leaves = [x for x in (result, *tree_leaves((args, kwargs))) if isinstance(x, Tensor)]
            versions = [(weakref.ref(x), x._version) for x in leaves if not isinstance(x, Waiting)]
            setattr(result, _NOTE, Note(func, args, kwargs, range(before, self.node()), versions))
            self.noted.append(weakref.ref(result))
        return result

    def _make_what_reads(self, *written: Any) -> None:
        """Makes the maps that wait for what is about to be written to."""
        memory = _memory(written)
        self.waiting = [each for each in self.waiting if (x := each()) is not None and x.full is None]
        for each in self.waiting:
            waiting = each()
            if waiting is not None and not memory.isdisjoint(_memory((waiting.args, waiting.kwargs))):
                waiting.make()

    def forget(self) -> None:
        """Takes the notes away: they keep pieces alive."""
        for each in self.noted:
            result = each()
            if result is not None and hasattr(result, _NOTE):
                delattr(result, _NOTE)
        self.noted.clear()
        self.waiting.clear()


def _memory(value: Any) -> set[int]:
    """Numbers for the memory of tensors in a value, and for those that have none yet."""
    tensors = [x for x in tree_leaves(value) if isinstance(x, Tensor)]
    waiting = [x for x in tensors if isinstance(x, Waiting)]
    plain = [x for x in tensors if not isinstance(x, Waiting)] + [
        x.full for x in waiting if x.full is not None
    ]
    return {id(x) for x in waiting} | {x.untyped_storage()._cdata for x in plain if x.layout == torch.strided}


class _Noting:
    """The context of notes, of a class: the compiler of torch 2.8 returns no other."""

    def __init__(self, node: Callable[[], int], waits: bool) -> None:
        self.notes = Notes(node, waits)

    def __enter__(self) -> Notes:
        _here.on, _here.waits = True, self.notes.waits
        return self.notes.__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __exit__(self, *error: object) -> None:
        self.notes.__exit__(*error)  # type: ignore[no-untyped-call]
        _here.on = _here.waits = False
        self.notes.forget()


def noting(node: Callable[[], int] = lambda: 0, waits: bool = False) -> AbstractContextManager[Notes | None]:
    """Joined, raised and pooled maps know what they were made of, in training.

    Args:
        node: See `Notes`.
        waits: The same.
    """
    on = getattr(_here, "on", False) or not is_step()
    waits = waits and not torch.compiler.is_compiling()  # which could not make what has no values
    return nullcontext() if on else _Noting(node, waits)


def maps_may_wait() -> bool:
    """Whether a map that is made here may wait for who reads it."""
    return getattr(_here, "waits", False)


def recipe_of(value: Any) -> tuple[Any, Any, Any] | None:
    """Function, arguments and keyword arguments that a map or a recipe is made with; None if that is not known."""
    known = value if isinstance(value, Recipe) else Note.of(value)
    return None if known is None else (known.function, known.args, known.kwargs)


def pieces(value: Any, ready: list[Ready]) -> Any:
    """The value with recipes in the places of maps that have some.

    Args:
        value: Arguments of a call.
        ready: Gets what the recipes hold for the first run; to be emptied behind it.
    """
    return tree_map(
        partial(_piece, ready), value
    )  # no function of its own, which would hold what is ready in a circle


def _piece(ready: list[Ready], x: Any) -> Any:
    note = Note.of(x)
    if note is None:
        return materialized(x)
    ready.append(Ready(x))
    holder = ready[-1]
    args, kwargs = pieces((note.args, note.kwargs), ready)
    return Recipe(note.function, args, kwargs, holder, note.nodes)


def made(value: Any) -> Any:
    """The value with maps in the places of recipes."""
    return tree_map(
        lambda x: x.make() if isinstance(x, Recipe) else x, value, is_leaf=lambda x: isinstance(x, Recipe)
    )


def begins_again(module: nn.Module) -> bool:
    """Whether what a module calls first, with the same arguments, takes recipes in the places of maps."""
    return bool(getattr(module, "begins_again", False))


class FromPieces(nn.Module):
    """A module called with recipes in the places of maps.

    Attributes:
        waits: Whether maps that are joined or raised inside wait in the second run too.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.waits = module, False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not begins_again(self.module):  # else what begins it makes them, and keeps the pieces too
            args, kwargs = made((args, kwargs))
        step = (
            training_step() if is_step() else nullcontext()
        )  # in both runs: for what turns graphs off inside
        with step, noting(waits=True) if self.waits else nullcontext():
            return materialized(self.module(*args, **kwargs))


def called_by_pieces(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a `Recompute` of `FromPieces` returns, which keeps the pieces of its arguments."""
    ready: list[Ready] = []
    args, kwargs = pieces((args, kwargs), ready)
    try:
        return module(*args, **kwargs)
    finally:
        for each in ready:
            each.value = None
