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

from revseg.gradients import Grads
from revseg.observers import has_hooks

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
