"""What do the kernels take of a GPU, and do they compile for all of them?

Every operation is compiled as it would be launched, forward and backward, for GPUs that need not be there:
registers of a thread, instructions that spill them, shared memory of a program. The tests do this for a
part of the cases; this is all of them, half an hour on two cores.

    python -m benchmarks measure compile_ahead --targets sm_90 --operations asymmetric_conv --jobs 2

The file has a row for each GPU and operation: the cases, the most that a kernel takes, and the kernels that spill or
fail one by one. Of a part, the other rows stay as they are, and must be of the same machine and Triton.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from typing import Any

import torch

from benchmarks import record
from benchmarks.ahead import TARGETS, compile_launches
from benchmarks.ahead_cases import Case, all_cases, operations
from benchmarks.record import Result, Results, Row
from benchmarks.tables import Table, markdown, source

QUESTION = "What do the kernels take of a GPU, and do they compile for all of them?"
ORDER = 9
ASKED_ALONE = True  # a machine without a GPU says the same as any other

FEW = "a few of thousands of instructions, of values used once a tile"

# Kernels that spill and are used all the same: by operation, kernel and target how often at most, and why.
SPILLS_KNOWN: dict[tuple[str, str, str], tuple[int, str]] = {
    ("asymmetric_conv", "_backward_kernel", "sm_80"): (6, FEW),
    ("asymmetric_conv", "_forward_kernel", "sm_86"): (2, FEW),
    ("asymmetric_conv", "_backward_kernel", "sm_86"): (9, FEW),
    ("asymmetric_conv", "_backward_kernel", "sm_90"): (3, FEW),
    ("asymmetric_conv", "_forward_kernel", "sm_100"): (3, FEW),
    ("asymmetric_conv", "_backward_kernel", "sm_100"): (8, FEW),
    ("asymmetric_conv", "_backward_kernel", "gfx942"): (8, FEW),
    ("bn_act_backward", "_add_kernel", "sm_86"): (4, FEW),
    ("sum_of_pools", "_forward_kernel", "gfx942"): (2, FEW),
    ("upsample_cross_entropy", "_pass_kernel", "sm_75"): (5, FEW),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--operations", nargs="+", default=list(operations()), choices=list(operations()))
    parser.add_argument("--jobs", type=int, default=os.cpu_count())


def settings(args: argparse.Namespace) -> dict[str, Any]:
    limits = {name: target.shared for name, target in TARGETS.items()}
    return {"triton": version("triton"), "shared_memory": limits}


def measure(args: argparse.Namespace) -> Iterator[list[Row]]:
    groups = everything()
    again = [key for key in groups if key[0] in args.targets and key[1] in args.operations]
    rows = kept_rows(args, again)
    with tempfile.TemporaryDirectory() as cache:
        pool = ProcessPoolExecutor(args.jobs, get_context("spawn"), _start, (cache,))
        with pool:
            for target, operation in again:
                cases = groups[target, operation]
                found = pool.map(compile_case, [target] * len(cases), cases)
                rows[target, operation] = summary(cases, [each for kernels in found for each in kernels])
                print(rows[target, operation], flush=True)
                yield [rows[key] for key in groups if key in rows]


def kept_rows(args: argparse.Namespace, again: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Row]:
    """`record.earlier_rows` by GPU and operation, without those that are compiled again or are no more."""
    stays = everything().keys() - set(again)
    path = args.out / "compile_ahead.jsonl"
    rows = record.earlier_rows(path, settings(args), lambda row: key_of(row) in stays)
    return {key_of(row): row for row in rows}


def key_of(row: Row) -> tuple[str, str]:
    """GPU and operation of a row."""
    return row["target"], row["operation"]


def everything() -> dict[tuple[str, str], list[Case]]:
    """By GPU and operation: the cases that it may be given."""
    found: dict[tuple[str, str], list[Case]] = {}
    for target in TARGETS:
        for case in all_cases():
            if case.runs_on(target):
                found.setdefault((target, case.operation), []).append(case)
    return found


def compile_case(target: str, case: Case) -> list[Row]:
    """A row for each kernel of a case: what it takes, or why it does not compile.

    Args:
        target: A key of `TARGETS`.
        case: What is launched.
    """
    row: Row = {"target": target, **case._asdict()}
    try:
        return [row | each.as_row() for each in compile_launches(target, case.launch)]
    except Exception as error:  # noqa: BLE001, compilers raise what they like
        return [row | {"error": f"{type(error).__name__}: {str(error).strip()[:500]}"}]


def summary(cases: Sequence[Case], kernels: Sequence[Row]) -> Row:
    """One row for the kernels of one operation on one GPU, in the order of the cases."""
    made = [row for row in kernels if "error" not in row]
    return {
        **{key: kernels[0][key] for key in ("target", "operation")},
        "cases": names_of(cases),
        "kernels": len(made),
        "registers": max((row["registers"] for row in made), default=0),
        "shared": max((row["shared"] for row in made), default=0),
        "spilling": [row for row in made if row["spills"]],
        "failed": [row for row in kernels if "error" in row],
    }


def names_of(cases: Sequence[Case]) -> list[str]:
    """Of cases of one operation."""
    return [f"{case.channels} {case.numbers} {case.layout}" for case in cases]


def complaints(rows: list[Row]) -> list[str]:
    """What is wrong, a sentence each: errors, more spills than known, too much shared memory."""
    found = []
    for row in rows:
        found += [f"{_where(each)}: {each['error']}" for each in row["failed"]]
        for each in row["spilling"]:
            known, _ = SPILLS_KNOWN.get((each["operation"], each["kernel"], each["target"]), (0, ""))
            if each["spills"] > known:
                found.append(f"{_where(each)}: {each['kernel']} spills {each['spills']} times")
        limit = TARGETS[row["target"]].shared
        if row["shared"] > limit:
            where = f"{row['operation']} for {row['target']}"
            found.append(f"{where}: a kernel takes {row['shared']} bytes of {limit}")
    return found


def _where(kernel: Row) -> str:
    return (
        f"{kernel['operation']} for {kernel['target']}, {kernel['numbers']}, {kernel['channels']} channels, "
        f"{kernel['layout']}"
    )


def _start(cache: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = cache
    torch.set_num_threads(1)


HEAD = """\
## Kernels for every GPU

