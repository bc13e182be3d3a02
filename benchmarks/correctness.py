"""Which library is right in which situation, which says that it is not, and which is silently wrong?

Each way runs each of the scenarios (`benchmarks.scenarios`) and is held against plain autograd in the same
scenario. "right" is equal (up to the rounding of float64), or an exception where plain raises one too;
"error" is an exception, "wrong" is another result without a word, "crash" the end of the process.

    python -m benchmarks.correctness

The exit code is 1 if one of our own cells is wrong or crashes. Counts and verdicts do not depend on load.
"""

import argparse
import json
import subprocess
import sys
import traceback
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import record
from benchmarks.chain import Found
from benchmarks.rivals import RIVALS, is_available
from benchmarks.scenarios import SCENARIOS
from benchmarks.ways import OURS, WAYS

QUESTION = "Which library is right in which situation, which says so if not, and which is silently wrong?"
ALL = [
    *("revseg", "revseg exact", "revseg lossless", "revseg Stack"),
    *("checkpoint", "compile", *RIVALS),
]
LIMIT_S = 300  # for one process
Cell = dict[str, Any]


def cell(way: str, scenario: str) -> Cell:
    """The verdict on one way in one scenario: way, scenario, verdict, detail."""
    expected = _outcome(scenario, "plain")
    found = _outcome(scenario, way)
    return {"way": way, "scenario": scenario, **verdict(found, expected, TOLERANCE.get(way, 1e-6))}


# "exact" rounds its streams to multiples of 2^-12: another network by that much, and held against it
TOLERANCE = {"revseg exact": 2e-3}


def _outcome(scenario: str, way: str) -> Found | Exception:
    torch.manual_seed(0)
    try:
        return SCENARIOS[scenario](way)
    except Exception as error:  # noqa: BLE001, whatever a library raises is its answer
        traceback.clear_frames(error.__traceback__)
        return error


def verdict(found: Found | Exception, expected: Found | Exception, tolerance: float) -> dict[str, str]:
    """Right, error or wrong, and why."""
    if isinstance(found, Exception):
        detail = f"{type(found).__name__}: {str(found).strip().splitlines()[0] if str(found).strip() else ''}"
        return {"verdict": "right" if isinstance(expected, Exception) else "error", "detail": detail[:300]}
    if isinstance(expected, Exception):
        return {"verdict": "wrong", "detail": f"plain raises {type(expected).__name__}, this does not"}
    for name, value in expected.items():
        if difference := _difference(found.get(name), value, tolerance):
            return {"verdict": "wrong", "detail": f"{name}: {difference}"}
    return {"verdict": "right", "detail": ""}


def _difference(found: Any, expected: Any, tolerance: float) -> str:
    """How a value differs from the expected one; empty if it does not."""
    if not isinstance(expected, Tensor) or not isinstance(found, Tensor):
        if isinstance(expected, Tensor) or isinstance(found, Tensor):
            return "is missing" if found is None else "is there, and should not be"
        return "" if found == expected else f"{found}, expected {expected}"
    if found.dtype == torch.uint8:
        return "" if torch.equal(found, expected) else "another one"
    if found.shape != expected.shape:
        return f"shape {list(found.shape)}, expected {list(expected.shape)}"
    if not expected.is_floating_point():
        return "" if torch.equal(found, expected) else f"{found.tolist()}, expected {expected.tolist()}"
    scale = expected.double().abs().max().clamp_min(1e-9)
    off = ((found.double() - expected.double()).abs().max() / scale).item()
    return "" if off <= tolerance else f"off by {off:.1e} of its scale"


def cells(way: str, scenarios: Iterable[str]) -> list[Cell]:
    """The verdicts on one way, found in processes of their own, of which some may crash."""
    left, found = list(scenarios), []
    while left:
        answer, end = _run(way, left)
        found += answer
        left = left[len(answer) :]
        if left:  # the process ended in the first that is left
            found.append({"way": way, "scenario": left.pop(0), "verdict": "crash", "detail": end})
    return found


def _run(way: str, scenarios: list[str]) -> tuple[list[Cell], str]:
    """What one process found, and how it ended."""
    command = [sys.executable, "-m", "benchmarks.correctness", "--job", json.dumps([way, scenarios])]
    try:
        ran = subprocess.run(
            command, check=False, cwd=record.ROOT, capture_output=True, text=True, timeout=LIMIT_S
        )
        text, end = ran.stdout, f"the process ended with {ran.returncode}"
    except subprocess.TimeoutExpired as error:
        text = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        end = f"the process took more than {LIMIT_S} s"
    return [json.loads(line) for line in text.splitlines() if line.startswith('{"way"')], end


def _job(way: str, scenarios: list[str]) -> None:
    warnings.simplefilter("ignore")  # the rivals use names that torch has deprecated
    torch.set_num_threads(1)
    is_available(way)
    for scenario in scenarios:
        print(json.dumps(cell(way, scenario)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--ways", nargs="+", default=ALL, choices=list(WAYS), metavar="WAY", help=", ".join(ALL)
    )
    parser.add_argument(
        "--scenarios", nargs="+", default=list(SCENARIOS), choices=list(SCENARIOS), metavar="SCENARIO"
    )
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        _job(*json.loads(args.job))
        return
    rows: list[Cell] = []
    for way in args.ways:
        if not is_available(way):
            print(f"{way}: not installed: python -m benchmarks.peers")
            continue
        for row in cells(way, args.scenarios):
            rows.append(row)
            print(f"{way:16} {row['scenario']:26} {row['verdict']:6} {row['detail']}", flush=True)
    meanings = {name: scenario.__doc__ for name, scenario in SCENARIOS.items()}
    print("wrote", record.write("correctness", QUESTION, rows, {"scenarios": meanings}, args.out))
    sys.exit(any(row["way"] in OURS and row["verdict"] in ("wrong", "crash") for row in rows))


if __name__ == "__main__":
    main()
