"""How long does each network take for one image, by `revseg predict` and by other runtimes?

From bytes to labels at their size, in one process and in turns, as `revseg benchmark` times a network: PyTorch module by
module, with batch norm folded, by torch.compile, by ONNX Runtime in float32 and with convolutions in 8-bit integers; and
`predict`, which is `revseg predict` as it comes, once it has chosen: of a network of its own, by what it found the faster
before. A runtime that is not installed, or gives other labels, is a note in the place of times.

    python -m benchmarks measure latency --rounds 3
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.record import Result, Results, Row
from benchmarks.tables import Table, markdown, source
from revseg.commands.benchmark import times_of
from revseg.inference.automatic import FEW, AutomaticRunner
from revseg.inference.export import Run
from revseg.inference.folded import folded
from revseg.inference.runner import Runner
from revseg.inference.runtimes import RUNTIMES, pytorch
from revseg.models import create_model, list_models

QUESTION = "How long does each network take for one image, by `revseg predict` and by other runtimes?"
ORDER = 11.5
SIZE = (128, 256)
FULL = (1024, 2048)  # VNet alone


WAYS = ("modules", "pytorch", "compile", "onnx", "onnx-int8", "predict")
NAMES = {
    "modules": "PyTorch",
    "pytorch": "batch norm folded",
    "compile": "torch.compile",
    "onnx": "ONNX Runtime",
    "onnx-int8": "int8",
    "predict": "predict",
}


def ways_of(network: nn.Module, image: Tensor) -> dict[str, Callable[[], Run]]:
    """By name, what prepares the network for images of this size."""
    runtimes = {name: partial(make, folded(network), image, False) for name, make in RUNTIMES.items()}
    return {
        "modules": partial(pytorch, network, image),
        **runtimes,
        "predict": partial(chosen, network, image),
    }


def chosen(network: nn.Module, image: Tensor) -> Runner:
    """What `revseg predict` runs once it has seen some of very many images."""
    runner = AutomaticRunner(network)
    runner.expect(1, 10**9)
    for _ in range(FEW + 1):
        runner(image)
    return runner


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--networks", nargs="+", default=list_models(), choices=list_models(), metavar="NAME")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--size", type=int, nargs=2, default=SIZE, metavar=("H", "W"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {"threads": args.threads, "classes": 19}


def measure(args: argparse.Namespace) -> Iterator[list[Row]]:
    torch.set_num_threads(args.threads)
    rows: list[Row] = []
    size = (args.size[0], args.size[1])
    tried = [(name, size) for name in args.networks]
    if "vnet" in args.networks and size == SIZE:
        tried.append(("vnet", FULL))
    for name, each in tried:
        torch.manual_seed(0)
        torch.compiler.reset()  # else networks count against one limit, and the last ones are not compiled
        image = torch.randint(0, 256, (1, 3, *each), dtype=torch.uint8)
        ways = [way for way in args.ways if each == size or way != "onnx-int8"]
        with torch.no_grad():
            network = create_model(name, 19).eval()
            makers = ways_of(network, image)
            found = times_of(network, image, {way: makers[way] for way in ways}, args.rounds)
        rows.append({"network": name, "size": list(each), "ways": found})
        print(rows[-1], flush=True)
        yield rows


HEAD = """\
## One image to labels

Milliseconds from bytes to labels at the size of the image, median of rounds in turns: PyTorch module by module; the same
with batch norm folded; torch.compile and ONNX Runtime of that; ONNX Runtime with convolutions in 8-bit integers; and what
`revseg predict` runs once it has chosen between PyTorch and ONNX Runtime. Behind them how many times as long as `predict`.
"""


def sections(results: Results) -> list[str]:
    result = results.get("latency")
    return [HEAD, markdown(table(result)), source(result)] if result else []


def table(result: Result) -> Table:
    ways = [way for way in WAYS if any(way in row["ways"] for row in result["rows"])]
    lines = []
    for row in result["rows"]:
        ours = row["ways"].get("predict", {}).get("ms")
        cells = [_cell(row["ways"].get(way), ours) for way in ways]
        lines.append([f"{row['network']}, {row['size'][0]} x {row['size'][1]}", *cells])
    return ["", *(NAMES[way] for way in ways)], lines


def _cell(found: dict[str, Any] | None, ours: float | None) -> str:
    if found is None:
        return ""
    if "ms" not in found:
        return "-"
    ratio = f" ({found['ms'] / ours:.2f})" if ours else ""
    return f"{found['ms']:.1f}{ratio}"
