"""ERFNet with reversible units: a change of its architecture, not another way to compute it.

Every residual unit of C channels becomes two additive couplings of streams of C / 2, with four
functions that are the unit's factorized convolutions at half the channels. A convolution of half
the channels has a quarter of the weights, so widths, operations and, but for biases and batch norms,
parameters stay those of ERFNet. What changes: a shortcut is never followed by a ReLU, and each
resolution is four times as many functions deep. Weights of ERFNet do not fit, its results do not carry over.

Source: Romera et al., ERFNet, see `revseg.models.erfnet`; Gomez et al., The Reversible Residual
Network, arXiv:1707.04585, for the coupling. The combination is ours.
"""

from collections.abc import Sequence
from functools import partial

from torch import nn

from revseg.couplings import AdditiveCoupling
from revseg.engine.exact import Exact
from revseg.layers.memory_policy import check_level, run_again
from revseg.models.erfnet import ERFNetLayers, Wrap, factorized
from revseg.sequence import ReversibleSequence


class ReversibleERFNet(ERFNetLayers):
    """Reversible ERFNet for `num_classes` classes: images [N, 3, H, W] to logits [N, num_classes, H, W].

    The units of each resolution form one `ReversibleSequence`, which keeps only its output for the
    backward pass, however deep it is.

    Args:
        num_classes: C, the number of classes.
        widths: Channels at 1/2, 1/4 and 1/8 of the size, rising, even.
        depth: Number of units at 1/4, of two couplings each, as everywhere.
        repeats: How often the units at 1/8 go through the dilations.
        dilations: Dilations of the units at 1/8.
        dropout: Probability of dropping a channel of a function's value at 1/4 and at 1/8.
        memory: "lowest", "balanced" or "fastest", see `revseg.layers.memory_policy`. Units are undone at the first
            two; at the lowest level up- and down-samplings run again too.
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
        depth: int = 5,
        repeats: int = 2,
        dilations: Sequence[int] = (2, 4, 8, 16),
        dropout: Sequence[float] = (0.03, 0.3),
        memory: str = "balanced",
        save_activations: bool = False,
        exact: Exact = False,
    ) -> None:
        check_level(memory)
        if any(width % 2 for width in widths):
            raise ValueError(f"expected even widths, got {widths}")
        saved = save_activations or memory == "fastest"
        block: Wrap = partial(run_again, memory=memory, save_activations=saved)

        def units(channels: int, dilations: Sequence[int], dropout: float) -> nn.Module:
            half = partial(factorized, channels // 2, dropout=dropout)
            couplings = [AdditiveCoupling(half(d), half(d)) for d in dilations for _ in range(2)]
            return ReversibleSequence(couplings, save_activations=saved, exact=exact)

        super().__init__(
            num_classes,
            widths,
            depth,
            repeats,
            dilations,
            dropout,
            encoder_head=False,
            units=units,
            block=block,
            stage=lambda stage: stage,
        )
