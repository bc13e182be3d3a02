"""The gradients of one draw of weights and data, held against float64 and against the plain twin's."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.ways import TWINS
from benchmarks.workload import Workload, workload
from revseg import ReversibleSequence
from revseg.exact.grid import GridRule, snap

Tensors = dict[str, Tensor]
SHAPE = (2, 64, 16, 32)  # at which plain rounding crosses few kinks of PReLU


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
        for way in [way for way in ways if way in TWINS]:  # another network, from the input on
            twin, truth = self.outcome(TWINS[way]), self.outcome(TWINS[way], double=True)
            found[way] = _held(self.outcome(way), twin, truth, truth)
        ways = [way for way in ways if way not in TWINS]
        for own in dict.fromkeys(map(_twin, ways)):
            twin, truth = self.outcome(own, plain=True), self.as_it_ran(own)
            for way in [way for way in ways if _twin(way) == own]:
                found[way] = _held(self.outcome(way), twin, truth, ordinary)
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


def _held(ours: Tensors, twin: Tensors, truth: Tensors, ordinary: Tensors) -> dict[str, Any]:
    """The two errors, and how many tensors are bitwise the twin's."""
    return {
        "error": relative_distance(ours, truth),
        "ordinary_error": relative_distance(ours, ordinary),
        "equal": sum(torch.equal(ours[name], expected) for name, expected in twin.items()),
        "tensors": len(twin),
    }


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
