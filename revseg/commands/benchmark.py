"""`revseg benchmark`: images a second of a network here, by every runtime that is installed.

All runtimes are timed in turn in one process, round after round, so that what else the machine does falls on all of them.
What a runtime gives is compared with PyTorch before it is timed.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from revseg.inference.export import AGREEING, Run
from revseg.inference.folded import folded
from revseg.inference.runtimes import RUNTIMES, pytorch
from revseg.inference.settings import BenchmarkSettings
from revseg.inference.trained import load
from revseg.ops import upsample_argmax
from revseg.training.setup import choose_device


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
    plain = folded(network)
    runtimes = {name: partial(RUNTIMES[name], plain, image, False) for name in settings.runtimes}
    found = times_of(network, image, runtimes, settings.rounds)
    console.print(_table(found, settings))
    for name, row in found.items():
        if "note" in row:
            console.print(f"{name} was not timed: {row['note']}", markup=False)
    return found


def times_of(
    network: nn.Module, image: Tensor, runtimes: Mapping[str, Callable[[], Run]], rounds: int
) -> dict[str, dict[str, Any]]:
    """Times of a network by several runtimes, from bytes to labels.

    Args:
        network: On the device of the image.
        image: [1, 3, H, W], uint8.
        runtimes: By name, what gives a function from this image to scores.
        rounds: How often each is timed, in turn with the others.

    Returns:
        By runtime: prepare_s (seconds until the first result), ms (median), fps; or note, why it was not timed.
    """
    expected = _labels(pytorch(network, image), image)
    found: dict[str, dict[str, Any]] = {}
    runs: dict[str, Run] = {}
    for name, make in runtimes.items():
        started = time.perf_counter()
        try:
            run = make()
            labels = _labels(run, image)
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


ROUNDED = {"onnx-int8"}  # whose labels are others by design; `revseg export --int8` tells how many


def _labels(run: Run, image: Tensor) -> Tensor:
    return upsample_argmax(run(image), image.shape[2:])


def _seconds(run: Run, image: Tensor) -> float:
    _wait(image)
    started = time.perf_counter()
    _labels(run, image)
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
