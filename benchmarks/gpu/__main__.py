"""What do the kernels give on a GPU: are they right, how fast, with how much memory?

Tests first, together with a run of everything that compiles what later parts need; then each part alone, timed
in turns with its rivals. A part that fails, hangs or takes the GPU down is recorded as such, and the next one
runs. Nothing has to be installed beyond torch and Triton.

    python -m benchmarks.gpu --minutes 8

On a machine without a GPU, `--toy` runs all of it at toy sizes; with `TRITON_INTERPRET=1` through the kernels.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import record
from benchmarks.gpu.goals import goals
from benchmarks.gpu.isolation import CONTEXT, Running
from benchmarks.gpu.parts import PARTS, TIMED, UNTIMED, WARMED
from benchmarks.gpu.setup import Setup
from benchmarks.record import Row

QUESTION = "What do the kernels give on a GPU: are they right, how fast, with how much memory?"
FIRST = 0.4  # of the time: for tests and compiling
LEAST = 20.0  # seconds a part should have


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--toy", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--minutes", type=float, default=7.5, help="that the whole run may take")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), metavar="PART",
                        help=", ".join(PARTS))  # fmt: skip
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    args = parser.parse_args(arguments)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which counts memory, talks to stderr
    if not args.toy and not torch.cuda.is_available():
        parser.error("no GPU here: --toy runs everything at toy size on the CPU")
    device, end = "cpu" if args.toy else "cuda", time.time() + 60 * args.minutes
    settings = {"minutes": args.minutes, "toy": args.toy, "parts": args.parts}
    rows: list[Row] = []
    CONTEXT.set_forkserver_preload(["benchmarks.gpu.parts"])

    def add(found: list[Row]) -> None:
        rows.extend(found)
        for row in found:
            print(
                "   ", *(f"{key} {_short(value)}" for key, value in row.items() if key != "part"), flush=True
            )
        record.write("gpu", QUESTION, [*rows, *goals(rows)], settings, args.out, "benchmarks.gpu")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = time.time() + FIRST * (end - time.time())
        untimed = [part for part in UNTIMED if part in args.parts]
        warmed = [part for part in WARMED if part in args.parts and not args.toy]
        print("tests, checks and compiling:", *untimed, *warmed, sep="  ", flush=True)
        running = [
            Running(part, PARTS[part], Setup(device, args.toy, False, first), folder) for part in untimed
        ]
        warming = [
            Running(part, PARTS[part], Setup(device, args.toy, True, first), folder) for part in warmed
        ]
        for part in running:
            add(part.rows())
        for part in warming:
            part.rows()  # what fails here fails again below, where it is recorded
        timed = [part for part in TIMED if part in args.parts]
        for i, part in enumerate(timed):
            left = end - time.time()
            if left < 5:
                add([{"part": part, "error": "no time left"}])
                continue
            # An equal share of what is left, doubled: most parts need less than their share.
            share = min(left, max(LEAST, 2 * left / (len(timed) - i)))
            print(f"{part}  ({left:.0f} s left)", flush=True)
            setup = Setup(device, args.toy, False, time.time() + share)
            add(Running(part, PARTS[part], setup, folder).rows())
    for goal in goals(rows):
        mark = {True: "met", False: "missed", None: "not measured"}[goal["met"]]
        print(f"{mark:13} {goal['dtype']:9} {goal['what']}: {goal['value']} (goal {goal['least']})")
    print("wrote", args.out / "gpu.jsonl")


def _short(value: object) -> str:
    if isinstance(value, dict) and "median" in value:
        return f"{value['median']}"
    text = str(value)
    return text if len(text) <= 300 else text[:300] + " ..."


if __name__ == "__main__":
    main()
