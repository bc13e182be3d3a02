"""PSPNet: pyramid pooling over a dilated residual network.

Three convolutions and a pool take the image to 1/4; four stages of bottlenecks follow, of which
the second halves the size and the last two keep 1/8 and dilate, by 2 and 4. The pyramid pools the
map to 1, 2, 3 and 6 cells a side, takes each to a quarter of the channels and back to the size of
the map. A 3 x 3 convolution reads map and pyramid, a 1 x 1 convolution the classes. In training an
auxiliary head reads the third stage.

Source: Zhao, Shi, Qi, Wang and Jia, Pyramid Scene Parsing Network, arXiv:1612.01105, figure 3.

As in the official PyTorch code (hszhao/semseg): the stride of a bottleneck is on its 3 x 3
convolution (on the first 1 x 1 in the paper's Caffe code; the parameters are the same), upsampling
inside has aligned corners. Other than there, images may have any size: the code asks for
8 k + 1 pixels a side, so that its last upsampling, which the loss does here, is exact. And a
batch of one image trains: batch norm on a pyramid's single cell is `PooledBatchNorm2d`.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from revseg.engine.tracing import has_hooks
from revseg.layers.bands.sources import WithGrids, run_of_source
from revseg.layers.blocks import PooledBatchNorm2d
from revseg.layers.grid_pool import GridMeans
from revseg.layers.images import IMAGENET
from revseg.layers.stack import Stack
from revseg.models.network import Network
from revseg.models.official import renamed_by
from revseg.models.policy import Memory, MemoryPolicy
from revseg.models.resnet import (
    DEPTHS,
    bottleneck,
    conv_bn_relu,
    image_conv_bn_relu,
    official_block_names,
    residual_stage,
)


class PSPNet(Network):
    """PSPNet for `num_classes` classes: images [N, 3, H, W] to logits [N, num_classes, h, w].

    h = ceil(H / 8), w = ceil(W / 8). In training with `aux` a tuple, the logits and those of the
    auxiliary head, of the same shape; the paper gives the latter a weight of 0.4.

    Args:
        num_classes: C, the number of classes.
        depth: Of the residual network: 50, 101 or 152.
        width: Channels of the first convolution; all others follow, up to 32 times as many.
        bins: Cells a side of the pyramid's pools.
        dropout: Probability of dropping a channel in front of a classifier.
        aux: Whether there is an auxiliary head.
        in_channels: Of the images.
        memory: "least", "lowest", "balanced" or "fastest", or a policy, see `revseg.models.policy`. Predicted peak of a training
            step, one image of 1024 x 2048 in float32: 3,816, 5,929 and 13,974 MiB (16,482 with PyTorch's own
            modules and loss).

    Raises:
        ValueError: If an argument is unknown or out of its range.
    """

    stride = 8
    official_normalizations: ClassVar = {None: IMAGENET}

    def __init__(
        self,
        num_classes: int = 19,
        *,
        depth: int = 101,
        width: int = 64,
        bins: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
        aux: bool = True,
        in_channels: int = 3,
        memory: Memory = "balanced",
    ) -> None:
        super().__init__(num_classes, in_channels)
        _check(depth, width, bins, dropout)
        policy = MemoryPolicy.of(memory)
        again, stage = policy.block, partial(residual_stage, bottleneck, policy)
        w, counts = width, DEPTHS[depth]

        self.stem = again(
            Stack(
                image_conv_bn_relu(in_channels, w, stride=2),  # 1/2
                conv_bn_relu(w, w),
                conv_bn_relu(w, 2 * w),
                nn.MaxPool2d(3, stride=2, padding=1),  # 1/4
            )
        )
        self.stage1 = stage(2 * w, w, counts[0])
        self.stage2 = stage(4 * w, 2 * w, counts[1], stride=2)  # 1/8
        self.stage3 = stage(8 * w, 4 * w, counts[2], dilation=2)
        self.stage4 = stage(16 * w, 8 * w, counts[3], dilation=4)
        pyramid = PyramidPooling(32 * w, bins)
        read = conv_bn_relu(pyramid.out_channels, 8 * w)
        self.head = again(_Head(pyramid, read, *_classifier(8 * w, num_classes, dropout)))
        self.aux = None
        if aux:
            read = conv_bn_relu(16 * w, 4 * w)
            self.aux = again(Stack(read, *_classifier(4 * w, num_classes, dropout)))

    def logits(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:  # [N, 3, H, W] -> [N, C, h, w]
        x = self.stage3(self.stage2(self.stage1(self.stem(images))))
        logits: Tensor = self.head(self.stage4(x))
        return (logits, self.aux(x)) if self.training and self.aux is not None else logits

    @staticmethod
    def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our names for weights named as in hszhao/semseg; see `revseg.models.load_official`.

        Raises:
            ValueError: If a name is unknown.
        """
        stem = {
            rf"layer0\.{3 * i + part}\.(\w+)": rf"stem.{i}.{part}.\1" for i in range(3) for part in (0, 1)
        }
        heads = {
            r"ppm\.features\.(\d+)\.([12])\.(\w+)": r"head.0.branches.\1.\2.\3",
            r"cls\.([01])\.(\w+)": r"head.1.\1.\2",
            r"cls\.4\.(\w+)": r"head.3.\1",
            r"aux\.([01])\.(\w+)": r"aux.0.\1.\2",
            r"aux\.4\.(\w+)": r"aux.2.\1",
        }
        blocks = official_block_names(r"layer([1-4])\.(\d+)", r"stage\1.\2")
        return renamed_by(state, stem | blocks | heads)


