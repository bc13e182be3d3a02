"""What do the kernels take of a GPU, and do they compile for all of them?

Every operation is compiled as it would be launched, forward and backward, for GPUs that need not be there:
registers of a thread, instructions that spill them, shared memory of a program. The tests do this for a
part of the cases; this is all of them, half an hour on two cores.

    python -m benchmarks.compile_ahead --targets sm_90 --operations asymmetric_conv --jobs 2

Of a part, rows of the other cases stay as they are in the file, which must be of the same machine and Triton.
"""

import argparse
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.ahead import TARGETS, compile_launches
from benchmarks.ahead_cases import CHANNELS, OF_CLASSES, OPERATIONS, Case, all_cases

QUESTION = "What do the kernels take of a GPU, and do they compile for all of them?"

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


def compile_case(target: str, case: Case) -> list[dict[str, Any]]:
    """A row for each kernel of a case: what it takes, or why it does not compile.

    Args:
        target: A key of `TARGETS`.
        case: What is launched.
    """
    started = time.perf_counter()
    row: dict[str, Any] = {"target": target, **case._asdict()}
    try:
        found = [each.as_row() for each in compile_launches(target, case.launch)]
    except Exception as error:  # noqa: BLE001, compilers raise what they like
        found = [{"error": f"{type(error).__name__}: {str(error).strip()[:500]}"}]
    seconds = round(time.perf_counter() - started, 1)
    return [row | each | {"case_seconds": seconds} for each in found]


def complaints(rows: list[dict[str, Any]]) -> list[str]:
    """What is wrong with these rows, a sentence each: errors, more spills than known, too much shared memory."""
    found = []
    for row in rows:
        where = f"{row['operation']} for {row['target']}, {row['numbers']}, {row['channels']} channels"
        if "error" in row:
            found.append(f"{where}, {row['layout']}: {row['error']}")
            continue
        known, _ = SPILLS_KNOWN.get((row["operation"], row["kernel"], row["target"]), (0, ""))
        if row["spills"] > known:
            found.append(f"{where}, {row['layout']}: {row['kernel']} spills {row['spills']} times")
        limit = TARGETS[row["target"]].shared
        if row["shared"] > limit:
            found.append(f"{where}, {row['layout']}: {row['kernel']} takes {row['shared']} bytes of {limit}")
    return found


def everything() -> list[tuple[str, Case]]:
    """Each GPU with each case that it may be given."""
    return [(target, case) for target in TARGETS for case in all_cases() if case.runs_on(target)]


def key_of(row: dict[str, Any]) -> tuple[str, Case]:
    """The GPU and the case of a row."""
    return row["target"], Case(*(row[field] for field in Case._fields))


def kept_rows(path: Path, settings: dict[str, Any], cases: list[tuple[str, Case]]) -> list[dict[str, Any]]:
    """`record.earlier_rows` without those of these cases, which are compiled again, and of cases that are no more."""
    kept = set(everything()) - set(cases)
    return record.earlier_rows(path, settings, lambda row: key_of(row) in kept)


def _start(cache: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = cache
    torch.set_num_threads(1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--operations", nargs="+", default=list(OPERATIONS), choices=list(OPERATIONS))
    parser.add_argument("--channels", type=int, nargs="+", default=list(CHANNELS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    args = parser.parse_args()
    cases = [
        (target, case)
        for target, case in everything()
        if target in args.targets
        and case.operation in args.operations
        and (case.channels in args.channels or case.operation in OF_CLASSES)
    ]
    limits = {name: target.shared for name, target in TARGETS.items()}
    settings = {"triton": version("triton"), "shared_memory": limits}
    rows = kept_rows(args.out / "compile_ahead.json", settings, cases)
    with tempfile.TemporaryDirectory() as cache:
        pool = ProcessPoolExecutor(args.jobs, get_context("spawn"), _start, (cache,))
        with pool:
            for done, found in enumerate(pool.map(compile_case, *zip(*cases, strict=True)), 1):
                rows += found
                print(f"{done}/{len(cases)}", *complaints(found), sep="  ", flush=True)
    print("wrote", record.write("compile_ahead", QUESTION, rows, settings, args.out))


if __name__ == "__main__":
    main()
