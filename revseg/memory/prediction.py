"""What a prediction says: the peak of a step, and who stands there."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from revseg.memory.follow import Block, Follower

KINDS = ("parameters", "optimizer", "inputs", "gradients", "kept activations", "loss", "working set")
MIB = 2**20


@dataclass(frozen=True)
class ModuleMemory:
    """What a module has of the memory, without the modules inside of it.

    Args:
        name: As in `named_modules`, "" for the network itself.
        kind: The class.
        kept: Bytes that stand between its forward and its backward pass.
        at_peak: Bytes at the peak, parameters not counted.
    """

    name: str
    kind: str
    kept: int
    at_peak: int


@dataclass(frozen=True)
class Moment:
    """The memory after something came or went.

    Args:
        phase: "forward", "loss", "backward" or "optimizer".
        module: Which module runs, or has its gradient computed.
        bytes: By kind, in the order of `KINDS`.
    """

    phase: str
    module: str
    bytes: tuple[int, ...]


@dataclass(frozen=True)
class Prediction:
    """The peak of a step.

    Args:
        peak: Bytes at the highest moment: all that is there, parameters included.
        before: Bytes that stand before the step: parameters, buffers, the optimizer's state, inputs.
        parts: The peak by kind, in bytes.
        phase: When the peak is: "forward", "loss", "backward" or "optimizer".
        module: In which module.
        operation: What made the block that reaches the peak.
        modules: A row a module, in the order of the network.
        history: The memory at each moment of the step.
        costs: Estimated seconds by phase and module; only their ratios mean something.
    """

    peak: int
    before: int
    parts: dict[str, int]
    phase: str
    module: str
    operation: str
    modules: list[ModuleMemory]
    history: list[Moment] = field(repr=False)
    costs: dict[tuple[str, str], float] = field(repr=False)

    @property
    def step_bytes(self) -> int:
        """The peak beyond what stands before the step: what `peak_bytes` measures."""
        return self.peak - self.before

    @classmethod
    def of(cls, model: nn.Module, standing: list[Block], follower: Follower) -> Prediction:
        """What the blocks of a run say."""
        now = Counter(dict.fromkeys(KINDS, 0))
        for block in standing:
            now[_kind(block)] += block.size
        before = sum(now.values())
        alive: Counter[Block] = Counter()
        history = [Moment("forward", "", tuple(now.values()))]
        most, best, event_there, at_peak = before, dict(now), None, dict(alive)
        for event in follower.events:
            kind = _kind(event.block)
            now[kind] += event.size
            alive[event.block] += event.size
            total = sum(now.values())
            history.append(Moment(event.phase, event.module, tuple(now.values())))
            if total > most:
                most, best, event_there = total, dict(now), event
                at_peak = {b: size for b, size in alive.items() if size}
        kept: Counter[str] = Counter()
        there: Counter[str] = Counter()
        for block in {event.block for event in follower.events if event.block.kept}:
            kept[block.module] += block.size
        for block, size in at_peak.items():
            there[block.module] += size
        named = {name: type(module).__name__ for name, module in model.named_modules()}
        rows = [
            ModuleMemory(name, named.get(name, ""), kept[name], there[name])
            for name in [*named, *follower.around.values()]
            if kept[name] or there[name]
        ]
        return cls(
            peak=most,
            before=before,
            parts=best,
            phase="before" if event_there is None else event_there.phase,
            module="" if event_there is None else event_there.module,
            operation="" if event_there is None else event_there.block.operation,
            modules=rows,
            history=history,
            costs=dict(follower.costs),
        )

    def as_json(self) -> dict[str, Any]:
        """All but the history, as JSON takes it."""
        found = {
            key: value for key, value in vars(self).items() if key not in ("history", "costs", "modules")
        }
        return {**found, "step_bytes": self.step_bytes, "modules": [asdict(row) for row in self.modules]}

    def table(self, rows: int = 12) -> str:
        """The parts of the peak, and the modules that have most of it."""
        where = f"the {self.phase} pass" if self.phase in ("forward", "backward") else f"the {self.phase}"
        lines = [f"peak {_mib(self.peak)} in {where}" + (f" of {self.module}" if self.module else "")]
        lines += [f"  {kind:<18}{_mib(size):>12}" for kind, size in self.parts.items() if size]
        largest = sorted(self.modules, key=lambda row: max(row.kept, row.at_peak), reverse=True)[:rows]
        if largest:
            width = max(len("module"), *(len(_title(row)) for row in largest))
            lines.append(f"{'module':<{width}}{'kept':>12}{'at the peak':>14}")
            shown = [row for row in self.modules if row in largest]
            lines += [f"{_title(row):<{width}}{_mib(row.kept):>12}{_mib(row.at_peak):>14}" for row in shown]
            if len(self.modules) > len(shown):
                rest = [row for row in self.modules if row not in largest]
                kept, there = (sum(getattr(row, key) for row in rest) for key in ("kept", "at_peak"))
                lines.append(f"{f'{len(rest)} others':<{width}}{_mib(kept):>12}{_mib(there):>14}")
        return "\n".join(lines)

    __str__ = table


def _kind(block: Block) -> str:
    if block.kind:
        return block.kind
    if block.module == "(loss)":
        return "loss"
    return "kept activations" if block.kept else "working set"


def _title(row: ModuleMemory) -> str:
    return f"{row.name or '(network)'} {row.kind}".strip()


def _mib(size: int) -> str:
    return f"{size / MIB:,.1f} MiB"
