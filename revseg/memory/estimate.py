"""The peak of a step under any choice of calls that run again, from one trace, in milliseconds.

A kept block lives in the backward pass until the node that saved it first. If the calls in which it is saved run
again, their inputs are kept instead, and the block comes back when its call is run again, until that call is done; in
the forward pass it goes when nobody reads it any more. Beside the kept blocks stands the working set of the node, which
does not depend on the choice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Container, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
from torch import nn

from revseg.memory.candidate import Candidate
from revseg.memory.follow import Block
from revseg.memory.joined import joined_maps_of
from revseg.memory.segments import with_segments
from revseg.memory.taking_in import taking_in
from revseg.memory.time_again import SECOND_RUN, time_again, time_by_bands
from revseg.memory.trace import AGAIN, Call, Kept, Key, Tracer
from revseg.memory.working_set import Bytes, WorkingSet

Changes = list[tuple[int, int]]  # from which place on there are how many more


class Estimate:
    """What a trace says about choices.

    Args:
        tracer: That has followed a step.
        model: The network.
        standing: The blocks that stood before the step.
    """

    def __init__(self, tracer: Tracer, model: nn.Module, standing: Iterable[Block]) -> None:
        calls = with_segments(tracer, model)
        calls += taking_in(tracer, model, calls)
        self.kept = {block: kept for block, kept in tracer.kept.items() if block.kept}
        spared: dict[int, list[Call]] = defaultdict(list)
        for call in calls:
            for node in call.spared:
                spared[node].append(call)
        for block, kept in self.kept.items():
            kept.used = tracer.used.get(block, (0, 0))
            kept.spared = {node: spared[node] for node, _ in kept.saved if node in spared}
        for call in calls:
            for block in call.inputs:
                if block not in call.remade and not block.kind:
                    kept = self._kept(block, tracer)
                    if not any(call in stack for _, stack in kept.saved):
                        kept.inputs.append(call)
            for block, parts in call.remade.items():
                if block in self.kept:
                    self.kept[block].remade.add(call)
                    for piece in parts:
                        if not piece.kind:
                            self._kept(piece, tracer).pieces.append(call)
        for block, kept in self.kept.items():
            for call in kept.made:
                larger = call.largest is None or call.largest.size < block.size
                if call.layers and larger and block not in call.returned:
                    call.largest = block
        self.standing = sum(block.size for block in standing)
        self.seconds = sum(tracer.costs.values())
        self.length = 1 + max((event.node for event in tracer.events), default=0)
        self.joined = joined_maps_of(calls, tracer, self.kept)
        working = WorkingSet(tracer, self.kept, self.joined, self.length)
        self.working = working.most
        self.candidates = self._candidates(calls, tracer)
        self._by_bands = {
            key: sum((working.by_bands(call) for call in c.calls), self._no_bytes())
            for key, c in self.candidates.items()
            if key[3] != AGAIN
        }
        self._again = {
            key: [(call.start, working.again(call)) for call in c.calls]
            for key, c in self.candidates.items()
            if key[3] == AGAIN
        }
        self._known: dict[Block, dict[int, Changes]] = defaultdict(dict)
        self._sees_inputs = True
        self._bits = {  # of the keys on which the life of a block depends: a choice is a number to it
            block: {
                key: 1 << i
                for i, key in enumerate(
                    {key for call in those for key in (call.key, call.by_bands)} & {*self.candidates}
                )
            }
            for block, those in self._calls()
        }
        self._crossed: dict[Key, set[Key]] = {}
        self._last_working: tuple[Collection[Key], Bytes] = ((), self.working)
        self._last: Collection[Key] = ()  # the choice that was asked for last, and what it is to blocks
        self._states: dict[Block, int] = {}

    def _kept(self, block: Block, tracer: Tracer) -> Kept:
        """What is known of a block that a call keeps if it runs again, though it may not be kept in the plain network."""
        if block not in self.kept:
            self.kept[block] = Kept(block.size, tracer.made.get(block, ()))
            self.kept[block].used = tracer.used.get(block, (0, 0))
        return self.kept[block]

    @contextmanager
    def without_inputs(self) -> Iterator[None]:
        """Inside, inputs that nobody saves in the plain network take nothing where they are kept: many share them."""
        self._sees_inputs, self._known = False, defaultdict(dict)
        try:
            yield
        finally:
            self._sees_inputs, self._known = True, defaultdict(dict)

    def live(self, chosen: Collection[Key]) -> Bytes:
        """Bytes beyond the standing ones at each node."""
        change = self._no_change()
        for block in (*self.kept, *self.joined):
            for place, size in self._changes(block, chosen, self._state(block, chosen)):
                change[place] += size
        return self._working(chosen) + self._summed(change) + self._of_bands(chosen)

    def difference(self, blocks: Iterable[Block], before: Collection[Key], after: Collection[Key]) -> Bytes:
        """How the bytes at each node change from one choice to another, by which the lives of these blocks differ."""
        more, fewer = ([key for key in a if key not in b] for a, b in ((after, before), (before, after)))
        change = self._no_change()
        for block in blocks:
            bits, old = self._bits[block], self._state(block, before)
            new = old
            for key in more:
                new |= bits.get(key, 0)
            for key in fewer:
                new &= ~bits.get(key, 0)
            if new != old:
                for place, size in self._changes(block, before, old):
                    change[place] -= size
                for place, size in self._changes(block, after, new):
                    change[place] += size
        old_working = self._working(before)
        working = self._with_again(self.working, after) if fewer else self._with_again(old_working, more)
        return self._summed(change) + working - old_working + self._of_bands(more) - self._of_bands(fewer)

    def _working(self, chosen: Collection[Key]) -> Bytes:
        """The working set, at each node that of the first or the second run, whichever is larger."""
        if chosen is not self._last_working[0]:
            self._last_working = chosen, self._with_again(self.working, chosen)
        return self._last_working[1]

    def _with_again(self, working: Bytes, chosen: Iterable[Key]) -> Bytes:
        """The larger one of a working set and of those of calls that run again."""
        found = working.copy()
        for key in chosen:
            for start, second in self._again.get(key, ()):
                np.maximum(found[start : start + len(second)], second, out=found[start : start + len(second)])
        return found

    def _of_bands(self, chosen: Iterable[Key]) -> Bytes:
        """How the working set differs where these go by bands."""
        return sum((self._by_bands[key] for key in chosen if key[3] != AGAIN), self._no_bytes())

    def _no_bytes(self) -> Bytes:
        return np.zeros(2 * self.length, dtype=np.int64)

    def _no_change(self) -> Bytes:
        return np.zeros(2 * (self.length + 1), dtype=np.int64)

    def _summed(self, change: Bytes) -> Bytes:
        """What changes at places add up to, in each pass by itself."""
        return np.cumsum(change.reshape(2, -1), axis=1)[:, :-1].reshape(-1)

    def _state(self, block: Block, chosen: Collection[Key]) -> int:
        """What a choice is to a block."""
        if chosen is not self._last:
            self._last, self._states = chosen, {}
        if block not in self._states:
            self._states[block] = sum(bit for key, bit in self._bits[block].items() if key in chosen)
        return self._states[block]

    def _changes(self, block: Block, chosen: Collection[Key], state: int) -> Changes:
        """Where a block comes and goes."""
        known = self._known[block]
        if state not in known:
            known[state] = self._changes_of(block, chosen)
        return known[state]

    def _changes_of(self, block: Block, chosen: Container[Key]) -> Changes:
        if block in self.joined:
            life = self.joined[block].life(chosen)
            if life is None:
                return []
            first, last = (self.length + 1 + node for node in life)
            return [(first, block.size), (last + 1, -block.size)]
        kept = self.kept[block]
        made = [call for call in kept.made if call.is_in(chosen)]
        since: dict[Call | None, int] = {}  # by the call whose second run it lives in
        keepers = [*kept.pieces, *(kept.inputs if self._sees_inputs else ())]
        pieces = [(call.start, call.outer) for call in keepers if call.is_in(chosen)]
        saved = [s for s in kept.saved if not any(call.is_in(chosen) for call in kept.spared.get(s[0], ()))]
        gone = bool(saved)  # whether all who read it make it as they read it
        for node, stack in (*saved, *pieces):
            around = [call for call in stack if call.is_in(chosen)]
            shared = 0
            while shared < min(len(made), len(around)) and made[shared] is around[shared]:
                shared += 1
            while shared < len(around) and around[shared] in kept.remade:
                shared += 1
            by_bands = [call for call in around[:shared] if call.by_bands in chosen]
            gone = gone and any(call in kept.remade for call in by_bands)
            if by_bands and by_bands[0].held is not block:
                continue  # no more of it than bands
            context = around[shared - 1] if shared else None
            begin = around[shared].start if shared < len(around) else node
            if by_bands:
                begin = by_bands[0].start  # it, or in its place a gradient
            since[context] = min(since.get(context, begin), begin)
        changes: Changes = []
        for context, begin in since.items():
            changes.append((begin, kept.size))
            if context is not None:
                changes.append((min(context.end, self.length), -kept.size))
        if gone:
            return changes
        first, last = (self.length + 1 + node for node in kept.used)
        rows = [call for call in made if call.by_bands in chosen]
        if rows and block not in rows[0].returned:
            if rows[0].held is not block:
                return changes  # of what is made inside one raw map exists at a time
            first, last = (self.length + 1 + node for node in (rows[0].start, rows[0].end - 1))
        changes.append((first, kept.size))
        if None not in since:
            changes.append((last + 1, -kept.size))
        return changes

    def groups(self) -> list[tuple[Candidate, ...]]:
        """Modules in one place that would keep the same inputs: each alone spares little, as the layers of a dense block do."""
        found: dict[Call | None, set[Key]] = defaultdict(set)  # by the call in which they are called
        for kept in self.kept.values():
            readers: dict[Call | None, set[Key]] = defaultdict(set)
            for call in kept.inputs:
                if call.key[1] < 0 and call.key in self.candidates:
                    readers[call.parent].add(call.key)
            for parent, keys in readers.items():
                if len(keys) > 1:
                    found[parent] |= keys
        return [tuple(self.candidates[key] for key in sorted(keys)) for keys in found.values()]

    def crossed_by(self, candidate: Candidate) -> set[Key]:
        """The candidates that cannot be added to this one."""
        if candidate.key not in self._crossed:
            self._crossed[candidate.key] = {key for key, c in self.candidates.items() if c.crosses(candidate)}
        return self._crossed[candidate.key]

    def extra(self, chosen: Iterable[Candidate]) -> float:
        """The time of a step's operations as a multiple of what they take without running anything again."""
        return 1 + sum(c.cost for c in chosen) / self.seconds

    def time(self, chosen: Collection[Candidate]) -> float:
        """The same of a step, with what each second run takes beside its operations."""
        return self.extra(chosen) + SECOND_RUN * sum(len(c.calls) for c in chosen) / self.seconds

    def _calls(self) -> Iterator[tuple[Block, set[Call]]]:
        """Blocks, and the calls on which the life of each depends."""
        yield from ((block, _calls_of(kept)) for block, kept in self.kept.items())
        yield from ((block, each.readers) for block, each in self.joined.items())

    def _candidates(self, calls: list[Call], tracer: Tracer) -> dict[Key, Candidate]:
        by_key: dict[Key, list[Call]] = defaultdict(list)
        for call in calls:
            by_key[call.key].append(call)
        inside: dict[Call, set[Block]] = defaultdict(set)
        for block, around in self._calls():
            for call in around:
                inside[call].add(block)
        found = {}
        for key, those in by_key.items():
            blocks = {block for call in those for block in inside[call]}
            if not blocks or any(call.writes or call.late or call.strange for call in those):
                continue
            if key[3] == AGAIN:
                again = sum(time_again(call, tracer) for call in those)
                found[key] = Candidate(key, those, again, blocks)
            if all(call.layers for call in those):
                again = sum(time_by_bands(call, tracer) for call in those)
                found[those[0].by_bands] = Candidate(those[0].by_bands, those, again, blocks)
        return found


def _calls_of(kept: Kept) -> set[Call]:
    """On which the life of a block depends."""
    keepers = {*kept.pieces, *kept.inputs}
    outer = {each for call in keepers for each in call.outer}
    spared = {call for calls in kept.spared.values() for call in calls}
    return {call for _, stack in kept.saved for call in stack} | {*kept.made} | keepers | outer | spared
