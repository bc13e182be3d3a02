"""ERFNet: residual units of factorized convolutions, an encoder and a small decoder.

The encoder halves the size three times (`ConvPool`) and refines the map with non-bottleneck-1D
units: two pairs of a 3 x 1 and a 1 x 3 convolution and a shortcut, the second pair dilated at 1/8.
The decoder doubles the size with transposed convolutions, two units after each, and ends at the
size of the images.

Source: Romera, Álvarez, Bergasa and Arroyo, ERFNet: Efficient Residual Factorized ConvNet for
Real-Time Semantic Segmentation, IEEE T-ITS 19(1), 2018: table I, and figure 2 (c) for the unit.

As in the official PyTorch code: all convolutions have a bias, the first of a pair has a ReLU and no
batch norm, eps is 1e-3, no dropout in the decoder. Its images are bytes / 255, which `load_official` sees to.
Odd sizes, which the official code refuses, are rounded up on the way down and cropped at the end.

The reversible edition is ours, a change of the architecture and not another way to compute it. Every unit
of C channels becomes two additive couplings of streams of C / 2, with four functions that are the unit's
factorized convolutions at half the channels. A convolution of half the channels has a quarter of the
weights, so widths, operations and, but for biases and batch norms, parameters stay. What changes: a
shortcut is never followed by a ReLU, and each resolution is four times as many functions deep.

Source of the coupling: Gomez et al., The Reversible Residual Network, arXiv:1707.04585.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from revseg.couplings import AdditiveCoupling
from revseg.exact.modes import Exact
from revseg.layers.conv_pool import ConvPool, ImageConvPool
from revseg.layers.images import Normalization, crop
from revseg.layers.stack import Stack
from revseg.layers.upsample_conv import DoublingConv2d
from revseg.models.network import Network, check_edition
from revseg.models.official import renamed
from revseg.models.policy import Memory, MemoryPolicy

# The official network's modules, and ours.
_HALVING = {"encoder.initial_block": "stem", "encoder.layers.0": "stage1.0", "encoder.layers.6": "stage2.0"}
_DOUBLING = {"decoder.layers.0": "stage3.0", "decoder.layers.3": "stage4.0"}
_UNITS = (  # half, its first layer, number of units, our stage
    ("encoder", 1, 5, "stage1"),
    ("encoder", 7, 8, "stage2"),
    ("decoder", 1, 2, "stage3"),
    ("decoder", 4, 2, "stage4"),
)
_PARTS = {"conv3x1_1": 0, "conv1x3_1": 2, "bn1": 3, "conv3x1_2": 5, "conv1x3_2": 7, "bn2": 8}


class ERFNet(Network):
    """ERFNet for `num_classes` classes: images [N, 3, H, W] to logits [N, num_classes, H, W].

    Args:
        num_classes: C, the number of classes.
        widths: Channels at 1/2, 1/4 and 1/8 of the size, rising; even if reversible.
        depth: Number of units at 1/4.
        repeats: How often the units at 1/8 go through the dilations.
        dilations: Dilations of the units at 1/8.
        dropout: Probability of dropping a channel in the units at 1/4 and at 1/8.
        encoder_head: Whether to have the classifier with which the official code first trains the
            encoder alone, and which the whole network never uses: its parameters get no gradient.
            2,066,642 parameters with it, as its files of weights have, 2,064,191 without.
        in_channels: Of the images.
        reversible: The units of each resolution form one `ReversibleSequence`, which keeps only its output
            for the backward pass, however deep it is.
        memory: "least", "lowest", "balanced" or "fastest", or a policy, see `revseg.models.policy`.
        save_activations: Train with ordinary autograd: same numbers, same state dict, more memory.
        exact: Bit-for-bit inversion, if reversible: True, or "lossless"; see `ReversibleSequence`.

    Raises:
        ValueError: If an argument is unknown or out of its range.
    """

    stride = 1
    official_normalizations: ClassVar = {None: Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))}
    official_files = "the released files are of num_classes=20, encoder_head=True"

    def __init__(
        self,
        num_classes: int = 19,
        *,
        widths: Sequence[int] = (16, 64, 128),
        depth: int = 5,
        repeats: int = 2,
        dilations: Sequence[int] = (2, 4, 8, 16),
        dropout: Sequence[float] = (0.03, 0.3),
        encoder_head: bool = False,
        in_channels: int = 3,
        reversible: bool = False,
        memory: Memory = "balanced",
        save_activations: bool = False,
        exact: Exact = False,
    ) -> None:
        super().__init__(num_classes, in_channels)
        self.reversible = reversible
        _check(widths, depth, repeats, dilations, dropout, reversible)
        check_edition(reversible, exact)
        policy = MemoryPolicy.of(memory, save_activations, full_logits=True)
        policy = policy.beside_sequences() if reversible else policy

        def units(channels: int, dilations: Sequence[int], dropout: float) -> nn.Module:
            if not reversible:
                row = (NonBottleneck1D(channels, dilation, dropout) for dilation in dilations)
                return nn.Sequential(*map(policy.residual, row))
            halves = (
                [factorized(channels // 2, d, dropout) for _ in "fg"] for d in dilations for _ in range(2)
            )
            return policy.sequence((AdditiveCoupling(*half) for half in halves), exact)

        def stage(sampling: nn.Module, units: nn.Module) -> nn.Module:
            return policy.stage(nn.Sequential(policy.block(sampling), units))

        w1, w2, w3 = widths
        self.stem = policy.block(ImageConvPool(in_channels, w1))  # 1/2
        self.stage1 = stage(ConvPool(w1, w2), units(w2, [1] * depth, dropout[0]))  # 1/4
        eighth = units(w3, [*dilations] * repeats, dropout[1])
        self.stage2 = stage(ConvPool(w2, w3), eighth)  # 1/8
        self.stage3 = stage(_doubling(w3, w2), units(w2, (1, 1), 0.0))  # 1/4
        self.stage4 = stage(_doubling(w2, w1), units(w1, (1, 1), 0.0))  # 1/2
        self.classifier = DoublingConv2d(w1, num_classes)  # 1
        if encoder_head:
            self.encoder_head = nn.Conv2d(w3, num_classes, 1)
        self.again = policy.again()

    def logits(self, images: Tensor) -> Tensor:  # [N, 3, H, W] -> [N, C, H, W]
        parts = self.stem, self.stage1, self.stage2, self.stage3, self.stage4
        return crop(self.classifier(self.again(self._features, parts, images)), images.shape[-2:])

    def _features(self, images: Tensor) -> Tensor:
        """The map at 1/2."""
        # One expression: a name would hold the map of one stage while the next one runs.
        return self.stage4(self.stage3(self.stage2(self.stage1(self.stem(images)))))  # type: ignore[no-any-return]

    @staticmethod
    def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of erfnet_pytorch under our names; with the encoder's head, so set `encoder_head`.

        Raises:
            ValueError: If a name is not one of the official network's.
        """
        modules = {"encoder.output_conv": "encoder_head", "decoder.output_conv": "classifier"}
        for theirs, ours in _HALVING.items():
            modules |= {f"{theirs}.conv": f"{ours}.conv", f"{theirs}.bn": f"{ours}.norm.0"}
        for theirs, ours in _DOUBLING.items():
            modules |= {f"{theirs}.conv": f"{ours}.0", f"{theirs}.bn": f"{ours}.1"}
        for half, first, count, stage in _UNITS:
            for i in range(count):
                theirs, ours = f"{half}.layers.{first + i}", f"{stage}.1.{i}.factorized"
                modules |= {f"{theirs}.{part}": f"{ours}.{place}" for part, place in _PARTS.items()}
        return renamed(state, modules)


