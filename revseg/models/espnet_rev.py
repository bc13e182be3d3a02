"""ESPNet with reversible bodies: a change of its architecture, not another way to compute it.

Every residual ESP block of C channels becomes two additive couplings of streams of C / 2, with four
functions that are ESP blocks of half the channels, batch norm and PReLU included. A convolution of
half the channels has a quarter of the weights, so widths stay, and operations and parameters almost
(a fifth of 64 or of 32 channels is rounded). What changes: nothing follows a sum, and each resolution
is four times as many functions deep. The blocks that halve the size and the decoder are ESPNet's.

Source: Mehta et al., ESPNet, see `revseg.models.espnet`; Gomez et al., The Reversible Residual
Network, arXiv:1707.04585, for the coupling. The combination is ours.
"""

from collections.abc import Sequence
from functools import partial

from torch import nn

from revseg.couplings import AdditiveCoupling
from revseg.engine.exact import Exact
from revseg.layers.memory_policy import check_level, run_again
from revseg.models.espnet import ESPNetLayers, Wrap
from revseg.models.espnet_esp import ESP
from revseg.sequence import ReversibleSequence


class ReversibleESPNet(ESPNetLayers):
    """Reversible ESPNet for `num_classes` classes: images [N, 3, H, W] to logits [N, num_classes, H, W].

    The blocks of each level form one `ReversibleSequence`, which keeps only its output for the
    backward pass, however deep it is.

    Args:
        num_classes: C, the number of classes. The decoder has as many channels, but at least 5.
        widths: Channels at 1/2, 1/4 and 1/8 of the size, rising, the last two even, at least 10.
        p: Number of ESP blocks at 1/4, of two couplings each, as at 1/8.
        q: Number of ESP blocks at 1/8.
        memory: "lowest", "balanced" or "fastest", see `revseg.layers.memory_policy`. Blocks are undone at the
            first two; at the lowest level what halves, joins and doubles runs again too.
        save_activations: Train with ordinary autograd: same numbers, same state dict, more memory.
        exact: Bit-for-bit inversion: True, or "lossless"; see `ReversibleSequence`.

    Raises:
        ValueError: If an argument is unknown or out of its range.
    """

    def __init__(
        self,
        num_classes: int = 19,
        *,
        widths: Sequence[int] = (16, 64, 128),
        p: int = 2,
        q: int = 8,
        memory: str = "balanced",
        save_activations: bool = False,
        exact: Exact = False,
    ) -> None:
        check_level(memory)
        if any(width % 2 or width < 10 for width in widths[1:]):
            raise ValueError(f"expected even widths of at least 10 at 1/4 and 1/8, got {widths}")
        saved = save_activations or memory == "fastest"
        block: Wrap = partial(run_again, memory=memory, save_activations=saved)

        def units(channels: int, count: int) -> nn.Module:
            half = channels // 2
            couplings = [AdditiveCoupling(ESP(half, half), ESP(half, half)) for _ in range(2 * count)]
            return ReversibleSequence(couplings, save_activations=saved, exact=exact)

        super().__init__(num_classes, widths, p, q, units, block, stage=lambda stage: stage)
