"""Runs all benchmarks, then writes the tables.

    python -m benchmarks.run

About two hours on two cores. Times mean something only on a machine that does
nothing else; for memory alone, run `python -m benchmarks.memory_depth`, which any load leaves alone.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks import record

SCRIPTS = [
    "memory_depth",
    "step_time",
    "correctness",
    "drift",
    "exact_formats",
    "memory_levels",
    "networks",
    "training_memory",
    "scale",
    "upsample_cross_entropy",
    "micro",
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scripts", nargs="*", default=SCRIPTS, metavar="SCRIPT", help=", ".join(SCRIPTS))
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    args = parser.parse_args()
    for script in args.scripts:
        if script not in SCRIPTS:
            parser.error(f"unknown script {script!r}; choose from {', '.join(SCRIPTS)}")
    for name in [f"benchmarks.{script}" for script in args.scripts] + ["benchmarks.report"]:
        folder = "--results" if name.endswith("report") else "--out"
        subprocess.run([sys.executable, "-m", name, folder, str(args.out)], cwd=record.ROOT, check=True)


if __name__ == "__main__":
    main()
