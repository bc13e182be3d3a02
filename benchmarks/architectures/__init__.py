"""Eleven segmentation networks of kinds that people bring, as they write them, without a line of our library.

Each takes images [N, 3, H, W], or volumes [N, C, D, H, W], and returns logits of the same size. Defaults are the
published numbers of blocks and channels; `tests/benchmarks/test_architectures.py` holds the counts of parameters against
the published ones.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from benchmarks.architectures.convnext import ConvNeXtUPerNet
from benchmarks.architectures.densenet import DenseNetFCN
from benchmarks.architectures.hrnet import HRNet
from benchmarks.architectures.mobilenet import MobileNetASPP
from benchmarks.architectures.nnunet import ResidualEncoderUNet
from benchmarks.architectures.resnet import DeepLabV3Plus, ResNetFCN
from benchmarks.architectures.segformer import SegFormer
from benchmarks.architectures.unet import UNet, UNet3D
from benchmarks.architectures.vit import ViTLinear


@dataclass(frozen=True)
class Architecture:
    """A network and the sizes it is asked at.

    Args:
        make: Makes it, by the published defaults.
        size: Batch, channels and extents of a training step in its paper or in common use.
        small: The same, as small as a peak still says something.
    """

    make: Callable[[], nn.Module]
    size: tuple[int, ...]
    small: tuple[int, ...]


STREET, SCENE = (4, 3, 1024, 2048), (8, 3, 512, 512)
SMALL = (2, 3, 256, 256)
ARCHITECTURES = {
    "ResNet50-FCN": Architecture(ResNetFCN, STREET, SMALL),
    "DeepLabv3+ R50": Architecture(DeepLabV3Plus, STREET, SMALL),
    "U-Net 2-D": Architecture(UNet, SCENE, (1, 3, 256, 256)),
    "U-Net 3-D": Architecture(UNet3D, (1, 3, 128, 128, 128), (1, 3, 32, 64, 64)),
    "nnU-Net ResEnc 3-D": Architecture(ResidualEncoderUNet, (2, 1, 128, 128, 128), (1, 1, 64, 64, 64)),
    "HRNet-W18": Architecture(HRNet, STREET, SMALL),
    "MobileNetV2-ASPP": Architecture(MobileNetASPP, STREET, SMALL),
    "ConvNeXt-T UPerNet": Architecture(ConvNeXtUPerNet, SCENE, SMALL),
    "SegFormer-B0": Architecture(SegFormer, STREET, SMALL),
    "ViT-B/16 linear": Architecture(ViTLinear, SCENE, SMALL),
    "DenseNet121-FCN": Architecture(DenseNetFCN, SCENE, SMALL),
}
