"""Which format of a stream lets addition be undone bit for bit, and what does it cost?

Four ways to hold a stream: plain float32, whose sums cannot be undone; float32 on a grid of 2^-12
(`exact=True`); fixed point in int32 with steps of 2^-18, a prototype that lives here; and plain
float32 with a residue for every sum (`exact="lossless"`). Of each: up to which size sums are undone,
how finely values are told apart, how long an update and its undoing take, what has to be kept, and
how far its rounding moves the gradients of a network of 16 blocks from those of float64.

    python -m benchmarks measure exact_formats
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gradients import SHAPE as SMALL
from benchmarks.gradients import Case, parameter_gradients, relative_distance
from benchmarks.record import Result, Results, Row
from benchmarks.tables import Table, markdown, source
from benchmarks.workload import SHAPE
from revseg.exact.grid import STEP, GridRule, extremes_of, snap
from revseg.exact.residue import Layout, pack, restore
from revseg.tensors import bits

QUESTION = "Which format of a stream lets addition be undone bit for bit, and what does it cost?"
ORDER = 5
DEPTH = 16
LARGEST = 24  # the size of streams, as a power of two, up to which sums are tried


class Plain:
    """float32 as it is."""

    step: float | None = None

    def start(self, x: Tensor) -> Tensor:
        """The stream that stands for these values."""
        return x.clone()

    def read(self, stream: Tensor) -> Tensor:
        """The stream as a function reads it, float32."""
        return stream

    def update(self, stream: Tensor, h: Tensor) -> Tensor:
        return stream + h

    def undo(self, stream: Tensor, h: Tensor) -> Tensor:
        return stream - h


class Grid(Plain):
    """float32 in multiples of 2^-12, its range watched."""

    step = STEP[torch.float32]

    def start(self, x: Tensor) -> Tensor:
        return snap(x)

    def update(self, stream: Tensor, h: Tensor) -> Tensor:
        y = GridRule().couple(stream, h)
        extremes_of(y)
        return y

    def undo(self, stream: Tensor, h: Tensor) -> Tensor:
        return GridRule().uncouple(stream, h)


class FixedPoint(Plain):
    """int32 in multiples of 2^-18; sums wrap around, and so does undoing them."""

    step = 2.0**-18

    def start(self, x: Tensor) -> Tensor:
        return torch.mul(x, 1 / self.step).round_().to(torch.int32)

    def read(self, stream: Tensor) -> Tensor:
        return stream.to(torch.float32).mul_(self.step)

    def update(self, stream: Tensor, h: Tensor) -> Tensor:
        return self.start(h).add_(stream)

    def undo(self, stream: Tensor, h: Tensor) -> Tensor:
        taken = self.start(h)
        return torch.sub(stream, taken, out=taken)


class Residue(Plain):
    """float32 as it is, with what undoing the last update would lose."""

    packed: Tensor
    layout: Layout

    def update(self, stream: Tensor, h: Tensor) -> Tensor:
        y = stream + h
        self.packed, self.layout = pack(stream, y - h)
        return y

    def undo(self, stream: Tensor, h: Tensor) -> Tensor:
        return restore(stream - h, self.packed, self.layout)


FORMATS: dict[str, type[Plain]] = {
    "float32": Plain,
    "float32 on a grid": Grid,
    "int32 fixed point": FixedPoint,
    "float32 and residues": Residue,
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", type=int, nargs=4, default=SHAPE, metavar=("N", "C", "H", "W"))
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--seeds", type=int, default=5)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {"shape": list(args.shape), "depth": DEPTH, "gradient_shape": list(SMALL), "threads": 1}


def measure(args: argparse.Namespace) -> Iterator[list[Row]]:
    torch.set_num_threads(1)
    rows: list[Row] = []
    for name in FORMATS:
        rows.append(row_of(name, tuple(args.shape), args.rounds, args.seeds))
        print(rows[-1], flush=True)
        yield rows


def row_of(name: str, shape: tuple[int, int, int, int], rounds: int, seeds: int) -> dict[str, Any]:
    """One row: the format called `name` in `FORMATS`.

    Args:
        name: The format.
        shape: N, C, H, W of the input, twice the channels of a stream.
        rounds: How often the two steps are timed, each beside plain float32.
        seeds: Draws of the network whose gradients are compared.

    Returns:
        Row of format, exact_to (see `largest_exact`), step, update and undo (relative to the time of
        a plain addition), stream_mib, kept_a_sequence_mib (beyond the output as PyTorch's functions
        read it), kept_an_update_mib, copy_mib (while a function runs), gradient_error.
    """
    half = (shape[0], shape[1] // 2, *shape[2:])
    kind = FORMATS[name]
    row: dict[str, Any] = {"format": name, "exact_to": largest_exact(kind()), "step": kind.step}
    row |= times(kind(), half, rounds)
    return row | bytes_of(kind(), half) | {"gradient_error": gradient_error(kind(), seeds)}


def largest_exact(form: Plain) -> int | None:
    """The largest k for which sums within 2^k are right and undone bit for bit; at most `LARGEST`."""
    found = None
    for k in range(-8, LARGEST + 1):
        torch.manual_seed(k + 8)
        before, after = ((2 * torch.rand(100_000, dtype=torch.float64) - 1).float() * 2.0**k for _ in "xy")
        x = form.start(before)
        h = after - before
        y = form.update(x, h)
        is_right = torch.allclose(form.read(y), after, rtol=1e-6, atol=2.0**k * 1e-6 + (form.step or 0.0))
        if not is_right or not torch.equal(bits(form.undo(y, h)), bits(x)):
            break
        found = k
    return found


def times(form: Plain, shape: tuple[int, ...], rounds: int) -> dict[str, float]:
    """Of an update and of its undoing, each with the reading of a stream, relative to plain addition."""
    torch.manual_seed(0)
    x, h = torch.randn(shape), torch.randn(shape)
    stream = form.start(x)
    y = form.update(stream, h)

    def update() -> None:
        form.read(form.update(stream, h))

    def undo() -> None:
        form.read(form.undo(y, h))

    ratios: dict[str, list[float]] = {"update": [], "undo": []}
    for _ in range(rounds):
        for name, fn in (("update", update), ("undo", undo)):
            ratios[name].append(_seconds(fn) / _seconds(lambda: x + h))
    return {name: round(statistics.median(each), 2) for name, each in ratios.items()}


def bytes_of(form: Plain, shape: tuple[int, ...]) -> dict[str, float]:
    """MiB of a stream; of what is kept for the backward pass; of what a function reads beside it."""
    torch.manual_seed(0)
    x, h = torch.randn(shape), torch.nn.functional.prelu(torch.randn(shape), torch.tensor([0.25]))
    stream = form.start(x)
    y = form.update(stream, h)
    copied = form.read(y).nbytes if form.read(y) is not y else 0
    packed = form.packed.nbytes if isinstance(form, Residue) else 0
    sizes = {"stream": x.nbytes, "kept_a_sequence": 2 * copied, "kept_an_update": packed, "copy": copied}
    return {f"{name}_mib": round(size / 2**20, 3) for name, size in sizes.items()}


def gradient_error(form: Plain, seeds: int) -> float:
    """Of all parameter gradients, against float64 of the ordinary network; the median of the seeds."""
    return float(f"{statistics.median(_gradient_error(form.step, seed) for seed in range(seeds)):.3g}")


def _gradient_error(step: float | None, seed: int) -> float:
    """Streams in float64 hold what each format holds; functions read and compute float32."""
    case = Case(DEPTH, None, SMALL, seed)
    work = case.workload("plain")
    work.functions.zero_grad()
    rounded = _rounding(step)
    x1, x2 = map(rounded, work.x.detach().chunk(2, 1))
    for f, g in work.functions:
        x1 = rounded(x1 + rounded(f(x2.float())))
        x2 = rounded(x2 + rounded(g(x1.float())))
    torch.cat([x1, x2], 1).backward(work.dy.double())
    return relative_distance(parameter_gradients(work), case.outcome("plain", double=True))


def _rounding(step: float | None) -> Callable[[Tensor], Tensor]:
    """To multiples of the step, or to float32; the gradient passes."""

    def rounded(x: Tensor) -> Tensor:
        exact = x.double()
        found = exact.float().double() if step is None else (exact / step).round() * step
        return exact + (found - exact).detach()

    return rounded


def _seconds(fn: Callable[[], object]) -> float:
    """Of the processor: with one thread, that is all the work, and no other program's."""
    start = time.process_time()
    fn()
    return time.process_time() - start


