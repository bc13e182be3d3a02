"""Residual blocks as a reversible chain: a change of their architecture.

A row of residual blocks, each b(x) = x + F(x) or act(x + F(x)), cannot be undone as it stands.
A `ResidualChain` of the same blocks can: two streams start as copies of the row's input, the blocks
update them in turn by what each of them changes, and at the end the input is counted once.

    y1 = x1 + (b1(x2) - x2),  y2 = x2 + (b2(y1) - y1),  ...       x1 = x2 = x
    output = y1 + y2 - x

Why streams as wide as the map, not halves of it. Every block stays what it is: it works on its
own number of channels, all parameters are kept, trained weights are a start. On halves each block
would have to be built anew at half its width, with a quarter of the parameters, and a block that
one knows only by calling it cannot be. The price is one more map than the row's output. Reversible
vision transformers have two whole streams for the same reason (Mangalam et al., Reversible Vision
Transformers, arXiv:2302.04869).

Why the change and not the block: x1 + b1(x2) would add the input again with every block. Why the
sum less the input, not the mean: it holds the whole of every change, as in the row, and the mean
the half. So two blocks compute what they did before. From the third on a block reads a stream that
lacks every second change before it: another network, to be trained or trained further.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from revseg.couplings import AdditiveCoupling
from revseg.engine.steps import Step, Update
from revseg.sequence import ReversibleSequence


class ResidualChain(nn.Module):
    """Residual blocks of one shape in a row, trained without storing their activations.

    Args:
        *blocks: Modules that keep the shape [N, ...] and dtype of the one tensor they take.
        **options: Arguments of the `ReversibleSequence` that runs them, like `exact`.

    Memory: two maps, whatever the number of blocks; and while a block is undone, its activations.

    Numerics: see `ReversibleSequence`. Where a map is exactly zero and a block adds exactly nothing, a
    ReLU after the sum stands at its kink, and rounding decides on its gradient; not so with
    `exact="lossless"`.
    """

    def __init__(self, *blocks: nn.Module, **options: Any) -> None:
        super().__init__()
        self.sequence = ReversibleSequence(
            [BlockCoupling(block, target=i % 2) for i, block in enumerate(blocks)], **options
        )

    def forward(self, x: Tensor) -> Tensor:
        # Each stream with a node of its own: gradients of x then add up in one order, stored or undone.
        y1, y2 = self.sequence((x.view_as(x), x.view_as(x)))
        return y1 + y2 - x  # type: ignore[no-any-return]


class BlockCoupling(AdditiveCoupling):
    """One stream updated by what a block changes about the other one.

    Args:
        block: A module that keeps the shape of its input.
        target: 0 or 1, the stream that is updated.
    """

    def __init__(self, block: nn.Module, target: int) -> None:
        nn.Module.__init__(self)
        self.f = _Change(block)
        self.target = target

    def steps(self, name: str = "") -> list[Step]:
        name = name or type(self).__name__
        return [Update(f"{name}, f", self.f, self, source=1 - self.target, target=self.target)]


class _Change(nn.Module):
    """F(x) of a block x + F(x)."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) - x  # type: ignore[no-any-return]
