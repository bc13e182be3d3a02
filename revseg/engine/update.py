"""One step of a chain in one forward pass: how it runs, how it is undone, and its gradients."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, ExitStack
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from revseg.engine.exactness import Exactness
from revseg.engine.function import function_of
from revseg.engine.gradients import Grads, alias, edge_of, gradients
from revseg.engine.steps import Map, Rule, Side, Streams, Update
from revseg.replay.call import Call, Turn
from revseg.replay.context import NO_CHANGE, Autocast, autocast_as
from revseg.replay.reach import modules_in
from revseg.tensors import laid_out, versions

_requires_grad, _dtype = attrgetter("requires_grad"), attrgetter("dtype")


class UpdatePass:
    """An update in one forward pass.

    Args:
        step: The update.
        source: The stream that it will read.
        side: What its function is given besides.
        functions: The functions of the chain, by their ids: their parameters are none of the rule's.
        wanted: Whether the gradient of each stream is; brought up to date.
        exact: How the update is undone.
        autocast: What surrounds the chain.
        keep: Whether the function keeps its graph.
    """

    def __init__(
        self,
        step: Update,
        source: Tensor,
        side: Side,
        functions: Collection[int],
        wanted: list[bool],
        exact: Exactness,
        autocast: Autocast,
        keep: bool,
    ) -> None:
        self.step, self.exact, self.autocast = step, exact, autocast
        self.source_wanted = wanted[step.source]
        self.function = function_of(step.fn, source, side, step.name, self.source_wanted, keep)
        self.learned = learned(step.rule, functions)
        self.tensors = self.function.tensors
        if self.learned is not None:
            self.tensors = [*self.tensors, *self.learned.parameters]
        wanted[step.target] |= self.source_wanted or any(map(_requires_grad, self.tensors))
        # whether a function may add its value itself, in its last pass
        self.additive = exact.adds and getattr(step.rule, "additive", False)
        self.note: Any = None  # of how the residue is read

    def forward(self, streams: Streams) -> tuple[Streams, list[Tensor]]:
        """The streams after the update, and what undoing it would lose: no tensor or one."""
        step = self.step
        source, x = streams[step.source], streams[step.target]
        before = versions(source, x)
        self.strides = source.stride()
        with Turn():
            h, added = self.function.run(source, (x, 1) if self.additive and self.exact.rounds else None)
        value = h.detach() if isinstance(h, Tensor) else h
        del h
        if added is not None:
            self.dtypes = {added, *map(_dtype, self.tensors)}
            return step.replace(streams, step.accepted(streams, value, before)), []
        spent = getattr(self.function, "gives_new_memory", False)
        y, residue, self.note = self.exact.update(step, streams, value, before, spent, self.autocast)
        self.dtypes = {value.dtype, *map(_dtype, self.tensors)}
        return step.replace(streams, y), residue

    def backward(
        self,
        streams: list[Tensor],
        grads: Grads,
        tensors: Sequence[Tensor],
        residue: list[Tensor],
        before: Grads,
    ) -> Grads:
        """Take the update back, in `streams` and in `grads`; the gradient of each tensor.

        Args:
            streams: The two streams after the update.
            grads: Their gradients.
            tensors: Those of the function and of the rule, as autograd kept them.
            residue: What `forward` gave; let go of.
            before: The gradient that each tensor has so far.
        """
        s, t, rule = self.step.source, self.step.target, self.step.rule
        tensors, of_rule = self._split(tensors)
        own_before, moved = before[: len(tensors)], before[len(tensors) :]
        dh = dy = grads[t]
        wanted = None if dy is None else [self.source_wanted, *(p.requires_grad for p in tensors)]
        (value, added), differentiate = self.function.rerun(
            laid_out(streams[s], self.strides), tensors, (streams[t], -1) if self.additive else None, wanted
        )
        dtype = value.dtype if added is None or self.exact.rounds else added
        if added is not None:
            streams[t] = self.exact.restored(value, residue, self.note)
        else:
            with autocast_as(self.autocast):
                with self._ruled(of_rule):
                    streams[t] = self.exact.undo(rule, streams[t], value, residue, self.note)
                if dy is not None and self.learned is None:
                    grads[t], dh = rule.gradients(streams[t], value, dy)
                elif dy is not None:
                    grads[t], dh, *moved = self._gradients_of_rule(streams[t], value, of_rule, dy, moved)
        del value, dy  # freed before gradients take room
        residue.clear()
        if dh is None or differentiate is None:
            return [*own_before, *moved]
        grads[s], *found = differentiate(dh.to(dtype), [grads[s], *own_before])
        grads[t] = _alone(grads[t])
        return [*found, *moved]

    def backward_with_graph(
        self,
        streams: list[Tensor],
        grads: Grads,
        tensors: Sequence[Tensor],
        residue: list[Tensor],
        before: Grads,
    ) -> Grads:
        """The same, differentiable once more (`create_graph=True`).

        The inversion is a function of outputs and parameters. The gradient is taken by aliases of
        what it found, so that only the step itself is differentiated, not the inversion too.
        """
        s, t, rule = self.step.source, self.step.target, self.step.rule
        dy = grads[t]
        streams[s] = laid_out(streams[s], self.strides)
        own, of_rule = self._split(tensors)
        h = self.function.rerun_with_graph(streams[s], own)
        with autocast_as(self.autocast), self._ruled(of_rule):
            streams[t] = self.exact.undo(rule, streams[t], h, residue, self.note)
        if dy is None:
            return before
        x, source, *aliases = (alias(p) for p in (streams[t], streams[s], *tensors))
        own, of_rule = self._split(aliases)
        h = self.function.rerun_with_graph(source, own)
        with autocast_as(self.autocast), self._ruled(of_rule):
            edge = edge_of(rule.couple(x, h))
        so_far = [None, grads[s], *before]
        grads[t], grads[s], *found = gradients(
            [edge], [x, source, *aliases], [dy], self.step.name, so_far, create_graph=True
        )
        return found

    def _split(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Those of the function, those of the rule."""
        count = len(self.function.tensors)
        return tensors[:count], tensors[count:]

    def _ruled(self, tensors: Sequence[Tensor]) -> AbstractContextManager[Any]:
        """The rule with these tensors for its parameters."""
        if self.learned is None:
            return NO_CHANGE
        stack = ExitStack()
        stack.enter_context(Turn())
        stack.enter_context(self.learned.swapped(tensors))
        return stack

    def _gradients_of_rule(
        self, x: Tensor, h: Tensor, tensors: Sequence[Tensor], dy: Tensor, before: Grads
    ) -> Grads:
        """The gradients of the stream before the update, of the value and of each parameter of the rule."""
        assert self.learned is not None
        inputs = [x.detach().requires_grad_(), h.detach().requires_grad_(), *self.learned.leaves(tensors)]
        with torch.enable_grad(), self._ruled(inputs[2:]):
            edge = edge_of(self.step.rule.couple(*inputs[:2]))
        return gradients([edge], inputs, [dy], self.step.name, [None, None, *before])


