"""ICNet: three resolutions, the less depth the finer.

The image at half of its size goes through a third of a half-width PSPNet50, to 1/16 of the full size;
halved once more, to 1/32, through the rest of it and through a pyramid of pools that are added.
The full image goes through three convolutions to 1/8. Cascade feature fusion (CFF) joins the
coarser two at 1/16, and that with the finest at 1/8. A 1 x 1 convolution reads the classes
at 1/4. In training, 1 x 1 convolutions also read them where a coarser map enters a CFF.

Source: Zhao, Qi, Shen, Shi and Jia, ICNet for Real-Time Semantic Segmentation on High-Resolution
Images, arXiv:1704.08545, figures 2 and 3.

The layers are those of the authors' Caffe files (hszhao/ICNet, icnet_cityscapes_bnnomerge.prototxt),
which are what is left after pruning: 6,699,987 parameters. (The "7.8 M" of comparisons and 31 MB of
weights agree with a pyramid that has 1 x 1 convolutions as well.) As there, a bottleneck's stride
is on its first convolution, the pools add to the map without convolutions, and resizing has
aligned corners. The auxiliary heads are those that reimplementations have; they weight the heads at
1/16, 1/8 and 1/4 with 0.16, 0.4 and 1. Pruning is no part of this: the net trains as it is.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from revseg.layers.grid_pool import grid_means
from revseg.layers.images import Normalization, of_each_image
from revseg.layers.stack import Stack
from revseg.models.caffe import Layers, from_caffe
from revseg.models.network import Network
from revseg.models.policy import Memory, MemoryPolicy
from revseg.models.resnet import bottleneck, conv_bn, conv_bn_relu, image_conv_bn_relu, residual_stage

BINS = (1, 2, 3, 6)  # cells a side of the pyramid's pools


class ICNet(Network):
    """ICNet for `num_classes` classes: images [N, 3, H, W] to logits [N, num_classes, h, w].

    h = ceil(H / 4), w = ceil(W / 4). In training with `aux` a tuple: the logits, those of the head at
    1/16, and those of the head at 1/8.

    Args:
        num_classes: C, the number of classes.
        width: Channels of the first convolutions; all others follow, up to 32 times as many.
        aux: Whether there are auxiliary heads.
        in_channels: Of the images.
        memory: "least", "lowest", "balanced" or "fastest", or a policy, see `revseg.models.policy`. Predicted peak of a training
            step, one image of 1024 x 2048 in float32: 230, 302 and 781 MiB (1,723 with PyTorch's own
            modules and loss).

    Raises:
        ValueError: If an argument is unknown or out of its range.
    """

    stride = 4
    official_normalizations: ClassVar = {
        19: Normalization.of_bytes((103.939, 116.779, 123.68), (1, 1, 1), flipped=True)
    }
    official_files = "the released files, to be read by revseg.models.caffe.read_caffemodel, are of num_classes=19, aux=False (Cityscapes)"

    def __init__(
        self,
        num_classes: int = 19,
        *,
        width: int = 32,
        aux: bool = True,
        in_channels: int = 3,
        memory: Memory = "balanced",
    ) -> None:
        super().__init__(num_classes, in_channels)
        if width < 1:
            raise ValueError(f"expected a width of at least 1, got {width}")
        policy = MemoryPolicy.of(memory)
        again = policy.block
        w, block = width, partial(bottleneck, stride_first=True)
        stage = partial(residual_stage, block, policy)

        self.stem = again(
            _HalfSizeStem(
                Stack(
                    conv_bn_relu(in_channels, w, stride=2),  # 1/4 of the full image
                    conv_bn_relu(w, w),
                    conv_bn_relu(w, 2 * w),
                    nn.MaxPool2d(3, stride=2, padding=1),  # 1/8
                ),
                Normalization.of_channels(in_channels),
            )
        )
        self.stage2 = stage(2 * w, w, 3)
        self.down = again(block(4 * w, 2 * w, stride=2))  # 1/16
        self.stage3 = stage(8 * w, 2 * w, 3)  # 1/32
        self.stage4 = stage(8 * w, 4 * w, 6, dilation=2)
        self.stage5 = stage(16 * w, 8 * w, 3, dilation=4)
        self.pyramid = again(Stack(PyramidSum(), conv_bn_relu(32 * w, 8 * w, 1)))
        self.fine = again(
            Stack(
                image_conv_bn_relu(in_channels, w, stride=2),
                conv_bn_relu(w, w, stride=2),
                conv_bn_relu(w, 2 * w, stride=2),  # 1/8
            )
        )
        self.fusion16 = again(CascadeFeatureFusion(8 * w, 8 * w, 4 * w))
        self.fusion8 = again(CascadeFeatureFusion(4 * w, 2 * w, 4 * w))
        self.classifier = again(_Classifier(4 * w, num_classes, late=policy.bands is not None))
        self.aux = None
        if aux:
            self.aux = nn.ModuleList(again(_Classifier(c, num_classes)) for c in (8 * w, 4 * w))

    def logits(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:  # [N, 3, H, W] -> [N, C, h, w]
        at16 = self.down(self.stage2(self.stem(images)))
        at32 = self.pyramid(self.stage5(self.stage4(self.stage3(_resize(at16, _sides(at16, 2))))))
        at8 = self.fine(images)
        fused16 = self.fusion16(at32, at16)
        fused8 = self.fusion8(fused16, at8)
        logits: Tensor = self.classifier(fused8, _sides(images, 4))
        if not self.training or self.aux is None:
            return logits
        return logits, self.aux[0](at32, at16.shape[-2:]), self.aux[1](fused16, at8.shape[-2:])

    @staticmethod
    def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our names for the blobs of the authors' Caffe files, merged ones too; see `revseg.models.load_official`.

        Raises:
            ValueError: If a layer is unknown or missing.
        """
        return from_caffe(state, _official_layers(), suffix="/bn", bias=False)


