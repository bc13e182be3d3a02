"""How far off are the gradients of a reversible network, and where are they bitwise plain autograd's?

The error of all parameter gradients together, relative L2, on the blocks of the main workload at a
small size, where plain rounding crosses few kinks of PReLU. Against two truths, both in float64:

- the network as it ran: the gradient at the very streams of the forward pass, each of which float64
  is handed after its update. What is left is the error of the backward pass. "revseg exact" rounds
  its streams to 2^-12 and "revseg Stack" has layers of its own: both are held against their own streams, the
  others against those of plain float32;
- the ordinary network from the input on. This counts the rounding of the forward pass as well, so
  that of "revseg exact", which is another network by that rounding.

And each way is held bit for bit against its plain twin in the same precision: output, gradients of
input and parameters, running statistics.

    python -m benchmarks.drift
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import record
from benchmarks.drift_plot import draw
from benchmarks.rivals import is_available
from benchmarks.workload import Workload, workload
from revseg import ReversibleSequence
from revseg.engine.exact import GridRule, snap

QUESTION = (
    "How far off are the gradients of a reversible network, and where are they bitwise plain autograd's?"
)
SHAPE = (2, 64, 16, 32)
DEPTHS = [1, 2, 4, 8, 16, 32, 64, 100]
# Those that reconstruct; the others' gradients are plain's.
ALL = [
    *("plain", "revseg", "revseg exact", "revseg lossless", "revseg Stack"),
    *("memcnn", "revtorch", "revlib", "invtorch"),
]
DTYPES = {"float32": None, "bfloat16 autocast": torch.bfloat16}


@dataclass
class Case:
    """One draw of weights and data.

    Args:
        depth: The number of blocks.
        dtype: What autocast casts to; None to compute in float32.
        shape: N, C, H, W of the input.
        seed: Of weights and data.
    """

    depth: int
    dtype: torch.dtype | None
    shape: tuple[int, int, int, int]
    seed: int

    def compare(self, ways: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Errors and the count of equal tensors, by way."""
        found = {}
        ordinary = self.outcome("plain", double=True)
        for own in dict.fromkeys(map(_twin, ways)):
            twin, truth = self.outcome(own, plain=True), self.as_it_ran(own)
            for way in [way for way in ways if _twin(way) == own]:
                ours = self.outcome(way)
                found[way] = {
                    "error": relative_distance(ours, truth),
                    "ordinary_error": relative_distance(ours, ordinary),
                    "equal": sum(torch.equal(ours[name], expected) for name, expected in twin.items()),
                    "tensors": len(twin),
                }
        return found

    def outcome(self, way: str, plain: bool = False, double: bool = False) -> dict[str, Tensor]:
        """What a step leaves behind, by name.

        Args:
            way: A name in `WAYS`.
            plain: Store activations instead.
            double: Compute in float64.
        """
        work = self.workload(way)
        if isinstance(work.net, ReversibleSequence):
            work.net.save_activations, work.net.check = plain, None
        dtype = torch.float64 if double else torch.float32
        work.functions.to(dtype).zero_grad()
        x = work.x.detach().to(dtype).requires_grad_()
        with self.autocast(not double):
            y = work.net(x)
        found = {"output": y.detach().clone(), **dict(work.functions.named_buffers())}
        y.backward(work.dy.to(y.dtype))
        return found | {"gradient of the input": x.grad} | parameter_gradients(work)

    def as_it_ran(self, way: str) -> dict[str, Tensor]:
        """The gradients of parameters in float64, at the streams of the forward pass of "plain" or "revseg exact"."""
        streams = self.streams(way)
        work = self.workload(way)
        work.functions.double().zero_grad()
        x1, x2 = next(streams), next(streams)
        for f, g in work.functions:
            x1 = _moved_to(next(streams), x1 + f(x2))
            x2 = _moved_to(next(streams), x2 + g(x1))
        torch.cat([x1, x2], 1).backward(work.dy.double())
        return parameter_gradients(work)

    @torch.no_grad()
    def streams(self, way: str) -> Iterator[Tensor]:
        """The two inputs, then each stream after its update, in float64."""
        add: Callable[[Tensor, Tensor], Tensor] = GridRule().couple if way == "revseg exact" else torch.add
        work = self.workload(way)
        x1, x2 = work.x.detach().chunk(2, 1)
        if way == "revseg exact":
            x1, x2 = snap(x1), snap(x2)
        found = [x1, x2]
        with self.autocast():
            for f, g in work.functions:
                x1 = add(x1, f(x2))
                x2 = add(x2, g(x1))
                found += [x1, x2]
        return (x.double() for x in found)

    def workload(self, way: str) -> Workload:
        return workload(way, self.depth, shape=self.shape, seed=self.seed)

    def autocast(self, on: bool = True) -> torch.autocast:
        return torch.autocast("cpu", self.dtype or torch.bfloat16, enabled=on and self.dtype is not None)