Every launch of every operation, dtype, memory layout and number of channels, forward and backward, compiled for GPUs
that need not be there. Spilled is what registers could not hold, in instructions of a kernel with its operation and
channels; kernels that spill are listed with the reason in [compile_ahead.py](questions/compile_ahead.py).
"""


def sections(results: Results) -> list[str]:
    result = results.get("compile_ahead")
    return [HEAD, markdown(table(result)), source(result)] if result else []


def table(result: Result) -> Table:
    """GPUs down."""
    head = [
        "",
        "kernels",
        "failed",
        "spilling",
        "most spilled",
        "most registers",
        "most shared memory, bytes",
        "of",
    ]
    limits: dict[str, int] = result["settings"]["shared_memory"]
    return head, [_row(target, limit, result["rows"]) for target, limit in limits.items()]


def _row(target: str, limit: int, rows: list[Row]) -> list[str]:
    rows = [row for row in rows if row["target"] == target]
    kernels, failed = sum(row["kernels"] for row in rows), sum(len(row["failed"]) for row in rows)
    if not kernels:
        return [target, "0", str(failed), *[""] * 5]
    spilling = [each for row in rows for each in row["spilling"]]
    worst = max(spilling, key=lambda each: each["spills"], default=None)
    return [
        target,
        str(kernels),
        str(failed),
        str(len(spilling)),
        f"{worst['spills']} ({worst['operation']}, {worst['numbers']}, {worst['channels']} channels)"
        if worst
        else "0",
        str(max(row["registers"] for row in rows)),
        f"{max(row['shared'] for row in rows):,}",
        f"{limit:,}",
    ]
