"""Steps: one stream read, the other updated, so that the update can be undone.

A network of two streams is a chain of steps. `run_plain` applies it by ordinary autograd: the
definition of what the engine computes, the oracle of the tests, and the path for tracing and
function transforms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from revseg.tensors import dense, describe, versions

Streams = tuple[Tensor, Tensor]
Values = tuple[Any, ...]


class HandedOver(list[Tensor]):
    """Two streams that whoever is given them takes. A tuple stands in the frames of all callers, and its tensors with it."""

    def take(self) -> Streams:
        """The streams, which are here no longer."""
        x1, x2 = self
        self.clear()
        return x1, x2


def taken(streams: Streams | HandedOver) -> Streams:
    """The streams, taken if they are handed over."""
    return streams.take() if isinstance(streams, HandedOver) else streams


class Side:
    """What every function of a chain is given besides its stream: tensors, also nested, and other values."""

    def __init__(self, values: Values = ()) -> None:
        self.values = values
        leaves, self._tree = tree_flatten(values)
        self.tensors = [x for x in leaves if isinstance(x, Tensor)]
        self._leaves = [None if isinstance(x, Tensor) else x for x in leaves]
        self._places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]

    def of(self, tensors: Sequence[Tensor]) -> Values:
        """The values with these tensors in the places of its own."""
        if not self.tensors:
            return self.values
        leaves = list(self._leaves)
        for i, x in zip(self._places, tensors, strict=True):
            leaves[i] = x
        return tree_unflatten(leaves, self._tree)  # type: ignore[no-any-return]


class Rule(Protocol):
    """How a value updates a stream, and how to undo that."""

    def couple(self, x: Tensor, h: Tensor) -> Tensor: ...
    def uncouple(self, y: Tensor, h: Tensor) -> Tensor: ...
    def gradients(self, x: Tensor, h: Tensor, dy: Tensor) -> tuple[Tensor | None, Tensor | None]: ...


@dataclass(frozen=True)
class Update:
    """Streams[target] = couple(streams[target], fn(streams[source], *side))."""

    name: str
    fn: Any
    rule: Rule
    source: int
    target: int

    def forward(self, streams: Streams, side: Values = ()) -> Streams:
        """The plain update, with ordinary autograd."""
        source, x = streams[self.source], streams[self.target]
        before = versions(source, x)
        return self.replace(streams, self.checked(streams, self.fn(source, *side), before))

    def inverse(self, streams: Streams, side: Values = ()) -> Streams:
        h = self.fn(streams[self.source], *side)
        return self.replace(streams, self.rule.uncouple(streams[self.target], h))

    def replace(self, streams: Streams, y: Tensor) -> Streams:
        return (y, streams[1]) if self.target == 0 else (streams[0], y)

    def checked(self, streams: Streams, h: Any, before: list[int]) -> Tensor:
        """The updated stream: a tensor of its own, of the same shape, dtype and device."""
        x = streams[self.target]
        if not isinstance(h, Tensor):
            raise TypeError(f"{self.name}: the function must return one tensor, got {type(h).__name__}")
        try:
            y = self.rule.couple(x, h)
        except NotImplementedError:
            raise  # a coupling without a rule
        except RuntimeError as error:
            raise ValueError(
                f"{self.name}: cannot update a stream {describe(x)} by a function value {describe(h)}: {error}"
            ) from error
        return self.accepted(streams, y, before, h)

    def accepted(self, streams: Streams, y: Tensor, before: list[int], h: Tensor | None = None) -> Tensor:
        """The same for a stream that is updated already."""
        source, x = streams[self.source], streams[self.target]
        if versions(source, x) != before:
            raise overwritten(self.name)
        if (y.shape, y.dtype, y.device) != (x.shape, x.dtype, x.device):
            raise ValueError(
                f"{self.name}: the update must keep the stream's shape, dtype and device, {describe(x)}, "
                f"got {describe(y)}" + ("" if h is None else f" from a function value {describe(h)}")
            )
        return y.clone() if y is x or y is h or y._base is not None else y


def overwritten(name: str) -> RuntimeError:
    """The error for a function that changed what it was given."""
    return RuntimeError(
        f"{name}: the function writes to its input, which cannot be undone; "
        "make its first in-place operation (inplace=True, add_, ...) an ordinary one"
    )


@dataclass(frozen=True)
class Map:
    """Each stream by an orthogonal linear map: what undoes it also takes gradients back."""

    name: str
    apply: Callable[[Tensor], Tensor]
    undo: Callable[[Tensor], Tensor]
    exact: bool  # whether undoing is free of rounding

    def forward(self, streams: Streams, side: Values = ()) -> Streams:
        return dense(self.apply(streams[0])), dense(self.apply(streams[1]))

    def inverse(self, streams: Streams, side: Values = ()) -> Streams:
        return dense(self.undo(streams[0])), dense(self.undo(streams[1]))


Step = Update | Map


def run_plain(steps: Sequence[Step], streams: Streams | HandedOver, side: Values = ()) -> Streams:
    """The outputs of the chain, by ordinary autograd, which stores every activation."""
    streams = taken(streams)
    for step in steps:
        streams = step.forward(streams, side)
    return streams


def run_inverse(steps: Sequence[Step], streams: Streams, side: Values = ()) -> Streams:
    """The inputs of the chain from its outputs, by ordinary autograd."""
    for step in reversed(steps):
        streams = step.inverse(streams, side)
    return streams