def learned(rule: Rule, functions: Collection[int]) -> Call | None:
    """The parameters of the rule that belong to no function, None if there are none."""
    if not isinstance(rule, nn.Module):
        return None
    modules = modules_in(rule, without=functions)
    if not any(module._parameters for module in modules):
        return None
    return Call(rule.couple, modules=modules)


class MapPass:
    """A map in one forward pass. What undoes it takes gradients back as well."""

    dtypes: Collection[torch.dtype] = ()

    def __init__(self, step: Map) -> None:
        self.step = step
        self.tensors: list[Tensor] = []

    def forward(self, streams: Streams) -> tuple[Streams, list[Tensor]]:
        """The streams after the map, and nothing that undoing it would lose."""
        return self.step.forward(streams), []

    def backward(
        self,
        streams: list[Tensor],
        grads: Grads,
        tensors: Sequence[Tensor],
        residue: list[Tensor],
        before: Grads,
    ) -> Grads:
        """Take the map back, in `streams` and in `grads`."""
        streams[:] = self.step.inverse((streams[0], streams[1]))
        grads[:] = [None if dy is None else self.step.undo(dy) for dy in grads]
        return []

    backward_with_graph = backward


def _alone(dx: Tensor | None) -> Tensor | None:
    """The gradient as a tensor of its own: half of a joined one would keep the other half in memory."""
    return dx.clone() if dx is not None and dx._base is not None else dx
