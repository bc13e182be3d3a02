"""All kernels: each operation with its meaning and a small call of it.

The contract tests, `revseg doctor` and the benchmarks find an operation here. Where an operation has a
second function for its gradients, the meaning of that one is autograd through the first's reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from revseg.kernels.asymmetric_conv import op as asymmetric_conv
from revseg.kernels.bn_act import op as bn_act
from revseg.kernels.bn_act.backward import bn_act_backward, bn_act_sums
from revseg.kernels.norm import Norm
from revseg.kernels.running_statistics import op as running_statistics
from revseg.kernels.sum_of_pools import op as sum_of_pools
from revseg.kernels.upsample_argmax import op as upsample_argmax
from revseg.kernels.upsample_cross_entropy import op as upsample_cross_entropy
from revseg.kernels.verify import Kernel


def _batch_statistics(u: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(u.dtype, torch.float32)
    var, mean = torch.var_mean(u.to(wide), (0, 2, 3), correction=0)
    return mean.double(), var.double()


def _batch_statistics_inputs(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    u = bn_act.example_inputs(device, dtype)[0]
    return (u + 2 * u.abs().amax(),)  # the relative error of a mean near 0 says nothing


def _bn_act_backward(u: Tensor, dz: Tensor, norm: Norm, batch: bool) -> tuple[Tensor, ...]:
    parameters = {name: getattr(norm, name) for name in ("weight", "bias", "slope")}
    leaves: dict[str, Any] = {
        name: p.detach().clone().requires_grad_() for name, p in parameters.items() if isinstance(p, Tensor)
    }
    u = u.detach().clone().requires_grad_()
    with torch.enable_grad():
        if batch:
            mean, var = _batch_statistics(u)
            norm = replace(norm, mean=mean, var=var)
        z = bn_act.reference(u, replace(norm, **leaves))
    return torch.autograd.grad(z, [u, *leaves.values()], dz)


def _bn_act_backward_inputs(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    u, norm = bn_act.example_inputs(device, dtype)
    return u, _gradient_like(u), norm, True


def _bn_act_add(u: Tensor, norm: Norm, x: Tensor) -> Tensor:
    return x + bn_act.reference(u, norm)


def _bn_act_add_inputs(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    u, norm = bn_act.example_inputs(device, dtype)
    return u, norm, _gradient_like(u)


def _bn_act_sums(u: Tensor, dz: Tensor, norm: Norm) -> Tensor:
    _, dweight, dbias, dslope = _bn_act_backward(u, dz, norm, False)
    return torch.stack((dbias, dweight / norm.inverse_deviation.to(dweight.dtype), dslope)).double()


def _bn_act_sums_inputs(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    return _bn_act_backward_inputs(device, dtype)[:3]


def _asymmetric_conv_backward_inputs(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    x, norm_x, weight, dilation, _ = asymmetric_conv.example_inputs(device, dtype)
    u = asymmetric_conv.reference(x, norm_x, weight, dilation, False)[0]
    scale, bias, slope = (torch.linspace(low, 1, u.shape[1], device=device) for low in (0.5, -1, 0.1))
    norm, dz = Norm(*bn_act.batch_statistics(u), scale, bias, slope, 1e-5), _gradient_like(u)
    return u, dz, norm, bn_act_sums(u, dz, norm), True, x, norm_x, weight, dilation


def _sum_of_pools_backward(dy: Tensor, x: Tensor, sizes: Sequence[int]) -> Tensor:
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        y = sum_of_pools.reference(x, sizes)
    return torch.autograd.grad(y, x, dy)[0]


def _sum_of_pools_backward_inputs(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    x, sizes = sum_of_pools.example_inputs(device, dtype)
    return _gradient_like(sum_of_pools.reference(x, sizes)), x, sizes


def _gradient_like(y: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(y.shape, generator=generator).to(y)


KERNELS = {
    "batch_statistics": Kernel(bn_act.batch_statistics, _batch_statistics, _batch_statistics_inputs),
    "moved_statistics": Kernel(
        running_statistics.moved_statistics, running_statistics.reference, running_statistics.example_inputs
    ),
    "bn_act": Kernel(bn_act.bn_act, bn_act.reference, bn_act.example_inputs),
    "bn_act_backward": Kernel(bn_act_backward, _bn_act_backward, _bn_act_backward_inputs),
    "bn_act_add": Kernel(bn_act.bn_act_add, _bn_act_add, _bn_act_add_inputs),
    "bn_act_sums": Kernel(bn_act_sums, _bn_act_sums, _bn_act_sums_inputs),
    "asymmetric_conv": Kernel(
        asymmetric_conv.asymmetric_conv,
        asymmetric_conv.reference,
        asymmetric_conv.example_inputs,
        rule=lambda x, norm, weight, *_: asymmetric_conv.has_asymmetric_conv(x, weight),
    ),
    "asymmetric_conv_backward": Kernel(
        asymmetric_conv.asymmetric_conv_backward,
        asymmetric_conv.reference_backward,
        _asymmetric_conv_backward_inputs,
        rule=lambda u, dz, norm, sums, batch, x, norm_x, weight, *_: asymmetric_conv.has_asymmetric_conv(
            x, weight
        ),
    ),
    "sum_of_pools": Kernel(sum_of_pools.sum_of_pools, sum_of_pools.reference, sum_of_pools.example_inputs),
    "sum_of_pools_backward": Kernel(
        sum_of_pools.sum_of_pools_backward, _sum_of_pools_backward, _sum_of_pools_backward_inputs
    ),
    "upsample_argmax": Kernel(
        upsample_argmax.upsample_argmax, upsample_argmax.reference, upsample_argmax.example_inputs
    ),
    "upsample_cross_entropy": Kernel(
        upsample_cross_entropy.upsample_cross_entropy,
        upsample_cross_entropy.reference,
        upsample_cross_entropy.example_inputs,
        differentiable=(0,),
    ),
}
