"""Who keeps what in a training step of a network: what a plan is made from.

One predicted step, in which also every call of a module is noted, and for each kept block which calls save it. Time is
counted in nodes of autograd: the forward pass makes node after node, the backward pass runs them the other way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from revseg.engine.tracing import has_hooks
from revseg.memory.follow import Block, Follower
from revseg.memory.values import tensors_in

Key = tuple[
    str, int, int
]  # a module's name; of a segment of the calls in it the first and the one behind the last, else -1, -1


@dataclass(eq=False)
class Call:
    """A call of a module, or of modules called one after the other."""

    key: Key
    start: int  # nodes of autograd before it
    end: int = -1  # and behind it
    cost: float = 0.0  # seconds of its forward pass
    inputs: list[Block] = field(default_factory=list)
    writes: bool = False  # whether it, or anybody later, writes to an input
    late: bool = False  # whether upsampling in it waits for the loss
    parent: Call | None = None  # in which it was called
    given: int = 0  # the number of the object that it was called with; 0 if there were others
    made: int = 0  # that of the object that it returned
    outputs: list[Block] = field(default_factory=list)
    shapes: tuple[Any, ...] = ()  # of these
    began: int = 0  # operations before it
    ended: int = 0  # and until its end
    members: tuple[str, ...] = ()  # of a segment that is not of a row, the modules by name


@dataclass(eq=False)
class Kept:
    """A block that stands between the passes."""

    size: int
    made: tuple[Call, ...]  # the calls in which it was made, the outermost first
    saved: list[tuple[int, tuple[Call, ...]]] = field(default_factory=list)  # at which node, in which calls


class Tracer(Follower):  # type: ignore[no-untyped-call]
    """A follower that notes calls, and who saves what."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.open: list[Call] = []
        self.calls_made: list[Call] = []
        self.kept: dict[Block, Kept] = {}
        self.made: dict[Block, tuple[Call, ...]] = {}
        self.written: dict[Block, int] = {}
        self.read: dict[Block, list[int]] = {}  # by which operations
        self.clock = 0

    def where(self) -> tuple[Call, ...]:
        """The calls that are open, the outermost first."""
        return tuple(self.open)

    @property
    def node(self) -> int:
        """The number of nodes that autograd has made."""
        return int(torch.autograd._get_sequence_nr()) - self._first_sequence  # type: ignore[attr-defined]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.spent
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if self.phase in ("forward", "loss"):
            self.clock += 1
            for x in tensors_in((args, kwargs or {})):
                found = self.alive.get(x.untyped_storage()._cdata)
                if found is not None:
                    self.read.setdefault(found[0], []).append(self.clock)
        if self.phase == "forward":
            for call in self.open:
                call.cost += self.spent - before
            if func._schema.is_mutable:
                for x in tensors_in(args):
                    found = self.alive.get(x.untyped_storage()._cdata)
                    if found is not None and _writes(func, args, x):
                        self.written[found[0]] = self.clock
            for x in tensors_in(result):
                found = self.alive.get(x.untyped_storage()._cdata)
                if found is not None:
                    self.made.setdefault(found[0], tuple(self.open))
        return result

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Notes calls and saved tensors of what runs inside."""
        call_of_module: Any = nn.Module.__call__
        tracer = self

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            name = tracer.names.get(id(module))
            if not name or tracer.phase != "forward":
                return call_of_module(module, *args, **kwargs)
            given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            noted = Call((name, -1, -1), tracer.node, inputs=[tracer.block(x) for x in given])
            noted.parent = tracer.open[-1] if tracer.open else None
            noted.given = id(args[0]) if len(args) == 1 and given and not kwargs else 0
            noted.began = tracer.clock
            tracer.calls_made.append(noted)
            tracer.open.append(noted)
            del given
            try:
                result = call_of_module(module, *args, **kwargs)
            finally:
                tracer.open.pop()
                noted.end, noted.ended = tracer.node, tracer.clock
            made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
            noted.made, noted.outputs = id(result), [tracer.block(x) for x in made]
            noted.shapes = tuple((x.shape, x.dtype) for x in made)
            return result

        nn.Module.__call__ = call  # type: ignore[method-assign]
        try:
            with saved_tensors_hooks(self._save, lambda x: x):
                yield
        finally:
            nn.Module.__call__ = call_of_module  # type: ignore[method-assign]
        for noted in self.calls_made:
            noted.writes = any(self.written.get(b, 0) > noted.began for b in noted.inputs)

    def _save(self, x: Tensor) -> Tensor:
        if self.phase in ("forward", "loss") and x.layout == torch.strided:
            block = self.block(x)
            if not block.kind:
                kept = self.kept.setdefault(block, Kept(block.size, self.made.get(block, ())))
                kept.saved.append((self.node, tuple(self.open)))
        return x if x.is_leaf else x.detach()


def _writes(func: Any, args: tuple[Any, ...], x: Tensor) -> bool:
    return any(
        argument.alias_info is not None
        and argument.alias_info.is_write
        and any(each is x for each in tensors_in(value))
        for argument, value in zip(func._schema.arguments, args, strict=False)
    )


def with_segments(tracer: Tracer, model: nn.Module) -> list[Call]:
    """All calls, those of segments too, put among the calls of what happens inside of them.

    A segment is made of modules that are called one after the other in one place, each with what the one before it
    returned, which nobody else reads: children of a row, entries of a list, `conv`, `norm` and `act` of a block.
    """
    for stack in tracer.late:
        for call in stack:
            call.late = True
    modules = dict(model.named_modules())
    at: dict[Call, list[Call]] = {}  # the segments around a call, the largest first
    calls = list(tracer.calls_made)
    for parent, lines in _lines(tracer).items():
        names = [call.key[0] for call in lines[0]]
        if any([call.key[0] for call in line] != names for line in lines):
            continue  # it does not do the same each time
        row = parent in modules and is_row(modules[parent])
        linked = [
            all(_passes_on(tracer, line[i], line[i + 1]) for line in lines) for i in range(len(names) - 1)
        ]
        for first, behind in _segments(names, linked, modules):
            if not row and not _can_lead(names, first, behind, modules, lines):
                continue
            for line in lines:
                parts = line[first:behind]
                segment = Call(
                    (parent, first, behind), parts[0].start, parts[-1].end, sum(c.cost for c in parts)
                )
                segment.inputs, segment.writes = parts[0].inputs, parts[0].writes
                segment.late = any(call.late for call in parts)
                segment.members = () if row else tuple(names[first:behind])
                calls.append(segment)
                for part in parts:
                    at.setdefault(part, []).append(segment)
    for segments in at.values():
        segments.sort(key=lambda s: s.key[1] - s.key[2])

    def filled(stack: tuple[Call, ...]) -> tuple[Call, ...]:
        return tuple(each for call in stack for each in (*at.get(call, ()), call))

    for kept in tracer.kept.values():
        kept.made = filled(kept.made)
        kept.saved = [(node, filled(stack)) for node, stack in kept.saved]
    return calls


def _lines(tracer: Tracer) -> dict[str, list[list[Call]]]:
    """By the name of a module, for each call of it the calls in it, in their order."""
    found: dict[Call | None, list[Call]] = {}
    for call in tracer.calls_made:
        found.setdefault(call.parent, []).append(call)
    lines: dict[str, list[list[Call]]] = {}
    for parent, line in found.items():
        lines.setdefault("" if parent is None else parent.key[0], []).append(line)
    return lines


def _passes_on(tracer: Tracer, call: Call, following: Call) -> bool:
    """Whether a call reads what the one before it returned, and nobody else does."""
    if call.made != following.given or call.outputs != following.inputs or call.late:
        return False
    return not any(
        call.ended < time and not following.began < time <= following.ended
        for block in call.outputs
        if block not in following.outputs  # what is read later is what that one returned
        for time in tracer.read.get(block, ())
    ) and not any(
        call.ended < time <= following.began for block in call.outputs for time in tracer.read.get(block, ())
    )


def _can_lead(
    names: list[str], first: int, behind: int, modules: dict[str, nn.Module], lines: list[list[Call]]
) -> bool:
    """Whether the first can run the others: it is called once, they give no other shapes, nobody looks at them by hooks."""
    shapes = {call.shapes for line in lines for call in line[first:behind]}
    hooks = any(has_hooks(modules[name]) for name in names[first:behind])
    return (
        names.count(names[first]) == 1
        and len(shapes) == len({line[first].shapes for line in lines})
        and not hooks
    )


def _segments(names: list[str], linked: list[bool], modules: dict[str, nn.Module]) -> list[tuple[int, int]]:
    """First and behind the last of each: runs of linked calls, cut where a module with weights begins."""
    found: dict[tuple[int, int], None] = {}
    begin = 0
    for end in range(1, len(names) + 1):
        if end < len(names) and linked[end - 1]:
            continue
        starts = [i for i in range(begin, end) if i == begin or _has_weights(modules[names[i]])]
        for i, j in _cuts(len(starts)):
            found[starts[i], starts[j] if j < len(starts) else end] = None
        begin = end
    return [(first, behind) for first, behind in found if behind - first > 1]


def _has_weights(module: nn.Module) -> bool:
    return any(p.ndim > 1 for p in module.parameters())


def is_row(module: nn.Module) -> bool:
    """Whether a module calls its children one after the other."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _cuts(length: int) -> list[tuple[int, int]]:
    """Segments of a row of this length: cut into 1, 2, 3, 4, 6, 8 and more equal pieces, and into single ones."""
    found = {}
    for pieces in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, length):
        if pieces <= length:
            found.update(dict.fromkeys(pairwise(round(i * length / pieces) for i in range(pieces + 1))))
    return list(found)
