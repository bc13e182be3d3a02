"""Results that the second run of a function takes from the first.

A function that runs again in the backward pass repeats all of its work. Where a small result
comes of large work, like the statistics of a batch, it calls `remember(make)`: the first run notes
what `make()` gives, the second run is handed the note. Outside of such runs it is `make()`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

T = TypeVar("T")

_thread = threading.local()


def remember(make: Callable[[], T]) -> T:
    """What `make()` gives; in the second run of a function, what it gave in the first.

    A function must call this in the same order in both runs.
    """
    notes: _Notes | None = getattr(_thread, "notes", None)
    return make() if notes is None else notes.next(make)


def noting() -> AbstractContextManager[list[Any]]:
    """A first run: the results, collected while the context lasts.

    Inside of another run its notes are asked first, so that nothing is made twice.
    """
    return _Notes([], getattr(_thread, "notes", None), again=False)


def reminding(results: list[Any]) -> AbstractContextManager[list[Any]]:
    """A second run: the results of the first are handed out in their order."""
    return _Notes(results, None, again=True)


class _Notes:
    def __init__(self, results: list[Any], outer: _Notes | None, again: bool) -> None:
        self.results, self.outer, self.again = results, outer, again
        self.position = 0

    def __enter__(self) -> list[Any]:
        self.before: _Notes | None = getattr(_thread, "notes", None)
        _thread.notes = self
        return self.results

    def __exit__(self, *error: object) -> None:
        _thread.notes = self.before

    def next(self, make: Callable[[], T]) -> T:
        if not self.again:
            self.results.append(make() if self.outer is None else self.outer.next(make))
        elif self.position == len(self.results):
            return make()  # the function does something else this time, which the drift check reports
        self.position += 1
        result: T = self.results[self.position - 1]
        return result
