"""What a plan can choose: modules and segments that run again, or go by bands."""

from __future__ import annotations

from dataclasses import dataclass

from revseg.memory.follow import Block
from revseg.memory.trace import AGAIN, Call, Key


@dataclass(eq=False)
class Candidate:
    """A module, or a segment of a row, that could run again."""

    key: Key
    calls: list[Call]
    cost: float
    blocks: set[Block]  # of which the lives depend on this choice

    def __post_init__(self) -> None:
        around = [{call.by_bands for call in each.outer if call.layers} for each in self.calls]
        self.around = set.intersection(*around)
        self.crossing = {key for call in self.calls for key in call.crossing}

    def crosses(self, other: Candidate) -> bool:
        """Whether this cannot be added to the other: each holds a part of the other and not all, or this is inside of bands."""
        (name, a, b, _), (other_name, c, d, _) = self.key, other.key
        if self.is_in(other) or self.key in other.crossing or other.key in self.crossing:
            return True
        return name == other_name and a >= 0 and c >= 0 and (a < c < b < d or c < a < d < b)

    def replaces(self, other: Candidate) -> bool:
        """Whether the other is inside of this one, which goes by bands: nothing in it runs by itself then."""
        return other.is_in(self)

    def is_in(self, other: Candidate) -> bool:
        """Whether this is inside of the other, or the same, and that goes by bands."""
        the_same = self.key[:3] == other.key[:3] and self.key[3] < other.key[3]
        return other.key[3] != AGAIN and (the_same or other.key in self.around)
