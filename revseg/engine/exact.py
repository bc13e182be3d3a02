"""Adding that is undone bit for bit, and what else exact inversion takes.

Floating-point addition cannot be undone: (x + h) - h is not x. Two ways around it:

`exact=True`, a grid. Streams hold multiples of 2^-12 up to 2^12 in float32 (2^-41 in float64), the
values of functions are rounded to that grid, and sums of such numbers have no rounding error. The
gradient passes the rounding straight through. Nothing is kept, and the stream that a function reads
is the stream itself. That is why it was chosen over int32 fixed point, which is 64 times finer in
the same range (2^-18), but takes a float copy of a stream for each function to read, another of the
output to hand on, and longer for an update: `benchmarks/exact_formats.py` measures both. The price
is that the network is another one by that rounding, as it is under TF32. Its gradients are
bitwise those of the network that ran.

`exact="lossless"`, a residue (`revseg.engine.residue`). The network is not touched. Each update keeps what
undoing it would lose, a fifteenth to a twelfth of a stream.

Either way the functions see in the backward pass, bit for bit, what they saw in the forward pass,
so gradients are bitwise those of plain autograd, as long as kernels give the same result twice:
with the same settings (`conditions`), strides (the engine lays tensors out as they were) and, on a
GPU, deterministic kernels. Two things then still differ from plain autograd by rounding: weights
used more than once under autocast, whose gradients its cache adds up in half precision (turn
the cache off), and second derivatives (`create_graph=True`), which pass through the inversion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import Tensor

from revseg.engine.drift import InversionError, report
from revseg.engine.residue import Layout, pack, restore
from revseg.engine.steps import Map, Rule, Step, Streams, Update
from revseg.engine.tensors import own

Exact = bool | Literal["lossless"]

LIMIT = 2.0**12
STEP = {torch.float32: 2.0**-12, torch.float64: 2.0**-41}  # 24 and 53 bits below the limit

# Settings, as attributes of torch, by which kernels are chosen. Not every torch has all of them, and
# some refuse to be read once their newer names were set; those are then in the list too.
_SETTINGS = (
    "are_deterministic_algorithms_enabled",
    "get_float32_matmul_precision",
    "backends.fp32_precision",
    "backends.mkldnn.enabled",
    "backends.mkldnn.deterministic",
    "backends.mkldnn.conv.fp32_precision",
    "backends.mkldnn.matmul.fp32_precision",
    "backends.cuda.flash_sdp_enabled",  # the CPU's attention obeys these as well
    "backends.cuda.mem_efficient_sdp_enabled",
    "backends.cuda.math_sdp_enabled",
)
_CPU_SETTINGS = ("get_num_threads",)
_GPU_SETTINGS = (
    "backends.cudnn.enabled",
    "backends.cudnn.deterministic",
    "backends.cudnn.allow_tf32",
    "backends.cudnn.conv.fp32_precision",
    "backends.cuda.matmul.fp32_precision",
    "backends.cuda.matmul.allow_bf16_reduced_precision_reduction",
    "backends.cuda.matmul.allow_fp16_reduced_precision_reduction",
    "backends.cuda.cudnn_sdp_enabled",
)


def exactness(exact: Exact) -> Exactness:
    """How updates are undone in one pass."""
    return {False: Exactness, True: _Grid, "lossless": _Lossless}[exact]()


class Exactness:
    """How updates are undone in one pass; without more, by `uncouple`, which rounds."""

    rounds = True

    def enter(self, x: Tensor) -> Tensor:
        """A stream at the door."""
        return x

    def rule(self, step: Step) -> Step:
        """The step with the rule that is undone so.

        Raises:
            ValueError: If it cannot be.
        """
        return step

    def begin(self, streams: Streams) -> None:
        """A forward pass begins with these streams."""

    def watch(self, name: str, x: Tensor) -> None:
        """Take note of a stream, to be judged at the end of the pass."""

    def after_update(
        self, step: Update, x: Tensor, y: Tensor, h: Tensor
    ) -> tuple[list[Tensor], Layout | None]:
        """What undoing the update of x to y by h needs: no tensor or one, and how it is read."""
        return [], None

    def judge(self) -> None:
        """Raise if a stream that was noted cannot be found again."""

    def resume(self, device: torch.device) -> None:
        """The backward pass begins."""

    def undo(
        self, rule: Rule, y: Tensor, h: Tensor, residue: Sequence[Tensor], layout: Layout | None
    ) -> Tensor:
        """The stream before the update."""
        return rule.uncouple(y, h)


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

    def after_update(
        self, step: Update, x: Tensor, y: Tensor, h: Tensor
    ) -> tuple[list[Tensor], Layout | None]:
        self.watch(step.name, y)
        return [], None

    def judge(self) -> None:
        watched, self.watched = self.watched, []
        check_range(watched)


class _Lossless(_Bitwise):
    """`exact="lossless"`."""

    def __str__(self) -> str:
        return "exact='lossless'"

    def after_update(
        self, step: Update, x: Tensor, y: Tensor, h: Tensor
    ) -> tuple[list[Tensor], Layout | None]:
        residue, layout = pack(x, step.rule.uncouple(y, h))
        return [residue], layout

    def undo(
        self, rule: Rule, y: Tensor, h: Tensor, residue: Sequence[Tensor], layout: Layout | None
    ) -> Tensor:
        back = rule.uncouple(y, h)
        assert layout is not None
        (packed,) = residue
        if torch.is_grad_enabled():
            return _Restore.apply(back, packed, layout)  # type: ignore[no-any-return, no-untyped-call]
        return restore(own(back, y, h), packed, layout)


class GridRule:
    """x + h on the grid: couple and uncouple are each other's inverse, to the bit."""

    def couple(self, x: Tensor, h: Tensor) -> Tensor:
        return _GridAdd.apply(x, h, 1.0)  # type: ignore[no-any-return, no-untyped-call]

    def uncouple(self, y: Tensor, h: Tensor) -> Tensor:
        return _GridAdd.apply(y, h, -1.0)  # type: ignore[no-any-return, no-untyped-call]

    def gradients(self, x: Tensor, h: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        return dy, dy.sum_to_size(h.shape).to(h.dtype)


def snap(x: Tensor) -> Tensor:
    """The nearest values on the grid; the gradient passes through.

    Raises:
        TypeError: If x is neither float32 nor float64.
    """
    if x.dtype not in STEP:
        raise TypeError(
            f"exact=True needs float32 or float64 streams, got {x.dtype}; under autocast streams are float32, "
            'and exact="lossless" takes any dtype'
        )
    return _GridAdd.apply(torch.zeros_like(x), x, 1.0)  # type: ignore[no-any-return, no-untyped-call]


def check_range(streams: list[tuple[str, Tensor]]) -> None:
    """Raise if a stream has left the grid; on a GPU at the next pass, without waiting here.

    Values that are infinite or NaN are let through, as in plain autograd. A sum one step beyond
    the limit is rounded to the limit, and left to the checksum of the inversion (`revseg.engine.drift`).

    Args:
        streams: Where each stream comes from, and its smallest and largest value [2].

    Raises:
        InversionError: If a value is too large, naming the step and the remedy.
    """
    names = [name for name, _ in streams]

    def judge(sizes: list[float]) -> None:
        for name, size in zip(names, sizes, strict=True):
            if LIMIT < size < math.inf:
                raise InversionError(
                    f"{name}: exact=True adds without error up to {LIMIT:g}, got a value of {size:g}; "
                    'scale the input or normalize inside the functions, or use exact="lossless"'
                )

    report(torch.stack([extremes.abs().amax() for _, extremes in streams]), judge)


def extremes_of(x: Tensor) -> Tensor:
    """The smallest and the largest value [2]."""
    return torch.stack(torch.aminmax(x.detach()))


def conditions(device: torch.device) -> dict[str, Any]:
    """The settings that must be the same in the forward and in the backward pass.

    Raises:
        RuntimeError: If kernels are chosen by timing, so that the second run may get another one.
    """
    if device.type == "cuda" and torch.backends.cudnn.benchmark:
        raise RuntimeError(
            "exact inversion needs the same kernels in both passes, and torch.backends.cudnn.benchmark "
            "may choose others; set it to False"
        )
    names = _SETTINGS + (_CPU_SETTINGS if device.type == "cpu" else _GPU_SETTINGS)
    return {name: _setting(name) for name in names}


def check_conditions(then: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise if a setting has changed since the forward pass.

    Raises:
        InversionError: Naming the setting and its two values.
    """
    for name, value in then.items():
        if None not in (value, now[name]) and now[name] != value:
            raise InversionError(
                f"torch.{name} was {value} in the forward pass and is {now[name]} in the backward pass; "
                "exact inversion needs the same kernels in both"
            )


class _Restore(torch.autograd.Function):
    """The stream before the update, bit for bit; the gradient passes through."""

    @staticmethod
    def forward(ctx: Any, back: Tensor, residue: Tensor, layout: Layout) -> Tensor:
        return restore(back.clone(), residue, layout)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Any:
        return dx, None, None


class _GridAdd(torch.autograd.Function):
    """x + sign * h, h rounded to the grid of x's dtype."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, h: Tensor, sign: float) -> Tensor:
        step = STEP[x.dtype]
        rounded = torch.mul(h.to(x.dtype), 1 / step).round_()
        fits = rounded.shape == x.shape and rounded.stride() == x.stride()
        out = rounded if fits and not torch._C._are_functorch_transforms_active() else None  # saves a stream
        return torch.add(x, rounded, alpha=sign * step, out=out)  # alpha, a power of two, rounds nothing

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        _, h, ctx.sign = inputs
        ctx.dtype, ctx.shape = h.dtype, h.shape

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        dh = dy if ctx.sign > 0 else -dy
        return dy, dh.sum_to_size(ctx.shape).to(ctx.dtype), None


def _setting(name: str) -> Any:
    """The value of a setting; None where this torch does not have it or will not tell."""
    try:
        value = attrgetter(name)(torch)
        return value() if callable(value) else value
    except (AttributeError, AssertionError, RuntimeError):
        return None
