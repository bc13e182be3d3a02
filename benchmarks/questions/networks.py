"""What does each network of the paper's tables cost, side by side?

Parameters and operations are counted: two a multiply-add, one image of 1024 x 2048, 19 classes, without auxiliary
heads. Time is that of one image in evaluation by three runtimes (`benchmarks.inference`), 512 x 1024 if
nothing else is said, as frames per second and as a ratio to VNet in PyTorch next to it. What training takes
in memory is asked by `training_memory`.

    python -m benchmarks measure networks --rounds 5
    python -m benchmarks measure networks --names vnet enet

The second measures two networks again and keeps the rows of the others. The file is written after each
network. With `--rounds 0` nothing is timed.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks import record
from benchmarks.inference import RUNTIMES, in_new_process
from benchmarks.record import Result, Results, Row
from benchmarks.segmentation import NETWORKS, PAPER, counts
from benchmarks.tables import NOT_RUN, Table, markdown, quartiles, size, source

QUESTION = "What does each network of the paper's tables cost, side by side?"
ORDER, SHORT_ORDER = 7, 6
MEGABYTES = ("bisenet_resnet18", "bisenet_xception39")

NAMES = {"eager": "PyTorch", "compile": "torch.compile", "onnx": "ONNX Runtime"}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--names", nargs="+", default=NETWORKS, choices=NETWORKS, metavar="NAME")
    parser.add_argument("--size", type=int, nargs=2, default=(512, 1024), metavar=("H", "W"))
    parser.add_argument("--rounds", type=int, default=5, help="of timing; 0 for none")
    parser.add_argument("--runtimes", nargs="+", default=list(RUNTIMES), choices=list(RUNTIMES))
    parser.add_argument("--threads", type=int, default=2)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {"size": list(args.size), "threads": args.threads}


def measure(args: argparse.Namespace) -> Iterator[list[Row]]:
    torch.set_num_threads(args.threads)
    options = {"size": args.size, "threads": args.threads, "runtimes": args.runtimes}
    rows = record.kept_rows(args.out / "networks.jsonl", "network", args.names, settings(args))
    for name in args.names:
        rows[name] = row_of(name, args.rounds, options)
        print(rows[name], flush=True)
        yield [rows[each] for each in NETWORKS if each in rows]


def row_of(name: str, rounds: int, options: dict[str, Any]) -> Row:
    """The row of one network.

    Args:
        name: The network.
        rounds: How often it is timed by each runtime; 0 for not at all.
        options: Of `benchmarks.inference.in_new_process`.
    """
    row: Row = {"network": name, **counts(name)}
    row |= {"rounds": rounds, "inference": in_new_process(name, rounds=rounds, **options) if rounds else {}}
    row["paper_millions"], row["paper_fps"] = PAPER.get(name, (None, None))
    return row | record.stamp()


HEAD = """\
19 classes, no auxiliary heads; 10^9 operations of one image of 1024 x 2048, two a multiply-add. Frames per second in
evaluation, one image of {size} on a CPU{threads}: PyTorch runs our network as it is, torch.compile makes one
graph of it, ONNX Runtime runs its export for this size. The paper's frames are of 1024 x 2048, on its card.
"""

DETAILS = """\
Behind the frames per second stands the time as a multiple of VNet's in PyTorch next to it: median, quartiles in
brackets. "made in" are the seconds of torch.compile until the first image is through, with empty caches;
"off by" is the greatest difference of ONNX Runtime from PyTorch, relative to the largest logit. The `_rev` networks
are changes of architecture.
"""

FOOT = """\
[1] The paper prints 49 and 5.8: these are megabytes of a file, not parameters. [2] The paper prints 7.8 for ICNet, which
is its file of 31 MB divided by four bytes; the deployed network has 6.7.
"""


def sections(results: Results) -> list[str]:
    result = results.get("networks")
    if not result:
        return []
    tables = [head(result), DETAILS, markdown(table(result))]
    return [
        "## Every network of the paper's tables\n",
        *tables,
        foot(result),
        FOOT,
        ranking(result),
        source(result),
    ]


def in_short(results: Results) -> list[str]:
    """The paper's networks down; frames per second alone."""
    result = results.get("networks")
    if not result:
        return []
    titles = [
        "",
        "parameters, M",
        "the paper's",
        "GFLOPs",
        *(f"{name}, fps" for name in NAMES.values()),
        "the paper's card",
    ]
    lines = [
        [
            row["network"],
            f"{row['parameters'] / 1e6:.3f}",
            _paper_millions(row),
            f"{row['gflops']:,.1f}",
            *(_fps(row.get("inference", {}).get(runtime)) for runtime in NAMES),
            _paper_fps(row),
        ]
        for row in result["rows"]
        if row["paper_fps"]
    ]
    return [
        "### Every network of the paper's tables\n",
        head(result),
        markdown((titles, lines)),
        FOOT,
        ranking(result),
    ]


