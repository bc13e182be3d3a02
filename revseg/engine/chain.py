"""Backward without stored activations.

A chain of steps takes two streams to two streams. `run_reversible` applies it as one autograd
function that saves its outputs alone. In the backward pass each step, from the last to the first,

    runs its function again on the stream it had read, with a graph,
    undoes its update with the value,
    differentiates through that graph, and drops it.

One extra run of each function, never two. A function that gives its gradients itself runs without a graph
(`revseg.engine.function`). Parameters are inputs of the autograd function and
their gradients are returned, so `torch.autograd.grad`, hooks, tied parameters and distributed
wrappers see what they see in plain autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable, without importing the compiler

from revseg.engine.drift import Check, Fingerprint, all_finite, raise_pending, tolerance_of
from revseg.engine.exact import Exact, check_conditions, check_range, conditions, extremes_of
from revseg.engine.gradients import Grads
from revseg.engine.memory_format import inner_layout, joined, relaid, restored
from revseg.engine.replay import Call
from revseg.engine.steps import Map, Step, Streams, Update
from revseg.engine.tensors import dense
from revseg.engine.update import Link, own


@_disable_dynamo
def run_reversible(
    steps: Sequence[Step], streams: Streams, join: bool, keep: int, check: Check, exact: Exact = False
) -> Any:
    """The outputs of the chain, by an autograd function that saves nothing else.

    Args:
        steps: The chain.
        streams: Its two inputs, of one dtype and layout.
        join: Return one tensor, the outputs joined along dim 1, instead of the pair.
        keep: How many of the last steps keep their graphs instead of being run again.
        check: What to do about drift: "error", "warn" or None.
        exact: True where steps add on the grid, which is then watched; "lossless" to keep what
            undoing each update would lose.

    Memory: the output, and per step the buffers of its function (running statistics), the random
    state if it drew, and the residue if lossless.
    """
    raise_pending()
    steps = list(steps)
    wanted = [x.requires_grad for x in streams]
    while steps and not (wanted[0] or wanted[1] or _has_trainable(steps[0])):
        streams = steps.pop(0).forward(streams)  # a frozen beginning needs no backward pass
    if not steps:
        return torch.cat(streams, 1) if join else streams
    chain = _Chain(steps, wanted, keep, check, exact)
    if not exact and len(chain.calls) == len(steps):
        chain.layout = inner_layout(streams[0], [link.step.fn for link in chain.calls])
    outputs = _Reversible.apply(chain, join, *streams, *chain.parameters)  # type: ignore[no-untyped-call]
    return outputs if join else tuple(outputs)


class _Reversible(torch.autograd.Function):
    boxed_grads_call = True  # where torch knows it, the incoming gradient is freed after its first use

    @staticmethod
    def forward(ctx: Any, chain: _Chain, join: bool, x1: Tensor, x2: Tensor, *parameters: Tensor) -> Any:
        layout = chain.layout
        y1, y2 = chain.forward((relaid(x1, layout), relaid(x2, layout)))
        if join:
            outputs: tuple[Tensor, ...] = (joined((y1, y2), layout),)
        else:
            outputs = own(restored(y1, layout), x1), own(restored(y2, layout), x2)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*outputs, *parameters, *chain.take_residues())
        ctx.chain, ctx.join = chain, join
        return outputs[0] if join else outputs

    @staticmethod
    @_disable_dynamo
    def backward(ctx: Any, *box: Any) -> Any:
        raise_pending()
        chain: _Chain = ctx.chain
        grads: Grads = box[0] if isinstance(box[0], list) else list(box)
        streams, kept = _saved(ctx)
        if ctx.join and grads[0] is not None:
            grads[:] = grads[0].chunk(2, 1)
        elif ctx.join:
            grads.append(None)
        dparameters = chain.backward(streams, grads, kept)
        for i, dx in enumerate(grads):  # in turn, so that one at a time exists in both layouts
            grads[i] = None if dx is None else restored(dx, chain.layout)
            del dx
        return None, None, *grads, *dparameters


def _saved(ctx: Any) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """The two output streams; parameters and residues. A joined output is let go of, unless kept for another pass."""
    saved: tuple[Tensor, ...] = ctx.saved_tensors
    layout = ctx.chain.layout
    if not ctx.join:
        return [relaid(y, layout) for y in saved[:2]], saved[2:]
    streams = [dense(y) if layout is None else relaid(y, layout) for y in saved[0].chunk(2, 1)]
    ctx.maybe_clear_saved_tensors()
    return streams, saved[1:]


class _Chain:
    """The steps of one forward pass, and what their functions need to run again."""

    def __init__(self, steps: list[Step], wanted: list[bool], keep: int, check: Check, exact: Exact) -> None:
        self.check, self.exact = check, exact
        self.layout: torch.memory_format | None = None  # of streams within, if not that of the caller's
        self.links = [Link(step, wanted, exact) if isinstance(step, Update) else step for step in steps]
        self.calls = [link for link in self.links if isinstance(link, Link)]
        for link in self.calls[len(self.calls) - keep :]:
            link.keep = True
        unique = {id(p): p for link in self.calls for p in link.call.parameters}
        order = {key: index for index, key in enumerate(unique)}
        self.parameters = list(unique.values())
        for k, link in enumerate(self.calls):
            link.indices = [order[id(p)] for p in link.call.parameters]
            link.place = len(unique) + k  # of the residue, behind the parameters

    def forward(self, streams: Streams) -> Streams:
        self.fingerprint = Fingerprint.of(streams, bool(self.exact)) if self.check else None
        self.conditions = conditions(streams[0].device) if self.exact else {}
        watched = [("the input", extremes_of(x)) for x in streams if self.exact is True]
        for link in self.links:
            streams = link.forward(streams)
            if self.exact is True and isinstance(link, Link):
                watched.append((link.step.name, extremes_of(streams[link.step.target])))
        if watched:
            check_range(watched)
        return streams

    def take_residues(self) -> list[Tensor]:
        """One of each link if lossless, for autograd to keep, to count and to free."""
        residues = [link.residue for link in self.calls if link.residue is not None]
        for link in self.calls:
            link.residue = None
        return residues

    def backward(self, streams: list[Tensor], grads: Grads, kept: Sequence[Tensor]) -> Grads:
        """Gradients of the parameters; `streams` and `grads` become those of the inputs.

        Args:
            streams: The two outputs.
            grads: Their gradients.
            kept: The parameters, then the residues.
        """
        if self.exact:
            check_conditions(self.conditions, conditions(streams[0].device))
        dparameters: Grads = [None] * len(self.parameters)
        finite = all_finite(streams) if self.fingerprint else None
        kept_last = next((link for link in self.calls[-1:] if link.keep), None)
        for link in reversed(self.links):
            if link is not kept_last:  # whose graph is large enough
                grads[:] = [None if dy is None else relaid(dy, self.layout) for dy in grads]
            if isinstance(link, Map):
                streams[:] = link.inverse((streams[0], streams[1]))
                grads[:] = [None if dy is None else link.undo(dy) for dy in grads]
            elif torch.is_grad_enabled():
                link.backward_with_graph(streams, grads, kept, dparameters)
            else:
                link.backward(streams, grads, kept, dparameters)
        if self.fingerprint is not None and finite is not None:
            tolerance = tolerance_of(streams[0].dtype, any(link.half for link in self.calls))
            self.fingerprint.compare((streams[0], streams[1]), finite, self.check, tolerance)
        return dparameters


def _has_trainable(step: Step) -> bool:
    return isinstance(step, Update) and any(p.requires_grad for p in Call(step.fn).parameters)
