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

from revseg.memory.follow import Block, Follower
from revseg.memory.values import tensors_in

Key = tuple[
    str, int, int
]  # a module's name; of a segment of a row its first child and the one behind its last, else -1, -1


@dataclass(eq=False)
class Call:
    """A call of a module, or of neighbouring children of a row."""

    key: Key
    start: int  # nodes of autograd before it
    end: int = -1  # and behind it
    cost: float = 0.0  # seconds of its forward pass
    inputs: list[Block] = field(default_factory=list)
    writes: bool = False  # whether it, or anybody later, writes to an input
    late: bool = False  # whether upsampling in it waits for the loss


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
        if self.phase == "forward":
            self.clock += 1
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
            tracer.calls_made.append(noted)
            tracer.open.append(noted)
            clock = tracer.clock
            del given
            try:
                return call_of_module(module, *args, **kwargs)
            finally:
                tracer.open.pop()
                noted.end = tracer.node
                tracer.began[noted] = clock

        self.began: dict[Call, int] = {}
        nn.Module.__call__ = call  # type: ignore[method-assign]
        try:
            with saved_tensors_hooks(self._save, lambda x: x):
                yield
        finally:
            nn.Module.__call__ = call_of_module  # type: ignore[method-assign]
        for noted in self.calls_made:
            noted.writes = any(self.written.get(b, 0) > self.began[noted] for b in noted.inputs)

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
    """All calls; those of neighbouring children of a row too, put among the calls of what happens inside of them."""
    for stack in tracer.late:
        for call in stack:
            call.late = True
    rows = {n: [c for c, _ in m.named_children()] for n, m in model.named_modules() if is_row(m)}
    place = {
        f"{row}.{child}".lstrip("."): (row, i) for row, names in rows.items() for i, child in enumerate(names)
    }
    at: dict[Call, list[Call]] = {}  # the segments around a call of a child, the largest first
    calls = list(tracer.calls_made)
    open_rows: dict[str, list[tuple[int, Call]]] = {}
    runs: list[tuple[str, list[tuple[int, Call]]]] = []
    for call in tracer.calls_made:  # children called one after the other make a run
        row, i = place.get(call.key[0], ("", -1))
        if i < 0:
            continue
        run = open_rows.get(row)
        if run is None or i != run[-1][0] + 1 or call.start < run[-1][1].end:
            run = open_rows[row] = []
            runs.append((row, run))
        run.append((i, call))
    for row, run in runs:
        if len(run) != len(rows[row]):
            continue
        for first, last in _cuts(len(run)):
            parts = [call for _, call in run[first:last]]
            segment = Call((row, first, last), parts[0].start, parts[-1].end, sum(c.cost for c in parts))
            segment.inputs, segment.writes = parts[0].inputs, parts[0].writes
            segment.late = any(call.late for call in parts)
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


def is_row(module: nn.Module) -> bool:
    """Whether a module calls its children one after the other."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _cuts(length: int) -> list[tuple[int, int]]:
    """Segments of a row of this length: cut into 2, 3, 4, 6, 8 and more equal pieces of two children at the least."""
    found = {}
    for pieces in (2, 3, 4, 6, 8, 12, 16, 24, 32):
        if length < 2 * pieces:
            break
        bounds = [round(i * length / pieces) for i in range(pieces + 1)]
        found.update(dict.fromkeys(pairwise(bounds)))
    return list(found)
