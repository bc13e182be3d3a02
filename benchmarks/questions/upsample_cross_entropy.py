"""What do upsampling and cross-entropy cost, in one and as two functions of PyTorch?

"PyTorch" is `F.interpolate` and `F.cross_entropy`, in evaluation `F.interpolate` and `argmax`; "revseg"
is `revseg.ops`. Memory is counted at the size of a training step, what was live before not included:
the logits, their gradient and the labels. Time is the ratio of two neighbours, at a size that fits
into a short run; each heap and thread count is a process of its own, as in `step_time`.

    python -m benchmarks measure upsample_cross_entropy --rounds 7

With `--rounds 0` only memory is counted, which any load leaves alone.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import process
from benchmarks.record import Result, Results, Row
from benchmarks.segmentation import MIB, plain_argmax, plain_loss
from benchmarks.tables import Table, markdown, quartiles, size, source, thread_count, unique
from benchmarks.timing import HEAPS, environment, in_turns, spread
from revseg.losses import OhemCrossEntropy, ohem_reference
from revseg.memory import peak_bytes, saved_bytes
from revseg.ops import upsample_argmax, upsample_cross_entropy

QUESTION = "What do upsampling and cross-entropy cost, in one and as two functions of PyTorch?"
ORDER = 12
MEMORY_SHAPE, TIME_SHAPE = (4, 19, 128, 256), (4, 19, 64, 128)
FACTOR = 8
WAYS = ["PyTorch", "revseg"]


def our_argmax(logits: Tensor, labels: Tensor) -> Tensor:
    return upsample_argmax(logits, labels.shape[-2:])


SMOOTH = {"weight": torch.linspace(0.5, 2, MEMORY_SHAPE[1]), "label_smoothing": 0.1}

# Of each task: PyTorch's function and ours, and whether the logits are trained.
TASKS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], bool]] = {
    "loss and gradient": (plain_loss, upsample_cross_entropy, True),
    "with weights, smoothing": (
        partial(plain_loss, **SMOOTH),
        partial(upsample_cross_entropy, **SMOOTH),
        True,
    ),
    "with hard pixels only": (ohem_reference, OhemCrossEntropy(), True),
    "loss only": (plain_loss, upsample_cross_entropy, False),
    "argmax": (plain_argmax, our_argmax, False),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--memory-shape", type=int, nargs=4, default=MEMORY_SHAPE, metavar=("N", "C", "h", "w")
    )
    parser.add_argument("--time-shape", type=int, nargs=4, default=TIME_SHAPE, metavar=("N", "C", "h", "w"))
    parser.add_argument("--rounds", type=int, default=7, help="0: memory only")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {"factor": FACTOR, "heaps": HEAPS}


def measure(args: argparse.Namespace) -> Iterator[list[Row]]:
    rows: list[Row] = []
    for task in TASKS:
        for dtype in (torch.float32, torch.bfloat16):
            rows += [memory(task, way, dtype, tuple(args.memory_shape)) for way in WAYS]
            print(*rows[-2:], sep="\n", flush=True)
    yield rows
    for heap, threads in [(heap, threads) for heap in HEAPS for threads in args.threads if args.rounds]:
        job = (args.rounds, list(args.time_shape))
        found, end = process.run(times, *job, environment=environment(heap, threads))
        if end:
            raise RuntimeError(f"heap {heap!r}, {threads} threads: {end}")
        rows += [row | {"heap": heap, "threads": threads} for row in found]
        print(*rows[-len(found) :], sep="\n", flush=True)
        yield rows


def example(
    shape: tuple[int, ...], dtype: torch.dtype, trained: bool, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Logits [N, C, h, w] with a gradient, if they are trained, and labels [N, H, W], a tenth ignored."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator).to(dtype)
    n, classes, h, w = shape
    size = (n, FACTOR * h, FACTOR * w)
    labels = torch.randint(0, classes, size, dtype=torch.uint8, generator=generator)
    labels[torch.rand(size, generator=generator) < 0.1] = 255
    logits, labels = logits.to(device), labels.to(device)
    if trained:
        logits.requires_grad_()
        logits.grad = torch.zeros_like(logits)
    return logits, labels


def step(function: Callable[..., Tensor], logits: Tensor, labels: Tensor) -> None:
    """The function, and its backward pass if the logits are trained."""
    result = function(logits, labels)
    if result.requires_grad:
        result.backward()


def memory(task: str, way: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Row:
    """A row: task, way, dtype, shape, peak_mib and saved_mib of a step."""
    *functions, trained = TASKS[task]
    function = functions[WAYS.index(way)]
    logits, labels = example(shape, dtype, trained)
    peak = peak_bytes(partial(step, function, logits, labels))
    saved = saved_bytes(partial(function, logits, labels))
    row = {"task": task, "way": way, "dtype": str(dtype).removeprefix("torch."), "shape": list(shape)}
    return row | {"peak_mib": round(peak / MIB, 2), "saved_mib": round(saved / MIB, 2)}


def times(rounds: int, shape: tuple[int, ...]) -> Iterator[Row]:
    """A row for each task, in float32: plain_s, the median seconds of PyTorch, and our ratio to it."""
    for task, (plain, ours, trained) in TASKS.items():
        logits, labels = example(tuple(shape), torch.float32, trained)
        steps = [partial(step, each, logits, labels) for each in (plain, ours)]
        pairs = in_turns(*steps, rounds + 1)[1:]  # the first is a warm-up
        row = {"task": task, "way": "revseg", "shape": list(shape), "rounds": rounds}
        row["plain_s"] = spread([a for a, _ in pairs])["median"]
        yield row | {"ratio": spread([b / a for a, b in pairs])}


HEAD = """\
## Upsampling and cross-entropy

