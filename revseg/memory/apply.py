"""Modules that run again, in the places where they are.

A wrapper would move a module: `model.layer1[0].conv1`, loops over the children of a row and checks of a class would
not find it. So the module stays, and gets a class of its own, derived from the one it has, whose `forward` runs again what was its
`forward`. Names, hooks, attributes and the state dict are the same.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import nn

from revseg.engine.tracing import has_hooks
from revseg.memory.handed_on import TakesIn
from revseg.memory.late import LateLoss, made_at_the_end
from revseg.memory.remake import FromPieces, begins_again, noting
from revseg.memory.run_again import Row, RunAgain, Segment, parts_of
from revseg.memory.waiting import is_step


@dataclass(frozen=True)
class Part:
    """What runs again: a module, or modules called one after the other in it.

    Args:
        name: Of the module, as in `named_modules`.
        first: Of a segment, the number of its first call among those in the module; None for the whole module.
        behind: The number of the call behind its last.
        members: The names of the modules of a segment; none if it is of the children of a row.
        by_bands: Whether a segment goes by bands.
        takes: The name of a convolution behind it that then goes by bands with it; none if it ends by itself.
        compact: Whether gradients of what is joined before it are copied out of the whole (`revseg.layers.recompute.Recompute`).
    """

    name: str
    first: int | None = None
    behind: int | None = None
    members: tuple[str, ...] = ()
    by_bands: bool = False
    takes: str = ""
    compact: bool = False

    @property
    def segment(self) -> Segment | None:
        """Its places; None for a whole module."""
        if self.first is None or self.behind is None:
            return None
        return Segment(self.first, self.behind, self.by_bands, bool(self.takes), self.compact)

    def __str__(self) -> str:
        behind = f", and {self.takes}" if self.takes else ""
        if self.members:
            return f"{self.members[0]} to {self.members[-1]}{behind}"
        place = self.name if self.first is None else f"{self.name or 'children'}[{self.first}:{self.behind}]"
        return place + behind


def apply_parts(model: nn.Module, parts: Iterable[Part]) -> nn.Module:
    """A copy of the network in which these parts run again.

    Raises:
        ValueError: If the network lacks one of them.
    """
    fitted = as_it_was(model)
    modules = dict(fitted.named_modules())
    by_name: dict[str, list[Part]] = {}
    lines: dict[str, list[Part]] = {}
    taken: list[str] = []
    for part in parts:
        behind = (part.takes,) if part.takes else ()
        taken += behind
        for name in (*(part.members or (part.name,)), *behind):
            if name not in modules:
                raise ValueError(f"expected a network with a module {name!r}, got {type(model).__name__}")
            own = name == part.name and not part.members
            by_name.setdefault(name, []).extend((part,) if own else ())
        if part.members:
            lines.setdefault(part.name, []).append(part)
    for name, those in by_name.items():
        _run_again(modules[name], those)
    for name in taken:
        runs: _Runs = modules[name].__dict__["_runs"]
        runs.now = TakesIn(modules[name], runs.now)
    for those in lines.values():
        _line_up(modules, those)
    if by_name and not isinstance(fitted, _Again):
        _run_again(fitted, [])  # what it joins itself is noted too
    for module in fitted.modules():
        if isinstance(module, _Again):
            module.__dict__["_runs"].let_maps_wait()
    return fitted


def as_it_was(model: nn.Module) -> nn.Module:
    """A copy of the network in which nothing of this kind runs again."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, _Again):
            given = module.__dict__.pop("_runs").given
            module.__class__ = module._kind  # type: ignore[assignment]
            if given is not None:
                module.__dict__["forward"] = given
    plain.__dict__.pop("plan", None)
    if isinstance(plain.__dict__.get("loss"), LateLoss):
        del plain.__dict__["loss"]
    return plain


def _run_again(module: nn.Module, parts: list[Part]) -> None:
    whole = [part for part in parts if part.first is None]  # none if it is only a member of segments
    segments = _segments(parts)
    children = list(module.children())
    if segments and segments[-1][1] > len(children):
        raise ValueError(f"expected a row of {segments[-1][1]} modules at the least, got {len(children)}")
    given = module.__dict__.pop("forward", None)  # put there by somebody, in the place of the class's
    if segments:
        inner: nn.Module = Row(children, segments)
    else:
        inner = _Original(module, type(module), given)
    module.__class__ = again(type(module))  # type: ignore[arg-type]
    module.__dict__["_runs"] = _Runs(RunAgain(inner, whole[0].compact) if whole else inner, given)


