"""What does each way to train a whole network take, in memory and time, and are its gradients right?

Networks of the paper and of ours, a U-Net and a ResNet-50 (`benchmarks.nets`); ways that PyTorch and other libraries
have, and ours (`benchmarks.network_ways`). One process for a network and a way:

- peak of a training step, by the allocator: images and labels counted, parameters and their gradients not;
- time of a step as a ratio to the plain step next to it, at the same batch;
- error of all parameter gradients against float64 in plain autograd, relative L2, at a small size, without dropout;
- how often a step moves the running statistics of a batch norm.

The batch is the largest, up to `--most-images`, whose plain step is predicted to take at most `--share` of the memory
of this machine or its GPU.

    python -m benchmarks measure whole_networks --rounds 5
    python -m benchmarks measure whole_networks --names vnet unet --ways plain "revseg lowest" --size 64 128

Rows of networks that are not named stay as they are.
"""

import argparse
import gc
import os
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import picture, process, record
from benchmarks.network_ways import NETWORKS, TWINS, WAYS, NotAllowedError, Shape, Training, plain
from benchmarks.peers import MISSING
from benchmarks.record import Result, Results, Row
from benchmarks.rivals import is_available
from benchmarks.segmentation import MIB, batch, using_kernels
from benchmarks.tables import NOT_RUN, Table, markdown, quartiles, source, unique
from benchmarks.timing import environment, in_turns, spread
from revseg.layers.images import normalize_images
from revseg.memory import peak_bytes, predicted_peak_bytes

QUESTION = "What does each way to train a whole network take, and are its gradients right?"
ORDER, SHORT_ORDER = 6.5, 4.5
CHECKED = (2, 64, 128)  # N, H, W at which gradients are compared
LIMIT_S = 3600  # of one process
IN_SHORT = (
    *("plain", "compile", "compile budget 0", "checkpoint"),
    *("revseg fastest", "revseg balanced", "revseg lowest"),
)
Step = Callable[[], object]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--names", nargs="+", default=list(NETWORKS), choices=NETWORKS, metavar="NAME")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS), metavar="WAY")
    parser.add_argument("--size", type=int, nargs=2, default=(512, 1024), metavar=("H", "W"))
    parser.add_argument("--most-images", type=int, default=4)
    parser.add_argument("--share", type=float, default=0.5, help="of the memory, for the plain step")
    parser.add_argument("--rounds", type=int, default=5, help="of timing; 0 for none")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {"size": list(args.size), "threads": args.threads, "device": args.device, "checked": list(CHECKED)}


def measure(args: argparse.Namespace) -> Iterator[list[Row]]:
    path = args.out / "whole_networks.jsonl"
    earlier = record.earlier_rows(path, settings(args), lambda row: row["network"] not in args.names)
    rows = {(row["network"], row["way"]): row for row in earlier}
    allowed = args.share * _memory_of(args.device)
    for name in args.names:
        images = largest_batch(name, tuple(args.size), allowed, args.most_images)
        for way in args.ways:
            shape = [images, *args.size]
            rows[name, way] = _row(name, way, shape, args.rounds, args.threads, args.device)
            print(rows[name, way], flush=True)
        order = [(each, way) for each in NETWORKS for way in WAYS]
        yield [rows[key] for key in order if key in rows]


def _row(name: str, way: str, shape: list[int], rounds: int, threads: int, device: str) -> Row:
    """What one process finds; a note where it does not come to its end."""
    row: Row = {"network": name, "way": way, "images": shape[0]}
    if not is_available(way):
        return row | {"note": MISSING} | record.stamp()
    place = environment("keeps pages", threads)
    found, end = process.run(
        _job, name, way, shape, rounds, threads, device, environment=place, limit=LIMIT_S
    )
    for each in found:
        row |= each
    return row | ({"note": end} if end else {}) | record.stamp()


