"""One update of a chain in one forward pass: how it runs, how it is undone, and its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from revseg.ambient import autocast_as
from revseg.exact import Exact
from revseg.gradients import Grads, alias, gradients
from revseg.recompute import Call
from revseg.residue import Layout, pack, restore
from revseg.steps import Streams, Update, laid_out, versions

# The source, the parameters and the value of a run with a graph; whether the value is the stream before the update.
_Run = tuple[Tensor, list[Tensor], Tensor, bool]


class Link:
    """One update in one forward pass."""

    def __init__(self, step: Update, wanted: list[bool], exact: Exact) -> None:
        self.step = step
        self.lossless = exact == "lossless"
        self.residue: Tensor | None = None
        self.layout: Layout | None = None
        self.call = Call(step.fn)
        # a function that adds its value itself, in its last pass
        additive = exact is False and getattr(step.rule, "additive", False)
        self.coupled = getattr(step.fn, "coupled", None) if additive else None
        self.keep = False
        self.indices: list[int] = []
        self.place = 0
        self.source_wanted = wanted[step.source]
        wanted[step.target] |= self.source_wanted or any(p.requires_grad for p in self.call.parameters)
        self._kept: _Run | None = None

    def forward(self, streams: Streams) -> Streams:
        source, x = streams[self.step.source], streams[self.step.target]
        before = versions(source, x)
        self.strides = source.stride()
        if self.keep:
            h, added = self._run_and_keep(source), None
        elif self.coupled is None:
            (h, self.replay), added = self.call.run(source), None
        else:
            (h, added), self.replay = self.call.run(source, x, 1, fn=self.coupled)
        value = h.detach() if isinstance(h, Tensor) else h
        if added is not None:
            self.half = added.itemsize < value.element_size() == 4
            return self.step.replace(streams, self.step.accepted(streams, value, before))
        y = self.step.checked(streams, value, before)
        self.half = value.element_size() < y.element_size() == 4
        if self.lossless:
            with autocast_as(self.replay.autocast):
                self.residue, self.layout = pack(x, self.step.rule.uncouple(y, value))
        return self.step.replace(streams, y)

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
        self._kept = leaf, leaves, h, False
        return h

    def backward(
        self, streams: list[Tensor], grads: Grads, kept: Sequence[Tensor], dparameters: Grads
    ) -> None:
        """Take the step back, in `streams` and in `grads`; add to the gradients of the parameters."""
        s, t = self.step.source, self.step.target
        dy = grads[t]
        own = [kept[i] for i in self.indices]
        wanted = dy is not None and (self.source_wanted or any(p.requires_grad for p in own))
        source, leaves, h, undone = self._kept or self._again(streams[s], streams[t], own, wanted)
        self._kept = None  # a second backward pass runs the function again
        value = h.detach()
        dh = dy
        if undone:
            streams[t] = value
        else:
            with autocast_as(self.replay.autocast):
                streams[t] = self._uncoupled(streams[t], value, kept)
                if dy is not None:
                    grads[t], dh = self.step.rule.gradients(streams[t], value, dy)
        if dh is None or not h.requires_grad:
            return
        edge = get_gradient_edge(h)
        del h, value, dy  # the value of the function is freed before its gradients take room
        before = [grads[s], *(dparameters[i] for i in self.indices)]
        grads[s], *dleaves = gradients([edge], [source, *leaves], [dh], self.step.name, before)
        grads[t] = _alone(grads[t])
        for i, gradient in zip(self.indices, dleaves, strict=True):
            dparameters[i] = gradient

    def _again(self, stream: Tensor, y: Tensor, own: list[Tensor], wanted: bool) -> _Run:
        source, leaves = laid_out(stream.detach(), self.strides), self.call.leaves(own)
        source.requires_grad_(wanted and self.source_wanted)
        with torch.set_grad_enabled(wanted):
            if self.coupled is None:
                return source, leaves, self.call.rerun(self.replay, source, parameters=leaves), False
            h, added = self.call.rerun(self.replay, source, y, -1, parameters=leaves, fn=self.coupled)
            return source, leaves, h, added is not None

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
        h = self.call.rerun(self.replay, streams[s], parameters=own)
        with autocast_as(self.replay.autocast):
            streams[t] = self._uncoupled(streams[t], h, kept)
        if dy is None:
            return
        x, source, *leaves = (alias(p) for p in (streams[t], streams[s], *own))
        h = self.call.rerun(self.replay, source, parameters=leaves)
        with autocast_as(self.replay.autocast):
            edge = get_gradient_edge(rule.couple(x, h))
        before = [None, grads[s], *(dparameters[i] for i in self.indices)]
        grads[t], grads[s], *dleaves = gradients(
            [edge], [x, source, *leaves], [dy], self.step.name, before, create_graph=True
        )
        for i, gradient in zip(self.indices, dleaves, strict=True):
            dparameters[i] = gradient


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
