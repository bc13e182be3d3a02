"""Follows every block of memory of a run on fake tensors: when it comes, who made it, when it goes.

Fake tensors have shapes and no values, so a step of any size runs in seconds. A block is the storage that an
operation made. It is alive until its storage is freed, and the sum of those alive at its highest is the peak.

Three things would come out otherwise than in a real run, and are put right here:

* While operations are followed autograd no longer adds gradients in place (`revseg.memory.in_place`). Where a real
  run would, it needs no memory for the sum, and none is counted.
* Operations of libraries take memory inside, which nobody outside sees (`revseg.memory.workspace`).
* A few small tensors are there to be read as numbers, the rates of drop path or the count of an optimizer's steps.
  These have their values (`revseg.memory.values`). Who reads others gets an error that names the line.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from revseg.memory.as_real import as_real
from revseg.memory.cost import cost_of, time_of_copies
from revseg.memory.in_place import adds_in_place, uses_alone
from revseg.memory.values import Values, tensors_in
from revseg.memory.workspace import workspace

_CALL = nn.Module._call_impl.__code__


@dataclass(eq=False)
class Block:
    """A storage that a run made, or that stood before it."""

    size: int
    phase: str
    module: (
        str  # the innermost one that was called, by name; of a gradient, the one whose forward it belongs to
    )
    operation: str
    kind: str = ""  # what it is for, where that is known
    kept: bool = False  # whether it stands between the passes


@dataclass(frozen=True)
class Event:
    """A block that comes (size > 0) or goes (size < 0)."""

    block: Block
    size: int
    phase: str
    module: str
    node: int  # of autograd, by its number; in the forward pass, how many there are


class Follower(TorchDispatchMode):
    """The blocks of everything that runs inside of it, under a `FakeTensorMode`.

    Args:
        fake: The mode whose tensors are followed; real ones are replaced by its own.
        names: Names of modules, for the blocks that are made in them.
        inside: Whether what operations take inside counts.
    """

    def __init__(
        self, fake: FakeTensorMode, names: Mapping[nn.Module, str] | None = None, inside: bool = True
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake, self.inside = fake, inside
        self.names = {id(module): name for module, name in (names or {}).items()}
        self.values = Values()
        self.real: dict[int, tuple[Tensor, Tensor]] = {}  # by the real tensor, with what stands for it
        self.phase = "before"
        self.events: list[Event] = []
        self.alive: dict[int, tuple[Block, weakref.ref[Any]]] = {}  # by storage
        self.costs: dict[tuple[str, str], float] = {}  # seconds by phase and module
        self.spent = 0.0  # and of all together
        self.copying = 0.0  # and of these what libraries copy inside
        self.late: list[Any] = []  # where upsampling began to wait that losses took by bands
        self.whole_logits = 0  # bytes of the largest logits that a loss took by bands as they were
        self._by_sequence: list[str] = []  # the module in which autograd made its node of this number
        self._alone = uses_alone()
        self._first_sequence = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]

    def start(self) -> None:
        """Forget what was so far: it stood before."""
        self.events.clear()
        self.costs.clear()

    def where(self) -> Any:
        """In which calls the run is."""
        return ()

    def block(self, x: Tensor) -> Block:
        """That of a tensor, from now on followed."""
        self._follow(x.untyped_storage(), "")
        return self.alive[x.untyped_storage()._cdata][0]

    def peak(self) -> int:
        """The most bytes at one time, beyond those at the start."""
        now = most = 0
        for event in self.events:
            now += event.size
            most = max(most, now)
        return most

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = tensors_in((args, kwargs))
        if any(not isinstance(x, FakeTensor) for x in given):
            args, kwargs = tree_map_only(Tensor, self._fake_of, (args, kwargs))
            given = tensors_in((args, kwargs))
        self._module = self._note_module()
        before = {x.untyped_storage()._cdata for x in given}
        answer, result = self.values.run(func, args, kwargs, given)
        if not answer:
            return result  # a number
        result = as_real(func, args, result)
        inside = workspace(func, args, kwargs, result) if self.inside else None
        made = tensors_in(result)
        if inside is not None:
            self._pass(inside.before, str(func))
        if adds_in_place(func, args, sys._getframe(1), self._alone):
            self._free(args[0].untyped_storage()._cdata)  # the sum is in the place of its first summand
        for x in made:
            if x.untyped_storage()._cdata not in before:
                self._follow(x.untyped_storage(), str(func))
        if inside is not None:
            self._pass(inside.beside, str(func))
        copies = 0.0 if inside is None else time_of_copies(inside.copied)
        cost = cost_of(func, args, kwargs, result, (*given, *made)) + copies
        self.spent += cost
        self.copying += copies
        key = self.phase, self._module
        self.costs[key] = self.costs.get(key, 0.0) + cost
        return result

    def _fake_of(self, x: Tensor) -> Tensor:
        """The tensor, or what stands for a real one."""
        if isinstance(x, FakeTensor):
            return x
        if id(x) not in self.real:
            stand_in = self.fake.from_tensor(x)
            self.real[id(x)] = x, stand_in  # both stay alive, or their numbers would be given to others
            self.values.set(stand_in, x)
            count = len(self.events)
            self._follow(stand_in.untyped_storage(), "")
            del self.events[count:]  # it stood before
        return self.real[id(x)][1]

    def _follow(self, storage: torch.UntypedStorage, operation: str) -> None:
        key = storage._cdata
        if key in self.alive:
            return
        block = Block(storage.nbytes(), self.phase, self._module, operation)
        self.alive[key] = block, weakref.ref(storage, lambda _: self._free(key))
        self.events.append(Event(block, block.size, self.phase, self._module, self._node))

    def _pass(self, size: int, operation: str) -> None:
        """A block that is gone at the end of the operation."""
        block = Block(size, self.phase, self._module, operation)
        self.events += [
            Event(block, size, self.phase, self._module, self._node),
            Event(block, -size, self.phase, self._module, self._node),
        ]

    def _free(self, key: int) -> None:
        if key in self.alive:
            block, _ = self.alive.pop(key)
            self.events.append(Event(block, -block.size, self.phase, self._module, self._node))

    _module, _node = "", 0
    around: ClassVar[dict[str, str]] = {"loss": "(loss)", "optimizer": "(optimizer)"}  # outside of modules

    def _note_module(self) -> str:
        """The module that runs, or whose gradient is computed."""
        node = torch._C._current_autograd_node()
        sequence = torch.autograd._get_sequence_nr() - self._first_sequence  # type: ignore[attr-defined]
        name = next(self.calls(), None)
        number = sequence if node is None else node._sequence_nr() - self._first_sequence
        if number > sequence:
            return self._module  # a node that adds to a gradient, behind another one
        self._node = number
        if name is None and node is not None:
            name = self._by_sequence[number] if 0 <= number < len(self._by_sequence) else None
        found = self.around.get(self.phase, "") if name is None else name
        self._by_sequence += [found] * (sequence - len(self._by_sequence))
        return found

    def calls(self) -> Iterator[str]:
        """Names of the modules that are being called, the innermost first."""
        frame: FrameType | None = sys._getframe(1)
        in_backward = torch._C._current_autograd_node() is not None
        while frame is not None:
            code = frame.f_code
            if code is _CALL:
                name = self.names.get(id(frame.f_locals["self"]))
                if name is not None:
                    yield name
            elif in_backward and code.co_name == "_engine_run_backward":
                return  # what called the backward pass is not what runs in it
            frame = frame.f_back
