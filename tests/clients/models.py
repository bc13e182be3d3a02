"""Networks of other libraries, as they come: how each is made, with weights of chance, and the images it takes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Client:
    """A network of a library.

    Args:
        library: Whose it is.
        make: Makes it, given the library.
        shape: Of the images; so many that maps weigh more than the gradients of all parameters, or no plan takes less.
        skips: Whether maps are read inside of blocks and beyond them too, so that gradients are sums that may
            round otherwise (`revseg.fit`).
    """

    library: str
    make: Callable[[Any], nn.Module]
    shape: tuple[int, ...] = (4, 3, 96, 96)
    skips: bool = False


def _torchvision(name: str, images: int = 4, **options: Any) -> Client:
    shape = (images, 3, 96, 96)
    return Client(
        "torchvision", lambda library: library.models.get_model(name, weights=None, **options), shape
    )


def _segmentation(name: str, **options: Any) -> Client:
    options |= {"weights_backbone": None, "num_classes": 5}
    return Client("torchvision", lambda library: library.models.get_model(name, weights=None, **options))


def _timm(name: str, images: int = 4, **options: Any) -> Client:
    return Client("timm", lambda library: library.create_model(name, **options), (images, 3, 96, 96))


def _smp(kind: str, encoder: str) -> Client:
    return Client(
        "segmentation_models_pytorch",
        lambda library: getattr(library, kind)(encoder, encoder_weights=None, classes=5),
        skips=True,
    )


CLIENTS = {
    "resnet50": _torchvision("resnet50"),
    "deeplabv3_resnet50": _segmentation("deeplabv3_resnet50"),
    "mobilenet_v3": _torchvision("mobilenet_v3_large"),
    "convnext_tiny": _torchvision("convnext_tiny"),
    "swin_t": _torchvision("swin_t"),
    "vit_b_16": _torchvision("vit_b_16", images=24, image_size=96),
    "densenet121": _torchvision("densenet121"),
    "efficientnet_b0": _torchvision("efficientnet_b0"),
    "timm resnet26d": _timm("resnet26d"),
    "timm convnext_atto": _timm("convnext_atto", drop_path_rate=0.1),
    "timm vit_tiny": _timm("vit_tiny_patch16_224", images=16, img_size=96),
    "timm efficientnetv2": _timm("efficientnetv2_rw_t"),
    "smp Unet resnet34": _smp("Unet", "resnet34"),
    "smp FPN resnet18": _smp("FPN", "resnet18"),
    "smp Segformer mit_b0": _smp("Segformer", "mit_b0"),
    "smp Unet mobilenet_v2": _smp("Unet", "mobilenet_v2"),
}
