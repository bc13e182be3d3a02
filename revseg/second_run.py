"""The second run of an update's function, and its gradients: by a graph, or by the function itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from revseg.gradients import Grads, gradients
from revseg.graphless import Graphless, Onto


class SecondRun(Protocol):
    """What both kinds have."""

    value: Tensor  # of the function; or the stream before the update
    undone: bool  # whether it is that
    has_gradients: bool

    def gradients(self, dh: Tensor, before: Grads) -> Grads:
        """Of the source and of each parameter, with those found before; the run is used up."""


class WithGraph:
    """A run that autograd followed.

    Args:
        source: What the function read.
        leaves: What stands for its parameters.
        value: See `SecondRun`.
        undone: See `SecondRun`.
        name: The function, for messages.
    """

    def __init__(self, source: Tensor, leaves: list[Tensor], value: Tensor, undone: bool, name: str) -> None:
        self.source, self.leaves, self.value, self.undone, self.name = source, leaves, value, undone, name
        self.has_gradients = value.requires_grad

    def gradients(self, dh: Tensor, before: Grads) -> Grads:
        edge = get_gradient_edge(self.value)
        del self.value  # freed before its gradients take room
        return gradients([edge], [self.source, *self.leaves], [dh], self.name, before)


class WithoutGraph:
    """A run of a function that gives its gradients itself.

    Args:
        fn: The function as it ran.
        source: What it reads.
        parameters: Of its module.
        indices: Which of them stand where in `fn.parameters`.
        onto: A stream for the value to be added to, and with which sign.
        wanted: Whether the gradient of the source and of each parameter is.
    """

    def __init__(
        self,
        fn: Graphless,
        source: Tensor,
        parameters: Sequence[Tensor],
        indices: Sequence[int],
        onto: Onto | None,
        wanted: Sequence[bool],
    ) -> None:
        self.fn, self.source, self.indices = fn, source, indices
        self.parameters = [parameters[i] for i in indices]
        self.wanted = [wanted[0], *(wanted[i + 1] for i in indices)]
        self.has_gradients = any(wanted)
        self.kept: list[Tensor] = []
        with torch.no_grad():
            kept = self.kept if self.has_gradients else None
            self.value, added = fn.again(source, self.parameters, onto, kept)
        self.undone, self.dtype = added is not None, self.value.dtype

    def gradients(self, dh: Tensor, before: Grads) -> Grads:
        del self.value
        dh = dh.to(self.dtype)
        dx, *dparameters = self.fn.gradients(self.source, self.parameters, self.kept, dh, self.wanted)
        found = list(before)
        if dx is not None and before[0] is not None:  # in its own memory, as one more map would be a third
            dx = before[0] + dx if dx is dh else dx.add_(before[0])
        found[0] = before[0] if dx is None else dx
        for i, more in zip(self.indices, dparameters, strict=True):
            if more is not None:
                so_far = found[i + 1]
                found[i + 1] = more if so_far is None else so_far + more
        return found
