"""The faster of PyTorch and ONNX Runtime, found out by trying, where there are images enough for that.

Every size of images begins by PyTorch, which needs no preparing. ONNX Runtime is prepared once that takes little of the
time that the images still to come would take by PyTorch; then both run the image at hand, in turn, and the faster runs
those that come. So one photo is run by PyTorch, and a run that ends at the worst moment has lost a tenth of its time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Hashable
from functools import partial

import torch
from torch import Tensor, nn

from revseg.inference.export import Run
from revseg.inference.runner import OWN, Runner, Tell
from revseg.inference.runtimes import RuntimeFailedError, check_runtime, prepared, size_of

LITTLE = 0.1  # of what is still to come, by PyTorch
FEW = 3  # images do not tell yet how long one takes
ROUNDS = 3  # in which both are timed
IMPORTS = 2.0  # seconds
EXPORTS = 400  # runs of a small image that preparing takes: both go from operation to operation (70 to 470 measured)
ANY_SIZE = 3  # as long as for one size


class AutomaticRunner(Runner):
    """A network by PyTorch, or by ONNX Runtime where that pays and is faster; see `Runner`.

    A size of images that comes often is prepared for alone, at most `OWN` of them. Images of other sizes share one run
    for any size, and are told apart by their number of pixels, in powers of two: what is faster depends on it.

    Args:
        network: As for `Runner`.
        tell: Is told what was chosen, and why.
    """

    def __init__(self, network: nn.Module, tell: Tell | None = None) -> None:
        super().__init__(network, "pytorch", tell)
        self.ahead = 1.0
        # how many images by PyTorch, and seconds of the fastest
        self.times: dict[Hashable, tuple[int, float]] = {}
        self.preparing: dict[bool, float] = {}  # seconds, for one size and for any
        self.shared: dict[Hashable, Run] = {}  # for any size
        self.left = OWN
        self.refused = why_not(next(network.parameters()).device)

    def expect(self, done: int, coming: int | None) -> None:
        """Says how many images there are; else as many are expected to come as there have been.

        Args:
            done: So many were run.
            coming: So many are to be run, the next one among them; None where nobody knows.
        """
        self.ahead = 1.0 if coming is None else coming / max(done, 1)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, C, h, w]."""
        try:
            return self.run_of(images)(images)
        except RuntimeFailedError as error:  # at a size that was not tried
            self.tell(f"PyTorch goes on: {error}")
            self.refused = str(error)
            return self.plain(images)  # type: ignore[no-any-return]

    def run_of(self, images: Tensor) -> Run:
        """What runs these images."""
        if self.refused or images.device.type != "cpu":
            return self.plain
        pixels = round(math.log2(images.shape[2] * images.shape[3]))
        own, alike = (images.dtype, images.shape), (images.dtype, len(images), pixels)
        for key in (own, alike):
            if key in self.runs:
                return self.runs[key]
        for key, any_size in ((own, False), (alike, True)):
            if self._pays(key, images, any_size):
                self.runs[key] = self._faster(images, any_size)
                return self.runs[key]
        return partial(self._timed, (own, alike))

    def summary(self) -> str:
        """Why no other runtime was tried."""
        return self.refused or "too few images of a size for another runtime to pay"

    def _pays(self, key: Hashable, images: Tensor, any_size: bool) -> bool:
        count, seconds = self.times.get(key, (0, 0.0))
        if count < FEW or not (any_size or self.left):
            return False
        little = LITTLE * self.ahead * count * seconds
        if little < IMPORTS:
            return False
        self.preparing = self.preparing or self._guessed(images)
        shared = any_size and (images.dtype, len(images)) in self.shared
        return (0.0 if shared else self.preparing[any_size]) + 2 * ROUNDS * seconds <= little

    def _guessed(self, images: Tensor) -> dict[bool, float]:
        """Seconds of preparing before it was done once, on a machine as busy as it is now."""
        small = images[:, :, :32, :32]
        started = time.perf_counter()
        try:
            for _ in range(ROUNDS):
                self.plain(small)
        except Exception:  # noqa: BLE001 - a network that takes no small images is left as it is
            return dict.fromkeys((False, True), math.inf)
        one = IMPORTS + EXPORTS * (time.perf_counter() - started) / ROUNDS
        return {False: one, True: ANY_SIZE * one}

    def _faster(self, images: Tensor, any_size: bool) -> Run:
        started = time.perf_counter()
        kind = (images.dtype, len(images))
        try:
            run = self.shared.get(kind) if any_size else None
            if run is None:
                run = prepared(self.plain.network, "onnx", images, any_size)
                self.preparing[any_size] = time.perf_counter() - started
                if any_size:
                    self.shared[kind] = run
                else:
                    self.left -= 1
        except RuntimeFailedError as error:
            self.preparing[any_size] = math.inf
            self.tell(f"PyTorch goes on: {error}")
            return self.plain
        rounds = [(_seconds(self.plain, images), _seconds(run, images)) for _ in range(ROUNDS)]
        plain, other = (min(seconds) for seconds in zip(*rounds, strict=True))
        (faster, least), (slower, most) = sorted(
            (("PyTorch", plain), ("ONNX Runtime", other)), key=lambda each: each[1]
        )
        self.tell(
            f"images {'like' if any_size else 'of'} {size_of(images)} by {faster}: {1000 * least:.1f} ms, {slower} takes "
            f"{1000 * most:.1f} ms (found out in {time.perf_counter() - started:.1f} s)"
        )
        return run if faster == "ONNX Runtime" else self.plain

    def _timed(self, keys: tuple[Hashable, ...], images: Tensor) -> Tensor:
        started = time.perf_counter()
        scores: Tensor = self.plain(images)
        seconds = time.perf_counter() - started
        for key in keys:
            count, least = self.times.get(key, (0, math.inf))
            self.times[key] = (count + 1, min(least, seconds))
        return scores


def why_not(device: torch.device) -> str | None:
    """Why ONNX Runtime cannot run anything, None if it can."""
    try:
        check_runtime("onnx", device)
    except (ImportError, ValueError) as error:
        return str(error)
    return None


def _seconds(run: Run, images: Tensor) -> float:
    started = time.perf_counter()
    run(images)
    return time.perf_counter() - started
