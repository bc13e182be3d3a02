"""The smallest operation with a kernel, to test what surrounds kernels: every channel times a factor."""

import torch

from revseg.kernels.dispatch import has_kernel
from revseg.kernels.verify import Kernel


def scale(x, factor):
    """x [N, C, H, W] times factor [C]."""
    if has_kernel(x, factor):
        from tests.kernels.scaling import gpu

        return gpu.scale(x, factor)
    return reference(x, factor)


def reference(x, factor):
    return x * factor[:, None, None]


def example_inputs(device, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((2, 3, 5, 7), generator=generator)
    return x.to(device, dtype), torch.tensor([0.5, 3.0, -1.0]).to(device, dtype)


SCALE = Kernel(scale, reference, example_inputs)
KERNELS = (SCALE,)
