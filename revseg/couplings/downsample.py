"""Reversible down-sampling: half the height and width, four times the channels.

Both maps are orthogonal, so the inverse also carries gradients back, and nothing is stored. They
stand between couplings in a `ReversibleSequence` and act on each stream alone.
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
        """The streams [N, C, H, W] as [N, 4C, H/2, W/2]."""
        outputs: Streams = run(self.steps(name), (x1, x2), side)
        return outputs

    def inverse(self, y1: Tensor, y2: Tensor, *side: Any) -> Streams:
        """The streams [N, 4C, H/2, W/2] as [N, C, H, W]."""
        return run_inverse(self.steps(), (y1, y2))

    def down(self, x: Tensor) -> Tensor:
        """One stream [N, C, H, W] as [N, 4C, H/2, W/2]."""
        raise NotImplementedError

    def up(self, y: Tensor) -> Tensor:
        """One stream [N, 4C, H/2, W/2] as [N, C, H, W]."""
        raise NotImplementedError

    def _check(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError(
                f"{type(self).__name__} needs streams [N, C, H, W] of even height and width, got {list(x.shape)}"
            )


class Squeeze(_Downsample):
    """Space to channels: each 2 x 2 square becomes four channels. A permutation, so bitwise exact.

    Raises:
        ValueError: If the streams are not [N, C, H, W] of even height and width.

    Source: Jacobsen et al., i-RevNet: Deep Invertible Networks, arXiv:1802.07088, section 3.1.
    """

    exact = True

    def down(self, x: Tensor) -> Tensor:
        self._check(x)
        return F.pixel_unshuffle(x, 2)

    def up(self, y: Tensor) -> Tensor:
        return F.pixel_shuffle(y, 2)


class HaarDownsample(_Downsample):
    """The Haar wavelet: mean, horizontal, vertical and diagonal detail of each 2 x 2 square.

    Channels come out in four groups of C, the means first. Orthonormal (each is half a sum of
    four values with signs), so sizes and gradients keep their scale.

    Raises:
        ValueError: If the streams are not [N, C, H, W] of even height and width.

    Source: Ardizzone et al., Guided Image Generation with Conditional Invertible Neural Networks,
    arXiv:1907.02392, section 3.3.
    """

    def down(self, x: Tensor) -> Tensor:
        self._check(x)
        a, b = x[..., 0::2, 0::2], x[..., 0::2, 1::2]
        c, d = x[..., 1::2, 0::2], x[..., 1::2, 1::2]
        top, bottom, left, right = a + b, c + d, a - b, c - d
        return torch.cat((top + bottom, left + right, top - bottom, left - right), 1).mul(0.5)

    def up(self, y: Tensor) -> Tensor:
        mean, horizontal, vertical, diagonal = y.chunk(4, 1)
        top, bottom = mean + vertical, mean - vertical
        left, right = horizontal + diagonal, horizontal - diagonal
        squares = torch.stack((top + left, top - left, bottom + right, bottom - right), 2)
        return F.pixel_shuffle(squares.mul(0.5).flatten(1, 2), 2)
