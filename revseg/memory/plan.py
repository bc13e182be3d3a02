"""What to run again so that a step fits: a plan, as a value, and the search for it.

Everything that a plan does is exact: modules, or neighbouring children of a row, run again in the backward pass
(`revseg.layers.recompute`), nested where that helps. Which, is chosen by what each frees where the peak is for the
time that it takes; what comes last in the forward pass is never worth running again, and so stays as it is.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Collection, Container
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from revseg.convert.network import with_chains
from revseg.files import write_text
from revseg.memory.apply import Part, apply_parts
from revseg.memory.candidate import Candidate
from revseg.memory.estimate import Estimate
from revseg.memory.follow import Block
from revseg.memory.late import LateLoss
from revseg.memory.trace import AGAIN, WITH_NEXT, Key
from revseg.memory.working_set import Bytes

MIB = 2**20
_STEP = 0.95  # from one target to the next
_MISSES = 3  # targets that are not reached, until no more are tried


@dataclass(frozen=True)
class Plan:
    """What is run again in which network, and what that gives.

    Args:
        network: The class of the network.
        parts: What runs again.
        before: The predicted peak of a step without the plan, in bytes, parameters and all.
        peak: That with the plan.
        time: The estimated time of a step, as a multiple of that without the plan.
        by_bands: Whether `peak` is that of `model.loss(images, labels)`, by bands, and not of the loss of the output.
        chains: Names of residual blocks that become reversible chains first, each chain a tuple: another architecture
            (`revseg.reversible`), to which the names of `parts` belong.
    """

    network: str
    parts: tuple[Part, ...]
    before: int
    peak: int
    time: float
    by_bands: bool = False
    chains: tuple[tuple[str, ...], ...] = ()

    def apply(self, model: nn.Module, loss: Callable[..., Any] | None = None) -> nn.Module:
        """A copy of a network of the same class that runs by this plan.

        Args:
            model: The network; it is left as it was.
            loss: The criterion of the copy's `loss` (`revseg.memory.late.LateLoss`); None for no such attribute.

        Raises:
            ValueError: If the network lacks a module of the plan.
        """
        fitted = apply_parts(with_chains(model, self.chains), self.parts)
        fitted.__dict__["plan"] = self
        if loss is not None and not hasattr(fitted, "loss"):
            fitted.__dict__["loss"] = LateLoss(fitted, loss)
        return fitted

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON takes it."""
        return {**vars(self), "parts": [vars(part) for part in self.parts]}

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON."""
        write_text(Path(path), json.dumps(self.as_json(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """The plan of a file.

        Raises:
            ValueError: If there is no plan in it.
        """
        try:
            found = json.loads(Path(path).read_text())
            parts, chains = map(_part, found["parts"]), map(tuple, found.get("chains", ()))
            return cls(**{**found, "parts": tuple(parts), "chains": tuple(chains)})
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"expected a plan as JSON, got {path}: {error}") from error

    def __str__(self) -> str:
        head = (
            f"{self.network}: peak {self.before / MIB:,.1f} -> {self.peak / MIB:,.1f} MiB "
            f"({self.before / self.peak:.1f} x less), about {self.time:.2f} x the time"
        )
        bands = ["  by bands: the loss, as model.loss(images, labels)"] if self.by_bands else []
        again = [f"  runs again: {part}" for part in self.parts if not part.by_bands]
        by_bands = [f"  by bands: {part}" for part in self.parts if part.by_bands]
        chains = [f"  reversible, another architecture: {', '.join(names)}" for names in self.chains]
        return "\n".join([head, *chains, *bands, *by_bands, *again])


def _part(found: dict[str, Any]) -> Part:
    return Part(**{**found, "members": tuple(found["members"])})


@dataclass(frozen=True)
class Choice:
    """Candidates, with the estimated peak beyond what stands, and the time."""

    chosen: dict[Key, Candidate]
    peak: int
    time: float


Move = tuple[Candidate, ...]  # chosen together


def choices(estimate: Estimate, bands: bool = False) -> list[Choice]:
    """What could be run again, from nothing to the least memory that is found; none has both more memory and more time.

    They do not depend on what is asked for, so that a smaller budget never leads to a higher peak.

    Args:
        estimate: Of the step.
        bands: Whether rows may go by bands.
    """
    groups = estimate.groups()
    moves: list[Move] = [(c,) for key, c in estimate.candidates.items() if bands or key[3] == AGAIN]
    ways = _on_the_way(estimate, [*moves, *groups])
    if groups:  # modules that share inputs are found by either
        with estimate.without_inputs():
            ways += _on_the_way(estimate, moves)
    found = [Choice({}, int(estimate.live({}).max()), 1.0)]
    found += [Choice(c, int(estimate.live(c).max()), estimate.extra(c.values())) for c in ways]
    best = [c for c in found if not any(o.peak <= c.peak and o.time < c.time for o in found)]
    return [replace(c, time=estimate.time(c.chosen.values())) for c in best]


def _on_the_way(estimate: Estimate, moves: list[Move]) -> list[dict[Key, Candidate]]:
    """What is chosen for lower and lower targets, until some are missed."""
    peak = int(estimate.live({}).max())
    alone = [estimate.difference(_blocks(m), {}, {c.key: c for c in m}) for m in moves]
    found: list[dict[Key, Candidate]] = []
    target, misses = peak, 0
    while misses < _MISSES and target > 0:
        target = int(_STEP * target)
        found.append(_towards(estimate, target, moves, alone))
        misses = misses + 1 if int(estimate.live(found[-1]).max()) > target else 0
    return found


def _towards(estimate: Estimate, target: int, moves: list[Move], alone: list[Bytes]) -> dict[Key, Candidate]:
    """Makes the move that takes most off above the target for its time, until nothing is above it or nothing helps.

    Args:
        estimate: Of the step.
        target: The most bytes at any node.
        moves: What may be chosen, together.
        alone: How the bytes at each node change by one of them alone.
    """
    chosen: dict[Key, Candidate] = {}
    live = estimate.live(chosen)
    queue = []
    for i, (move, difference) in enumerate(zip(moves, alone, strict=True)):
        gain = -_gain(live, live + difference, target) / max(_cost(move), 1e-9)
        if gain < 0:
            queue.append((gain, i, 0))
    heapq.heapify(queue)
    crossed: set[Key] = set()  # by what is chosen
    round_, swept = 0, 0  # moves that were made, and until the last sweep
    while live.max() > target:
        if not queue:  # what had no gain before the last moves may have some now
            if swept == round_:
                break
            queue, swept = [(-float("inf"), i, -1) for i in range(len(moves))], round_
        gain, i, known = heapq.heappop(queue)
        replaced = _replaced(moves[i], chosen)
        within = crossed if not replaced else _crossed(estimate, chosen, replaced)
        move = tuple(c for c in moves[i] if c.key not in within and c.key not in chosen)
        if not move:
            continue
        kept = {key: other for key, other in chosen.items() if key not in replaced}
        more = {**kept, **{c.key: c for c in move}}
        difference = estimate.difference(_blocks((*move, *replaced.values())), chosen, more)
        if known < round_:  # its gain was that of an earlier choice
            cost = _cost(move) - _cost(tuple(replaced.values()))
            gain = -_gain(live, live + difference, target) / max(cost, 1e-9)
            if gain < 0:
                heapq.heappush(queue, (gain, i, round_))
            continue
        live, chosen = live + difference, more
        crossed = _crossed(estimate, chosen)
        round_ += 1
    return _without_needless(estimate, chosen, live, target)


def _replaced(move: Move, chosen: dict[Key, Candidate]) -> dict[Key, Candidate]:
    """What goes where a row goes by bands: what is inside of it, and what holds the row without what that takes in."""
    row, how = move[0], move[0].key[3]
    if how == AGAIN:
        return {}
    return {
        key: c for key, c in chosen.items() if row.replaces(c) or (how == WITH_NEXT and key in row.crossing)
    }


def _crossed(estimate: Estimate, chosen: dict[Key, Candidate], without: Container[Key] = ()) -> set[Key]:
    """The candidates that cannot be added."""
    return set().union(*(estimate.crossed_by(c) for key, c in chosen.items() if key not in without))


def _blocks(move: Move) -> Collection[Block]:
    return move[0].blocks if len(move) == 1 else set().union(*(c.blocks for c in move))


def _cost(move: Move) -> float:
    return sum(c.cost for c in move)


def _gain(live: Bytes, after: Bytes, target: int) -> float:
    """How much less there is above the target, summed over the step."""
    return float(np.maximum(live - target, 0).sum() - np.maximum(after - target, 0).sum())


def _without_needless(
    estimate: Estimate, chosen: dict[Key, Candidate], live: Bytes, target: int
) -> dict[Key, Candidate]:
    """The choice without what later ones have made needless, the dearest first; what costs less in their places if that will do."""
    limit = max(target, int(live.max()))
    for key, candidate in sorted(chosen.items(), key=lambda item: -item[1].cost):
        fewer = {k: c for k, c in chosen.items() if k != key}
        simpler = (estimate.candidates.get((*key[:3], how)) for how in range(key[3]))
        for instead in (fewer, *({**fewer, c.key: c} for c in simpler if c is not None)):
            without = live + estimate.difference(candidate.blocks, chosen, instead)
            if int(without.max()) <= limit:
                chosen, live = instead, without
                break
    return chosen
