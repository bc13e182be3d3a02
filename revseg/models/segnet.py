"""SegNet: an encoder whose pools tell its decoder where the maxima were.

The encoder is VGG-16's 13 convolutions, in five stages that each end with a 2 x 2 max pool. The
decoder mirrors it: a stage puts every value back where its maximum was, zeros elsewhere, and
convolves the sparse map into a dense one. The last convolution gives the classes at full size.
Every other convolution has batch norm and a ReLU behind it.

Source: Badrinarayanan, Kendall and Cipolla, SegNet: A Deep Convolutional Encoder-Decoder
Architecture for Image Segmentation, arXiv:1511.00561, figure 2.

The layers, biases in front of batch norm included, are those of the authors' Caffe files
(SegNet-Tutorial, segnet_train.prototxt), where pools also reach over the border: a side of n
pixels becomes ceil(n / 2), so any size goes in and comes out.

Only the place of a maximum in its window is kept, a byte where PyTorch's indices take eight (the
paper: two bits would do). Putting it back is deterministic, as PyTorch's own unpooling is not.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from revseg.layers.bands.corners import pooled_by_bands
from revseg.layers.bands.sources import Unpooled, run_of_source
from revseg.layers.blocks import ConvBNAct, ImageConvBNAct
from revseg.layers.corner_pool import pool_with_corners, unpool
from revseg.layers.images import Normalization
from revseg.layers.stack import Stack
from revseg.models.caffe import Layers, from_caffe
from revseg.models.network import Network
from revseg.models.policy import Memory, MemoryPolicy

CONVOLUTIONS = (2, 2, 3, 3, 3)  # of the encoder's stages, VGG-16's

_layer = partial(ConvBNAct, bias=True, activation="relu", eps=1e-5)
_image_layer = partial(ImageConvBNAct, bias=True, activation="relu", eps=1e-5)

Size = tuple[int, ...]  # height and width of a map
Pooled = tuple[Tensor, Size]  # the places of the maxima, and the size of the map that they are from


class SegNet(Network):
    """SegNet for `num_classes` classes: images [N, 3, H, W] to logits [N, num_classes, H, W].

    Args:
        num_classes: C, the number of classes.
        widths: Channels of the five stages.
        in_channels: Of the images.
        memory: "least", "lowest", "balanced" or "fastest", or a policy, see `revseg.models.policy`. Predicted peak of a training
            step, one image of 1024 x 2048 in float32: 2,716, 2,881 and 7,692 MiB (10,324 with PyTorch's own
            modules and loss).

    Raises:
        ValueError: If an argument is unknown or out of its range.
    """

    stride = 1
    official_normalizations: ClassVar = {None: Normalization.of_bytes((0, 0, 0), (1, 1, 1), flipped=True)}
    official_files = (
        "the released files, to be read by revseg.models.caffe.read_caffemodel, are of num_classes=12 (the driving demo), "
        "11 (CamVid, the Bayesian one), 37 (SUN) and 21 (Pascal); SegNet-Basic is another network"
    )

    def __init__(
        self,
        num_classes: int = 19,
        *,
        widths: Sequence[int] = (64, 128, 256, 512, 512),
        in_channels: int = 3,
        memory: Memory = "balanced",
    ) -> None:
        super().__init__(num_classes, in_channels)
        if len(widths) != len(CONVOLUTIONS) or min(widths) < 1:
            raise ValueError(f"expected five positive widths, got {widths}")
        policy = MemoryPolicy.of(memory).keeping_no_maps()
        down, up = [], []
        for i, (width, count) in enumerate(zip(widths, CONVOLUTIONS, strict=True)):
            before = widths[i - 1] if i else in_channels
            first = _image_layer(before, width) if i == 0 else _layer(before, width)
            encode = Stack(first, *(_layer(width, width) for _ in range(count - 1)))
            last = _layer(width, before) if i else nn.Conv2d(width, num_classes, 3, padding=1)
            decode = Stack(*(_layer(width, width) for _ in range(count - 1)), last)
            down.append(policy.residual(_Down(encode)))
            up.append(policy.residual(_Up(decode)))
        self.encoder = policy.stage(_Encoder(down))
        self.decoder = policy.stage(_Decoder(reversed(up)))

    def logits(self, images: Tensor) -> Tensor:  # [N, 3, H, W] -> [N, C, H, W]
        return self.decoder(*self.encoder(images))  # type: ignore[no-any-return]

    @staticmethod
    def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our names for the blobs of the authors' Caffe files; see `revseg.models.load_official`.

        Raises:
            ValueError: If a layer is unknown or missing.
        """
        return from_caffe(state, _official_layers(), suffix="_bn", bias=True)


def _official_layers() -> Layers:
    """Our convolution and batch norm of each layer of the authors' prototxt."""
    layers: dict[str, tuple[str, str | None]] = {}
    for i, count in enumerate(CONVOLUTIONS):
        for j in range(count):
            down, up = (
                f"encoder.stages.{i}.convolutions.{j}",
                f"decoder.stages.{4 - i}.convolutions.{count - 1 - j}",
            )
            layers[f"conv{i + 1}_{j + 1}"] = f"{down}.0", f"{down}.1"
            layers[f"conv{i + 1}_{j + 1}_D"] = (up, None) if i + j == 0 else (f"{up}.0", f"{up}.1")
    return layers


class _Down(nn.Module):
    """A stage of the encoder: convolutions, then the maxima of 2 x 2 windows and their places."""

    def __init__(self, convolutions: Stack) -> None:
        super().__init__()
        self.convolutions = convolutions

    def forward(self, x: Tensor) -> tuple[Tensor, Pooled]:  # [N, in, H, W] -> 2 of [N, out, h, w]
        size = tuple(x.shape[-2:])
        layers, bands = self.convolutions.layers_by_bands(x), self.convolutions.bands
        if layers is not None and bands is not None:
            maxima, places = pooled_by_bands(layers, x, bands)
        else:
            maxima, places = pool_with_corners(self.convolutions(x))
        return maxima, (places, size)


class _Up(nn.Module):
    """A stage of the decoder: maxima back to their places, then convolutions."""

    def __init__(self, convolutions: Stack) -> None:
        super().__init__()
        self.convolutions = convolutions

    def forward(self, x: Tensor, places: Tensor, size: Size) -> Tensor:  # [N, in, h, w] -> [N, out, H, W]
        layers, bands = self.convolutions.layers_by_bands(x), self.convolutions.bands
        if layers is not None and bands is not None:
            return run_of_source(layers, lambda x: Unpooled(x, places, size), (x,), bands)
        return self.convolutions(unpool(x, places, size))  # type: ignore[no-any-return]


class _Encoder(nn.Module):
    def __init__(self, stages: Iterable[nn.Module]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Pooled]]:
        pools = []
        for stage in self.stages:
            x, pooled = stage(x)
            pools.append(pooled)
        return x, pools


class _Decoder(nn.Module):
    def __init__(self, stages: Iterable[nn.Module]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor, pools: Sequence[Pooled]) -> Tensor:
        for stage, (places, size) in zip(self.stages, reversed(pools), strict=True):
            x = stage(x, places, size)
        return x
