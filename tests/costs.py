"""What a network costs: parameters, floating-point operations, and bytes of a training step."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from revseg.losses import UpsampleCrossEntropy
from revseg.memory import peak_bytes


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def gflops(model: nn.Module) -> float:
    """At 1024 x 2048, two for each multiplication with an addition; found without any values."""
    model = model.to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 1024, 2048, device="meta"))
    return counter.get_total_flops() / 1e9


def peak(model: nn.Module, size: tuple[int, int] = (128, 128), n: int = 2) -> int:
    """The most bytes that a training step allocates at one time, beside parameters and gradients."""
    images = torch.randint(0, 256, (n, 3, *size), dtype=torch.uint8)
    labels = torch.randint(0, 2, (n, *size), dtype=torch.uint8)
    criterion = UpsampleCrossEntropy()

    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # else the gradients would count, which no level saves
    return peak_bytes(lambda: criterion(model(images), labels).backward())