def _memory_of(device: str) -> float:
    """Bytes of the machine, or of its GPU."""
    if device != "cpu":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def largest_batch(name: str, size: tuple[int, int], allowed: float, most: int) -> int:
    """How many images the plain step is predicted to hold in so many bytes; 1 at the least.

    Args:
        name: The network.
        size: H, W of the images.
        allowed: Bytes for the step.
        most: More images than this are not wanted.
    """
    one, two = (predicted_peak_bytes(lambda n=n: step_of(plain(name), (n, *size))) for n in (1, 2))
    return max(1, min(most, int((allowed - (2 * one - two)) // (two - one))))


def step_of(training: Training, shape: Shape, values: bool = False, device: str | None = None) -> Step:
    """A training step that adds to gradients that are there."""
    for p in training.model.parameters():
        p.grad = torch.zeros_like(p)
    return lambda: training.step(*batch(shape, values, device))


def _job(
    name: str, way: str, shape: list[int], rounds: int, threads: int, device: str
) -> Iterator[dict[str, Any]]:
    """Parts of a row, one after another, so that those before a failure are kept."""
    torch.set_num_threads(threads)
    is_available(way)  # makes it importable
    try:
        size = (shape[0], shape[1], shape[2])
        yield {"gradient_error": gradient_error(name, way, size, device)}
        yield {"updates": batch_norm_updates(_made(name, way, size, device), device)}
        yield from _costs(name, way, size, rounds, device)
    except NotAllowedError as reason:
        yield {"note": str(reason)}
    except Exception as error:  # noqa: BLE001, a library may raise anything
        text = " ".join(str(error).split())
        yield {"note": f"{type(error).__name__}: {text[:160]}"}


def _made(name: str, way: str, shape: Shape, device: str) -> Training:
    training = WAYS[way](name, shape)
    training.model.to(device)
    return training


def _costs(name: str, way: str, shape: Shape, rounds: int, device: str) -> Iterator[dict[str, Any]]:
    """peak_mib, and then plain_s with the ratio to it."""
    step = step_of(_made(name, way, shape, device), shape, True, device)
    step()  # what is compiled or kept for good is made here
    gc.collect()
    yield {"peak_mib": round(peak_bytes(step, device) / MIB, 1)}
    if not rounds:
        return
    beside = step_of(_made(name, "plain", shape, device), shape, True, device)
    pairs = in_turns(beside, step, rounds + 1)[1:]  # the first is a warm-up
    ratio = spread([b / a for a, b in pairs])
    yield {"plain_s": round(statistics.median(a for a, _ in pairs), 4), "ratio": ratio}


def gradient_error(name: str, way: str, shape: Shape, device: str = "cpu") -> float:
    """Of all parameter gradients against plain autograd in float64 from the same weights, relative L2."""
    found = _gradients(_made(name, way, shape, device), torch.float32, device)
    truth = _gradients(TWINS.get(way, plain)(name), torch.float64, device)
    off = sum(float((a.double() - b).square().sum()) for a, b in zip(found, truth, strict=True))
    return float(f"{(off / sum(float(b.square().sum()) for b in truth)) ** 0.5:.2g}")


def _gradients(training: Training, dtype: torch.dtype, device: str) -> list[Tensor]:
    """In the order of the parameters, without dropout."""
    training.model.to(device, dtype)
    for module in training.model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    images, labels = _data(device)
    with using_kernels(False):  # all ways from the same numbers: the rounding of the images is not asked
        given = normalize_images(images).to(dtype)
    training.step(given, labels)
    return [p.grad for p in training.model.parameters() if p.grad is not None]


def _data(device: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    images, labels = batch(CHECKED, values=True)
    return images.to(device), labels.to(device)


def batch_norm_updates(training: Training, device: str = "cpu") -> int:
    """How often one step counts its batch, at most over all batch norms."""
    training.step(*_data(device))
    norms = [m for m in training.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return max((int(m.num_batches_tracked) for m in norms if m.num_batches_tracked is not None), default=0)


# --- what is said of it --------------------------------------------------------------------------

HEAD = """\
## Whole networks

A training step of {height} x {width}, 19 classes, with its loss, by every way: peak MiB by the allocator, images and
labels counted, parameters and gradients not; time as a ratio to the plain step next to it, median with quartiles; the error
of all parameter gradients against float64; and how often a step moves running statistics. Bold ways are on the front:
no other takes less of both memory and time. "revseg fastest, balanced, lowest, least" are the memory levels with our loss;
"revseg fit" is the plain network fitted to 1.35 times plain's time by the plan's estimate, to the bit, "revseg fit bands" by
bands, "revseg fit least" by bands at any time;
"revseg reversible" is the converted network, another architecture; rivals run the V modules of VNet. torch.compile is
mended, see `benchmarks/compiling.py`: before torch 2.14, on a CPU, VNet and its loss in one graph get gradients of zero.

![Peak against time of every way](results/whole_networks.png)
"""


def sections(results: Results) -> list[str]:
    result = results.get("whole_networks")
    if not result:
        return []
    height, width = result["settings"]["size"]
    parts = [HEAD.format(height=height, width=width)]
    for name in unique(row["network"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["network"] == name]
        parts += [markdown(table(name, rows)), _notes(rows)]
    return [*parts, source(result)]


def table(name: str, rows: list[Row]) -> Table:
    """Ways down, those of the front in bold."""
    best, images = front(rows), rows[0]["images"]
    head = [f"{name}, batch {images}", "peak MiB", "time", "gradients off by", "updates"]
    return head, [
        [
            f"**{row['way']}**" if row["way"] in best else row["way"],
            f"{row['peak_mib']:,.0f}",
            quartiles(row.get("ratio")),
            f"{row['gradient_error']:.1e}",
            str(row["updates"]),
        ]
        for row in rows
        if "peak_mib" in row
    ]


def _notes(rows: list[Row]) -> str:
    """What was not run, by reason; empty if all was."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if "note" in row:
            reasons.setdefault(row["note"], []).append(row["way"])
    return "".join(f"Not run: {', '.join(ways)} ({reason}).\n" for reason, ways in reasons.items())


def front(rows: list[Row]) -> list[str]:
    """The ways that no other way beats in both memory and time, from the fastest on."""
    points = [(row["ratio"]["median"], row["peak_mib"], row["way"]) for row in rows if "ratio" in row]
    found: list[tuple[float, float, str]] = []
    for point in sorted(points):
        if not found or point[1] < found[-1][1]:
            found.append(point)
    return [way for _, _, way in found]


def in_short(results: Results) -> list[str]:
    """Networks down, ways across."""
    result = results.get("whole_networks")
    if not result:
        return []
    by_case = {(row["network"], row["way"]): row for row in result["rows"]}
    lines = [
        [name, *(_cell(by_case.get((name, way))) for way in IN_SHORT)]
        for name in unique(row["network"] for row in result["rows"])
    ]
    height, width = result["settings"]["size"]
    said = f"Whole networks, a training step at {height} x {width}: peak MiB, and time as a multiple of plain's:\n"
    return [said, markdown((["", *IN_SHORT], lines))]


def _cell(row: Row | None) -> str:
    if row is None or "peak_mib" not in row:
        return NOT_RUN
    ratio = f"; {row['ratio']['median']:.2f}" if "ratio" in row else ""
    return f"{row['peak_mib']:,.0f}{ratio}"


def draw(result: Result, path: Path) -> None:
    """Peak against time, a panel for each network whose steps were timed, with the front as a line."""
    names = unique(row["network"] for row in result["rows"] if "ratio" in row)
    lines = -(-len(names) // 3)
    figure, panels = picture.panels(min(3, len(names)), 5.4, 4.6 * lines, lines)
    for name, axes in zip(names, panels, strict=False):
        rows = [row for row in result["rows"] if row["network"] == name]
        points = {row["way"]: (row["ratio"]["median"], row["peak_mib"]) for row in rows if "ratio" in row}
        picture.scatter(axes, points, front(rows), ("time, multiple of plain's", "peak MiB"))
        axes.set_title(name)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    picture.save(figure, path)
