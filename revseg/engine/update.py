"""One update of a chain in one forward pass: how it runs, how it is undone, and its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from revseg.engine.context import autocast_as, autocast_state, devices_of
from revseg.engine.exact import Exact
from revseg.engine.function import Graphless, SecondRun, WithGraph, WithoutGraph, graphless
from revseg.engine.gradients import Grads, alias, gradients
from revseg.engine.replay import Call, Turn
from revseg.engine.residue import Layout, pack, restore
from revseg.engine.steps import Streams, Update
from revseg.engine.tensors import laid_out, versions


class Link:
    """One update in one forward pass."""

    def __init__(self, step: Update, wanted: list[bool], exact: Exact) -> None:
        self.step = step
        self.lossless = exact == "lossless"
        self.residue: Tensor | None = None
        self.layout: Layout | None = None
        self.call = Call(step.fn)
        # whether a function may add its value itself, in its last pass
        self.additive = exact is False and getattr(step.rule, "additive", False)
        self.coupled = getattr(step.fn, "coupled", None) if self.additive else None
        self.keep = False
        self.indices: list[int] = []
        self.place = 0
        self.source_wanted = wanted[step.source]
        wanted[step.target] |= self.source_wanted or any(p.requires_grad for p in self.call.parameters)
        self._kept: WithGraph | None = None

    def forward(self, streams: Streams) -> Streams:
        source, x = streams[self.step.source], streams[self.step.target]
        before = versions(source, x)
        self.strides = source.stride()
        offered = None if self.keep else graphless(self.step.fn, source, self.call.parameters)
        self.graphless: Graphless | None
        self.graphless, self.places = offered or (None, [])
        h, added = self._first_run(source, x)
        value = h.detach() if isinstance(h, Tensor) else h
        if added is not None:
            self.half = added.itemsize < value.element_size() == 4
            return self.step.replace(streams, self.step.accepted(streams, value, before))
        y = self.step.checked(streams, value, before)
        self.half = value.element_size() < y.element_size() == 4
        if self.lossless:
            with autocast_as(self.autocast):
                self.residue, self.layout = pack(x, self.step.rule.uncouple(y, value))
        return self.step.replace(streams, y)

    def _first_run(self, source: Tensor, x: Tensor) -> tuple[Any, torch.dtype | None]:
        """The value, or its sum with x and the dtype of what was added."""
        if self.graphless is not None:
            self.autocast = autocast_state(devices_of([source]))
            with Turn():
                return self.graphless.run(source, (x, 1) if self.additive else None)
        if self.keep:
            found = self._run_and_keep(source), None
        elif self.coupled is None:
            h, self.replay = self.call.run(source)
            found = h, None
        else:
            found, self.replay = self.call.run(source, x, 1, fn=self.coupled)
        self.autocast = self.replay.autocast
        return found

    def _run_and_keep(self, source: Tensor) -> Any:
        leaf = source.detach().requires_grad_(self.source_wanted)
        leaves = self.call.leaves(self.call.parameters)
        try:
            with torch.enable_grad():
                h, self.replay = self.call.run(leaf, parameters=leaves)
        except RuntimeError as error:
            if "a leaf Variable that requires grad" in str(error):
                raise self.step.overwritten() from error
            raise
        self._kept = WithGraph(leaf, leaves, h, False, self.step.name)
        return h

    def backward(
        self, streams: list[Tensor], grads: Grads, kept: Sequence[Tensor], dparameters: Grads
    ) -> None:
        """Take the step back, in `streams` and in `grads`; add to the gradients of the parameters."""
        s, t = self.step.source, self.step.target
        dy = grads[t]
        own = [kept[i] for i in self.indices]
        run = self._kept or self._again(streams[s], streams[t], own, dy is not None)
        self._kept = None  # a second backward pass runs the function again
        dh = dy
        if run.undone:
            streams[t] = run.value.detach()
        else:
            with autocast_as(self.autocast):
                value = run.value.detach()
                streams[t] = self._uncoupled(streams[t], value, kept)
                if dy is not None:
                    grads[t], dh = self.step.rule.gradients(streams[t], value, dy)
                del value
        if dh is None or not run.has_gradients:
            return
        del dy
        found = run.gradients(dh, [grads[s], *(dparameters[i] for i in self.indices)])
        grads[s] = found[0]
        grads[t] = _alone(grads[t])
        for i, gradient in zip(self.indices, found[1:], strict=True):
            dparameters[i] = gradient

    def _again(self, stream: Tensor, y: Tensor, own: list[Tensor], wanted: bool) -> SecondRun:
        source, each = laid_out(stream.detach(), self.strides), [p.requires_grad for p in own]
        asked = [wanted and w for w in (self.source_wanted, *each)]
        if self.graphless is not None:
            onto = (y, -1) if self.additive else None
            return WithoutGraph(self.graphless, source, own, self.places, onto, asked)
        source.requires_grad_(asked[0])
        leaves = self.call.leaves(own)
        with torch.set_grad_enabled(any(asked)):
            if self.coupled is None:
                h, added = self.call.rerun(self.replay, source, parameters=leaves), None
            else:
                h, added = self.call.rerun(self.replay, source, y, -1, parameters=leaves, fn=self.coupled)
        return WithGraph(source, leaves, h, added is not None, self.step.name)

    def _uncoupled(self, y: Tensor, h: Tensor, kept: Sequence[Tensor]) -> Tensor:
        back = self.step.rule.uncouple(y, h)
        if self.layout is None:
            return back
        if torch.is_grad_enabled():
            return _Restore.apply(back, kept[self.place], self.layout)  # type: ignore[no-any-return, no-untyped-call]
        return restore(own(back, y, h), kept[self.place], self.layout)

    def backward_with_graph(
        self, streams: list[Tensor], grads: Grads, kept: Sequence[Tensor], dparameters: Grads
    ) -> None:
        """The same, differentiable once more (`create_graph=True`).

        The inversion is a function of outputs and parameters. The gradient is taken by aliases of
        what it found, so that only the step itself is differentiated, not the inversion too.
        """
        s, t, rule = self.step.source, self.step.target, self.step.rule
        dy = grads[t]
        own = [kept[i] for i in self.indices]
        streams[s] = laid_out(streams[s], self.strides)
        h = self._with_graph(streams[s], own)
        with autocast_as(self.autocast):
            streams[t] = self._uncoupled(streams[t], h, kept)
        if dy is None:
            return
        x, source, *leaves = (alias(p) for p in (streams[t], streams[s], *own))
        h = self._with_graph(source, leaves)
        with autocast_as(self.autocast):
            edge = get_gradient_edge(rule.couple(x, h))
        before = [None, grads[s], *(dparameters[i] for i in self.indices)]
        grads[t], grads[s], *dleaves = gradients(
            [edge], [x, source, *leaves], [dy], self.step.name, before, create_graph=True
        )
        for i, gradient in zip(self.indices, dleaves, strict=True):
            dparameters[i] = gradient

    def _with_graph(self, source: Tensor, own: list[Tensor]) -> Tensor:
        if self.graphless is None:
            return self.call.rerun(self.replay, source, parameters=own)  # type: ignore[no-any-return]
        return self.graphless.with_graph(source, [own[i] for i in self.places])


class _Restore(torch.autograd.Function):
    """The stream before the update, bit for bit; the gradient passes through."""

    @staticmethod
    def forward(ctx: Any, back: Tensor, residue: Tensor, layout: Layout) -> Tensor:
        return restore(back.clone(), residue, layout)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Any:
        return dx, None, None


def own(y: Tensor, *others: Tensor) -> Tensor:
    """A tensor with memory of its own: the outputs if no step updates them, or a stream that is written to."""
    memory = y.untyped_storage()._cdata
    return y.clone() if any(memory == x.untyped_storage()._cdata for x in others) else y


def _alone(dx: Tensor | None) -> Tensor | None:
    """The gradient as a tensor of its own: half of a joined one would keep the other half in memory."""
    return dx.clone() if dx is not None and dx._base is not None else dx