`revseg.ops.upsample_cross_entropy` and `upsample_argmax` against `F.interpolate` with `F.cross_entropy` and
`argmax`. Peak MiB of the loss, its backward pass included where the logits are trained, beyond what
was live before it: logits, their gradient, labels. In brackets, the MiB saved for the backward pass.
"""

TIME_HEAD = """\
Ratio of the time to that of PyTorch, which ran next to it: median, quartiles in brackets.
"""


def sections(results: Results) -> list[str]:
    result = results.get("upsample_cross_entropy")
    if not result:
        return []
    parts = [HEAD, markdown(memory_table(result))]
    if table := time_table(result):
        parts += [TIME_HEAD, markdown(table)]
    return [*parts, source(result)]


def memory_table(result: Result) -> Table:
    """Tasks down, way and type across; the shape is that of the first row."""
    rows = [row for row in result["rows"] if "peak_mib" in row]
    columns = unique((row["dtype"], row["way"]) for row in rows)
    cells = {(row["task"], row["dtype"], row["way"]): row for row in rows}
    head = [_sizes(rows[0]["shape"], result["settings"]["factor"]), *(" ".join(c) for c in columns)]
    tasks = unique(row["task"] for row in rows)
    return head, [[task, *(_memory_cell(cells[(task, *c)]) for c in columns)] for task in tasks]


def time_table(result: Result) -> Table | None:
    """Tasks down, threads and heap across; None if only memory was counted."""
    rows = [row for row in result["rows"] if "ratio" in row]
    if not rows:
        return None
    columns = unique((row["threads"], row["heap"]) for row in rows)
    cells = {(row["task"], row["threads"], row["heap"]): row for row in rows}
    head = [f"{thread_count(threads)}, heap {heap}" for threads, heap in columns]
    tasks = unique(row["task"] for row in rows)
    table = [[task, *(_time_cell(cells[(task, *c)]) for c in columns)] for task in tasks]
    return [_sizes(rows[0]["shape"], result["settings"]["factor"]), *head], table


def _sizes(shape: list[int], factor: int) -> str:
    h, w = shape[2:]
    return f"{size(shape)} to {size([factor * h, factor * w])}"


def _memory_cell(row: Row) -> str:
    saved = f" ({row['saved_mib']:,.1f})" if row["saved_mib"] else ""
    return f"{row['peak_mib']:,.1f}{saved}"


def _time_cell(row: Row) -> str:
    return f"{quartiles(row['ratio'])} of {row['plain_s']:.2f} s"
