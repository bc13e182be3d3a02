"""An n x 1 or 1 x n convolution that reads the raw map of the layer before, and writes its own.

    z = act(bn(x))        on load; x itself if there is no norm
    u = conv(z, weight)   stride 1, "same" zero padding of z, any dilation
    mean, var of u        on store

A chain conv - BN - act - conv - BN - act so touches each raw map once on the way, and no activated
map exists. Backward, a layer turns the gradient of its activated map into that of its raw map on load;
for that it needs three sums over the map (`bn_act_sums`), which the layer behind took while it wrote
that gradient. Only the last layer of a chain has to take its own.

Letters: x the raw map of the layer before [N, C, H, W], z the activated one; u the raw map [N, D, H, W];
n taps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from revseg.kernels.batch_statistics.op import batch_statistics
from revseg.kernels.bn_act.op import bn_act
from revseg.kernels.bn_act_backward.op import bn_act_backward, bn_act_sums
from revseg.kernels.dispatch import has_kernel, is_interpreting, triton_version
from revseg.kernels.norm import Norm
from revseg.kernels.verify import Kernel, gradient_like

CHANNELS = range(8, 129)  # fewer waste most of a tile's multiplications, more do not fit in registers
OLDEST_TRITON = (3, 5)  # 3.4 fails at the backward kernel in half precision for sm_80 and sm_90
OLDEST_CUDA = (8, 0)  # Triton multiplies without tensor cores on older ones, where cuDNN is faster


def asymmetric_conv(
    x: Tensor, norm: Norm | None, weight: Tensor, dilation: int, statistics: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The raw map of a layer, from that of the layer before.

    Args:
        x: Raw map of the layer before [N, C, H, W], or the input of the first layer.
        norm: Statistics and parameters that follow x; None if x is to be read as it is.
        weight: [D, C, n, 1] or [D, C, 1, n], n odd, of the dtype of x.
        dilation: Distance between taps.
        statistics: Whether mean and variance are wanted.

    Returns:
        u [N, D, H, W], of the dtype and memory layout of x; mean and biased variance of u by channel
        [D], float64, or None.

    Raises:
        ValueError: If the weight is of another shape, or the dilation is below 1.
        TypeError: If x and weight are of different dtypes.
    """
    _check(x, weight, dilation)
    if not has_asymmetric_conv(x, weight):
        return reference(x, norm, weight, dilation, statistics)
    from revseg.kernels.asymmetric_conv import gpu

    return gpu.asymmetric_conv(x, norm, weight, dilation, statistics)


