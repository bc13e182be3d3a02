"""What runs again in the backward pass: a module, or modules called one after the other, segments of them together."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

from torch import nn

from revseg.layers.recompute import Recompute
from revseg.memory.late import nothing_waits
from revseg.memory.remake import FromPieces, begins_again, called_by_pieces, made
from revseg.memory.row_by_bands import BANDS, RowByBands
from revseg.memory.waiting import is_step, training_step


class Segment(NamedTuple):
    """Modules called one after the other: the first, behind the last.

    Args:
        first: Its place.
        behind: That of the one behind the last.
        by_bands: Whether they go by bands.
        hands_on: Whether a convolution behind takes them in then.
        compact: See `revseg.layers.recompute.Recompute`.
    """

    first: int
    behind: int
    by_bands: bool
    hands_on: bool = False
    compact: bool = False

    def moved(self, by: int) -> Segment:
        """The same, so many places further on."""
        return self._replace(first=self.first + by, behind=self.behind + by)


class RunAgain(nn.Module):
    """A module that runs again, and keeps of its arguments the pieces.

    Args:
        module: The module.
        compact: See `revseg.layers.recompute.Recompute`.
    """

    begins_again = True

    def __init__(self, module: nn.Module, compact: bool) -> None:
        super().__init__()
        self.module = Recompute(FromPieces(module), compact=compact)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with nothing_waits(), training_step() if is_step() else nullcontext():
            return called_by_pieces(self.module, args, kwargs)


class _Chain(nn.Module):
    """Modules one after the other, the first with whatever it is called with: a map that is made for it goes when it is done."""

    begins_again = True

    def __init__(self, modules: nn.ModuleList) -> None:
        super().__init__()
        self.first, self.others = modules[0], modules[1:]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if begins_again(self.first):
            x = self.first(*args, **kwargs)
        else:
            x = self.first(*made(args), **made(kwargs))
        for module in self.others:
            x = module(x)
        return x


class Row(nn.Module):
    """Children called one after the other, segments of them run again, segments inside of segments too."""

    def __init__(self, children: list[nn.Module], segments: list[Segment]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts_of(children, children, (0, len(children)), segments))

    @property
    def begins_again(self) -> bool:
        return begins_again(self.parts[0])

    def forward(self, x: Any) -> Any:
        for part in self.parts:
            x = part(x)
        return x


def parts_of(
    runs: list[nn.Module], modules: list[nn.Module], where: tuple[int, int], segments: list[Segment]
) -> list[nn.Module]:
    """What is called one after the other from a first to behind a last place.

    Args:
        runs: What each place runs.
        modules: The modules in these places, for what goes by bands.
        where: From which place on, and behind which.
        segments: Places that run again together.
    """
    found: list[nn.Module] = []
    begin, end = where
    while begin < end:
        here = [s for s in segments if s.first == begin and s.behind <= end]
        if not here:
            found.append(runs[begin])
            begin += 1
            continue
        largest = max(here, key=lambda s: s[1:])
        first, begin, by_bands, hands_on, compact = largest
        inner = [s for s in segments if s != largest and first <= s.first and s.behind <= begin]
        again = RunAgain(_Chain(nn.ModuleList(parts_of(runs, modules, (first, begin), inner))), compact)
        found.append(RowByBands(modules[first:begin], again, BANDS, hands_on) if by_bands else again)
    return found