def _segments(parts: Iterable[Part]) -> list[Segment]:
    return sorted(found for part in parts if (found := part.segment) is not None)


def _line_up(modules: dict[str, nn.Module], parts: list[Part]) -> None:
    """Lets the first member of each segment run all of it."""
    where = {(part.first or 0) + i: name for part in parts for i, name in enumerate(part.members)}
    segments = _segments(parts)
    line = _Line()
    for i, j, *_ in segments:
        if any(s.first <= i and j <= s.behind and s[:2] != (i, j) for s in segments):
            continue  # a piece of another one
        members = [modules[where[k]] for k in range(i, j)]
        inner = [s.moved(-i) for s in segments if i <= s.first and s.behind <= j]
        runs = [member.__dict__["_runs"] for member in members]
        (segment,) = parts_of([each.now for each in runs], members, (0, j - i), inner)
        runs[0].leads = _Segment(segment, members[1:], line)
        for each in runs[1:]:
            if line not in each.follows:
                each.follows.append(line)


@dataclass(eq=False)
class _Line:
    """What segments of the calls in one module share: who is called next, and with what."""

    waiting: list[nn.Module] = field(default_factory=list)
    value: Any = None


@dataclass(eq=False)
class _Segment:
    """What the first of its members runs; the others, called with what that returned, return it."""

    module: nn.Module
    others: list[nn.Module]
    line: _Line


@dataclass(eq=False)
class _Runs:
    """What a module runs, held where no children are looked for, so that names stay as they are."""

    now: nn.Module
    given: Any
    waits: bool = False  # whether maps that are joined or raised wait
    leads: _Segment | None = None
    follows: list[_Line] = field(default_factory=list)

    def let_maps_wait(self) -> None:
        """Those that are joined or raised are made when somebody looks at them, in both runs."""
        self.waits = True
        for each in (self.now, *([self.leads.module] if self.leads else [])):
            for inner in each.modules():
                if isinstance(inner, FromPieces):
                    inner.waits = True

    def in_line(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call in training."""
        for line in self.follows:
            if not line.waiting:
                continue
            is_next, is_handed_on = line.waiting[0] is module, args[0] is line.value
            if not (is_next or is_handed_on):
                continue
            if not (is_next and is_handed_on):
                line.waiting.clear()
                raise RuntimeError(
                    f"expected {type(module).__name__} to be called as when the plan was made, with what the module "
                    "before it returned; fit the network anew, with what it does now"
                )
            del line.waiting[0]
            if not line.waiting:
                line.value = None
            return args[0]
        if self.leads is None:
            return self.now(*args, **kwargs)
        line = self.leads.line
        value = line.value = self.leads.module(*args, **kwargs)
        line.waiting = list(self.leads.others)
        return value


@cache
def again(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of modules of this kind that run again."""
    attributes = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "_kind": kind}
    return type(kind.__name__, (_Again, kind), attributes)


class _Again:
    _kind: type[nn.Module]
    training: bool

    @property
    def begins_again(self) -> bool:
        runs: _Runs = self.__dict__["_runs"]
        alone = not (runs.leads or runs.follows or has_hooks(self))  # type: ignore[arg-type]
        return alone and begins_again(runs.now)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        runs: _Runs = self.__dict__["_runs"]
        in_line = (runs.leads or runs.follows) and self.training and is_step()
        with noting(waits=runs.waits) as notes:
            value = runs.in_line(self, args, kwargs) if in_line else runs.now(*args, **kwargs)  # type: ignore[arg-type]
            return value if notes is None else made_at_the_end(value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _bare, (self._kind,), self.__dict__


def _bare(kind: type[nn.Module]) -> nn.Module:
    """A module without content, to be filled by copy or pickle."""
    made = again(kind)  # type: ignore[arg-type]
    return made.__new__(made)


class _Original(nn.Module):
    """What a module did before it ran again."""

    def __init__(self, module: nn.Module, kind: type[nn.Module], given: Any) -> None:
        super().__init__()
        self.module, self.kind, self.given = module, kind, given

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.given is not None:
            return self.given(*args, **kwargs)
        return self.kind.forward(self.module, *args, **kwargs)
