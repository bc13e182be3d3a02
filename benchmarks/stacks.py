"""What does a Stack in the place of `nn.Sequential` save, inside of reversible blocks and without them?

The workload of `memory_depth` and `step_time`, the same modules in three networks: reversible blocks with the
functions as they are ("revseg"), with each function as a Stack ("revseg Stack"), and ordinary autograd with
each function as a Stack ("plain Stack"), which stores activations and is the fair rival. All ratios of time
are to ordinary autograd with the functions as they are.

    python -m benchmarks.stacks
"""

import argparse
import os
from pathlib import Path

from benchmarks import memory_depth, record, step_time

QUESTION = (
    "What does a Stack in the place of nn.Sequential save, inside of reversible blocks and without them?"
)
WAYS = ["revseg", "revseg Stack", "plain Stack"]
HEAP = "keeps pages"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", type=int, nargs=4, default=step_time.SHAPE, metavar=("N", "C", "H", "W"))
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    args = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which counts memory, talks to stderr
    shape, rows = tuple(args.shape), []
    for depth in args.depths:
        for threads in args.threads:
            case = {"depth": depth, "ways": WAYS, "rounds": args.rounds, "shape": shape, "device": "cpu"}
            rows += step_time.in_new_process(HEAP, threads, case)
        peaks = {
            row["way"]: row["peak_mib"] for row in memory_depth.measure([depth], ["plain", *WAYS], shape)
        }
        for row in [row for row in rows if row["depth"] == depth]:
            row |= {"peak_mib": peaks[row["way"]], "plain_mib": peaks["plain"]}
            print({key: row[key] for key in ("depth", "threads", "way", "ratio", "peak_mib")}, flush=True)
    settings = {"shape": list(shape), "dtype": "float32", "heap": HEAP}
    print("wrote", record.write("stacks", QUESTION, rows, settings, args.out))


if __name__ == "__main__":
    main()