def _official_layers() -> Layers:
    """Our convolution and batch norm of each layer of the authors' prototxt."""
    ours = {"conv1_1_3x3_s2": "stem.layers.0", "conv1_2_3x3": "stem.layers.1", "conv1_3_3x3": "stem.layers.2"}
    blocks = {f"conv2_{i + 1}": f"stage2.{i}" for i in range(3)} | {"conv3_1": "down"}
    blocks |= {f"conv3_{i + 2}": f"stage3.{i}" for i in range(3)}
    blocks |= {f"conv4_{i + 1}": f"stage4.{i}" for i in range(6)}
    blocks |= {f"conv5_{i + 1}": f"stage5.{i}" for i in range(3)}
    parts = {"1x1_reduce": "body.0", "3x3": "body.1", "1x1_increase": "body.2"}
    for theirs, block in blocks.items():
        shortcut = {"1x1_proj": "shortcut"} if theirs.endswith("_1") else {}
        ours |= {f"{theirs}_{part}": f"{block}.{name}" for part, name in (parts | shortcut).items()}
    ours |= {"conv5_4_k1": "pyramid.1", "conv_sub4": "fusion16.coarse", "conv3_1_sub2_proj": "fusion16.fine"}
    ours |= {"conv_sub2": "fusion8.coarse", "conv3_sub1_proj": "fusion8.fine"}
    ours |= {f"conv{i + 1}_sub1": f"fine.{i}" for i in range(3)}
    layers: dict[str, tuple[str, str | None]] = {
        theirs: (f"{name}.0", f"{name}.1") for theirs, name in ours.items()
    }
    return layers | {"conv6_cls": ("classifier", None)}


class PyramidSum(nn.Module):
    """A map plus its means over coarser and coarser grids: [N, C, h, w] to the same."""

    def forward(self, x: Tensor) -> Tensor:
        total = x
        for cells in BINS:
            total = total + _resize(grid_means(x, cells), x.shape[-2:])
        return total


class CascadeFeatureFusion(nn.Module):
    """CFF: relu(coarse + fine), both through a convolution, the coarse map first to the fine one's size.

    Args:
        coarse_channels: Of the coarse map [N, coarse_channels, h, w].
        fine_channels: Of the fine map [N, fine_channels, H, W].
        channels: Of the sum [N, channels, H, W].
    """

    def __init__(self, coarse_channels: int, fine_channels: int, channels: int) -> None:
        super().__init__()
        self.coarse = conv_bn(coarse_channels, channels, 3, dilation=2)
        self.fine = conv_bn(fine_channels, channels)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        return F.relu(self.coarse(_resize(coarse, fine.shape[-2:])) + self.fine(fine), inplace=True)


class _Classifier(nn.Conv2d):
    """The logits of a map at another size.

    Args:
        channels: Of the map.
        num_classes: C.
        late: Whether training resizes the logits and not the map: the same up to rounding, of fewer channels.
    """

    def __init__(self, channels: int, num_classes: int, late: bool = False) -> None:
        super().__init__(channels, num_classes, 1)
        self.late = late

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:  # type: ignore[override]
        if self.late and self.training:
            return _resize(super().forward(x), size)
        return super().forward(_resize(x, size))


class _HalfSizeStem(nn.Module):
    """Layers that see images at half of their size; bytes are normalised one image at a time."""

    def __init__(self, layers: Stack, prepare: Normalization) -> None:
        super().__init__()
        self.layers, self.prepare = layers, prepare

    def forward(self, images: Tensor) -> Tensor:
        dtype = images.dtype if images.is_floating_point() else next(self.layers.parameters()).dtype
        size = _sides(images, 2)
        half = of_each_image(lambda image: _resize(image, size).to(dtype), images, self.prepare)
        return self.layers(half)  # type: ignore[no-any-return]


def _sides(x: Tensor, step: int) -> list[int]:
    """The sides over the step, rounded up; without negative numbers, which ONNX divides otherwise."""
    return [(side + step - 1) // step for side in x.shape[-2:]]


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)
