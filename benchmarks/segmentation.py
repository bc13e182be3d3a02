"""A training step of a whole network: the network, its images and labels, its loss as plain PyTorch has it."""

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from revseg.models import MODELS, create_model
from revseg.ops import plain

CLASSES = 19
MIB = 2**20
# Of the paper's table 2: parameters in millions as printed, and frames per second on its card.
PAPER: dict[str, tuple[float, float]] = {
    "pspnet": (65.7, 1.9),
    "bisenet_resnet18": (49.0, 27.0),
    "segnet": (29.5, 5.0),
    "icnet": (7.8, 30.3),
    "bisenet_xception39": (5.8, 30.0),
    "erfnet": (2.07, 17.9),
    "enet": (0.36, 22.0),
    "espnet": (0.36, 47.6),
    "vnet": (0.16, 37.4),
}
NETWORKS = [*PAPER, *(name for name in MODELS if name not in PAPER)]  # those of the paper first


def network(name: str, **options: Any) -> nn.Module:
    """The network for 19 classes, without auxiliary heads."""
    heads = {"aux": False} if "aux" in inspect.signature(MODELS[name]).parameters else {}
    return create_model(name, CLASSES, **heads, **options)


def counts(name: str) -> dict[str, Any]:
    """Parameters, and 10^9 operations of one image of 1024 x 2048."""
    with torch.device("meta"):
        model, images = network(name).eval(), torch.empty(1, 3, 1024, 2048)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "gflops": round(counter.get_total_flops() / 1e9, 1)}


def batch(size: tuple[int, int, int], values: bool, device: str | None = None) -> tuple[Tensor, Tensor]:
    """Images [N, 3, H, W] and labels [N, H, W], both uint8, of random numbers or of zeros."""
    n, height, width = size
    images = torch.zeros((n, 3, height, width), dtype=torch.uint8, device=device)
    labels = torch.zeros((n, height, width), dtype=torch.uint8, device=device)
    if values:
        images.random_(0, 256)
        labels.random_(0, CLASSES)
    return images, labels


def plain_loss(logits: Tensor, labels: Tensor, weight: Tensor | None = None, **options: Any) -> Tensor:
    """The loss by two functions of PyTorch, with every class at full size."""
    scores = F.interpolate(logits, labels.shape[-2:], mode="bilinear")
    weight = None if weight is None else weight.to(scores.dtype)
    return F.cross_entropy(scores, labels.long(), weight, ignore_index=255, **options)


def plain_argmax(logits: Tensor, labels: Tensor) -> Tensor:
    """The predicted labels by two functions of PyTorch."""
    return F.interpolate(logits, labels.shape[-2:], mode="bilinear").argmax(dim=1)


def using_kernels(on: bool) -> AbstractContextManager[None]:
    """Kernels, or for the length of a `with` none."""
    return nullcontext() if on else plain()
