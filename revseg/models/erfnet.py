"""ERFNet: residual units of factorized convolutions, an encoder and a small decoder.

The encoder halves the size three times (`ConvPool`) and refines the map with non-bottleneck-1D
units: two pairs of a 3 x 1 and a 1 x 3 convolution and a shortcut, the second pair dilated at 1/8.
The decoder doubles the size with transposed convolutions, two units after each, and ends at the
size of the images.

Source: Romera, Álvarez, Bergasa and Arroyo, ERFNet: Efficient Residual Factorized ConvNet for
Real-Time Semantic Segmentation, IEEE T-ITS 19(1), 2018: table I, and figure 2 (c) for the unit.

As in the official PyTorch code: all convolutions have a bias, the first of a pair has a ReLU and no
batch norm, eps is 1e-3, no dropout in the decoder. Its images are bytes / 255; ours have the mean and
deviation of ImageNet taken out (`normalize_images`), so give official weights bytes / 255 as floats.
Odd sizes, which the official code refuses, are rounded up on the way down and cropped at the end.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from revseg.layers.conv_pool import ConvPool, ImageConvPool
from revseg.layers.images import crop
from revseg.layers.memory_policy import check_level, run_again, run_block_again
from revseg.layers.stack import Stack
from revseg.layers.upsample_conv import DoublingConv2d
from revseg.models.official import renamed

Wrap = Callable[[nn.Module], nn.Module]
Units = Callable[[int, Sequence[int], float], nn.Module]  # of channels, of these dilations, with dropout


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


class ERFNetLayers(nn.Module):
    """What lies around the units, the same for ERFNet and its reversible edition.

    Args:
        num_classes: C, the number of classes.
        widths: Channels at 1/2, 1/4 and 1/8 of the size.
        depth: Number of units at 1/4.
        repeats: How often the units at 1/8 go through the dilations.
        dilations: Dilations of the units at 1/8.
        dropout: Probability of dropping a channel in the units at 1/4 and at 1/8.
        encoder_head: Whether to have the unused classifier of the encoder.
        units: Makes the units of one resolution.
        block: Called with each up- or down-sampling, for what stands in its place.
        stage: Called with each stage, for what stands in its place.
    """

    stride = 1

    def __init__(
        self,
        num_classes: int,
        widths: Sequence[int],
        depth: int,
        repeats: int,
        dilations: Sequence[int],
        dropout: Sequence[float],
        encoder_head: bool,
        units: Units,
        block: Wrap,
        stage: Wrap,
    ) -> None:
        super().__init__()
        _check(num_classes, widths, depth, repeats, dilations, dropout)
        w1, w2, w3 = widths
        self.stem = block(ImageConvPool(3, w1))  # 1/2
        self.stage1 = stage(nn.Sequential(block(ConvPool(w1, w2)), units(w2, [1] * depth, dropout[0])))  # 1/4
        eighth = units(w3, [*dilations] * repeats, dropout[1])
        self.stage2 = stage(nn.Sequential(block(ConvPool(w2, w3)), eighth))  # 1/8
        self.stage3 = stage(nn.Sequential(block(_doubling(w3, w2)), units(w2, (1, 1), 0.0)))  # 1/4
        self.stage4 = stage(nn.Sequential(block(_doubling(w2, w1)), units(w1, (1, 1), 0.0)))  # 1/2
        self.classifier = DoublingConv2d(w1, num_classes)  # 1
        if encoder_head:
            self.encoder_head = nn.Conv2d(w3, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:  # [N, 3, H, W] -> [N, C, H, W]
        # One expression: a name would hold the map of one stage while the next one runs.
        logits = self.classifier(self.stage4(self.stage3(self.stage2(self.stage1(self.stem(images))))))
        return crop(logits, images.shape[-2:])


class ERFNet(ERFNetLayers):
    """ERFNet for `num_classes` classes: images [N, 3, H, W] to logits [N, num_classes, H, W].

    Args:
        num_classes: C, the number of classes.
        widths: Channels at 1/2, 1/4 and 1/8 of the size, rising.
        depth: Number of units at 1/4.
        repeats: How often the units at 1/8 go through the dilations.
        dilations: Dilations of the units at 1/8.
        dropout: Probability of dropping a channel in the units at 1/4 and at 1/8.
        encoder_head: Whether to have the classifier with which the official code first trains the
            encoder alone, and which the whole network never uses: its parameters get no gradient.
            2,066,642 parameters with it, as its files of weights have, 2,064,191 without.
        memory: "lowest", "balanced" or "fastest", see `revseg.layers.memory_policy`.

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
        encoder_head: bool = False,
        memory: str = "balanced",
    ) -> None:
        check_level(memory)
        block: Wrap = partial(run_block_again, memory=memory)
        stage: Wrap = partial(run_again, memory=memory, save_activations=False)

        def units(channels: int, dilations: Sequence[int], dropout: float) -> nn.Module:
            return nn.Sequential(*(block(NonBottleneck1D(channels, d, dropout)) for d in dilations))

        super().__init__(
            num_classes, widths, depth, repeats, dilations, dropout, encoder_head, units, block, stage
        )

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
    num_classes: int,
    widths: Sequence[int],
    depth: int,
    repeats: int,
    dilations: Sequence[int],
    dropout: Sequence[float],
) -> None:
    if num_classes < 1:
        raise ValueError(f"expected num_classes of at least 1, got {num_classes}")
    if len(widths) != 3 or not 3 < widths[0] < widths[1] < widths[2]:
        raise ValueError(f"expected three rising widths above 3, got {widths}")
    if depth < 1 or repeats < 1:
        raise ValueError(f"expected depth and repeats of at least 1, got {depth} and {repeats}")
    if not dilations or min(dilations) < 1:
        raise ValueError(f"expected one or more dilations of at least 1, got {dilations}")
    if len(dropout) != 2 or not all(0 <= p < 1 for p in dropout):
        raise ValueError(f"expected two probabilities of dropout in [0, 1), got {dropout}")
