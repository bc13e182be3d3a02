"""Backward without stored activations.

A chain of steps takes two streams to two streams. `run_reversible` applies each step as an autograd function
that saves no stream; the last one saves the outputs of the chain. In the backward pass each step, from the last to
the first,

    runs its function again on the stream it had read, with a graph,
    undoes its update with the value,
    differentiates through that graph, drops it, and leaves the streams it found to the step before.

One extra run of each function, never two. A function that gives its gradients itself runs without a graph
(`revseg.engine.function`). Parameters are inputs of the autograd functions and their gradients are returned, so
`torch.autograd.grad`, hooks, tied parameters and distributed wrappers see what they see in plain
autograd, and the gradients of one step are accumulated before the step before makes its own.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable, without importing the compiler

from revseg.engine.drift import Check, Fingerprint, all_finite, raise_pending, tolerance_of
from revseg.engine.exactness import Exactness
from revseg.engine.gradients import Grads
from revseg.engine.memory_format import inner_layout, joined, relaid, restored
from revseg.engine.steps import HandedOver, Map, Side, Step, Streams, Update, Values, taken
from revseg.engine.update import MapPass, UpdatePass, learned
from revseg.replay.call import Call
from revseg.replay.context import autocast_state, devices_of
from revseg.tensors import dense, memory


@_disable_dynamo
def run_reversible(
    steps: Sequence[Step],
    streams: Streams | HandedOver,
    side: Values,
    join: bool,
    keep: int,
    check: Check,
    exact: Exactness,
) -> Any:
    """The outputs of the chain, by autograd functions that save nothing else.

    Args:
        steps: The chain.
        streams: Its two inputs, of one dtype and layout. Those that are handed over go as they are updated.
        side: What every function is given besides its stream; its tensors get gradients.
        join: Return one tensor, the outputs joined along dim 1, instead of the pair.
        keep: How many of the last updates keep their graphs instead of being run again.
        check: What to do about drift: "error", "warn" or None.
        exact: How updates are undone in this pass, and in this pass only.

    Memory: the output and the side inputs, and per step the buffers of its function (running statistics), the random
    state if it drew, and the residue that undoing the update needs.
    """
    raise_pending()
    steps, given, outputs = list(steps), Side(side), taken(streams)
    functions = {id(step.fn) for step in steps if isinstance(step, Update)}
    moved = any(x.requires_grad for x in given.tensors)
    while steps and not (
        moved or any(x.requires_grad for x in outputs) or _has_trainable(steps[0], functions)
    ):
        outputs = steps.pop(0).forward(outputs, side)  # a frozen beginning needs no backward pass
    if not steps:
        return torch.cat(outputs, 1) if join else outputs
    chain = _Chain(steps, outputs, given, functions, join, keep, check, exact)
    for i in range(len(steps)):
        run = chain.prepared(i, outputs)
        outputs = _Step.apply(chain, i, run, *outputs, *run.tensors)  # type: ignore[no-untyped-call]
    chain.exact.judge()
    return outputs


class _Step(torch.autograd.Function):
    boxed_grads_call = True  # where torch knows it, the incoming gradients are freed after their first use

    @staticmethod
    def forward(
        ctx: Any, chain: _Chain, i: int, run: UpdatePass | MapPass, x1: Tensor, x2: Tensor, *tensors: Tensor
    ) -> Any:
        streams, residue = run.forward(chain.entered(x1, x2) if i == 0 else (x1, x2))
        chain.dtypes.update(run.dtypes)
        last = i == chain.last
        outputs = chain.left(streams) if last else streams
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *residue, *(outputs if last else ()))
        ctx.chain, ctx.i, ctx.run = chain, i, run
        if len(outputs) == 1:
            return outputs[0]
        return tuple(y.detach() if y is x1 or y is x2 else y for y in outputs)

    @staticmethod
    @_disable_dynamo
    def backward(ctx: Any, *box: Any) -> Any:
        raise_pending()
        chain, run = ctx.chain, ctx.run
        grads: Grads = box[0] if isinstance(box[0], list) else list(box)
        tensors, residue, under_way = _resumed(ctx)
        streams = under_way.streams
        if ctx.i == chain.last and chain.join:
            grads[:] = (None, None) if grads[0] is None else grads[0].chunk(2, 1)
        if not (ctx.i == chain.last and chain.keep):  # the kept graph is large enough
            grads[:] = [None if dy is None else relaid(dy, chain.layout) for dy in grads]
        back = run.backward_with_graph if torch.is_grad_enabled() else run.backward
        found = back(streams, grads, tensors, residue, under_way.taken(run.tensors))
        if chain.shared:
            under_way.carry(chain, ctx.i, run.tensors, found)
        if ctx.i > 0:
            chain.passes[_task()] = under_way
            return None, None, None, *grads, *found
        chain.arrived(under_way)
        for k, dx in enumerate(grads):  # in turn, so that one at a time exists in both layouts
            grads[k] = None if dx is None else restored(dx, chain.layout)
            del dx
        return None, None, None, *grads, *found


def _resumed(ctx: Any) -> tuple[Sequence[Tensor], list[Tensor], _Pass]:
    """The tensors of a step, its residue, and how far the pass is. Outputs and residue are let go of, unless they are kept for another pass."""
    chain: _Chain = ctx.chain
    saved: tuple[Tensor, ...] = ctx.saved_tensors
    tensors, rest = saved[: (count := len(ctx.run.tensors))], list(saved[count:])
    ctx.maybe_clear_saved_tensors()
    if ctx.i != chain.last:
        return tensors, rest, chain.passes.pop(_task())
    outputs = 1 if chain.join else 2
    streams = chain.reentered(rest[-outputs:])
    return tensors, rest[:-outputs], _Pass(streams, all_finite(streams) if chain.check else None, {})


def _task() -> int:
    """A number for the backward pass that is running."""
    return torch._C._current_graph_task_id()


@dataclass
class _Pass:
    """A backward pass that is under way."""

    streams: list[Tensor]  # as far as it is
    finite: Tensor | None  # whether the outputs were, bool []; None if nobody asks
    carried: dict[int, Tensor]  # gradients so far of tensors that several steps use, by their ids

    def taken(self, tensors: Sequence[Tensor]) -> Grads:
        """What each tensor has so far; of one that stands here twice, once."""
        return [self.carried.pop(id(x), None) for x in tensors] if self.carried else [None] * len(tensors)

    def carry(self, chain: _Chain, i: int, tensors: Sequence[Tensor], found: Grads) -> None:
        """Keep gradients for the first step that uses a tensor, so that they add up as in plain autograd, use by use."""
        for k, (x, gradient) in enumerate(zip(tensors, found, strict=True)):
            if gradient is not None and chain.first[id(x)] < i:
                so_far = self.carried.get(id(x))
                self.carried[id(x)] = gradient if so_far is None else so_far + gradient
                found[k] = None


class _Chain:
    """What the steps of one forward pass share."""

    def __init__(
        self,
        steps: list[Step],
        streams: Streams,
        side: Side,
        functions: Collection[int],
        join: bool,
        keep: int,
        check: Check,
        exact: Exactness,
    ) -> None:
        self.steps, self.side, self.join, self.keep, self.check = steps, side, join, keep, check
        self.functions, self.exact = functions, exact
        self.last = len(steps) - 1
        self.wanted = [x.requires_grad for x in streams]
        self.autocast = autocast_state(devices_of(streams))
        updates = {i: step for i, step in enumerate(steps) if isinstance(step, Update)}
        self.kept = set(list(updates)[max(0, len(updates) - keep) :])
        self.layout: torch.memory_format | None = None  # of streams within, if not that of the caller's
        if self.exact.rounds and len(updates) == len(steps):
            self.layout = inner_layout(streams[0], [step.fn for step in updates.values()])
        self.dtypes: set[torch.dtype] = set()  # in which functions compute
        self.passes: dict[int, _Pass] = {}
        self.first: dict[int, int] = {}  # which step uses a tensor first, by its id
        self.shared = False  # whether several use one

    def prepared(self, i: int, streams: Streams) -> UpdatePass | MapPass:
        """Step i, about to run."""
        step = self.steps[i]
        if isinstance(step, Map):
            return MapPass(step)
        with torch.no_grad():
            run = UpdatePass(
                step,
                streams[step.source],
                self.side,
                self.functions,
                self.wanted,
                self.exact,
                self.autocast,
                i in self.kept,
            )
        used = set(map(id, run.tensors))
        new = used - self.first.keys()
        self.shared |= len(new) < len(used)
        self.first.update(dict.fromkeys(new, i))
        return run

    def entered(self, x1: Tensor, x2: Tensor) -> Streams:
        """The input in the layout of the chain."""
        streams = relaid(x1, self.layout), relaid(x2, self.layout)
        self.fingerprint = Fingerprint.of(streams, not self.exact.rounds) if self.check else None
        self.exact.begin(streams)
        self.inputs = [weakref.ref(x.untyped_storage()) for x in (x1, x2)]
        return streams

    def left(self, streams: Streams) -> tuple[Tensor, ...]:
        """The output as the caller has the input, in other memory than that."""
        if self.join:
            return (joined(streams, self.layout),)
        restored_streams = (restored(y, self.layout) for y in streams)
        alive = (ref() for ref in self.inputs)  # whose memory is gone may have given its number to others
        numbers = {storage._cdata for storage in alive if storage is not None}
        return tuple(y.clone() if memory(y) in numbers else y for y in restored_streams)

    def reentered(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The output streams in the layout of the chain."""
        self.exact.resume(outputs[0].device)
        if not self.join:
            return [relaid(y, self.layout) for y in outputs]
        halves = outputs[0].chunk(2, 1)
        return [dense(y) if self.layout is None else relaid(y, self.layout) for y in halves]

    def arrived(self, under_way: _Pass) -> None:
        """Ask whether the inversion arrived where the forward pass began."""
        if self.fingerprint is not None and under_way.finite is not None:
            y1, y2 = under_way.streams
            tolerance = tolerance_of(y1.dtype, self._is_half(y1))
            self.fingerprint.compare((y1, y2), under_way.finite, self.check, tolerance)

    def _is_half(self, x: Tensor) -> bool:
        """Whether functions compute in half precision on float32 streams: by autocast, on parameters, or by their values."""
        enabled, dtype = self.autocast.get(x.device.type, (False, x.dtype))
        dtypes = [dtype] * enabled + [each for each in self.dtypes if each.is_floating_point]
        return x.element_size() == 4 and any(each.itemsize < 4 for each in dtypes)


def _has_trainable(step: Step, functions: Collection[int]) -> bool:
    if isinstance(step, Map):
        return False
    calls = Call(step.fn), learned(step.rule, functions)
    return any(p.requires_grad for call in calls if call is not None for p in call.parameters)
