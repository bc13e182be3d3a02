"""Layers with an asymmetric convolution: their maps, and what plain PyTorch makes of them."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from revseg.kernels.asymmetric_conv.op import asymmetric_conv, asymmetric_conv_backward, reference
from revseg.kernels.batch_statistics.op import batch_statistics
from revseg.kernels.bn_act_backward.op import bn_act_sums
from revseg.kernels.norm import Norm
from tests.helpers import small_input

F64 = torch.float64


@dataclass
class Case:
    """One layer: what it reads, what it makes, and the gradient of what its norm makes of that."""

    x: Tensor
    norm_x: Norm | None
    weight: Tensor
    dilation: int
    u: Tensor
    dz: Tensor
    norm: Norm
    batch: bool

    def wide(self) -> "Case":
        """The same numbers in float64."""
        maps = {name: getattr(self, name).double() for name in ("x", "weight", "u", "dz")}
        norm_x = None if self.norm_x is None else wide_norm(self.norm_x)
        return replace(self, **maps, norm_x=norm_x, norm=wide_norm(self.norm))

    def sums(self) -> Tensor:
        """Those of the gradient, exact."""
        return bn_act_sums(self.u.double(), self.dz.double(), wide_norm(self.norm))


def case(
    channels=8, out=8, kernel=(3, 1), dilation=1, size=(2, 9, 21), dtype=F64, layout=torch.contiguous_format,
    slope="prelu", first=False, batch=True, affine=True, seed=0,
):  # fmt: skip
    """A layer whose numbers are those of `dtype`; the first of a chain reads its input as it is."""
    images, *area = size
    x = (small_input(images, channels, *area, seed=seed, requires_grad=False) * 2 + 0.5).to(dtype)
    x = x.contiguous(memory_format=layout)
    weight = small_input(out, channels, *kernel, seed=seed + 1, requires_grad=False)
    weight = (weight / (channels * max(kernel)) ** 0.5).to(dtype)
    norm_x = None if first else norm_of(x, slope, True, affine, seed + 2)
    wide = None if norm_x is None else wide_norm(norm_x)
    u = reference(x.double(), wide, weight.double(), dilation, False)[0].to(dtype)
    dz = small_input(*u.shape, seed=seed + 3, requires_grad=False).to(dtype).contiguous(memory_format=layout)
    norm = norm_of(u, slope, batch, affine, seed + 4)
    return Case(x, norm_x, weight, dilation, u.contiguous(memory_format=layout), dz, norm, batch)


def norm_of(u: Tensor, slope: str | float, batch: bool, affine: bool, seed: int) -> Norm:
    """One that follows u; parameters are float32 for half, and its own statistics if not the batch's."""
    v = small_input(5, u.shape[1], seed=seed, requires_grad=False)
    v = v.to(torch.promote_types(u.dtype, torch.float32))
    mean, var = batch_statistics(u.double())
    if not batch:
        mean, var = mean + 0.3 * v[0].double(), var * v[1].double().exp()
    slopes = {"prelu": 0.25 + 0.2 * v[4], "shared": v[4, :1]}
    slope = slopes[slope] if isinstance(slope, str) else slope
    return Norm(mean, var, v[2] if affine else None, v[3] if affine else None, slope, 1e-3)


def wide_norm(norm: Norm) -> Norm:
    vectors = {name: getattr(norm, name) for name in ("weight", "bias", "slope")}
    return replace(norm, **{k: v.double() for k, v in vectors.items() if isinstance(v, Tensor)})


def ours(given: Case) -> dict[str, Tensor]:
    u, mean, var = asymmetric_conv(given.x, given.norm_x, given.weight, given.dilation, True)
    found = {"u": u, "mean": mean, "var": var}
    dx, dweight, sums = asymmetric_conv_backward(
        given.u, given.dz, given.norm, given.sums(), given.batch, given.x, given.norm_x, given.weight,
        given.dilation,
    )  # fmt: skip
    return found | {"dx": dx, "dweight": dweight} | ({} if sums is None else {"sums": sums})


def plain(given: Case) -> dict[str, Tensor]:
    """The same by the functions of PyTorch and autograd."""
    x, weight, u = given.x, given.weight.clone().requires_grad_(), given.u.clone().requires_grad_()
    z = (x if given.norm_x is None else bn_act_of(x, given.norm_x, True)).detach().requires_grad_()
    padding = [given.dilation * (size // 2) for size in weight.shape[2:]]
    made = F.conv2d(z, weight, None, 1, padding, given.dilation)
    var, mean = torch.var_mean(
        made.detach().to(torch.promote_types(x.dtype, torch.float32)), (0, 2, 3), correction=0
    )
    (du,) = torch.autograd.grad(bn_act_of(u, given.norm, given.batch), u, given.dz)
    dx, dweight = torch.autograd.grad(made, (z, weight), du)
    found = {"u": made.detach(), "mean": mean, "var": var, "dx": dx, "dweight": dweight}
    if given.norm_x is not None:
        found["sums"] = sums_by_autograd(x, dx, given.norm_x)
    return found


def bn_act_of(u: Tensor, norm: Norm, batch: bool) -> Tensor:
    wide = torch.promote_types(u.dtype, torch.float32)
    mean, var = norm.mean.to(wide), norm.var.to(wide)
    weight, bias = (None if v is None else v.to(wide) for v in (norm.weight, norm.bias))
    n = F.batch_norm(u, *((None, None) if batch else (mean, var)), weight, bias, batch, 0.0, norm.eps)
    if isinstance(norm.slope, Tensor):
        return F.prelu(n, norm.slope.to(n.dtype))
    return torch.where(n > 0, n, n * norm.slope)


def sums_by_autograd(x: Tensor, dz: Tensor, norm: Norm) -> Tensor:
    """What `bn_act_sums` gives, as gradients of a norm with constant statistics."""
    wide = torch.promote_types(x.dtype, torch.float32)
    one = torch.ones_like(norm.mean, dtype=wide)
    bias = (one * 0 if norm.bias is None else norm.bias.to(wide)).clone().requires_grad_()
    weight = (one if norm.weight is None else norm.weight.to(wide)).clone().requires_grad_()
    slope = norm.slope if isinstance(norm.slope, Tensor) else norm.slope * one
    slope = slope.to(wide).expand(len(one)).clone().requires_grad_()
    z = bn_act_of(x, replace(norm, weight=weight, bias=bias, slope=slope), False)
    dweight, dbias, dslope = torch.autograd.grad(z, (weight, bias, slope), dz)
    return torch.stack((dbias, dweight / norm.inverse_deviation.to(wide), dslope))


def error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-3)).item()


def ratios(seeds=(0,), **kwargs) -> dict[str, float]:
    """For each result: the errors made, by those that plain PyTorch makes, both over some cases."""
    mine, theirs = {}, {}
    for seed in seeds:
        given = case(seed=seed, **kwargs)
        exact, found, other = plain(given.wide()), ours(given), plain(given)
        assert found.keys() == exact.keys()
        for name, truth in exact.items():
            least = 2.0**-23 if name in ("mean", "var") else 0.0  # float64, but sums of float32 numbers
            mine[name] = mine.get(name, 0.0) + error(found[name], truth) ** 2
            theirs[name] = theirs.get(name, 0.0) + max(error(other[name], truth), least) ** 2
    return {name: (mine[name] / theirs[name]) ** 0.5 for name in mine}
