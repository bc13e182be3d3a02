"""How do memory and time grow with batch, depth, width and size, and what would one large card hold?

VNet's training step, plain (PyTorch's own modules and loss) and at two memory levels: one of batch, depth, width
and size is varied, the others stay at `BASE`. Peaks are predicted on fake tensors, those in `CHECKED` are
measured as well. A line is fitted to each series, by least squares: MiB = fixed + slope * value, where the value of a
size is its number of 10^6 pixels, and that of a depth the number of V modules. What a card of 80 GB would hold
follows from the line, with the budget of `training_memory`. Time is that of a step at batch `TIMED`, by image,
as a ratio to the plain step next to it.

    python -m benchmarks measure scale --rounds 3

With `--rounds 0` nothing is timed, and any load leaves the rest alone.
"""

import argparse
import gc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from benchmarks.questions.training_memory import OVERHEAD_MIB
from benchmarks.record import Result, Results, Row
from benchmarks.segmentation import CLASSES, MIB, batch, plain_loss, using_kernels
from benchmarks.tables import Table, markdown, source
from benchmarks.timing import in_turns, seconds, spread
from revseg.layers.images import normalize_images
from revseg.losses import UpsampleCrossEntropy
from revseg.memory import peak_bytes, predicted_peak_bytes
from revseg.models import create_model

QUESTION = (
    "How do memory and time grow with batch, depth, width and size, and what would one large card hold?"
)
ORDER = 11
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


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--series", nargs="+", default=list(SERIES), choices=list(SERIES), metavar="SERIES")
    parser.add_argument("--rounds", type=int, default=3, help="of timing; 0 for none")
    parser.add_argument("--threads", type=int, default=2)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {"base": BASE, "rounds": args.rounds, "card_gb": CARD_GB}


def measure(args: argparse.Namespace) -> Iterator[list[Row]]:
    torch.set_num_threads(args.threads)
    rows: list[Row] = []
    for series in args.series:
        timed = times(series, args.rounds) if args.rounds else {}
        for level in LEVELS:
            rows.append(row_of(series, level) | {"time": timed.get(level, {})})
            print(rows[-1], flush=True)
        yield rows


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


def row_of(series: str, level: str) -> Row:
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
    row: Row = {"series": series, "level": level, "predicted_mib": predicted, "measured_mib": measured}
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
            seconds(each)
        for level in LEVELS[1:]:
            pairs = in_turns(steps["plain"], steps[level], rounds)
            ms = float(np.median([a for a, _ in pairs])) * 1e3 / point["batch"]
            found[level][at] = {"plain_ms": round(ms, 1), "ratio": spread([b / a for a, b in pairs])}
    return found


HEAD = """\
## Scale

VNet's training step when one thing grows and the rest stays at {base}. MiB as predicted on fake tensors from the
least value of the series to its greatest, the line through them with its greatest deviation, how far measurements
here are from the predictions at most, and what a card of {card} GB would hold by the line if it grew alone (a prediction;
"no limit" where nothing grows). Time is that of a step as a ratio to plain's, from the least value timed to the greatest.
"""


def sections(results: Results) -> list[str]:
    result = results.get("scale")
    if not result:
        return []
    base = ", ".join(f"{name} {value:,}" for name, value in result["settings"]["base"].items())
    head = HEAD.format(base=base, card=result["settings"]["card_gb"])
    return [head, markdown(table(result)), source(result)]


def table(result: Result) -> Table:
    """Series and levels down."""
    rows = []
    for row in result["rows"]:
        predicted, measured, law = row["predicted_mib"], row["measured_mib"], row["law"]
        off = [abs(predicted[at] / measured[at] - 1) for at in measured]
        ratios = [each["ratio"]["median"] for each in row["time"].values()]
        ends = list(predicted)
        rows.append([
            f"{row['series']}, {ends[0]} to {ends[-1]}",
            row["level"],
            f"{predicted[ends[0]]:,.0f} to {predicted[ends[-1]]:,.0f}",
            f"{law['fixed']:,.1f} + {law['slope']:,.2f} x ({law['off']:.1%})",
            f"{max(off):.1%}" if off else "",
            "no limit" if row["held"] is None else f"{row['held']:,.0f}",
            f"{ratios[0]:.2f} to {ratios[-1]:.2f}" if ratios else "",
        ])  # fmt: skip
    return ["", "level", "MiB", "line", "off", "held", "time"], rows
