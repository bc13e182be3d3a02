"""The one table of the project's README: memory, time and trust of the ways to train one chain of blocks.

Each way is a row; the columns come from four questions, and a way that one of them did not ask has no figure there.
"""

from benchmarks.questions.memory_depth import by_depth
from benchmarks.questions.step_time import timed
from benchmarks.record import Results
from benchmarks.tables import NOT_RUN, markdown, size

WAYS = ("plain", "checkpoint", "compile", "memcnn", "revtorch", "revseg", "revseg lossless", "revseg Stack")
DEEP, DRIFT = 128, 32  # blocks at which memory is compared, and gradients


def first_table(results: Results) -> list[str]:
    """The table, and a sentence about VNet.

    Returns:
        Nothing where one of the questions was not measured.
    """
    found = [results.get(name) for name in ("memory_depth", "step_time", "drift", "correctness")]
    memory, time, drift, correctness = found
    if memory is None or time is None or drift is None or correctness is None:
        return []
    peaks = {row["way"]: row["peak_mib"] for row in by_depth(memory) if row["depth"] == DEEP}
    errors = {
        row["way"]: row["error"]
        for row in drift["rows"]
        if "error" in row and (row["dtype"], row["depth"]) == ("float32", DRIFT)
    }
    rows = [row for row in timed(time) if "ratio" in row]
    heap, depth = list(time["settings"]["heaps"])[-1], max(row["depth"] for row in rows)
    case = heap, depth, rows[0]["threads"]
    rows = [row for row in rows if (row["heap"], row["depth"], row["threads"]) == case]
    ratios = {"plain": 1.0} | {row["way"]: row["ratio"]["median"] for row in rows}
    verdicts: dict[str, list[str]] = {}
    for row in correctness["rows"]:
        verdicts.setdefault(row["way"], []).append(row["verdict"])
    head = [
        "",
        f"peak MiB, {DEEP} blocks",
        f"time, plain = 1, {depth} blocks",
        f"gradient error, {DRIFT} blocks",
        "silently wrong",
    ]
    lines = [
        [
            way,
            _cell(peaks.get(way), ",.0f"),
            _cell(ratios.get(way), ".2f"),
            _cell(errors.get(way), ".1e"),
            "the reference" if way == "plain" else _wrong(verdicts.get(way, [])),
        ]
        for way in WAYS
    ]
    return [markdown((head, lines)), *_vnet(results)]


def _cell(value: float | None, form: str) -> str:
    return NOT_RUN if value is None else format(value, form)


def _wrong(verdicts: list[str]) -> str:
    wrong = sum(each in ("wrong", "crash") for each in verdicts)
    return f"{wrong} of {len(verdicts)}" if verdicts else NOT_RUN


def _vnet(results: Results) -> list[str]:
    levels = results.get("memory_levels")
    if levels is None:
        return []
    images, height, width = levels["settings"]["size"]
    rows = {row["case"]: row for row in levels["rows"]}
    plain, lowest = rows["plain"]["peak_mib"], rows["lowest"]["peak_mib"]
    text = (
        f"A whole network: a step of VNet on {images} images of {height} x {width} takes {plain:,.0f} MiB in plain "
        f'PyTorch and {lowest:,.0f} MiB with `memory="lowest"`, in {rows["lowest"]["ratio"]["median"]:.2f} of the '
        f"time (timed at {size(levels['settings']['time_size'][1:])}). Measured on a CPU; how, and all else: "
        "[benchmarks](benchmarks/README.md).\n"
    )
    return [text]