def table(result: Result) -> Table:
    """Networks down; each runtime with frames per second and the ratio to VNet."""
    head = [
        "",
        "parameters, M",
        "the paper's",
        "GFLOPs",
        *NAMES.values(),
        "made in, s",
        "off by",
        "the paper's",
    ]
    rows = []
    for row in result["rows"]:
        found = row.get("inference", {})
        made, off = found.get("compile", {}).get("prepare_s"), found.get("onnx", {}).get("difference")
        rows.append([
            row["network"],
            f"{row['parameters'] / 1e6:.3f}",
            _paper_millions(row),
            f"{row['gflops']:,.1f}",
            *(_speed_cell(found.get(runtime)) for runtime in NAMES),
            "" if made is None else f"{made:.0f}",
            "" if off is None else f"{off:.0e}",
            _paper_fps(row),
        ])  # fmt: skip
    return head, rows


def head(result: Result) -> str:
    """What the frames per second are those of."""
    settings = result["settings"]
    shape = size(settings["size"])
    threads = f", {settings['threads']} threads" if "threads" in settings else ""
    return HEAD.format(size=shape, threads=threads)


def foot(result: Result) -> str:
    """What failed, and which rows were measured at another time than the last; empty if there is nothing to say."""
    lines = [
        f"{row['network']}, {NAMES[runtime]}: not run, {found['note']}."
        for row in result["rows"]
        for runtime, found in row.get("inference", {}).items()
        if "note" in found
    ]
    whole = (result["commit"], result["date"][:10])
    earlier: dict[tuple[str, str], list[str]] = {}
    for row in result["rows"]:
        stamp = (row.get("commit", whole[0]), row.get("date", whole[1])[:10])
        earlier.setdefault(stamp, []).append(row["network"])
    earlier.pop(whole, None)
    lines += [f"At commit {sha}, {day}: {', '.join(names)}." for (sha, day), names in earlier.items()]
    return "".join(f"{line}\n" for line in lines)


def ranking(result: Result) -> str:
    """Who is faster than whom, by the paper and here, in two sentences; empty if nothing was timed."""
    here = {
        row["network"]: row["inference"]["eager"]["ratio"]["median"]
        for row in result["rows"]
        if row["paper_fps"] and "ratio" in row.get("inference", {}).get("eager", {})
    }
    if not here:
        return ""
    by_paper = {row["network"]: -row["paper_fps"] for row in result["rows"] if row["network"] in here}
    names = [", ".join(sorted(order, key=order.__getitem__)) for order in (by_paper, here)]
    same = "the same" if names[0] == names[1] else "another"
    return (
        f"From the fastest on, by the paper's frames per second on its card: {names[0]}. Here, in PyTorch on a CPU, "
        f"the order is {same}: {names[1]}.\n"
    )


def _paper_millions(row: dict[str, Any]) -> str:
    mark = ""
    if row["network"] in MEGABYTES:
        mark = " [1]"
    elif row["network"] == "icnet":
        mark = " [2]"
    return f"{row['paper_millions']}{mark}" if row["paper_millions"] else ""


def _paper_fps(row: dict[str, Any]) -> str:
    return f"{row['paper_fps']:.1f}" if row["paper_fps"] else ""


def _fps(found: dict[str, Any] | None) -> str:
    return f"{found['fps']:.1f}" if found and "fps" in found else NOT_RUN


def _speed_cell(found: dict[str, Any] | None) -> str:
    if not found or "fps" not in found:
        return _fps(found)
    return f"{_fps(found)}; {quartiles(found['ratio'])}"
