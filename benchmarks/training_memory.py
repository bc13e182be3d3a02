"""Who can be trained on which card? The paper's table 3, for every network and memory level.

Peaks of a training step at 1024 x 2048, 19 classes, float32, without auxiliary heads: images and labels counted,
parameters and their gradients not. "plain" is the network of PyTorch's own modules with `F.interpolate` and
`F.cross_entropy`. Predicted on fake tensors for batches of 1, 2 and 4; measured by the allocator's events at batch 1, each
case in a process of its own. "validation" is a step of validation after one of training, while what a training
loop holds is alive. A line through the predictions, MiB = fixed + per image * batch, gives the largest batch of a card:

    budget = its bytes - 500 MiB for the driver and libraries - parameters, gradients and Adam's two moments

    python -m benchmarks.training_memory --measure 400

`--measure` takes the most 10^9 operations a network may need for an image to be measured here; 0 measures none. The
file is written after every network; with `--names`, rows of the others stay as they are.
"""

import argparse
import gc
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import record
from benchmarks.memory_levels import batch, plain_loss, using_kernels
from benchmarks.networks import PAPER, counts, kept_rows
from revseg.losses import UpsampleCrossEntropy, predict_labels
from revseg.memory import peak_bytes, predicted_peak_bytes
from revseg.memory.policy import MEMORY_LEVELS
from revseg.metrics import ConfusionMatrix
from revseg.models import MODELS, create_model

QUESTION = "Which network can be trained on which card?"
CLASSES = 19
MIB = 2**20
CASES = {"plain": ("fastest", False), **{level: (level, True) for level in MEMORY_LEVELS}}
BATCHES = (1, 2, 4)
CARDS_GB = (12, 24, 80)
OVERHEAD_MIB = 500
# Of the paper's table 3, MB on its card of 12 GB at batch 4: training, and training with validation.
PAPER_MB: dict[str, tuple[int | str, int | str]] = {
    "pspnet": ("out of memory at batch 1", "out of memory"),
    "enet": (8151, "out of memory"),
    "espnet": (7431, "out of memory"),
    "vnet": (5021, 9345),
}


def step(
    name: str, case: str, size: tuple[int, int, int], values: bool, validate: bool
) -> Callable[[], None]:
    """A training step of a network, and if asked a step of validation after it.

    Args:
        name: Of the network.
        case: A name in `CASES`.
        size: N, H, W of the images.
        values: Whether images hold random numbers; without, the step can run on fake tensors.
        validate: Whether a batch of validation follows.
    """
    level, kernels = CASES[case]
    heads = {"aux": False} if "aux" in inspect.signature(MODELS[name]).parameters else {}
    model = create_model(name, CLASSES, memory=level, **heads)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    loss = UpsampleCrossEntropy() if kernels else plain_loss
    matrix = ConfusionMatrix(CLASSES)

    def train_and_validate() -> None:
        images, labels = batch(size, values)
        with using_kernels(kernels):
            value = loss(model(images), labels)
            value.backward()
            if validate:
                model.eval()
                with torch.no_grad():
                    found = _predicted(model(images), kernels)
                    if values:
                        matrix.update(found, labels)
                model.train()

    def _predicted(logits: torch.Tensor, kernels: bool) -> torch.Tensor:
        if kernels:
            return predict_labels(logits, size[1:])
        return F.interpolate(logits, size[1:], mode="bilinear").argmax(1)

    return train_and_validate


def predicted(name: str, case: str, size: tuple[int, int, int], validate: bool = False) -> float:
    """MiB of a step on fake tensors."""
    return round(predicted_peak_bytes(lambda: step(name, case, size, False, validate)) / MIB, 1)


def law(peaks: dict[int, float]) -> dict[str, float]:
    """The line through peaks by batch: fixed and per_image in MiB, and how far a point is off at most."""
    batches = np.array(list(peaks))
    mib = np.array(list(peaks.values()))
    per_image, fixed = np.polyfit(batches, mib, 1)
    off = np.abs(fixed + per_image * batches - mib) / mib
    return {
        "fixed": round(float(fixed), 1),
        "per_image": round(float(per_image), 1),
        "off": round(float(off.max()), 4),
    }


def largest_batch(line: dict[str, float], card_gb: int, parameters: int) -> int:
    """How many images fit on a card of so many GB (10^9 bytes), by the line; 0 if none does."""
    budget = card_gb * 1e9 / MIB - OVERHEAD_MIB - 4 * 4 * parameters / MIB
    return max(0, int((budget - line["fixed"]) // line["per_image"]))


def measured(name: str, case: str, size: tuple[int, int]) -> dict[str, Any]:
    """Peaks of training alone and with validation at batch 1, found in another process; a note if it failed."""
    job = json.dumps([name, case, list(size)])
    command = [sys.executable, "-m", "benchmarks.training_memory", "--job", job]
    ran = subprocess.run(command, cwd=record.ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if ran.returncode:
        return {"note": f"the process ended with {ran.returncode}"}
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def _job(name: str, case: str, size: list[int]) -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    found = {}
    for kind, validate in (("training", False), ("validation", True)):
        found[kind] = round(peak_bytes(step(name, case, (1, *size), True, validate)) / MIB, 1)
        gc.collect()
    print(json.dumps(found))


def row(name: str, size: tuple[int, int], most_gflops: float) -> dict[str, Any]:
    """All cases of one network."""
    count = counts(name)
    found: dict[str, Any] = {"network": name, **count, "paper_mb": PAPER_MB.get(name), "cases": {}}
    for case in CASES:
        peaks = {n: predicted(name, case, (n, *size)) for n in BATCHES}
        line = law(peaks)
        each: dict[str, Any] = {"predicted_mib": peaks, "law": line}
        each["validation_mib"] = predicted(name, case, (BATCHES[-1], *size), validate=True)
        each["largest"] = {str(gb): largest_batch(line, gb, count["parameters"]) for gb in CARDS_GB}
        allowed = count["gflops"] <= most_gflops
        each["measured"] = measured(name, case, size) if allowed else {"note": "not measured: too slow here"}
        if "training" in each["measured"]:
            each["off"] = round(peaks[1] / each["measured"]["training"] - 1, 4)
        found["cases"][case] = each
        print(name, case, each, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    order = [*PAPER, *(name for name in MODELS if name not in PAPER)]
    parser.add_argument("--names", nargs="+", default=order, choices=order, metavar="NAME")
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 2048), metavar=("H", "W"))
    parser.add_argument("--measure", type=float, default=400, metavar="GFLOPS")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        _job(*json.loads(args.job))
        return
    settings = {"size": list(args.size), "measure": args.measure, "overhead_mib": OVERHEAD_MIB}
    rows = kept_rows(args.out / "training_memory.json", args.names, settings)
    for name in args.names:
        rows[name] = row(name, tuple(args.size), args.measure) | record.stamp()
        ordered = [rows[each] for each in order if each in rows]
        path = record.write("training_memory", QUESTION, ordered, settings, args.out)
    print("wrote", path)


if __name__ == "__main__":
    main()
