"""How the function of an update runs, runs again and is differentiated.

A `Function` is one run of it in one forward pass, to be repeated in backward passes. There are two kinds. `Replayed`
takes any callable: it runs again with a graph, through which autograd differentiates. What a graph costs, copies of
buffers, the state of generators and a walk through the graph among it, is more than the function itself where maps are
small; so a module that knows its gradients offers runs of its own by a method `as_function(x, *side)`, which gives
one, or None where a graph is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from revseg.engine.gradients import Grads, alias, edge_of, gradients, total
from revseg.engine.steps import Side, overwritten
from revseg.engine.tracing import has_hooks
from revseg.replay.aside import unmark
from revseg.replay.call import Call, Turn
from revseg.replay.reach import modules_of
from revseg.tensors import versions

Onto = tuple[Tensor, int]  # a stream, and the sign with which the value is added to it
Coupled = tuple[Tensor, torch.dtype | None]  # a sum, and the dtype of what was added; or a value, not added
Differentiate = Callable[[Tensor, Grads], Grads]


class Function(Protocol):
    """One run of a function in a forward pass, and the means to repeat it.

    What a function with gradients of its own gives must follow from its input, its tensors and what `run` notes; it draws
    no random numbers, and only `run` changes buffers. It need not add to a stream that does not fit. One whose value
    always is memory that nobody else has says so by an attribute `gives_new_memory`, and the stream may take that.
    """

    tensors: list[
        Tensor
    ]  # what it is differentiated by besides its input; one tensor may stand here several times

    def run(self, x: Tensor, onto: Onto | None) -> Coupled:
        """The first run."""

    def rerun(
        self, x: Tensor, tensors: Sequence[Tensor], onto: Onto | None, wanted: Sequence[bool] | None
    ) -> tuple[Coupled, Differentiate | None]:
        """Another run with the numbers of the first, and what gives its gradients, to be called once at most.

        Args:
            x: The input.
            tensors: What stands for those of the first run.
            onto: A stream for the value to be added to, which `run` did, too.
            wanted: Whether the gradient of the input and of each tensor is; None if none will be asked for.

        Returns:
            The value, without a graph; and None if nothing has a gradient, or a function of the value's gradient, in
            its dtype, and of the gradients that the input and each tensor have so far. It returns these gradients,
            those so far included: tensors that nobody else holds, or those it was given.
        """

    def rerun_with_graph(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """Another run, by ordinary autograd, any number of times differentiable."""


def function_of(fn: Any, x: Tensor, side: Side, name: str, wanted: bool, keep: bool) -> Function:
    """A run of a function, to come.

    Args:
        fn: A module, or any callable that has no parameters of its own.
        x: What it will read.
        side: What it is given besides.
        name: The function, for messages.
        wanted: Whether the gradient of x is.
        keep: Let the first run keep its graph, for the first backward pass.
    """
    if keep:
        return _Kept(fn, side, name, wanted)
    offer = getattr(fn, "as_function", None)
    if offer is not None and not has_hooks(fn):
        with Turn():
            own: Function | None = offer(x, *side.values)
            if own is not None and _owned(fn, side).issuperset(map(id, own.tensors)):
                return own
    return Replayed(fn, side, name)


def _owned(fn: Any, side: Side) -> set[int]:
    """What a function may be differentiated by, by the ids: its parameters and what it is given besides."""
    found = set(map(id, side.tensors))
    for module in modules_of(fn):
        found.update(map(id, module._parameters.values()))
    return found


class Replayed:
    """Any callable, run again with a graph (`revseg.replay.call`)."""

    def __init__(self, fn: Any, side: Side, name: str) -> None:
        self.call, self.side, self.name = Call(fn), side, name
        self.tensors = [*side.tensors, *self.call.parameters]

    def run(self, x: Tensor, onto: Onto | None) -> Coupled:
        before = versions(*self.side.tensors)
        value, self.replay = self.call.run(x, *self.side.values)
        if versions(*self.side.tensors) != before:
            raise overwritten(self.name)
        return value, None

    def rerun(
        self, x: Tensor, tensors: Sequence[Tensor], onto: Onto | None, wanted: Sequence[bool] | None
    ) -> tuple[Coupled, Differentiate | None]:
        with torch.set_grad_enabled(wanted is not None):
            inputs = self._inputs(x, tensors, wanted is not None and wanted[0])
            value = self.rerun_with_graph(inputs[0], inputs[1:])
        return self._differentiable(value, inputs)

    def rerun_with_graph(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        side, parameters = self._split(tensors)
        return self.call.rerun(self.replay, x, *self.side.of(side), parameters=parameters)  # type: ignore[no-any-return]

    def _split(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Those besides the input, those of the module."""
        count = len(self.side.tensors)
        return tensors[:count], tensors[count:]

    def _inputs(self, x: Tensor, tensors: Sequence[Tensor], wanted: bool) -> list[Tensor]:
        """What stands for the input, the side inputs and the parameters in a graph of its own."""
        side, parameters = self._split(tensors)
        return [
            alias(
                x.detach().requires_grad_(wanted)
            ),  # as a leaf, a counter of operations would stumble over it
            *(alias(each.detach().requires_grad_(each.requires_grad)) for each in side),
            *self.call.leaves(parameters),
        ]

    def _differentiable(self, value: Tensor, inputs: list[Tensor]) -> tuple[Coupled, Differentiate | None]:
        if not value.requires_grad:
            return (value, None), None
        edge = edge_of(value)  # the value itself would stay alive while its gradients take room

        def differentiate(dh: Tensor, before: Grads) -> Grads:
            return gradients([edge], inputs, [dh], self.name, before)

        return (value.detach(), None), differentiate


