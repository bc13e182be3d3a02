"""Which library is right in which situation, which says that it is not, and which is silently wrong?

Each way runs each of the scenarios (`benchmarks.scenarios`) and is held against plain autograd in the same
scenario. "right" is equal (up to the rounding of float64), or an exception where plain raises one too;
"error" is an exception, "wrong" is another result without a word, "crash" the end of the process. Where a library has
nothing that a scenario asks for, or nothing that was tried, that is "not offered". momentumnet is held against a plain momentum network.

    python -m benchmarks measure correctness

The exit code is 1 if one of our own cells is wrong or crashes. Counts and verdicts do not depend on load.
"""

import argparse
import traceback
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import process
from benchmarks.peers import MISSING
from benchmarks.record import Result, Results, Row
from benchmarks.rivals import RIVALS, is_available
from benchmarks.scenarios import SCENARIOS
from benchmarks.scenarios.chain import Found, NotOfferedError
from benchmarks.tables import Table, markdown, source, unique
from benchmarks.ways import EVERY, OURS, TWINS

QUESTION = "Which library is right in which situation, which says so if not, and which is silently wrong?"
ORDER, SHORT_ORDER = 3, 3
ALL = [
    *("revseg", "revseg exact", "revseg lossless", "revseg Stack"),
    *("checkpoint", "compile", *RIVALS, "momentumnet"),
]
LIMIT_S = 300  # for one process


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ways", nargs="+", default=ALL, choices=list(EVERY), metavar="WAY", help=", ".join(ALL)
    )
    parser.add_argument(
        "--scenarios", nargs="+", default=list(SCENARIOS), choices=list(SCENARIOS), metavar="SCENARIO"
    )


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {"scenarios": {name: SCENARIOS[name].__doc__ for name in args.scenarios}}


def measure(args: argparse.Namespace) -> Iterator[list[Row]]:
    rows: list[Row] = []
    for way in args.ways:
        if not is_available(way):
            print(f"{way}: {MISSING}")
            continue
        rows += cells(way, args.scenarios)
        print(*(row for row in rows if row["way"] == way), sep="\n", flush=True)
        yield rows


def complaints(rows: list[Row]) -> list[str]:
    """Our own cells that are silently wrong, or crash."""
    return [
        f"{row['way']}, {row['scenario']}: {row['verdict']}, {row['detail']}"
        for row in rows
        if row["way"] in OURS and row["verdict"] in ("wrong", "crash")
    ]


def cell(way: str, scenario: str) -> Row:
    """The verdict on one way in one scenario: way, scenario, verdict, detail."""
    expected = _outcome(scenario, TWINS.get(way, "plain"))
    found = _outcome(scenario, way)
    return {"way": way, "scenario": scenario, **verdict(found, expected, TOLERANCE.get(way, 1e-6))}


# "exact" rounds its streams to multiples of 2^-12, momentumnet its velocity and the factor of that: other networks by
# that much
TOLERANCE = {"revseg exact": 2e-3, "momentumnet": 1e-4}


def _outcome(scenario: str, way: str) -> Found | Exception:
    torch.manual_seed(0)
    try:
        return SCENARIOS[scenario](way)
    except Exception as error:  # noqa: BLE001, whatever a library raises is its answer
        traceback.clear_frames(error.__traceback__)
        return error


def verdict(found: Found | Exception, expected: Found | Exception, tolerance: float) -> dict[str, str]:
    """Right, error or wrong, and why."""
    if isinstance(found, NotOfferedError):
        return {"verdict": "not offered", "detail": str(found)}
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


def cells(way: str, scenarios: Iterable[str]) -> list[Row]:
    """The verdicts on one way, found in processes of their own, of which some may crash."""
    left, found = list(scenarios), []
    while left:
        answer, end = process.run(_job, way, left, limit=LIMIT_S)
        found += answer
        left = left[len(answer) :]
        if left:  # the process ended in the first that is left
            found.append({"way": way, "scenario": left.pop(0), "verdict": "crash", "detail": end})
    return found


def _job(way: str, scenarios: list[str]) -> Iterator[Row]:
    warnings.simplefilter("ignore")  # the rivals use names that torch has deprecated
    torch.set_num_threads(1)
    is_available(way)
    for scenario in scenarios:
        yield cell(way, scenario)


SIGNS = {"right": "right", "error": "error", "wrong": "**wrong**", "crash": "**crash**", "not offered": "-"}

HEAD = """\
## Right, refused, or silently wrong

Every way through the same scenarios, each held against plain autograd: outputs, all gradients, buffers, the random
state. "error" is an exception, "wrong" is another result without a word. Where plain autograd raises, an
exception is right, and "-" is what a library has no way to do, or none that was tried. Functions have no batch norm where it is not the point.
"""

SHORT_FOOT = """\
FrEIA is ordinary autograd: it saves no memory. The errors of revseg: an output that is written to before the backward
pass, and a function with hidden state, which nobody else notices.
"""


def sections(results: Results) -> list[str]:
    result = results.get("correctness")
    return [HEAD, markdown(matrix(result)), details(result), source(result)] if result else []


def in_short(results: Results) -> list[str]:
    """Ways down: how many scenarios are right, refused, wrong, and which are wrong."""
    result = results.get("correctness")
    if not result:
        return []
    lines = []
    for way in _ways(result):
        mine = [row for row in result["rows"] if row["way"] == way]
        counts = [sum(row["verdict"] in verdicts for row in mine) for verdicts in (["right"], ["error"])]
        wrong = [row["scenario"] for row in mine if row["verdict"] in ("wrong", "crash")]
        lines.append([way, *map(str, counts), str(len(wrong)), ", ".join(wrong)])
    head = ["", "right", "error", "silently wrong", "wrong in"]
    said = "The same blocks in the same situations, each held against plain autograd:\n"
    return [said, markdown((head, lines)), SHORT_FOOT]


def _ways(result: Result) -> list[str]:
    return unique(row["way"] for row in result["rows"])


def matrix(result: Result) -> Table:
    """Scenarios down, ways across."""
    ways, meanings = _ways(result), result["settings"]["scenarios"]
    by_cell = {(row["scenario"], row["way"]): row["verdict"] for row in result["rows"]}
    rows = [
        [meaning.rstrip("."), *(SIGNS[by_cell[name, way]] if (name, way) in by_cell else "" for way in ways)]
        for name, meaning in meanings.items()
    ]
    return ["", *ways], rows


def details(result: Result) -> str:
    """What was wrong, and which errors are ours, a line each."""
    lines = [
        f"- {row['way']}, {row['scenario']}: {row['verdict']}; {_first_sentence(row['detail'])}"
        for row in result["rows"]
        if row["verdict"] in ("wrong", "crash")
        or (row["verdict"] == "error" and row["way"].startswith("revseg"))
    ]
    return "\n".join(lines) + "\n"


def _first_sentence(text: str) -> str:
    end = text.find(". ")
    return (text if end < 0 else text[:end])[:160].replace("|", "\\|")
