"""ENet with reversible bottlenecks: a change of its architecture, not another way to compute it.

Every bottleneck of C channels becomes two additive couplings of streams of C / 2, with four
functions that are the bottleneck's convolutions at half the channels. A convolution of half the
channels has a quarter of the weights, so widths, operations and, but for biases, batch norms and
slopes, parameters stay those of ENet. What changes: no activation follows a sum, and each
resolution is four times as many functions deep. The blocks that halve and double the size are ENet's.

Source: Paszke et al., ENet, see `revseg.models.enet`; Gomez et al., The Reversible Residual Network,
arXiv:1707.04585, for the coupling. The combination is ours.
"""

from collections.abc import Sequence
from functools import partial

from torch import nn

from revseg.couplings import AdditiveCoupling
from revseg.engine.exact import Exact
from revseg.layers.memory_policy import check_level, run_again
from revseg.models.enet import ENetLayers, Kind, Wrap, bottleneck
from revseg.sequence import ReversibleSequence


class ReversibleENet(ENetLayers):
    """Reversible ENet for `num_classes` classes: images [N, 3, H, W] to logits [N, num_classes, H, W].

    The bottlenecks of each resolution form one `ReversibleSequence`, which keeps only its output for
    the backward pass, however deep it is.

    Args:
        num_classes: C, the number of classes.
        widths: Channels at 1/2, 1/4 and 1/8 of the size, rising, multiples of 8.
        depth: Number of bottlenecks at 1/4, of two couplings each, as everywhere.
        repeats: How often the bottlenecks at 1/8 go through their eight kinds.
        dropout: Probability of dropping a channel of a function's value at 1/4 and at 1/8.
        memory: "lowest", "balanced" or "fastest", see `revseg.layers.memory_policy`. Bottlenecks are undone at the
            first two; at the lowest level up- and down-samplings run again too.
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
        depth: int = 4,
        repeats: int = 2,
        dropout: Sequence[float] = (0.01, 0.1),
        memory: str = "balanced",
        save_activations: bool = False,
        exact: Exact = False,
    ) -> None:
        check_level(memory)
        if any(width % 8 for width in widths):
            raise ValueError(f"expected widths that are multiples of 8, got {widths}")
        saved = save_activations or memory == "fastest"
        block: Wrap = partial(run_again, memory=memory, save_activations=saved)

        def units(channels: int, kinds: Sequence[Kind], dropout: float, activation: str) -> nn.Module:
            half = partial(bottleneck, channels // 2, dropout=dropout, activation=activation)
            couplings = [AdditiveCoupling(half(kind), half(kind)) for kind in kinds for _ in range(2)]
            return ReversibleSequence(couplings, save_activations=saved, exact=exact)

        super().__init__(
            num_classes, widths, depth, repeats, dropout, units, block, stage=lambda stage: stage
        )
