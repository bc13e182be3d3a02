"""The correctness matrix, from `results/correctness.json`."""

from typing import Any

Result = dict[str, Any]
Table = tuple[list[str], list[list[str]]]

SIGNS = {"right": "right", "error": "error", "wrong": "**wrong**", "crash": "**crash**"}

HEAD = """\
## Right, refused, or silently wrong

Every way through the same scenarios, each held against plain autograd: outputs, all gradients, buffers, the random
state. "error" is an exception, "wrong" is another result without a word. Where plain autograd raises, an
exception is right. Functions have no batch norm where it is not the point.
"""

SHORT_FOOT = """\
FrEIA is ordinary autograd: it saves no memory. The errors of revseg: an output that is written to before the backward
pass, and a function with hidden state, which nobody else notices. All scenarios: [benchmarks](benchmarks/README.md).
"""


def _ways(result: Result) -> list[str]:
    return list(dict.fromkeys(row["way"] for row in result["rows"]))


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


def in_short(result: Result) -> Table:
    """Ways down: how many scenarios are right, refused, wrong, and which are wrong."""
    rows = []
    for way in _ways(result):
        mine = [row for row in result["rows"] if row["way"] == way]
        counts = [sum(row["verdict"] in verdicts for row in mine) for verdicts in (["right"], ["error"])]
        wrong = [row["scenario"] for row in mine if row["verdict"] in ("wrong", "crash")]
        rows.append([way, *map(str, counts), str(len(wrong)), ", ".join(wrong)])
    return ["", "right", "error", "silently wrong", "wrong in"], rows


def _first_sentence(text: str) -> str:
    end = text.find(". ")
    return (text if end < 0 else text[:end])[:160].replace("|", "\\|")
