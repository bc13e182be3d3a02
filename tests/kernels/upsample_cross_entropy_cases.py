"""Logits, labels and options, and how near results have to be."""

import pytest
import torch
import torch.nn.functional as F

from revseg.kernels.upsample_cross_entropy.inputs import REDUCTIONS
from tests.helpers import small_input

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
OPTIONS = [{}, {"weight": True}, {"label_smoothing": 0.1}, {"weight": True, "label_smoothing": 0.3}]

reductions = pytest.mark.parametrize("reduction", REDUCTIONS)
variants = pytest.mark.parametrize("options", OPTIONS, ids=str)


def example(n=2, classes=5, low=(4, 5), size=(13, 18), dtype=torch.float64, ignored=0.2, scale=1.0):
    logits = (scale * small_input(n, classes, *low, requires_grad=False)).to(dtype).requires_grad_()
    labels = torch.randint(0, classes, (n, *size), dtype=torch.uint8)
    labels[torch.rand(labels.shape) < ignored] = 255
    return logits, labels


def with_weights(options, classes, dtype=torch.float64):
    if not options.get("weight"):
        return options
    return {**options, "weight": small_input(classes, requires_grad=False).abs().to(dtype) + 0.1}


def run(loss, logits, labels, **options):
    """The loss and the gradient of the logits, for some gradient of the loss."""
    logits = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    result = loss(logits, labels, **options)
    dresult = small_input(*result.shape, seed=5, requires_grad=False).to(result) if result.ndim else None
    return result.detach(), *torch.autograd.grad(result, logits, dresult)


def eager(logits, labels, **options):
    """What users write, in the type of the logits."""
    align_corners = options.pop("align_corners", False)
    if options.get("weight") is not None:
        options["weight"] = options["weight"].to(logits.dtype)
    scores = F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=align_corners)
    return F.cross_entropy(scores, labels.long(), ignore_index=255, **options)


def assert_near(ours, plain, exact):
    """At most twice the error of plain PyTorch, in length, and a last bit: one number can be right by luck."""
    ours, plain, last_bit = ours.double(), plain.double(), torch.finfo(ours.dtype).eps
    allowed = 2 * (plain - exact).norm() + last_bit * exact.norm()
    assert (ours - exact).norm() <= allowed, f"{(ours - exact).norm():.3g} > {allowed:.3g}"