def measure(
    depth: int, ways: Sequence[str], seeds: int, shape: tuple[int, int, int, int] = SHAPE
) -> list[dict[str, Any]]:
    """One row for each precision and way.

    Args:
        depth: The number of blocks.
        ways: Names in `WAYS`.
        seeds: How many draws of weights and data.
        shape: N, C, H, W of the input.

    Returns:
        Rows of way, depth, dtype, note; error (against the network as it ran) and ordinary_error,
        medians over the seeds; equal and tensors, counts over all seeds.
    """
    rows = []
    present = [way for way in ways if is_available(way)]
    for name, dtype in DTYPES.items():
        found = [Case(depth, dtype, shape, seed).compare(present) for seed in range(seeds)]
        for way in ways:
            row: dict[str, Any] = {"way": way, "depth": depth, "dtype": name, "note": ""}
            if way not in present:
                rows.append(row | {"note": "not installed: python -m benchmarks.peers"})
                continue
            for key in ("error", "ordinary_error"):
                row[key] = float(f"{statistics.median(each[way][key] for each in found):.3g}")
            for key in ("equal", "tensors"):
                row[key] = sum(each[way][key] for each in found)
            rows.append(row)
    return rows


def _twin(way: str) -> str:
    """The way that has the same plain twin, and stands for it."""
    return way if way in ("revseg exact", "revseg Stack") else "plain"


def parameter_gradients(work: Workload) -> dict[str, Tensor]:
    return {
        f"gradient of {name}": p.grad for name, p in work.functions.named_parameters() if p.grad is not None
    }


def _moved_to(value: Tensor, y: Tensor) -> Tensor:
    """The value, with the gradient of y."""
    return y + (value - y).detach()


def relative_distance(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Between all parameter gradients, relative L2."""
    names = [name for name in truth if name.startswith("gradient of ") and not name.endswith("input")]
    a, b = (torch.cat([each[name].double().flatten() for name in names]) for each in (ours, truth))
    return float((a - b).norm() / b.norm())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS)
    parser.add_argument("--ways", nargs="+", default=ALL, choices=ALL, metavar="WAY", help=", ".join(ALL))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shape", type=int, nargs=4, default=SHAPE, metavar=("N", "C", "H", "W"))
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for depth in args.depths:
        rows += (new := measure(depth, args.ways, args.seeds, tuple(args.shape)))
        for row in new:
            said = "{error:.1e}  {ordinary_error:.1e}  {equal} of {tensors}" if "error" in row else "{note}"
            print("depth {depth:3}  {dtype:17}  {way:15}  ".format(**row) + said.format(**row), flush=True)
    settings = {"shape": list(args.shape), "seeds": args.seeds, "threads": 1, "function": "conv pair"}
    print("wrote", record.write("drift", QUESTION, rows, settings, args.out))
    draw(rows, args.out / "drift.png")
    print("wrote", args.out / "drift.png")


if __name__ == "__main__":
    main()
