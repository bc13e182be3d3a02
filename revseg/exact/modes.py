"""Adding that is undone bit for bit, and what else exact inversion takes.

Floating-point addition cannot be undone: (x + h) - h is not x. Two ways around it:

`exact=True`, a grid (`revseg.exact.grid`). Streams hold multiples of 2^-12 up to 2^12 in float32 (2^-41 in float64), the
values of functions are rounded to that grid, and sums of such numbers have no rounding error. The
gradient passes the rounding straight through. Nothing is kept, and the stream that a function reads
is the stream itself. That is why it was chosen over int32 fixed point, which is 64 times finer in
the same range (2^-18), but takes a float copy of a stream for each function to read, another of the
output to hand on, and longer for an update: `benchmarks/exact_formats.py` measures both. The price
is that the network is another one by that rounding, as it is under TF32. Its gradients are
bitwise those of the network that ran.

`exact="lossless"`, a residue (`revseg.exact.residue`). The network is not touched. Each update keeps what
undoing it would lose, a fifteenth to a twelfth of a stream.

Either way the functions see in the backward pass, bit for bit, what they saw in the forward pass,
so gradients are bitwise those of plain autograd, as long as kernels give the same result twice:
with the same settings (`revseg.exact.conditions`), strides (the engine lays tensors out as they were) and, on a
GPU, deterministic kernels. Two things then still differ from plain autograd by rounding: weights
used more than once under autocast, whose gradients its cache adds up in half precision (turn
the cache off), and second derivatives (`create_graph=True`), which pass through the inversion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from revseg.engine.exactness import Exactness
from revseg.engine.steps import Map, Rule, Step, Streams, Update
from revseg.exact.conditions import check_conditions, conditions
from revseg.exact.grid import GridRule, check_range, extremes_of, snap
from revseg.exact.residue import Layout, add, pack, restore
from revseg.replay.context import Autocast
from revseg.tensors import like, own

Exact = bool | Literal["lossless"]


def exactness(exact: Exact) -> Exactness:
    """How updates are undone in one pass."""
    return {False: Exactness, True: _Grid, "lossless": _Lossless}[exact]()


class _Bitwise(Exactness):
    """To the bit, as long as kernels give the same bits twice."""

    rounds = False

    def rule(self, step: Step) -> Step:
        if isinstance(step, Map) and not step.exact:
            raise ValueError(f"{step.name} cannot be undone bit for bit, as {self} asks; use Squeeze")
        return step

    def begin(self, streams: Streams) -> None:
        self.conditions = conditions(streams[0].device)

    def resume(self, device: torch.device) -> None:
        check_conditions(self.conditions, conditions(device))


class _Grid(_Bitwise):
    """`exact=True`."""

    adds = False

    def __init__(self) -> None:
        self.watched: list[tuple[str, Tensor]] = []

    def __str__(self) -> str:
        return "exact=True"

    def enter(self, x: Tensor) -> Tensor:
        return snap(x)

    def rule(self, step: Step) -> Step:
        step = super().rule(step)
        if isinstance(step, Map):
            return step
        if not getattr(step.rule, "additive", False):
            raise ValueError(
                f"{step.name}: exact=True undoes additions only; use an additive coupling (one of your "
                'own says additive = True where it defines couple), or exact="lossless", which takes any'
            )
        return replace(step, rule=GridRule())

    def begin(self, streams: Streams) -> None:
        super().begin(streams)
        for x in streams:
            self.watch("the input", x)

    def watch(self, name: str, x: Tensor) -> None:
        self.watched.append((name, extremes_of(x)))

    def after_update(self, step: Update, x: Tensor, y: Tensor, h: Tensor) -> tuple[list[Tensor], Any]:
        self.watch(step.name, y)
        return [], None

    def judge(self) -> None:
        watched, self.watched = self.watched, []
        check_range(watched)


class _Lossless(_Bitwise):
    """`exact="lossless"`."""

    def __str__(self) -> str:
        return "exact='lossless'"

    def update(
        self, step: Update, streams: Streams, h: Any, before: list[int], spent: bool, autocast: Autocast
    ) -> tuple[Tensor, list[Tensor], Any]:
        x = streams[step.target]
        alike = isinstance(h, Tensor) and like(h) == like(x)
        if not (alike and getattr(step.rule, "additive", False)):
            return super().update(step, streams, h, before, spent, autocast)
        y = h if spent else torch.empty_like(h)
        packed, note = add(x, h, y)
        return step.accepted(streams, y, before), [packed], note

    def after_update(self, step: Update, x: Tensor, y: Tensor, h: Tensor) -> tuple[list[Tensor], Any]:
        residue, layout = pack(x, step.rule.uncouple(y, h))
        return [residue], layout

    def restored(self, back: Tensor, residue: Sequence[Tensor], note: Any) -> Tensor:
        (packed,) = residue
        return restore(back, packed, note)

    def undo(self, rule: Rule, y: Tensor, h: Tensor, residue: Sequence[Tensor], note: Any) -> Tensor:
        back = rule.uncouple(y, h)
        (packed,) = residue
        if torch.is_grad_enabled():
            return _Restore.apply(back, packed, note)  # type: ignore[no-any-return, no-untyped-call]
        return restore(own(back, y, h), packed, note)


class _Restore(torch.autograd.Function):
    """The stream before the update, bit for bit; the gradient passes through."""

    @staticmethod
    def forward(ctx: Any, back: Tensor, residue: Tensor, layout: Layout) -> Tensor:
        return restore(back.clone(), residue, layout)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Any:
        return dx, None, None
