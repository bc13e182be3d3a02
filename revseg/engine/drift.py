"""Did the inversion arrive where the forward pass began?

A fingerprint, some thousand values of each stream, is kept in the forward pass and compared with the
reconstructed input after the last inversion. Nothing else notices a function with hidden state
(a counter, a mask that was changed, Python's random numbers), one that explodes, or a stream that the other
absorbed. The values lie at random, one in each of as many equal parts, so that a change of a thousandth of
a map is seen wherever it is. Where inversion is exact the fingerprint is a checksum, so that no bit may be another.

Each stream is held against its own size: an error of 1 is nothing in a stream of 1e6 and
everything in the one beside it. On a GPU the comparison is copied back without waiting and
reported by the next pass through any reversible sequence.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from revseg.replay.context import is_capturing
from revseg.tensors import bits, has_values

Check = Literal["error", "warn"] | None

SAMPLES = 1 << 13  # a region of a thousandth of a map then escapes once in 3,000 times
FLOOR = 1e-4  # a stream smaller than this is measured against this
TOLERANCE = {torch.float64: 1e-6}  # of the stream's largest sample
DEFAULT_TOLERANCE = 1e-2
HALF_TOLERANCE = 1e-1  # float32 streams, functions in half precision: their own rounding is 1e-2

_ROUNDING = (
    "the reconstructed input is off by {} (first and second stream), more than {:g} of the stream's "
    "size. Either a function gives other values when run again (hidden state, numpy or Python random "
    "numbers), or it amplifies rounding too much for this depth and dtype{}. "
    "revseg.testing.check(block, x) tells which; float32 or float64 streams, fewer blocks in a "
    'sequence, exact="lossless" or save_activations=True avoid it'
)
_REPEAT = (
    "the reconstructed input is not bit for bit that of the forward pass. Inversion is exact, so a "
    "function gives other values when run again: it has hidden state, draws numpy or Python random "
    "numbers, or its kernels are not deterministic (torch.use_deterministic_algorithms(True))"
)

_pending: deque[tuple[Any, Tensor, Callable[[list[float]], None]]] = deque()


class InversionError(RuntimeError):
    """What the backward pass found again is not what the forward pass had.

    Gradients of parameters that the pass has accumulated by then are those of wrong streams: reset them.
    """


@dataclass(frozen=True)
class Fingerprint:
    """Samples of tensors, [SAMPLES or fewer] of each, float64 of those in float64, else float32; or their checksums, [1]."""

    samples: tuple[Tensor, ...]
    exact: bool

    @classmethod
    def of(cls, tensors: Iterable[Tensor], exact: bool = False) -> Fingerprint:
        return cls(tuple(_checksum(x) if exact else _sample(x) for x in tensors), exact)

    def distance(self, tensors: Iterable[Tensor]) -> Tensor:
        """How far each tensor is from the one noted, by its largest sample, float32 [K]; 0 or 1 of checksums."""
        pairs = zip(self.samples, Fingerprint.of(tensors, self.exact).samples, strict=True)
        return torch.stack([_differs(*each) if self.exact else _distance(*each) for each in pairs])

    def compare(
        self, reconstructed: tuple[Tensor, Tensor], finite: Tensor, check: Check, tolerance: float
    ) -> None:
        """Raise, or warn, when the reconstructed streams are not the ones of this fingerprint.

        Args:
            reconstructed: The streams as the backward pass found them.
            finite: Whether the outputs were finite, bool []. Others are let through: their
                gradients are infinite or NaN, as in plain autograd, and a gradient scaler waits
                for just that.
            check: "error" or "warn".
            tolerance: Of the stream's largest sample; without effect where inversion is exact.

        Raises:
            InversionError: If a stream is off by more than the tolerance.
        """
        drift = torch.where(finite, self.distance(reconstructed), 0.0)  # [2]
        tolerance = 0.0 if self.exact else tolerance
        autocast = " under autocast" if tolerance == HALF_TOLERANCE else ""

        def judge(values: list[float]) -> None:
            if all(value <= tolerance for value in values):  # NaN is not
                return
            off = " and ".join(f"{value:.2g}" for value in values)
            complain(_REPEAT if self.exact else _ROUNDING.format(off, tolerance, autocast), check)

        report(drift, judge)


def complain(message: str, check: Check) -> None:
    """Raise an `InversionError`, or only warn."""
    if check == "error":
        raise InversionError(message)
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def tolerance_of(dtype: torch.dtype, half: bool) -> float:
    """The drift let through, relative to a stream's largest sample.

    Args:
        dtype: Of the streams.
        half: Whether functions computed in half precision on float32 streams (autocast).
    """
    return HALF_TOLERANCE if half else TOLERANCE.get(dtype, DEFAULT_TOLERANCE)


def all_finite(streams: Iterable[Tensor]) -> Tensor:
    """Whether no value is infinite or NaN, bool [], on the device of the streams."""
    return torch.stack([_extremes(x).isfinite().all() for x in streams]).all()


def _extremes(x: Tensor) -> Tensor:
    """A few values, NaN or infinite if any of x is; a minimum takes a fifth of the time of an exact sum."""
    if x.is_complex() or not x.numel():
        return x.sum()
    return torch.stack(torch.aminmax(x))


def report(values: Tensor, judge: Callable[[list[float]], None]) -> None:
    """Let `judge` see the values [K]: now on a CPU, at a later call of `raise_pending` on a GPU.

    Never from inside a CUDA graph: what its replays compute nobody could copy and wait for.
    """
    if not has_values(values) or is_capturing():
        return
    if values.device.type == "cpu":
        judge(values.tolist())
    else:
        copied = values.to("cpu", non_blocking=True)
        event = torch.get_device_module(values.device).Event()
        event.record()
        _pending.append((event, copied, judge))


def raise_pending() -> None:
    """Judge the values that have arrived from an accelerator by now; waits for nothing."""
    if is_capturing():
        return  # to ask whether they have arrived would end the capture
    while _pending and _pending[0][0].query():
        _, values, judge = _pending.popleft()
        judge(values.tolist())


def _differs(kept: Tensor, found: Tensor) -> Tensor:
    return (found != kept).any().float()


def _distance(kept: Tensor, found: Tensor) -> Tensor:
    return ((found - kept).abs().amax() / kept.abs().amax().clamp_min(FLOOR)).float()


def _checksum(x: Tensor) -> Tensor:
    """The sum of the bit patterns, with what overflows cut off, an integer [1]."""
    integers = bits(x.detach())
    integers = integers.view(torch.int32) if x.element_size() == 8 else integers
    return integers.sum(0, keepdim=True, dtype=integers.dtype)  # of another dtype it would copy


def _sample(x: Tensor) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32  # not every device has float64
    if not has_values(x):
        return x.new_empty(min(x.numel(), SAMPLES), dtype=dtype)
    reach = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    memory = x.detach().as_strided((reach,), (1,), x.storage_offset())
    return memory.index_select(0, _places(x.shape, x.stride(), x.device)).to(dtype)


@lru_cache(maxsize=64)
def _places(shape: torch.Size, strides: tuple[int, ...], device: torch.device) -> Tensor:
    """Where in memory the samples lie, int64 [SAMPLES or fewer]: the same values whatever the strides are."""
    with _disable_current_modes():  # which would make tensors that are no numbers
        numel = shape.numel()
        if numel <= SAMPLES:
            index = torch.arange(numel, device="cpu")
        else:
            inside = torch.rand(
                SAMPLES, dtype=torch.float64, device="cpu", generator=torch.Generator().manual_seed(0)
            )
            index = (
                ((torch.arange(SAMPLES, device="cpu") + inside) * (numel / SAMPLES))
                .long()
                .clamp_(max=numel - 1)
            )
        coordinates = torch.unravel_index(index, shape)
        places = sum(
            (c * stride for c, stride in zip(coordinates, strides, strict=True)), torch.zeros_like(index)
        )
        return places.to(device)
