"""Who keeps what in a training step of a network: what a plan is made from.

One predicted step, in which also every call of a module is noted, and for each kept block which calls save it. Time is
counted in nodes of autograd: the forward pass makes node after node, the backward pass runs them the other way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from revseg.layers.structure import take_apart
from revseg.memory.cost import is_product, time_of_copies
from revseg.memory.follow import Block, Follower
from revseg.memory.handed_on import Dropouts
from revseg.memory.remake import Ready, noting, pieces
from revseg.memory.values import tensors_in

# A module's name; of a segment of the calls in it the first and the one behind the last, else -1, -1; how it goes.
Key = tuple[str, int, int, int]
AGAIN, BY_BANDS, WITH_NEXT = 0, 1, 2  # the last: by bands, with a convolution behind


@dataclass(eq=False)
class Call:
    """A call of a module, or of modules called one after the other."""

    key: Key
    start: int  # nodes of autograd before it
    end: int = -1  # and behind it
    cost: float = 0.0  # seconds of its forward pass
    copies: float = 0.0  # and of these what libraries copy inside
    # seconds of each product, with what follows it in one pass
    products: list[float] = field(default_factory=list)
    inputs: list[Block] = field(default_factory=list)
    writes: bool = False  # whether it, or anybody later, writes to an input
    late: bool = False  # whether upsampling in it waits for the loss
    read: set[Block] = field(default_factory=set)  # parameters, its own or not
    strange: bool = False  # whether some are not: a second run would know nothing of them
    parent: Call | None = None  # in which it was called
    given: int = 0  # the number of the object that it was called with; 0 if there were others
    # operations that dropped channels of that before, if any did
    dropped: tuple[int, int] | None = None
    made: int = 0  # that of the object that it returned
    outputs: list[Block] = field(default_factory=list)
    shapes: tuple[Any, ...] = ()  # of these
    began: int = 0  # operations before it
    ended: int = 0  # and until its end
    remade: dict[Block, list[Block]] = field(default_factory=dict)  # inputs that are made again, of what
    joined: set[Block] = field(default_factory=set)  # these, and what between them and that is made too
    shared: bool = False  # whether a piece of what is joined before it is read by others too
    spared: list[int] = field(default_factory=list)  # nodes of autograd that then are not needed
    outer: tuple[Call, ...] = ()  # all around it
    members: tuple[str, ...] = ()  # of a segment that is not of a row, the modules by name
    parts: tuple[Call, ...] = ()  # of a segment
    ends_linear: bool = False  # whether neither norm nor activation is behind its last product
    layers: int = 0  # of one that could go by bands
    weights: int = 0  # bytes of these, where they do
    takes: str = ""  # and the convolution behind that it takes in then
    crossing: frozenset[Key] = frozenset()  # what holds a part of it and not all
    scores: bool = False  # whether it is one layer and a classifier of it
    largest: Block | None = None  # the largest map that is made in it and kept

    @property
    def by_bands(self) -> Key:
        """The key of the choice to let it go by bands."""
        return *self.key[:3], max(self.key[3], BY_BANDS)

    @property
    def returned(self) -> list[Block]:
        """What it returns."""
        return self.parts[-1].outputs if self.parts else self.outputs

    @property
    def needs_no_map(self) -> bool:
        """Whether by bands no map inside of it is whole (`revseg.layers.bands.cut.BandPlan.needs_no_map`)."""
        if not self.scores or self.largest is None:
            return False
        small = 2 * sum(block.size for block in self.returned) <= self.largest.size
        return small and (bool(self.remade) or all(block.size != self.largest.size for block in self.inputs))

    @property
    def held(self) -> Block | None:
        """The map made in it of which as much is there by bands too."""
        return None if self.needs_no_map else self.largest

    def is_in(self, chosen: Container[Key]) -> bool:
        """Whether it is not to keep what is made in it, in one way or the other."""
        return self.key in chosen or (self.layers > 0 and self.by_bands in chosen)


@dataclass(eq=False)
class Kept:
    """A block that stands between the passes."""

    size: int
    made: tuple[Call, ...]  # the calls in which it was made, the outermost first
    saved: list[tuple[int, tuple[Call, ...]]] = field(default_factory=list)  # at which node, in which calls
    remade: set[Call] = field(default_factory=set)  # the calls that make it again if they run again
    pieces: list[Call] = field(default_factory=list)  # and those that then keep it, to make another
    inputs: list[Call] = field(default_factory=list)  # of which it is one, that would keep it too
    spared: dict[int, list[Call]] = field(default_factory=dict)  # by the node that then does not save it
    used: tuple[int, int] = (0, 0)  # the first and the last node of the forward pass that has it in hands


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
        self.used: dict[Block, tuple[int, int]] = {}  # see `Kept`
        self.clock = 0
        self.forward_at: dict[int, float] = defaultdict(float)  # seconds by the node that was made
        self.copies_at: dict[int, float] = defaultdict(float)  # of copies in the backward pass, by the node

    def where(self) -> tuple[Call, ...]:
        """The calls that are open, the outermost first."""
        return tuple(self.open)

    @property
    def node(self) -> int:
        """The number of nodes that autograd has made."""
        return int(torch.autograd._get_sequence_nr()) - self._first_sequence  # type: ignore[attr-defined]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before, copying = self.spent, self.copying
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if self.phase in ("forward", "loss"):
            self.clock += 1
            for x in tensors_in((args, kwargs or {})):
                found = self.alive.get(x.untyped_storage()._cdata)
                if found is not None:
                    self.read.setdefault(found[0], []).append(self.clock)
                    self._use(found[0])
                    if found[0].kind == "parameters":
                        for call in self.open:
                            call.read.add(found[0])
        spent, copies = self.spent - before, self.copying - copying
        if self.phase == "backward":
            self.copies_at[self._node] += copies
        if self.phase == "forward":
            self.forward_at[max(self.node - 1, 0)] += spent
            made = sum(x.nbytes for x in tensors_in(result)) if is_product(func) else 0
            for call in self.open:
                call.cost += spent
                call.copies += copies
                if made:
                    call.products.append(spent - copies + time_of_copies(made))
            if func._schema.is_mutable:
                for x in tensors_in(args):
                    found = self.alive.get(x.untyped_storage()._cdata)
                    if found is not None and _writes(func, args, x):
                        self.written[found[0]] = self.clock
            for x in tensors_in(result):
                found = self.alive.get(x.untyped_storage()._cdata)
                if found is not None:
                    self.made.setdefault(found[0], tuple(self.open))
                    self._use(found[0])
        return result

    def _use(self, block: Block) -> None:
        now = max(self.node - 1, 0)  # the node of what runs is there already
        self.used[block] = self.used.get(block, (now, now))[0], now

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Notes calls and saved tensors of what runs inside."""
        call_of_module: Any = nn.Module.__call__
        tracer, dropouts = self, Dropouts(lambda: self.clock)

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            name = tracer.names.get(id(module))
            if not name or tracer.phase != "forward":
                return call_of_module(module, *args, **kwargs)
            given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            noted = Call((name, -1, -1, AGAIN), tracer.node, inputs=[tracer.block(x) for x in given])
            noted.parent = tracer.open[-1] if tracer.open else None
            if len(args) == 1 and given and not kwargs:
                noted.given, noted.dropped = dropouts.number(args[0])
            noted.began = tracer.clock
            for x in given:
                ready: list[Ready] = []
                recipe = pieces(x, ready)
                if recipe is not x:
                    noted.remade[tracer.block(x)] = [tracer.block(p) for p in take_apart(recipe)[0]]
                    noted.spared += recipe.made_by()
                    noted.joined.update(tracer.block(each.value) for each in ready)
                del recipe, ready
            tracer.calls_made.append(noted)
            tracer.open.append(noted)
            del given
            try:
                result = call_of_module(module, *args, **kwargs)
            finally:
                tracer.open.pop()
                noted.end, noted.ended = tracer.node, tracer.clock
            own = {tracer.block(p) for p in (*module.parameters(), *module.buffers())}
            noted.strange = not noted.read <= own.union(noted.inputs)
            made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
            noted.made, noted.outputs = id(result), [tracer.block(x) for x in made]
            noted.shapes = tuple((x.shape, x.dtype) for x in made)
            return result

        nn.Module.__call__ = call  # type: ignore[method-assign]
        try:
            with saved_tensors_hooks(self._save, lambda x: x), noting(lambda: tracer.node), dropouts:
                yield
        finally:
            nn.Module.__call__ = call_of_module  # type: ignore[method-assign]
        for noted in self.calls_made:
            noted.shared = any(self._readers(b) > 1 for those in noted.remade.values() for b in those)
            noted.writes = any(self.written.get(b, 0) > noted.began for b in noted.inputs)

    def _readers(self, block: Block) -> int:
        """How many operations read it once it is complete."""
        return sum(time > self.written.get(block, 0) for time in self.read.get(block, ()))

    def _save(self, x: Tensor) -> Tensor:
        if self.phase in ("forward", "loss") and x.layout == torch.strided:
            block = self.block(x)
            if not block.kind:
                kept = self.kept.setdefault(block, Kept(block.size, self.made.get(block, ())))
                kept.saved.append((self._saving(x), tuple(self.open)))
        return x if x.is_leaf else x.detach()

    def _saving(self, x: Tensor) -> int:
        """The node that saves x, which is there already."""
        newest = self.node - 1
        made_by: Any = x.grad_fn
        copied = made_by is not None and made_by.name() == "CloneBackward0"
        # an operation in place saves a copy, whose own node is behind its own
        return newest - int(copied and made_by._sequence_nr() - self._first_sequence == newest)


def _writes(func: Any, args: tuple[Any, ...], x: Tensor) -> bool:
    return any(
        argument.alias_info is not None
        and argument.alias_info.is_write
        and any(each is x for each in tensors_in(value))
        for argument, value in zip(func._schema.arguments, args, strict=False)
    )
