"""How do memory and time grow with batch, depth, width and size, and what would one large card hold?

VNet's training step, plain (PyTorch's own modules and loss) and at two memory levels: one of batch, depth, width
and size is varied, the others stay at `BASE`. Peaks are predicted on fake tensors, those in `CHECKED` are
measured as well. A line is fitted to each series, by least squares: MiB = fixed + slope * value, where the value of a
size is its number of 10^6 pixels, and that of a depth the number of V modules. What a card of 80 GB would hold
follows from the line, with the budget of `benchmarks.training_memory`. Time is that of a step at batch `TIMED`, by image,
as a ratio to the plain step next to it.

    python -m benchmarks.scale --rounds 3

With `--rounds 0` nothing is timed, and any load leaves the rest alone.
"""

import argparse
import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import record
from benchmarks.memory_levels import batch, plain_loss, using_kernels
from benchmarks.step_time import spread
from benchmarks.training_memory import OVERHEAD_MIB
from revseg.layers.images import normalize_images
from revseg.losses import UpsampleCrossEntropy
from revseg.memory import peak_bytes, predicted_peak_bytes
from revseg.models import create_model

QUESTION = (
    "How do memory and time grow with batch, depth, width and size, and what would one large card hold?"
)
CLASSES = 19
MIB = 2**20
LEVELS = ("plain", "balanced", "lowest")
CARD_GB = 80

Point = dict[str, Any]
BASE: Point = {"batch": 4, "height": 512, "width": 1024, "modules": 3, "channels": 128}
SERIES: dict[str, list[Point]] = {
    "batch": [{"batch": n} for n in (1, 2, 4, 8, 16)],
    "V modules": [{"modules": n} for n in (3, 6, 12, 24, 48)],
    "channels of the last stage": [{"channels": n} for n in (64, 128, 256, 512)],
    "10^6 pixels": [{"height": h, "width": 2 * h} for h in (256, 512, 1024, 2048)],
}
CHECKED = (
    ("batch", (1, 2, 4)),
    ("V modules", (6,)),
    ("channels of the last stage", (64, 256)),
    ("10^6 pixels", (0.13,)),
)
TIMED = ("batch", (1, 2, 4)), ("V modules", (3, 12)), ("channels of the last stage", (64, 256))


def value(series: str, point: Point) -> float:
    """Where a point stands in its series."""
    if series == "10^6 pixels":
        return round(point["height"] * point["width"] / 1e6, 2)
    return int(point[{"batch": "batch", "V modules": "modules"}.get(series, "channels")])


def step(level: str, point: Point, values: bool) -> Callable[[], None]:
    """A training step of VNet.

    Args:
        level: One of `LEVELS`.
        point: As `BASE`; a third of the modules is in the first of the two stages.
        values: Whether images hold random numbers; without, the step can run on fake tensors.
    """
    plain, alpha = level == "plain", point["modules"] // 3
    model = create_model(
        "vnet",
        CLASSES,
        memory="fastest" if plain else level,
        widths=(point["channels"] // 16, point["channels"] // 4, point["channels"]),
        alpha=alpha,
        beta=point["modules"] - alpha,
    )
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    loss = plain_loss if plain else UpsampleCrossEntropy()

    def train() -> None:
        images, labels = batch((point["batch"], point["height"], point["width"]), values)
        with using_kernels(not plain):
            loss(model(normalize_images(images) if plain else images), labels).backward()

    return train


def line(points: dict[float, float]) -> dict[str, float]:
    """Fixed and slope of the line through MiB by value, and how far off the worst point is."""
    x, y = np.array(list(points)), np.array(list(points.values()))
    slope, fixed = np.polyfit(x, y, 1)
    off = np.abs(fixed + slope * x - y) / y
    return {
        "fixed": round(float(fixed), 2),
        "slope": round(float(slope), 3),
        "off": round(float(off.max()), 4),
    }


def held(law: dict[str, float]) -> float | None:
    """The greatest value that a card of `CARD_GB` holds by this line; None if it does not grow."""
    budget = CARD_GB * 1e9 / MIB - OVERHEAD_MIB - law["fixed"]
    return round(budget / law["slope"], 1) if law["slope"] > 0.05 else None


def measure(series: str, level: str) -> Point:
    """Predicted and measured MiB by value, the line, and what a large card would hold."""
    checked = dict(CHECKED).get(series, ())
    predicted, measured = {}, {}
    for change in SERIES[series]:
        point = BASE | change
        at = value(series, point)
        predicted[at] = round(predicted_peak_bytes(lambda p=point: step(level, p, False)) / MIB, 1)
        if at in checked:
            gc.collect()
            measured[at] = round(peak_bytes(step(level, point, True)) / MIB, 1)
    law = line(predicted)
    row: Point = {"series": series, "level": level, "predicted_mib": predicted, "measured_mib": measured}
    return row | {"law": law, "held": held(law)}


def times(series: str, rounds: int) -> dict[str, dict[float, Point]]:
    """By level and value: milliseconds of an image in the plain step, and the ratio to it."""
    found: dict[str, dict[float, Point]] = {level: {} for level in LEVELS}
    for change in SERIES[series]:
        point = BASE | change
        at = value(series, point)
        if at not in dict(TIMED).get(series, ()):
            continue
        steps = {level: step(level, point, True) for level in LEVELS}
        for each in steps.values():
            _seconds(each)
        pairs: dict[str, list[tuple[float, float]]] = {level: [] for level in LEVELS}
        for _ in range(rounds):
            for level in LEVELS[1:]:
                pairs[level].append((_seconds(steps["plain"]), _seconds(steps[level])))
        for level in LEVELS[1:]:
            ms = float(np.median([a for a, _ in pairs[level]])) * 1e3 / point["batch"]
            found[level][at] = {"plain_ms": round(ms, 1), "ratio": spread([b / a for a, b in pairs[level]])}
    return found


def _seconds(each: Callable[[], None]) -> float:
    gc.collect()
    started = time.perf_counter()
    each()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--series", nargs="+", default=list(SERIES), choices=list(SERIES), metavar="SERIES")
    parser.add_argument("--rounds", type=int, default=3, help="of timing; 0 for none")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    args = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    torch.set_num_threads(args.threads)
    rows = []
    for series in args.series:
        timed = times(series, args.rounds) if args.rounds else {}
        for level in LEVELS:
            rows.append(measure(series, level) | {"time": timed.get(level, {})})
            print(rows[-1], flush=True)
    settings = {"base": BASE, "rounds": args.rounds, "card_gb": CARD_GB}
    print("wrote", record.write("scale", QUESTION, rows, settings, args.out))


if __name__ == "__main__":
    main()
