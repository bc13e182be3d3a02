"""Functions of an update that give their gradients themselves.

The engine runs a function again with a graph and differentiates through it. What a graph costs, copies of buffers,
the state of generators and a walk through the graph among it, is more than the function itself where
maps are small. A function that knows its gradients needs none of this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from revseg.engine.gradients import Grads, gradients
from revseg.engine.tracing import has_hooks

Onto = tuple[Tensor, int]  # a stream, and the sign with which the value is added to it
Coupled = tuple[Tensor, torch.dtype | None]  # a sum, and the dtype of what was added; or a value, not added


class Graphless(Protocol):
    """One run of a function in a forward pass, to be repeated in backward passes.

    What a function gives must follow from its input, its parameters and what `run` notes; it draws no random numbers,
    and only `run` changes buffers. A module offers such runs by a method `graphless(x)`, which gives one, or
    None where graphs are needed.
    """

    parameters: list[Tensor]  # one for each gradient; one tensor may stand here several times

    def run(self, x: Tensor, onto: Onto | None) -> Coupled:
        """The first run."""

    def again(
        self, x: Tensor, parameters: Sequence[Tensor], onto: Onto | None, kept: list[Tensor] | None
    ) -> Coupled:
        """Another run with the numbers of the first; `kept`, if given, receives what `gradients` needs."""

    def gradients(
        self, x: Tensor, parameters: Sequence[Tensor], kept: list[Tensor], dh: Tensor, wanted: Sequence[bool]
    ) -> Grads:
        """Of the input and of each parameter, None for those not wanted; `kept` is used up.

        Args:
            x: The input.
            parameters: As given to `again`.
            kept: As filled by `again`.
            dh: The gradient of the value, in its dtype; in that of the sum where the value was added.
            wanted: Whether the gradient of the input and of each parameter is.

        Returns:
            Tensors that nobody else holds, or dh itself.
        """

    def with_graph(self, x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """Another run, by ordinary autograd, any number of times differentiable."""


def graphless(fn: Any, x: Tensor, parameters: Sequence[Tensor]) -> tuple[Graphless, list[int]] | None:
    """A run of this kind, and which of the parameters stand where in it.

    None if the function does not offer it, if a hook waits for it, or if it uses other parameters.
    """
    offer = getattr(fn, "graphless", None)
    watched = isinstance(fn, nn.Module) and has_hooks(fn)
    run: Graphless | None = None if offer is None or watched else offer(x)
    order = {id(p): i for i, p in enumerate(parameters)}
    if run is None or not all(id(p) in order for p in run.parameters):
        return None
    return run, [order[id(p)] for p in run.parameters]


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
