"""Reversible down-sampling: half the size, more channels; four times as many for images.

Both maps are orthogonal, so the inverse also carries gradients back, and nothing is stored. They
stand between couplings in a `ReversibleSequence` and act on each stream alone. Signals [N, C, L], images
[N, C, H, W] and volumes [N, C, D, H, W] are halved in each of their d dimensions, for 2^d times the channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revseg.engine.steps import Map, Step, Streams, run_inverse, run_plain


class _Downsample(nn.Module):
    """What the two maps share: a step, and the check of sizes."""

    exact = False  # whether undoing is free of rounding

    def steps(self, name: str = "") -> list[Step]:
        return [Map(name or type(self).__name__, self.down, self.up, self.exact)]

    def forward(
        self, x1: Tensor, x2: Tensor, *side: Any, run: Callable[..., Any] = run_plain, name: str = ""
    ) -> Streams:
        """The streams [N, C, ...] at half their size, [N, 2^d C, ...]."""
        outputs: Streams = run(self.steps(name), (x1, x2), side)
        return outputs

    def inverse(self, y1: Tensor, y2: Tensor, *side: Any) -> Streams:
        """The streams [N, 2^d C, ...] at twice their size, [N, C, ...]."""
        return run_inverse(self.steps(), (y1, y2))

    def down(self, x: Tensor) -> Tensor:
        """One stream [N, C, ...] at half its size, [N, 2^d C, ...]."""
        raise NotImplementedError

    def up(self, y: Tensor) -> Tensor:
        """One stream [N, 2^d C, ...] at twice its size, [N, C, ...]."""
        raise NotImplementedError

    def _check(self, x: Tensor) -> None:
        if not 3 <= x.ndim <= 5 or any(length % 2 for length in x.shape[2:]):
            raise ValueError(
                f"{type(self).__name__} needs streams [N, C, L], [N, C, H, W] or [N, C, D, H, W] of even sizes, "
                f"got {list(x.shape)}"
            )


class Squeeze(_Downsample):
    """Space to channels: each 2 x 2 square becomes four channels. A permutation, so bitwise exact.

    Of signals each pair becomes two channels, of volumes each cube eight. The channels that come of one stand
    together, as with `torch.nn.functional.pixel_unshuffle`.

    Raises:
        ValueError: If the streams are not of one to three dimensions, each of even size.

    Source: Jacobsen et al., i-RevNet: Deep Invertible Networks, arXiv:1802.07088, section 3.1.
    """

    exact = True

    def down(self, x: Tensor) -> Tensor:
        self._check(x)
        if x.ndim == 4:
            return F.pixel_unshuffle(x, 2)  # which keeps channels_last
        n, c, *size = x.shape
        x = x.reshape(n, c, *(each for length in size for each in (length // 2, 2)))
        dims = range(2, x.ndim, 2)
        x = x.permute(0, 1, *(dim + 1 for dim in dims), *dims)
        return x.reshape(n, c << len(size), *(length // 2 for length in size))

    def up(self, y: Tensor) -> Tensor:
        if y.ndim == 4:
            return F.pixel_shuffle(y, 2)
        n, c, *size = y.shape
        d = len(size)
        y = y.reshape(n, c >> d, *([2] * d), *size)
        y = y.permute(0, 1, *(dim for i in range(d) for dim in (2 + d + i, 2 + i)))
        return y.reshape(n, c >> d, *(2 * length for length in size))


class HaarDownsample(_Downsample):
    """The Haar wavelet: mean, horizontal, vertical and diagonal detail of each 2 x 2 square.

    Channels come out in 2^d groups of C, the means first, then those with details along the last dimension, along the
    one before and so on. Orthonormal (each is 2^(-d/2) times a sum of values with signs), so sizes and
    gradients keep their scale.

    Raises:
        ValueError: If the streams are not of one to three dimensions, each of even size.

    Source: Ardizzone et al., Guided Image Generation with Conditional Invertible Neural Networks,
    arXiv:1907.02392, section 3.3.
    """

    def down(self, x: Tensor) -> Tensor:
        self._check(x)
        groups = [x]
        for dim in reversed(range(2, x.ndim)):
            halves = [_halves(group, dim) for group in groups]
            groups = [even + odd for even, odd in halves] + [even - odd for even, odd in halves]
        return torch.cat(groups, 1).mul(_scale(x))

    def up(self, y: Tensor) -> Tensor:
        groups = list(y.chunk(2 ** (y.ndim - 2), 1))
        for dim in range(2, y.ndim):
            means, details = groups[: len(groups) // 2], groups[len(groups) // 2 :]
            groups = [
                torch.stack((mean + detail, mean - detail), dim + 1).flatten(dim, dim + 1)
                for mean, detail in zip(means, details, strict=True)
            ]
        return groups[0].mul(_scale(y))


def _halves(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Every second value along a dimension, from the first and from the second on."""
    n = x.shape[dim] // 2
    even, odd = x.reshape(*x.shape[:dim], n, 2, *x.shape[dim + 1 :]).unbind(dim + 1)
    return even, odd


def _scale(x: Tensor) -> float:
    return float(2 ** (1 - x.ndim / 2))
