"""z = x1 + f(x2); y1 = z; y2 = x2 + z.

One function a block; the second update adds the first stream itself. Nothing normalises the
second stream, so values grow with depth, and with them the rounding error of the inversion: in
float32 about 1e-6 after 3 blocks, 4e-3 after 100. Source: Lin et al., VNet: A Versatile Network
for Efficient Real-Time Semantic Segmentation, section III, table "Reversible Function".
"""

from collections.abc import Callable

from torch import Tensor

from revseg.couplings.additive import AdditiveCoupling
from revseg.engine.function import Identity


class OneSidedCoupling(AdditiveCoupling):
    """The paper's V module: `z = x1 + f(x2)`, then `(y1, y2) = (z, x2 + z)`.

    Args:
        f: Takes the second stream [N, C, ...] to the value that updates the first.
    """

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__(f, Identity())
