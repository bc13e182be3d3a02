"""What does each part of a step cost, beside the functions of PyTorch that it stands in for?

pytest-benchmark times the cases of `benchmarks.micro.cases` in a process of its own.

    python -m benchmarks.micro --rounds 20
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.micro.cases import CASES, MAP, TINY, TOY

QUESTION = "What does each part of a step cost, beside the functions of PyTorch that it stands in for?"


def measure(cases: list[str], rounds: int, threads: int, toy: bool) -> list[dict[str, Any]]:
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
    rows: dict[str, dict[str, Any]] = {case: {"case": case} for case in cases}
    for each in timed:
        stats, info = each["stats"], each["extra_info"]
        rows[info["case"]][info["way"]] = {
            "median_ms": round(1e3 * stats["median"], 4),
            "iqr_ms": round(1e3 * stats["iqr"], 4),
            "rounds": stats["rounds"],
        }
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--toy", action="store_true", help="small maps, for a look at the table")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = measure(args.cases, args.rounds, args.threads, args.toy)
    settings = {"shape": list(TOY if args.toy else MAP), "tiny": list(TINY), "threads": args.threads}
    print("wrote", record.write("micro", QUESTION, rows, settings, args.out))


if __name__ == "__main__":
    main()
