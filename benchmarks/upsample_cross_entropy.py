"""What do upsampling and cross-entropy cost, in one and as two functions of PyTorch?

"PyTorch" is `F.interpolate` and `F.cross_entropy`, in evaluation `F.interpolate` and `argmax`; "revseg"
is `revseg.ops`. Memory is counted at the size of a training step, what was live before not included:
the logits, their gradient and the labels. Time is the ratio of two neighbours, at a size that fits
into a short run; each heap and thread count is a process of its own, as in `step_time`.

    python -m benchmarks.upsample_cross_entropy --rounds 7

With `--rounds 0` only memory is counted, which any load leaves alone.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import record
from benchmarks.step_time import HEAPS, spread
from revseg.losses import OhemCrossEntropy, ohem_reference
from revseg.memory import peak_bytes, saved_bytes
from revseg.ops import upsample_argmax, upsample_cross_entropy

QUESTION = "What do upsampling and cross-entropy cost, in one and as two functions of PyTorch?"
MEMORY_SHAPE, TIME_SHAPE = (4, 19, 128, 256), (4, 19, 64, 128)
FACTOR = 8
WAYS = ["PyTorch", "revseg"]
MIB = 2**20


def plain_loss(logits: Tensor, labels: Tensor, weight: Tensor | None = None, **options: Any) -> Tensor:
    scores = F.interpolate(logits, labels.shape[-2:], mode="bilinear")
    weight = None if weight is None else weight.to(scores.dtype)
    return F.cross_entropy(scores, labels.long(), weight, ignore_index=255, **options)


def plain_argmax(logits: Tensor, labels: Tensor) -> Tensor:
    return F.interpolate(logits, labels.shape[-2:], mode="bilinear").argmax(dim=1)


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


def memory(task: str, way: str, dtype: torch.dtype, shape: tuple[int, ...]) -> dict[str, Any]:
    """A row: task, way, dtype, shape, peak_mib and saved_mib of a step."""
    *functions, trained = TASKS[task]
    function = functions[WAYS.index(way)]
    logits, labels = example(shape, dtype, trained)
    peak = peak_bytes(partial(step, function, logits, labels))
    saved = saved_bytes(partial(function, logits, labels))
    row = {"task": task, "way": way, "dtype": str(dtype).removeprefix("torch."), "shape": list(shape)}
    return row | {"peak_mib": round(peak / MIB, 2), "saved_mib": round(saved / MIB, 2)}


def times(rounds: int, shape: tuple[int, ...]) -> list[dict[str, Any]]:
    """A row for each task, in float32: plain_s, the median seconds of PyTorch, and our ratio to it."""
    rows = []
    for task, (plain, ours, trained) in TASKS.items():
        logits, labels = example(shape, torch.float32, trained)
        pairs = []
        for i in range(rounds + 1):
            order = [plain, ours] if i % 2 else [ours, plain]
            seconds = {each: _seconds(partial(step, each, logits, labels)) for each in order}
            pairs.append((seconds[plain], seconds[ours]))
        pairs = pairs[1:]  # the first is a warm-up
        row = {"task": task, "way": "revseg", "shape": list(shape), "rounds": rounds}
        row["plain_s"] = spread([a for a, _ in pairs])["median"]
        rows.append(row | {"ratio": spread([b / a for a, b in pairs])})
    return rows


def _seconds(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _in_new_process(heap: str, threads: int, rounds: int, shape: tuple[int, ...]) -> list[dict[str, Any]]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    environment |= HEAPS[heap] | {"OMP_NUM_THREADS": str(threads)}
    job = json.dumps({"rounds": rounds, "shape": shape})
    command = [sys.executable, "-m", "benchmarks.upsample_cross_entropy", "--job", job]
    answer = subprocess.run(
        command, env=environment, cwd=record.ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    rows: list[dict[str, Any]] = json.loads(answer.stdout.splitlines()[-1])
    return [row | {"heap": heap, "threads": threads} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--memory-shape", type=int, nargs=4, default=MEMORY_SHAPE, metavar=("N", "C", "h", "w")
    )
    parser.add_argument("--time-shape", type=int, nargs=4, default=TIME_SHAPE, metavar=("N", "C", "h", "w"))
    parser.add_argument("--rounds", type=int, default=7, help="0: memory only")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(times(**json.loads(args.job))))
        return
    rows = []
    for task in TASKS:
        for dtype in (torch.float32, torch.bfloat16):
            for way in WAYS:
                rows.append(memory(task, way, dtype, tuple(args.memory_shape)))
                row = rows[-1]
                print(f"{task:24} {row['dtype']:9} {way:8} peak {row['peak_mib']:9.2f} MiB", flush=True)
    cases = [(heap, threads) for heap in HEAPS for threads in args.threads] if args.rounds else []
    for heap, threads in cases:
        for row in _in_new_process(heap, threads, args.rounds, tuple(args.time_shape)):
            ratio = row["ratio"]
            print(
                f"{row['task']:24} {heap:11} {threads} threads  {ratio['median']:.2f} of {row['plain_s']} s"
            )
            rows.append(row)
    settings = {"factor": FACTOR, "heaps": HEAPS}
    print("wrote", record.write("upsample_cross_entropy", QUESTION, rows, settings, args.out))


if __name__ == "__main__":
    main()
