"""What does a training step of VNet take at each memory level, measured and predicted?

Memory: batch 4 at 1024 x 2048, 19 classes, by the allocator's events; parameters and their gradients
not counted, images and labels (bytes, 32 MiB) counted. Time: the ratio to the plain step next to
it, at a size that fits into a short run. "plain" is the network of ordinary PyTorch modules with
`F.interpolate` and `F.cross_entropy`.

    python -m benchmarks.memory_levels --rounds 5

With `--rounds 0` only memory is counted, which any load leaves alone.
"""

import argparse
import gc
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import record
from benchmarks.step_time import spread
from revseg.kernels.dispatch import plain
from revseg.layers.images import normalize_images
from revseg.losses import UpsampleCrossEntropy, predict_labels
from revseg.memory import peak_bytes, predicted_peak_bytes
from revseg.metrics import ConfusionMatrix
from revseg.models import create_model

QUESTION = "What does a training step of VNet take at each memory level, measured and predicted?"
CLASSES = 19
MIB = 2**20
BF16 = "bfloat16"

# Of each row: whether it is plain PyTorch, the dtype of the network, hyperparameters, and the goal in MiB.
CASES: dict[str, tuple[bool, str, dict[str, Any], int | None]] = {
    "plain": (True, "float32", {"memory": "fastest"}, None),
    "fastest": (False, "float32", {"memory": "fastest"}, None),
    "balanced": (False, "float32", {"memory": "balanced"}, 900),
    "lowest": (False, "float32", {"memory": "lowest"}, 487),
    "balanced, exact": (False, "float32", {"memory": "balanced", "exact": True}, None),
    "lowest, exact": (False, "float32", {"memory": "lowest", "exact": True}, None),
    "lowest, alpha 8, beta 16": (False, "float32", {"memory": "lowest", "alpha": 8, "beta": 16}, None),
    "plain, bfloat16": (True, BF16, {"memory": "fastest"}, None),
    "balanced, lossless, bfloat16": (False, BF16, {"memory": "balanced", "exact": "lossless"}, 500),
    "lowest, lossless, bfloat16": (False, BF16, {"memory": "lowest", "exact": "lossless"}, 250),
}
TIMED = ("fastest", "balanced", "lowest", "balanced, exact")

Step = Callable[[], None]


def training_step(
    case: str, size: tuple[int, int, int], values: bool = True, device: str | None = None
) -> Step:
    """One training step: makes images and labels, then runs forward and backward.

    Args:
        case: A name in `CASES`.
        size: N, H, W of the images.
        values: Whether the images hold random numbers; without, the step can run on fake tensors.
        device: Where it runs; by default where PyTorch makes tensors.
    """
    plain, dtype, hyperparameters, _ = CASES[case]
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        model = create_model("vnet", CLASSES, **hyperparameters)
    finally:
        torch.set_default_dtype(torch.float32)
    if device is not None:
        model.to(device)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    loss = plain_loss if plain else UpsampleCrossEntropy()

    def step() -> None:
        images, labels = batch(size, values, device)
        with using_kernels(not plain):
            loss(model(normalize_images(images).to(p.dtype) if plain else images), labels).backward()

    return step


def validation_step(case: str, size: tuple[int, int, int]) -> Step:
    """One step of validation: prediction, counts of pixels, and the loss."""
    _, _, hyperparameters, _ = CASES[case]
    model = create_model("vnet", CLASSES, **hyperparameters).eval()
    matrix, loss = ConfusionMatrix(CLASSES), UpsampleCrossEntropy()

    @torch.no_grad()
    def step() -> None:
        images, labels = batch(size, values=True)
        logits = model(images)
        matrix.update(predict_labels(logits, labels.shape[-2:]), labels)
        loss(logits, labels)

    return step


def batch(size: tuple[int, int, int], values: bool, device: str | None = None) -> tuple[Tensor, Tensor]:
    """Images [N, 3, H, W] and labels [N, H, W], both uint8."""
    n, height, width = size
    images = torch.zeros((n, 3, height, width), dtype=torch.uint8, device=device)
    labels = torch.zeros((n, height, width), dtype=torch.uint8, device=device)
    if values:
        images.random_(0, 256)
        labels.random_(0, CLASSES)
    return images, labels


def plain_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss by two functions of PyTorch, with every class at full size."""
    scores = F.interpolate(logits, labels.shape[-2:], mode="bilinear")
    return F.cross_entropy(scores, labels.long(), ignore_index=255)


def using_kernels(on: bool) -> AbstractContextManager[None]:
    """Kernels, or for the length of a `with` none."""
    return nullcontext() if on else plain()


def measure(case: str, size: tuple[int, int, int]) -> dict[str, Any]:
    """Peak of a training step, measured and predicted, and of a validation step."""
    predicted = predicted_peak_bytes(lambda: training_step(case, size, values=False)) / MIB
    gc.collect()
    measured = peak_bytes(training_step(case, size)) / MIB
    row: dict[str, Any] = {"case": case, "peak_mib": round(measured, 1), "predicted_mib": round(predicted, 1)}
    row["goal_mib"] = CASES[case][3]
    row["off"] = round(predicted / measured - 1, 4)
    if case == "lowest":
        row["validation_mib"] = round(peak_bytes(validation_step(case, size)) / MIB, 1)
    return row


def time_ratios(
    cases: tuple[str, ...], size: tuple[int, int, int], rounds: int
) -> dict[str, dict[str, float]]:
    """The step of each case as a ratio to the plain step before it."""
    steps = {case: training_step(case, size) for case in ("plain", *cases)}
    for step in steps.values():
        step()
    ratios: dict[str, list[float]] = {case: [] for case in cases}
    for _ in range(rounds):
        for case in cases:
            ratios[case].append(1 / (_seconds(steps["plain"]) / _seconds(steps[case])))
    return {case: spread(values) for case, values in ratios.items()}


def _seconds(step: Step) -> float:
    gc.collect()
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    parser.add_argument("--size", type=int, nargs=3, default=(4, 1024, 2048), metavar=("N", "H", "W"))
    parser.add_argument("--time-size", type=int, nargs=3, default=(4, 512, 1024), metavar=("N", "H", "W"))
    parser.add_argument("--rounds", type=int, default=5, help="of timing; 0 for memory alone")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    args = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    torch.set_num_threads(args.threads)
    ratios = time_ratios(TIMED, tuple(args.time_size), args.rounds) if args.rounds else {}
    for case, ratio in ratios.items():
        print(f"{case:30} {ratio['median']:.2f} x the plain step ({ratio['low']:.2f} to {ratio['high']:.2f})")
    rows = []
    for case in args.cases:
        rows.append(measure(case, tuple(args.size)) | {"ratio": ratios.get(case)})
        print(", ".join(f"{key} {value}" for key, value in rows[-1].items() if value is not None), flush=True)
    settings = {"size": list(args.size), "time_size": list(args.time_size), "rounds": args.rounds}
    print("wrote", record.write("memory_levels", QUESTION, rows, settings, args.out))


if __name__ == "__main__":
    main()
