"""Maps between modules, raised or joined, that who reads them makes: so no caller holds them, or they never are whole.

A plain network holds such a map until the reader returns. What runs again makes it from its pieces and lets it go when it has
been read; a row by bands makes it row by row.
"""

from __future__ import annotations

from collections.abc import Collection, Container
from dataclasses import dataclass, field

from revseg.memory.follow import Block
from revseg.memory.trace import Call, Key, Tracer


@dataclass(eq=False)
class JoinedMap:
    """A map that is not kept.

    Args:
        size: Its bytes.
        born: The node of the forward pass that makes it.
        used: The last that has it in hands.
        gone: And that at which it goes.
        readers: The calls that could make it.
    """

    size: int
    born: int
    used: int
    gone: int
    readers: set[Call] = field(default_factory=set)

    def life(self, chosen: Container[Key]) -> tuple[int, int] | None:
        """The first and last node at which it is there; None if it never is."""
        if any(call.by_bands in chosen for call in self.readers):
            return None
        return self.born, self.used if any(call.is_in(chosen) for call in self.readers) else self.gone


def joined_maps_of(calls: Collection[Call], tracer: Tracer, kept: Container[Block]) -> dict[Block, JoinedMap]:
    """Those that come and go in the forward pass."""
    asked = {block for call in calls for block in call.joined if block not in kept}
    found: dict[Block, JoinedMap] = {}
    for event in tracer.events:
        if (
            event.block in asked
            and event.phase == "forward"
            and event.size < 0
            and event.block in tracer.used
        ):
            found[event.block] = JoinedMap(
                event.block.size, *tracer.used[event.block], gone=max(event.node - 1, 0)
            )
    for call in calls:
        for block in call.joined:
            if block in found:
                found[block].readers.add(call)
    return found
