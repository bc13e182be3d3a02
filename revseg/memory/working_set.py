"""What stands beside the kept blocks at each node of autograd: gradients on their way, and what operations need for a moment.

It does not depend on what runs again. It does on what goes by bands: of the gradients of maps inside of a row there are bands
alone, and one map, for which the estimate counts the largest raw map; and of maps that are made as they are read there is no
gradient either, but one of each map that they are made of.
"""

from __future__ import annotations

from collections.abc import Container, Iterator

import numpy as np
from numpy.typing import NDArray

from revseg.memory.follow import Block, Event
from revseg.memory.trace import Call, Tracer

Bytes = NDArray[np.int64]  # of each node: while its gradient is computed, and behind those, while it is made


class WorkingSet:
    """The most bytes that are alive and not kept, at each node.

    Args:
        tracer: That has followed a step.
        kept: The blocks that stand between the passes.
        length: How many nodes there are.

    Attributes:
        most: These bytes.
    """

    def __init__(self, tracer: Tracer, kept: Container[Block], length: int) -> None:
        self.tracer, self.length = tracer, length
        self.most: Bytes = np.zeros(2 * length, dtype=np.int64)
        self._events: list[tuple[Event, int]] = []  # of the backward pass, each with the bytes behind it
        self._life: dict[Block, tuple[int, int]] = {}  # from which to which node of it
        now = 0
        for event in tracer.events:
            if event.block not in kept:
                now += event.size
            if event.node < 0:
                continue
            backward = event.phase == "backward"
            place = event.node if backward else length + max(event.node - 1, 0)
            self.most[place] = max(self.most[place], now)
            if backward:
                self._events.append((event, now))
                if event.block not in kept:
                    born = self._life.get(event.block, (event.node, -1))[0]
                    self._life[event.block] = born, -1 if event.size > 0 else event.node

    def by_bands(self, call: Call) -> Bytes:
        """How much more there is if a row goes by bands."""
        change: Bytes = np.zeros(2 * self.length, dtype=np.int64)
        joined = {*self._of_joined(call)}
        inside = {
            block
            for block, (born, gone) in self._life.items()
            if call.start <= gone and call.start <= born < call.end and block.phase == "backward"
        }
        last = min((self._life[block][1] for block in joined), default=call.start)
        most = dict.fromkeys(range(min(last, call.start), call.end), 0)
        now = 0
        for event, all_ in self._events:
            if event.block in inside or event.block in joined:
                now += event.size
            if event.node in most:
                most[event.node] = max(most[event.node], all_ - now)
        for node, without in most.items():
            change[node] = without - self.most[node]
        given = set()  # sizes of gradients that the row gives
        for block, (born, gone) in self._life.items():
            if block.phase != "backward" or block in joined:
                continue
            if born >= call.end > gone > call.start:  # what it is given stays to its end
                change[call.start : gone] += block.size
            elif born == call.start > gone:
                given.add(block.size)
        for parts in call.remade.values():
            for part in parts:
                if not part.kind:
                    made = self.tracer.used.get(part, (0, 0))[0]
                    change[made + 1 : call.start + 1] += part.size
                    given.add(part.size)
        if call.held is not None and call.held.size in given:
            change[call.start] -= call.held.size  # it lies where the gradient of the raw map did
        return change

    def _of_joined(self, call: Call) -> Iterator[Block]:
        """Gradients of maps that are made as they are read."""
        sizes = {block.size for block in call.remade}
        for block, (born, _) in self._life.items():
            if born == call.start and block.size in sizes and block.phase == "backward":
                yield block
