"""`revseg benchmark`: images a second of a network here, by every runtime that is installed.

All runtimes are timed in turn in one process, round after round, so that what else the machine does falls on all of them.
What a runtime gives is compared with PyTorch before it is timed.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from revseg.inference.export import AGREEING, Deployed, run_onnx, write_onnx
from revseg.inference.folded import folded
from revseg.inference.int8 import write_int8
from revseg.inference.settings import BenchmarkSettings
from revseg.inference.trained import load
from revseg.training.setup import choose_device

Run = Callable[[Tensor], Tensor]


@torch.no_grad()
def benchmark(settings: BenchmarkSettings) -> dict[str, dict[str, Any]]:
    """Times the network on one image of bytes, to labels at its size.

    Args:
        settings: What the command line says.

    Returns:
        By runtime: prepare_s (seconds until the first result), ms (median), fps; or note, why it was not timed.
    """
    console = Console(highlight=False)
    device = choose_device(settings.device)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    network = load(settings.weights).network.to(device)
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (1, 3, *settings.size), generator=generator, dtype=torch.uint8).to(device)
    found = times_of(network, image, {name: RUNTIMES[name] for name in settings.runtimes}, settings.rounds)
    console.print(_table(found, settings))
    for name, row in found.items():
        if "note" in row:
            console.print(f"{name} was not timed: {row['note']}", markup=False)
    return found


def times_of(
    network: nn.Module, image: Tensor, runtimes: Mapping[str, Callable[[nn.Module, Tensor], Run]], rounds: int
) -> dict[str, dict[str, Any]]:
    """Times of a network by several runtimes, from bytes to labels.

    Args:
        network: On the device of the image.
        image: [1, 3, H, W], uint8.
        runtimes: By name, what makes a function of the network for images of this size.
        rounds: How often each is timed, in turn with the others.

    Returns:
        By runtime: prepare_s (seconds until the first result), ms (median), fps; or note, why it was not timed.
    """
    expected = Deployed(network, labels=True).eval()(image)
    found: dict[str, dict[str, Any]] = {}
    runs: dict[str, Run] = {}
    for name, make in runtimes.items():
        started = time.perf_counter()
        try:
            run = make(network, image)
            labels = run(image)
        except Exception as error:  # noqa: BLE001 - runtimes raise nearly anything, and the others are still to be timed
            found[name] = {"note": (str(error).splitlines() or [type(error).__name__])[0][:120]}
            continue
        agreeing = (labels == expected).double().mean().item()
        if agreeing < AGREEING and name not in ROUNDED:
            found[name] = {"note": f"{100 * (1 - agreeing):.1f} % of the labels are others"}
            continue
        runs[name], found[name] = run, {"prepare_s": round(time.perf_counter() - started, 2)}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds):
        for name in list(runs) if i % 2 == 0 else reversed(list(runs)):
            times[name].append(_seconds(runs[name], image))
    for name, seconds in times.items():
        median = statistics.median(seconds)
        found[name] |= {"ms": round(1000 * median, 2), "fps": round(1 / median, 2)}
    return found


def pytorch(network: nn.Module, image: Tensor) -> Run:
    """PyTorch, batch norm folded."""
    return Deployed(folded(network), labels=True).eval()


def compiled(network: nn.Module, image: Tensor) -> Run:
    """By torch.compile, batch norm folded; the code is made by the first call."""
    run: Run = torch.compile(Deployed(folded(network), labels=True).eval())
    return run


def onnx(network: nn.Module, image: Tensor, int8: bool = False) -> Run:
    """ONNX Runtime on a CPU, from a file for images of this size; convolutions in integers have the ranges of this one."""
    if image.device.type != "cpu":
        raise ValueError("timed on a CPU only")
    with tempfile.TemporaryDirectory() as folder:
        path, rounded = Path(folder) / "network.onnx", Path(folder) / "int8.onnx"
        write_onnx(Deployed(folded(network), labels=True).eval(), image, path, dynamic=False)
        if int8:
            write_int8(path, rounded, [image[0]])
        return run_onnx(rounded if int8 else path)


RUNTIMES: dict[str, Callable[[nn.Module, Tensor], Run]] = {
    "pytorch": pytorch,
    "compile": compiled,
    "onnx": onnx,
    "onnx-int8": partial(onnx, int8=True),
}
ROUNDED = {"onnx-int8"}  # whose labels are others by design; `revseg export --int8` tells how many


def _seconds(run: Run, image: Tensor) -> float:
    _wait(image)
    started = time.perf_counter()
    run(image)
    _wait(image)
    return time.perf_counter() - started


def _wait(image: Tensor) -> None:
    if image.is_cuda:
        torch.cuda.synchronize(image.device)


def _table(found: dict[str, dict[str, Any]], settings: BenchmarkSettings) -> Table:
    height, width = settings.size
    table = Table(title=f"One image of {height} x {width} to labels, {settings.rounds} rounds")
    for column in ("runtime", "ms", "images / s", "first result after s"):
        table.add_column(column, justify="left" if column == "runtime" else "right")
    for name, row in found.items():
        if "note" not in row:
            table.add_row(name, f"{row['ms']:.1f}", f"{row['fps']:.2f}", f"{row['prepare_s']:.1f}")
    return table
