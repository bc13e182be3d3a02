"""The eleven networks have the published numbers of parameters, and logits of the size of their images."""

import pytest
import torch

from benchmarks.architectures import ARCHITECTURES

PUBLISHED = {  # parameters, of which part, and where they are published
    "ResNet50-FCN": (
        32_957_013,
        "",
    ),  # torchvision's fcn_resnet50, 35,322,218, less its second head of 2,365,205
    "DeepLabv3+ R50": (23_508_032, "backbone"),  # torchvision's resnet50, 25,557,032, less its classifier
    "U-Net 2-D": (31_043_586, ""),  # the common edition with batch norm, for two classes
    "U-Net 3-D": (
        19_069_955,
        "",
    ),  # the paper's, which does not count norms and biases of raising convolutions
    "nnU-Net ResEnc 3-D": (102.35e6, ""),  # ResEnc L, to the printed digits
    "HRNet-W18": (9.6e6, ""),  # the paper's table, to its digits
    "MobileNetV2-ASPP": (2_223_872, "features"),  # torchvision's mobilenet_v2, 3,504,872, less its classifier
    "ConvNeXt-T UPerNet": (
        27_821_472,
        "backbone",
    ),  # timm's convnext_tiny without head, and the norms of four maps
    "SegFormer-B0": (3_752_694, ""),  # the published weights for ADE20K
    "ViT-B/16 linear": (85_798_656, ""),  # timm's vit_base_patch16_224 without its classifier
    "DenseNet121-FCN": (6_953_856, "features"),  # torchvision's densenet121, 7,978,856, less its classifier
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameters(name):
    with torch.device("meta"):
        network = ARCHITECTURES[name].make()
    published, part = PUBLISHED[name]
    counted = network.get_submodule(part)
    found = sum(p.numel() for p in counted.parameters())
    if name == "ViT-B/16 linear":
        found -= sum(p.numel() for p in network.head.parameters())
    if name == "U-Net 3-D":
        found -= sum(
            p.numel()
            for m in network.modules()
            if isinstance(m, torch.nn.BatchNorm3d)
            for p in m.parameters()
        )
        found -= sum(m.bias.numel() for m in network.raised)
    assert found == pytest.approx(published, rel=0.01 if isinstance(published, float) else 0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_have_the_size_of_the_images(name):
    with torch.device("meta"):
        network = ARCHITECTURES[name].make().eval()
        images = torch.empty(ARCHITECTURES[name].small)
        logits = network(images)
    assert (len(logits), logits.shape[2:]) == (len(images), images.shape[2:])
