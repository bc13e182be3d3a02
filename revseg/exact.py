"""Adding that is undone bit for bit.

Floating-point addition cannot be undone: (x + h) - h is not x. Two ways around it:

`exact=True`, a grid. Streams hold multiples of 2^-12 up to 2^12 in float32 (2^-41 in float64), the
values of functions are rounded to that grid, and sums of such numbers have no rounding error. The
gradient passes the rounding straight through. Chosen over int32 fixed point (2^-18, any sum can be
undone, range 2^13), which needs a float copy of a stream for each function to read, another of
the output to hand on, and four conversions an update; see `benchmarks/exact_formats.py` for both
measured. On the grid the stream that a function reads is the stream itself.

`exact="lossless"`, a residue. The network is not touched. Each update keeps what undoing it would
lose: the difference of the bit patterns, 0 or 1 units in the last place for nine values of ten,
packed into two bits; the others take a byte more, or five.

Either way the functions see in the backward pass, bit for bit, what they saw in the forward pass,
so gradients are bitwise those of plain autograd, as long as kernels give the same result twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from revseg.drift import InversionError, report
from revseg.steps import laid_out

LIMIT = 2.0**12
STEP = {torch.float32: 2.0**-12, torch.float64: 2.0**-41}  # 24 and 53 bits below the limit
_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 18  # values that are packed at a time on a CPU: they stay in its cache
_WIDE = -128  # the one of 256 that is no difference


class GridRule:
    """x + h on the grid: couple and uncouple are each other's inverse, to the bit."""

    def couple(self, x: Tensor, h: Tensor) -> Tensor:
        return _GridAdd.apply(x, h, 1.0)  # type: ignore[no-any-return, no-untyped-call]

    def uncouple(self, y: Tensor, h: Tensor) -> Tensor:
        return _GridAdd.apply(y, h, -1.0)  # type: ignore[no-any-return, no-untyped-call]

    def gradients(self, x: Tensor, h: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        return dy, dy.to(h.dtype).sum_to_size(h.shape)


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

    Values that are infinite or NaN are let through, as in plain autograd.

    Args:
        streams: Where each stream comes from, and its largest and smallest value [2].

    Raises:
        InversionError: If a value is larger than the limit.
    """
    names = [name for name, _ in streams]

    def judge(sizes: list[float]) -> None:
        for name, size in zip(names, sizes, strict=True):
            if LIMIT < size < float("inf"):
                raise InversionError(
                    f"{name}: exact=True adds without error up to {LIMIT:g}, got a value of {size:g}; "
                    'scale the input or normalize inside the functions, or use exact="lossless"'
                )

    report(torch.stack([extremes.abs().amax() for _, extremes in streams]), judge)


def extremes_of(x: Tensor) -> Tensor:
    """The smallest and the largest value [2]."""
    return torch.stack(torch.aminmax(x))


class Residue:
    """What undoing one update would lose, so that it loses nothing.

    Args:
        x: The stream before the update, without gaps.
        back: The stream as undoing the update gives it.

    Memory: `nbytes`: 2 bits a value, 8 more for about one in ten, 32 more for a few in a thousand.
    """

    def __init__(self, x: Tensor, back: Tensor) -> None:
        self._strides = x.stride()
        wanted, found = _bits(x), _bits(laid_out(back, self._strides))
        size = _CHUNK if x.device.type == "cpu" else max(4, x.numel())
        packed, wide = zip(
            *(_pack(a - b) for a, b in zip(torch.split(wanted, size), torch.split(found, size), strict=True)),
            strict=True,
        )
        self._size, self._packed, self._counts = size, packed, [len(each) for each in wide]
        self._bytes, self._rest = _narrow(torch.cat(wide))

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in (*self._packed, self._bytes, self._rest))

    def restore(self, back: Tensor) -> Tensor:
        """The stream before the update, bit for bit.

        Args:
            back: The stream as undoing the update gives it; written to.
        """
        restored = laid_out(back, self._strides)
        bits = _bits(restored)
        wide = self._bytes.to(bits.dtype)
        wide[self._bytes == _WIDE] = self._rest
        for values, packed, differences in zip(
            torch.split(bits, self._size), self._packed, torch.split(wide, self._counts), strict=True
        ):
            values += _unpack(packed, len(values), differences)
        return restored


def conditions(device: torch.device) -> dict[str, Any]:
    """The settings that must be the same in the forward and in the backward pass.

    Raises:
        RuntimeError: If kernels are chosen by timing, so that the second run may get another one.
    """
    found: dict[str, Any] = {
        "torch.get_num_threads()": torch.get_num_threads(),
        "torch.get_float32_matmul_precision()": torch.get_float32_matmul_precision(),
        "torch.backends.mkldnn.enabled": torch.backends.mkldnn.enabled,
    }
    if device.type == "cuda":
        if torch.backends.cudnn.benchmark:
            raise RuntimeError(
                "exact inversion needs the same kernels in both passes, and torch.backends.cudnn.benchmark "
                "may choose others; set it to False"
            )
        found["torch.backends.cudnn.enabled"] = torch.backends.cudnn.enabled
        found["torch.backends.cudnn.deterministic"] = torch.backends.cudnn.deterministic
    return found


def check_conditions(then: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise if a setting has changed since the forward pass.

    Raises:
        InversionError: Naming the setting and its two values.
    """
    for name, value in then.items():
        if now[name] != value:
            raise InversionError(
                f"{name} was {value} in the forward pass and is {now[name]} in the backward pass; "
                "exact inversion needs the same kernels in both"
            )


class _GridAdd(torch.autograd.Function):
    """x + sign * h, h rounded to the grid of x's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor, sign: float) -> Tensor:
        ctx.sign, ctx.dtype, ctx.shape = sign, h.dtype, h.shape
        step = STEP[x.dtype]
        rounded = torch.mul(h.to(x.dtype), 1 / step).round_()
        # alpha is a power of two, so nothing is rounded here; the value's memory serves for the sum
        fits = rounded.shape == x.shape and rounded.stride() == x.stride()
        return torch.add(x, rounded, alpha=sign * step, out=rounded if fits else None)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        dh = dy if ctx.sign > 0 else -dy
        return dy, dh.to(ctx.dtype).sum_to_size(ctx.shape), None


def _bits(x: Tensor) -> Tensor:
    """The bit patterns of x as integers [numel], in the order of memory; a view."""
    return x.as_strided((x.numel(),), (1,), x.storage_offset()).view(_INTEGER[x.element_size()])


def _pack(differences: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of 2 bits, four in a byte, and the differences that need more."""
    codes = differences.clamp(-2, 2).to(torch.int8) & 3
    wide = torch.masked_select(differences, _escaped(codes))
    a, b, c, d = torch.nn.functional.pad(codes.view(torch.uint8), (0, -len(codes) % 4)).chunk(4)
    return a | b << 2 | c << 4 | d << 6, wide


def _unpack(packed: Tensor, length: int, wide: Tensor) -> Tensor:
    """The differences [length], of the dtype of the wide ones."""
    codes = torch.cat([packed << 6 - 2 * k for k in range(4)])[:length].view(torch.int8) >> 6  # with sign
    return codes.to(wide.dtype).masked_scatter_(_escaped(codes), wide)


def _escaped(codes: Tensor) -> Tensor:
    """Where the code is 2, or -2 once its sign is extended: no difference, but a mark."""
    return (codes >> 1 & ~codes & 1).view(torch.bool)


def _narrow(wide: Tensor) -> tuple[Tensor, Tensor]:
    """Differences as bytes, and those that need more."""
    narrow = wide.clamp(-127, 127)
    escaped = narrow != wide
    return narrow.to(torch.int8).masked_fill_(escaped, _WIDE), wide[escaped]
