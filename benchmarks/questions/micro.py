"""What does each part of a step cost, beside the functions of PyTorch that it stands in for?

pytest-benchmark times the cases of `benchmarks.micro.cases` in a process of its own.

    python -m benchmarks measure micro --rounds 20
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.micro.cases import CASES, MAP, TINY, TOY
from benchmarks.record import Result, Results, Row
from benchmarks.tables import Table, markdown, source

QUESTION = "What does each part of a step cost, beside the functions of PyTorch that it stands in for?"
ORDER = 8


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--toy", action="store_true", help="small maps, for a look at the table")


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {"shape": list(TOY if args.toy else MAP), "tiny": list(TINY), "threads": args.threads}


def measure(args: argparse.Namespace) -> Iterator[list[Row]]:
    torch.set_num_threads(args.threads)
    yield rows_of(args.cases, args.rounds, args.threads, args.toy)


def rows_of(cases: list[str], rounds: int, threads: int, toy: bool) -> list[Row]:
    """Rows of case, and of ours and plain each: median_ms, iqr_ms and rounds."""
    # pytest-benchmark times nothing where pytest-xdist has left its marks
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"OMP_NUM_THREADS": str(threads), "MICRO_ROUNDS": str(rounds)}
    environment["MICRO_TOY"] = str(int(toy))
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        nodes = [
            f"benchmarks/micro/test_micro.py::test_micro[{case}-{way}]"
            for case in cases
            for way in ("ours", "plain")
        ]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-enable"]
        command += [f"--benchmark-json={found}", *nodes]
        subprocess.run(command, env=environment, cwd=record.ROOT, check=True)
        timed = json.loads(found.read_text())["benchmarks"]
    rows: dict[str, Row] = {case: {"case": case} for case in cases}
    for each in timed:
        stats, info = each["stats"], each["extra_info"]
        rows[info["case"]][info["way"]] = {
            "median_ms": round(1e3 * stats["median"], 4),
            "iqr_ms": round(1e3 * stats["iqr"], 4),
            "rounds": stats["rounds"],
        }
    return list(rows.values())


HEAD = """\
## The parts of a step

Milliseconds, median and in brackets the distance of the quartiles, by pytest-benchmark
([cases](micro/cases.py)): ours, and its twin of PyTorch's functions after it in the same run. The exact sums and the
packing of residues do more than their twins, which lose what rounding takes; `sequence_step` is a tiny tensor, all
overhead.
"""


def sections(results: Results) -> list[str]:
    result = results.get("micro")
    return [HEAD, markdown(table(result)), source(result)] if result else []


def table(result: Result) -> Table:
    """Cases down."""
    rows = [
        [
            row["case"],
            _cell(row["ours"]),
            _cell(row["plain"]),
            f"{row['ours']['median_ms'] / row['plain']['median_ms']:.2f}",
            str(row["ours"]["rounds"]),
        ]
        for row in result["rows"]
    ]
    return ["", "ours, ms", "plain, ms", "ratio", "rounds"], rows


def _cell(times: dict[str, Any]) -> str:
    return f"{times['median_ms']:.3g} ({times['iqr_ms']:.2g})"
