"""The questions, one file each; a file that is put here is measured, reported and drawn.

A file has

    QUESTION                 one sentence
    ORDER                    where its sections stand in `benchmarks/README.md`, the least first
    add_options(parser)      the options of `python -m benchmarks measure NAME`
    settings(args)           what holds for all rows
    measure(args)            yields all rows so far, each time there are more
    sections(results)        the text that the result files give; nothing where there are none

and where it likes

    SHORT_ORDER, in_short(results)   what stands before all sections
    draw(result, path)               a picture, `results/NAME.png`
    complaints(rows)                 what is wrong in the rows, a sentence each: the command then fails
    ASKED_ALONE                      True where it is measured only by its name, not with all the others
"""

import argparse
from collections.abc import Iterator
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Protocol, cast

from benchmarks.record import Results, Row


class Question(Protocol):
    """What a file here has; the rest is looked up by name."""

    __doc__: str
    __name__: str
    QUESTION: str
    ORDER: float

    def add_options(self, parser: argparse.ArgumentParser) -> None: ...

    def settings(self, args: argparse.Namespace) -> dict[str, Any]: ...

    def measure(self, args: argparse.Namespace) -> Iterator[list[Row]]: ...

    def sections(self, results: Results) -> list[str]: ...


def questions() -> dict[str, Question]:
    """All of them by name, in the order of their sections."""
    names = sorted(module.name for module in iter_modules(__path__))
    found = {name: cast(Question, import_module(f"{__name__}.{name}")) for name in names}
    return dict(sorted(found.items(), key=lambda each: each[1].ORDER))