HEAD = """\
## Formats of a stream

Up to which size sums are right and undone bit for bit, what values are rounded to, the time of an update and
of undoing it as multiples of a plain addition, and MiB for streams of {stream:g} MiB: kept for the backward pass
by each sequence and by each update, and copied for each function to read. The last column is the error of the
gradients of a network of {depth} blocks against float64 of the ordinary network.

The grid is `exact=True`: of the three that can be undone it alone keeps nothing, as functions read the stream
itself. Fixed point is 64 times finer, for a copy of every stream that a function reads and two of the output.
Residues are `exact="lossless"`: the network is not rounded at all.
"""


def sections(results: Results) -> list[str]:
    result = results.get("exact_formats")
    if not result:
        return []
    head = HEAD.format(stream=result["rows"][0]["stream_mib"], depth=result["settings"]["depth"])
    return [head, markdown(table(result)), source(result)]


def table(result: Result) -> Table:
    """A row for each format."""
    head = [
        "",
        "exact up to",
        "step",
        "update",
        "undo",
        "a sequence",
        "an update",
        "copied",
        "gradients off by",
    ]
    return head, [
        [
            row["format"],
            _power(row["exact_to"]),
            "-" if row["step"] is None else f"2^{_exponent(row['step'])}",
            f"{row['update']:.1f}",
            f"{row['undo']:.1f}",
            *(f"{row[key]:.3g}" for key in ("kept_a_sequence_mib", "kept_an_update_mib", "copy_mib")),
            f"{row['gradient_error']:.1e}",
        ]
        for row in result["rows"]
    ]


def _power(exponent: int | None) -> str:
    return "never" if exponent is None else "any size" if exponent == LARGEST else f"2^{exponent}"


def _exponent(power: float) -> int:
    return round(power).bit_length() - 1 if power >= 1 else 1 - round(1 / power).bit_length()