class NonBottleneck1D(nn.Module):
    """The residual unit: relu(x + factorized(x)), [N, C, h, w] to the same.

    Args:
        channels: C.
        dilation: Dilation of the second pair.
        dropout: Probability of dropping a channel before the sum.
    """

    def __init__(self, channels: int, dilation: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.factorized = factorized(channels, dilation, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.factorized(x), inplace=True)


def factorized(channels: int, dilation: int, dropout: float) -> Stack:
    """Two 3 x 3 convolutions, each as a 3 x 1 and a 1 x 3, the second one dilated; a linear end."""
    layers: list[nn.Module] = []
    for d, act in ((1, [nn.ReLU()]), (dilation, [])):
        layers += [
            nn.Conv2d(channels, channels, (3, 1), padding=(d, 0), dilation=(d, 1)),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, (1, 3), padding=(0, d), dilation=(1, d)),
            nn.BatchNorm2d(channels, eps=1e-3),
            *act,
        ]
    return Stack(*layers, *([nn.Dropout2d(dropout)] if dropout > 0 else []))


def _doubling(in_channels: int, out_channels: int) -> Stack:
    """Twice the size: transposed convolution, batch norm, ReLU."""
    return Stack(
        nn.ConvTranspose2d(in_channels, out_channels, 3, stride=2, padding=1, output_padding=1),
        nn.BatchNorm2d(out_channels, eps=1e-3),
        nn.ReLU(),
    )


def _check(
    widths: Sequence[int],
    depth: int,
    repeats: int,
    dilations: Sequence[int],
    dropout: Sequence[float],
    reversible: bool,
) -> None:
    if len(widths) != 3 or not 3 < widths[0] < widths[1] < widths[2]:
        raise ValueError(f"expected three rising widths above 3, got {widths}")
    if reversible and any(width % 2 for width in widths):
        raise ValueError(f"expected even widths, got {widths}")
    if depth < 1 or repeats < 1:
        raise ValueError(f"expected depth and repeats of at least 1, got {depth} and {repeats}")
    if not dilations or min(dilations) < 1:
        raise ValueError(f"expected one or more dilations of at least 1, got {dilations}")
    if len(dropout) != 2 or not all(0 <= p < 1 for p in dropout):
        raise ValueError(f"expected two probabilities of dropout in [0, 1), got {dropout}")
