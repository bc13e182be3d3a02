"""The order of programs, which a GPU leaves open and the interpreter does not."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from triton.runtime.interpreter import InterpreterBuilder


@contextmanager
def reversed_order() -> Iterator[None]:
    """The last program of a grid runs first."""
    run = InterpreterBuilder.set_grid_idx

    def run_reversed(self: InterpreterBuilder, *index: int) -> None:
        run(self, *(n - 1 - i for n, i in zip(self.grid_dim, index, strict=True)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "set_grid_idx", run_reversed)
        yield
