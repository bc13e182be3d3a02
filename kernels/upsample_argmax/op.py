"""The class of the largest upsampled score, without the upsampled scores.

The scores at full size are C floats a pixel, their argmax is one byte. So some rows are upsampled
at a time, and only their argmax stays; a Triton kernel has no scores in memory at all.

Letters: N images, C classes, h w size of the scores, H W size of the result.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable, without importing the compiler

from revseg.kernels.cpu.argmax import MOST_CLASSES
from revseg.kernels.cpu.bilinear import DTYPES
from revseg.kernels.dispatch import has_kernel
from revseg.kernels.upsample_argmax import cpu
from revseg.kernels.verify import Kernel


@_disable_dynamo
@torch.no_grad()
def upsample_argmax(logits: Tensor, size: Sequence[int], *, align_corners: bool = False) -> Tensor:
    """The class with the highest score at each pixel, after bilinear upsampling to any size.

    Args:
        logits: Scores [N, C, h, w], float16, bfloat16, float32 or float64; C at most 255.
        size: (H, W), also smaller than (h, w).
        align_corners: As in `F.interpolate`.

    Returns:
        Class indices [N, H, W], uint8. Of equal scores the first class wins.

    Memory:
        The result and some MiB.

    Numerics:
        The scores are those of `F.interpolate` in float32 at least, up to the last bit, in which that
        function itself depends on the memory format (see `bilinear`). A pixel with a NaN among its
        scores has an unspecified class in [0, C).

    Raises:
        TypeError: If the logits are not floating.
        ValueError: If a shape does not fit, or there are more than 255 classes.
    """
    if logits.dtype not in DTYPES:
        raise TypeError(f"expected floating logits of at least 16 bits, got {logits.dtype}")
    if logits.ndim != 4 or 0 in logits.shape[1:]:
        raise ValueError(f"expected logits [N, C, h, w] with C, h, w at least 1, got {list(logits.shape)}")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"expected a size (H, W) of at least 1 x 1, got {tuple(size)}")
    if logits.shape[1] > MOST_CLASSES:
        raise ValueError(f"expected at most {MOST_CLASSES} classes, got {logits.shape[1]}")
    if len(logits) and has_kernel(logits):
        from revseg.kernels.upsample_argmax.gpu import argmax

        return argmax(logits, size, align_corners)  # type: ignore[no-any-return]
    return cpu.argmax(logits, size, align_corners)


@torch.no_grad()
def reference(logits: Tensor, size: Sequence[int], *, align_corners: bool = False) -> Tensor:
    """What `upsample_argmax` computes, with all scores at full size."""
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = F.interpolate(scores, tuple(size), mode="bilinear", align_corners=align_corners)
    return scores.argmax(dim=1).to(torch.uint8)


def example_inputs(device: torch.device | str, dtype: torch.dtype) -> tuple[Tensor, tuple[int, int]]:
    """Logits and size of a small call, a factor of 3.25 by 3.6."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 5, 4, 5, generator=generator).to(device, dtype), (13, 18)


KERNELS = (Kernel(upsample_argmax, reference, example_inputs),)