def asymmetric_conv_backward(
    u: Tensor,
    dz: Tensor,
    norm: Norm,
    sums: Tensor,
    batch: bool,
    x: Tensor,
    norm_x: Norm | None,
    weight: Tensor,
    dilation: int,
    wanted: tuple[bool, bool] = (True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of a layer: of its convolution's input and weight, from that of its activated map.

    Args:
        u: The layer's raw map [N, D, H, W].
        dz: The gradient of its activated map, of the dtype of u and any strides.
        norm: Statistics and parameters that follow u.
        sums: `bn_act_sums(u, dz, norm)` [3, D], float64; not read unless `batch`.
        batch: Whether mean and variance in `norm` are those of u.
        x: As given to `asymmetric_conv`.
        norm_x: As its `norm`.
        weight: As given to `asymmetric_conv`.
        dilation: As given to `asymmetric_conv`.
        wanted: Whether the gradients of the input and of the weight are.

    Returns:
        dz_x [N, C, H, W], the gradient of the activated map before, or of x without a norm; the gradient
        of the weight; and `bn_act_sums(x, dz_x, norm_x)` [3, C]. None for what is not wanted, and the sums
        are None if there is no `norm_x`.

    Raises:
        ValueError: As `asymmetric_conv`.
        TypeError: As `asymmetric_conv`.
    """
    _check(x, weight, dilation)
    if not has_asymmetric_conv(x, weight):
        return backward_reference(u, dz, norm, sums, batch, x, norm_x, weight, dilation, wanted)
    from revseg.kernels.asymmetric_conv import gpu_backward

    return gpu_backward.asymmetric_conv_backward(
        u, dz, norm, sums, batch, x, norm_x, weight, dilation, wanted
    )


def has_asymmetric_conv(x: Tensor, weight: Tensor) -> bool:
    """Whether the convolution of x by this weight runs as a Triton kernel."""
    return (
        has_kernel(x, weight)
        and all(channels in CHANNELS for channels in weight.shape[:2])
        and not (x.is_cuda and _is_old(x.device))
        and (is_interpreting() or triton_version() >= OLDEST_TRITON)
    )


def _is_old(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST_CUDA


def reference(
    x: Tensor, norm: Norm | None, weight: Tensor, dilation: int, statistics: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The meaning of `asymmetric_conv`."""
    z = x if norm is None else bn_act(x, norm)
    u = torch.conv2d(z, weight, None, 1, padding(weight, dilation), dilation)
    return (u, *batch_statistics(u)) if statistics else (u, None, None)


def backward_reference(
    u: Tensor,
    dz: Tensor,
    norm: Norm,
    sums: Tensor,
    batch: bool,
    x: Tensor,
    norm_x: Norm | None,
    weight: Tensor,
    dilation: int,
    wanted: tuple[bool, bool] = (True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The meaning of `asymmetric_conv_backward`; takes the sums again."""
    du = bn_act_backward(u, dz, norm, batch)[0]
    z = x if norm_x is None else bn_act(x, norm_x)
    dz_x, dweight, _ = torch.ops.aten.convolution_backward(
        du,
        z,
        weight,
        None,
        [1, 1],
        padding(weight, dilation),
        [dilation, dilation],
        False,
        [0, 0],
        1,
        (*wanted, False),
    )
    return dz_x, dweight, None if dz_x is None or norm_x is None else bn_act_sums(x, dz_x, norm_x)


def padding(weight: Tensor, dilation: int) -> list[int]:
    """Zeros on each side of a map, so that it keeps its size."""
    return [dilation * (size // 2) for size in weight.shape[2:]]


def _check(x: Tensor, weight: Tensor, dilation: int) -> None:
    height, width = weight.shape[2:]
    if min(height, width) != 1 or height * width % 2 == 0 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"expected a weight [D, {x.shape[1]}, n, 1] or [D, {x.shape[1]}, 1, n] with n odd, "
            f"got {list(weight.shape)}"
        )
    if dilation < 1:
        raise ValueError(f"expected a dilation of at least 1, got {dilation}")
    if x.dtype != weight.dtype:
        raise TypeError(f"expected a map and a weight of one dtype, got {x.dtype} and {weight.dtype}")


def example_inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Norm, Tensor, int, bool]:
    """Arguments of a small call of `asymmetric_conv`."""
    x = torch.randn(2, 9, 7, 19, device=device).to(dtype)
    weight = (torch.randn(11, 9, 3, 1, device=device) / 5).to(dtype)
    scale, bias, slope = torch.randn(3, 9, device=device)
    return x, Norm(*batch_statistics(x), scale, bias, slope, 1e-5), weight, 2, True


def backward_example_inputs(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments of a small call of `asymmetric_conv_backward`."""
    x, norm_x, weight, dilation, _ = example_inputs(device, dtype)
    u = reference(x, norm_x, weight, dilation, False)[0]
    scale, bias, slope = (torch.linspace(low, 1, u.shape[1], device=device) for low in (0.5, -1, 0.1))
    norm, dz = Norm(*batch_statistics(u), scale, bias, slope, 1e-5), gradient_like(u)
    return u, dz, norm, bn_act_sums(u, dz, norm), True, x, norm_x, weight, dilation


KERNELS = (
    Kernel(
        asymmetric_conv,
        reference,
        example_inputs,
        rule=lambda x, norm, weight, *_: has_asymmetric_conv(x, weight),
    ),
    Kernel(
        asymmetric_conv_backward,
        backward_reference,
        backward_example_inputs,
        rule=lambda u, dz, norm, sums, batch, x, norm_x, weight, *_: has_asymmetric_conv(x, weight),
    ),
)
