"""Asks questions: each runs as long as it must, its rows written as they come.

    python -m benchmarks measure                       all, then the report; hours on two cores
    python -m benchmarks measure drift step_time       some
    python -m benchmarks measure drift --depths 4 8    one, with its own options (`--help` says which)

Times mean something only on a machine that does nothing else; memory alone (`measure memory_depth`) is left
alone by any load.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import record
from benchmarks.questions import questions


def main(arguments: Sequence[str]) -> None:
    """Runs the command after `python -m benchmarks measure`."""
    found = questions()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks measure",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    everything = [name for name, question in found.items() if not getattr(question, "ASKED_ALONE", False)]
    parser.add_argument("names", nargs="*", choices=[[], *found], metavar="NAME", help=", ".join(found))
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="the folder of the results")
    named = [each for each in arguments[:2] if each in found]
    if len(named) == 1:
        ask(named[0], arguments[1:])
        return
    args = parser.parse_args(arguments)
    out = str(args.out.resolve())
    for name in args.names or everything:
        command = [sys.executable, "-m", "benchmarks", "measure", name, "--out", out]
        subprocess.run(command, cwd=record.ROOT, check=True)
    report = [sys.executable, "-m", "benchmarks", "report", "--results", out]
    subprocess.run(report, cwd=record.ROOT, check=True)


def ask(name: str, arguments: Sequence[str]) -> None:
    """Measures one question, with its own options, and draws its picture.

    Raises:
        SystemExit: With 1 if something in the rows is wrong.
    """
    question = questions()[name]
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks measure {name}",
        description=question.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    question.add_options(parser)
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="the folder of the results")
    args = parser.parse_args(arguments)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which counts memory, talks to stderr
    settings = question.settings(args)
    rows: list[record.Row] = []
    for rows in question.measure(args):
        path = record.write(name, question.QUESTION, rows, settings, args.out)
    print("wrote", path)
    if draw := getattr(question, "draw", None):
        draw(record.read(path), args.out / f"{name}.png")
        print("wrote", args.out / f"{name}.png")
    complaints = getattr(question, "complaints", lambda rows: [])(rows)
    if complaints:
        print(*complaints, sep="\n", file=sys.stderr)
        sys.exit(1)