class _Kept(Replayed):
    """A callable whose first run keeps its graph; a second backward pass runs it again."""

    def __init__(self, fn: Any, side: Side, name: str, wanted: bool) -> None:
        super().__init__(fn, side, name)
        self.wanted = wanted

    def run(self, x: Tensor, onto: Onto | None) -> Coupled:
        try:
            with torch.enable_grad():
                inputs = self._inputs(x, self.tensors, self.wanted)
                side, parameters = self._split(inputs[1:])
                value, self.replay = self.call.run(inputs[0], *self.side.of(side), parameters=parameters)
        except RuntimeError as error:
            if "a leaf Variable that requires grad" in str(error):
                raise overwritten(self.name) from error
            raise
        self.kept: tuple[Any, list[Tensor]] | None = value, inputs
        return value, None

    def rerun(
        self, x: Tensor, tensors: Sequence[Tensor], onto: Onto | None, wanted: Sequence[bool] | None
    ) -> tuple[Coupled, Differentiate | None]:
        kept, self.kept = self.kept, None
        if kept is None:
            return super().rerun(x, tensors, onto, wanted)
        unmark(self.call.modules)
        return self._differentiable(*kept)


class Identity(nn.Identity):
    """The identity of the stream, which needs no graph and adds its value itself."""

    def forward(self, x: Tensor, *side: Any) -> Tensor:
        return x

    def as_function(self, x: Tensor, *side: Any) -> Function:
        return _Same()


class _Same:
    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def run(self, x: Tensor, onto: Onto | None) -> Coupled:
        return (x, None) if onto is None else (torch.add(onto[0], x, alpha=onto[1]), x.dtype)

    def rerun(
        self, x: Tensor, tensors: Sequence[Tensor], onto: Onto | None, wanted: Sequence[bool] | None
    ) -> tuple[Coupled, Differentiate | None]:
        with torch.no_grad():
            coupled = self.run(x, onto)
        return coupled, (lambda dh, before: [total(dh, before[0], dh)]) if wanted and wanted[0] else None

    def rerun_with_graph(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        return x
