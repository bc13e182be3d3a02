"""What stands beside the kept blocks at each node of autograd: gradients on their way, and what operations need for a moment.

It does not depend on what runs again. It does on what goes by bands: of the gradients of maps inside of a row there are bands
alone, and one map, for which the estimate counts the largest raw map; and of maps that are made as they are read there is no
gradient either, but one of each map that they are made of.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from revseg.memory.follow import Block, Event
from revseg.memory.row_by_bands import BANDS
from revseg.memory.trace import Call, Kept, Tracer

# Bands that there are at a time: of the layer, of what it reads, of their gradients. Where a map is whole some lie in that.
_BESIDE, _BESIDE_MAP = 6, 3
Bytes = NDArray[np.int64]  # of each node: while its gradient is computed, and behind those, while it is made


class WorkingSet:
    """The most bytes that are alive and not kept, at each node.

    Args:
        tracer: That has followed a step.
        kept: The blocks that stand between the passes.
        joined: Maps that are made of others as they are read, which do not count either.
        length: How many nodes there are.

    Attributes:
        most: These bytes.
    """

    def __init__(
        self, tracer: Tracer, kept: Mapping[Block, Kept], joined: Container[Block], length: int
    ) -> None:
        self.tracer, self.length = tracer, length
        self.most: Bytes = np.zeros(2 * length, dtype=np.int64)
        self._events: list[tuple[Event, int]] = []  # of the backward pass, each with the bytes behind it
        self._life: dict[Block, tuple[int, int]] = {}  # from which to which node of it
        now, left = 0, {}
        for event in tracer.events:
            counts = event.block not in kept and event.block not in joined
            if counts:
                now += event.size
            if event.node < 0:
                continue
            backward = event.phase == "backward"
            place = event.node if backward else length + max(event.node - 1, 0)
            self.most[place] = max(self.most[place], now)
            if backward:
                left[event.node] = now
                self._events.append((event, now))
                if counts:
                    born = self._life.get(event.block, (event.node, -1))[0]
                    self._life[event.block] = born, -1 if event.size > 0 else event.node
        for node in range(length - 2, -1, -1):  # where nothing comes or goes, what there was before
            if node not in left:
                left[node] = self.most[node] = max(left.get(node + 1, 0), 0)
        self._left = left  # behind each node of the backward pass
        self._before_saved: dict[Call, list[tuple[int, int, int]]] = defaultdict(list)
        for each in kept.values():
            saved = min((node for node, _ in each.saved), default=each.used[1])
            for call in each.made if each.used[0] < saved else ():
                self._before_saved[call].append((each.used[0], saved, each.size))

    def again(self, call: Call) -> Bytes:
        """What there is at the nodes of a call while it runs again: as in its first run, and the gradients that wait for it.

        A map is there from when it is made, though it is saved later on.
        """
        first = self.most[self.length + call.start : self.length + call.end]
        of_others = sum(size - part for size, part in self._given(call).values())
        found: Bytes = first + self._left.get(call.end, 0) - of_others
        for made, saved, size in self._before_saved[call]:
            found[max(made - call.start, 0) : max(saved - call.start, 0)] += size
        return found

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
        for block, (_, own) in self._given(call).items():
            change[call.start : self._life[block][1]] += own  # what it is given stays to its end
        given = {  # sizes of gradients that the row gives
            block.size
            for block, (born, gone) in self._life.items()
            if born == call.start > gone and block.phase == "backward" and block not in joined
        }
        for parts in call.remade.values():
            for part in parts:
                if not part.kind:
                    made = self.tracer.used.get(part, (0, 0))[0]
                    change[made + 1 : call.start + 1] += part.size
                    given.add(part.size)
        band = 0 if call.largest is None else call.largest.size // BANDS.part
        for node in range(call.start, call.end):
            change[node] += 2 * call.weights  # gradients of bands, and their sum
            if call.needs_no_map:
                change[[node, self.length + max(node - 1, 0)]] += _BESIDE * band
            else:
                change[node] += _BESIDE_MAP * band
        if call.held is not None and call.held.size in given:
            change[call.start] -= call.held.size  # it lies where the gradient of the raw map did
        return change

    def _given(self, call: Call) -> dict[Block, tuple[int, int]]:
        """Gradients that a call uses up, with their bytes, and how many of these are its own: of a joined map a part is."""
        returned = sum(block.size for block in call.returned)
        return {
            block: (block.size, min(block.size, returned))
            for block, (born, gone) in self._life.items()
            if born >= call.end > gone >= call.start and block.phase == "backward"
        }

    def _of_joined(self, call: Call) -> Iterator[Block]:
        """Gradients of maps that are made as they are read."""
        sizes = {block.size for block in call.remade}
        for block, (born, _) in self._life.items():
            if born == call.start and block.size in sizes and block.phase == "backward":
                yield block
