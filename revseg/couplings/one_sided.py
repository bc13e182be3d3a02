"""z = x1 + f(x2); y1 = z; y2 = x2 + z.

One function a block; the second update adds the first stream itself. Nothing normalises the
second stream, so values grow with depth, and with them the rounding error of the inversion: in
float32 about 1e-6 after 3 blocks, 4e-3 after 100. Source: Lin et al., VNet: A Versatile Network
for Efficient Real-Time Semantic Segmentation, section III, table "Reversible Function".
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from revseg.couplings.additive import AdditiveCoupling
from revseg.engine.function import Coupled, Onto
from revseg.engine.gradients import Grads


class OneSidedCoupling(AdditiveCoupling):
    """The paper's V module: `z = x1 + f(x2)`, then `(y1, y2) = (z, x2 + z)`.

    Args:
        f: Takes the second stream [N, C, ...] to the value that updates the first.
    """

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__(f, Identity())


class Identity(nn.Identity):
    """The identity, which needs no graph (`revseg.engine.function`)."""

    def graphless(self, x: Tensor) -> "_Same":
        return _Same()


class _Same:
    parameters: list[Tensor] = []  # noqa: RUF012

    def run(self, x: Tensor, onto: Onto | None) -> Coupled:
        return (x, None) if onto is None else (torch.add(onto[0], x, alpha=onto[1]), x.dtype)

    def again(
        self, x: Tensor, parameters: Sequence[Tensor], onto: Onto | None, kept: list[Tensor] | None
    ) -> Coupled:
        return self.run(x, onto)

    def gradients(
        self, x: Tensor, parameters: Sequence[Tensor], kept: list[Tensor], dh: Tensor, wanted: Sequence[bool]
    ) -> Grads:
        return [dh]

    def with_graph(self, x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        return x