class PyramidPooling(nn.Module):
    """A map, and beside it its means over coarser and coarser grids, at the map's size.

    Args:
        channels: C, of the map.
        bins: Cells a side of each grid; each gets C / len(bins) channels.
    """

    def __init__(self, channels: int, bins: Sequence[int]) -> None:
        super().__init__()
        each = channels // len(bins)
        self.out_channels = channels + each * len(bins)
        self.branches = nn.ModuleList(
            nn.Sequential(
                GridMeans(cells),
                nn.Conv2d(channels, each, 1, bias=False),
                PooledBatchNorm2d(each),
                nn.ReLU(),
            )
            for cells in bins
        )

    def forward(self, x: Tensor) -> Tensor:  # [N, C, h, w] -> [N, out_channels, h, w]
        return WithGrids(x, *self.grids(x)).plain()

    def grids(self, x: Tensor) -> list[Tensor]:
        """Of each branch its cells [N, C / len(bins), cells, cells]."""
        return [branch(x) for branch in self.branches]


class _Head(Stack):
    """Pyramid, convolution and classifier; by bands the map of all channels is never whole."""

    def forward(self, x: Tensor) -> Tensor:
        pyramid: Any = self[0]
        layers = self.layers_by_bands(x, self[1]) if self.training and not has_hooks(pyramid) else None
        if layers is None or self.bands is None:
            return super().forward(x)
        x = run_of_source(layers, WithGrids, (x, *pyramid.grids(x)), self.bands)
        for part in list(self)[2:]:
            x = part(x)
        return x


def _classifier(channels: int, num_classes: int, dropout: float) -> tuple[nn.Module, nn.Module]:
    return nn.Dropout2d(dropout), nn.Conv2d(channels, num_classes, 1)


def _check(depth: int, width: int, bins: Sequence[int], dropout: float) -> None:
    if depth not in DEPTHS:
        raise ValueError(f"unknown depth {depth}; choose one of {', '.join(map(str, DEPTHS))}")
    if width < 1:
        raise ValueError(f"expected a width of at least 1, got {width}")
    if not bins or min(bins) < 1 or 32 * width % len(bins):
        raise ValueError(f"expected positive bins whose number divides {32 * width} channels, got {bins}")
    if not 0 <= dropout < 1:
        raise ValueError(f"expected dropout in [0, 1), got {dropout}")
