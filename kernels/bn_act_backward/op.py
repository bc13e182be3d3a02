"""The gradients of `bn_act` (`revseg.kernels.bn_act.op`), in two passes over the raw map.

The first takes three sums by channel, which are the gradients of the parameters; the second makes the
gradient of the raw map, through the statistics too if they are the batch's. Each is an operation of its own too,
for maps that go through them band by band.

Letters: u the raw map [N, C, H, W], n the normalised one, z the activated one; M = N * H * W.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from revseg.kernels.batch_statistics import op as batch_statistics
from revseg.kernels.bn_act import op as bn_act
from revseg.kernels.cpu import native
from revseg.kernels.cpu.blocks import Matrix
from revseg.kernels.cpu.compiled import is_compiled, run
from revseg.kernels.dispatch import has_kernel
from revseg.kernels.norm import Norm
from revseg.kernels.precision import widest
from revseg.kernels.shapes import has_values
from revseg.kernels.strides import as_dense, memory_like
from revseg.kernels.verify import Kernel, gradient_like


def bn_act_backward(
    u: Tensor, dz: Tensor, norm: Norm, batch: bool, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `bn_act`, through the statistics too if they are the batch's.

    Args:
        u: The raw map [N, C, H, W].
        dz: The gradient of the activated map, of any strides.
        norm: Statistics and parameters.
        batch: Whether mean and variance are those of u.
        out: Written to instead of new memory; may be dz itself, or u, which takes a little longer.

    Returns:
        du [N, C, H, W], of the dtype and strides of u, and the gradients of weight, bias and
        slope, each [C], float64 where the device has it.
    """
    du = memory_like(u, u.dtype, out)
    if dz.stride() != u.stride():
        dz = as_dense(dz, u) if du is u else du.copy_(dz)
    if has_kernel(u, dz):
        from revseg.kernels.bn_act_backward import gpu

        return gpu.bn_act_backward(u, dz, norm, batch, du)
    if native.is_small(u):
        found, dweight, dbias, dslope = native.gradients(u, dz.to(u.dtype), norm, batch)
        return du.copy_(found), dweight, dbias, dslope
    maps = Matrix(u), Matrix(dz), Matrix(du)
    if not has_values(u):
        maps[0].one_block(4)
        vector = norm.mean.new_empty(u.shape[1])
        return du, vector, vector, vector
    # where possible, the first pass writes dn, so that the second need not make it again
    once = du is not u and maps[0].direct and not is_compiled(maps[0])
    dbias, dot, dslope = _sums(*maps, norm, once)
    dweight = dot * norm.inverse_deviation
    m = u.numel() // u.shape[1]
    _apply(*maps, norm, once, (dweight / m, dbias / m) if batch else None)
    return du, dweight, dbias, dslope


def bn_act_sums(u: Tensor, dz: Tensor, norm: Norm) -> Tensor:
    """The sums that `bn_act_backward` needs before it can make du [3, C], float64.

    Those of dn, which is the gradient of the bias; of dn * (u - mean), which is that of the weight
    times the deviation; and of dz * n where n < 0, which is that of the slope.

    Args:
        u: The raw map [N, C, H, W].
        dz: The gradient of the activated map, of any strides.
        norm: Statistics and parameters.
    """
    dz = as_dense(dz, u)
    if has_kernel(u, dz):
        from revseg.kernels.bn_act_backward import gpu

        return gpu.bn_act_sums(u, dz, norm)
    matrix, gradient = Matrix(u), Matrix(dz)
    if not has_values(u):
        matrix.one_block(3)
        return norm.mean.new_empty(3, u.shape[1])
    return _sums(matrix, gradient, matrix, norm, write=False)


def bn_act_gradient(
    u: Tensor, dz: Tensor, norm: Norm, sums: Tensor | None, values: int, out: Tensor | None = None
) -> Tensor:
    """The gradient of a raw map, or of a band of one, whose sums are known.

    Args:
        u: The raw map [N, C, H, W], or rows of it.
        dz: The gradient of what norm and activation made of these, of any strides.
        norm: Statistics and parameters.
        sums: `bn_act_sums` [3, C] of the whole map; None if the statistics are not the batch's.
        values: Of each channel of the whole map.
        out: Written to instead of new memory; may be dz itself, or u.

    Returns:
        du, of the dtype and strides of u.
    """
    du = memory_like(u, u.dtype, out)
    dz = as_dense(dz, u)
    if has_kernel(u, dz):
        from revseg.kernels.bn_act_backward import gpu

        return gpu.bn_act_gradient(u, dz, norm, sums, values, du)
    maps = Matrix(u), Matrix(dz), Matrix(du)
    if not has_values(u):
        maps[0].one_block(2)
        return du
    means = None if sums is None else (sums[1] * norm.inverse_deviation / values, sums[0] / values)
    _apply(*maps, norm, False, means)
    return du


def _sums(u: Matrix, dz: Matrix, du: Matrix, norm: Norm, write: bool) -> Tensor:
    """The sums of dn, of dn * (u - mean) and of dz * n below 0, by channel [3, C]; dn itself into du."""
    if is_compiled(u):
        sums = run("sums", u.whole(), dz.whole(), *u.along(norm.vectors))
        return u.added_whole(torch.stack(sums).to(widest(u.data.device)))
    blocks, wide = [], widest(u.data.device)
    for x, g, y, (mean, scale, bias, slope), c, n, t in zip(
        *(each.blocks() for each in (u, dz, du)),
        u.spread(norm.vectors),
        *(u.scratch() for _ in range(3)),
        strict=True,
    ):
        g = g.to(u.dtype)
        torch.mul(torch.sub(x, mean, out=c), scale, out=n).add_(bias)
        dslope = torch.clamp(n, max=0, out=t).mul_(g).sum(u.dim)
        dn = torch.mul(_factor_(n, slope), g, out=y if write else n)
        blocks.append(torch.stack((dn.sum(u.dim), c.mul_(dn).sum(u.dim), dslope)).to(wide))
    return u.added(blocks)


def _apply(
    u: Matrix, dz: Matrix, du: Matrix, norm: Norm, written: bool, of_batch: tuple[Tensor, Tensor] | None
) -> None:
    """The gradient of the raw map into du: (dn - dbias - (u - mean) / deviation * dweight) * scale."""
    scale = norm.vectors[1]
    dweight, dbias = (torch.zeros_like(scale),) * 2 if of_batch is None else of_batch
    more = torch.stack((-scale * norm.inverse_deviation * dweight, scale * dbias))
    vectors = torch.cat((norm.vectors, more))
    if is_compiled(u):
        args = u.whole(), dz.whole(), *u.along(vectors)
        in_place = {u.data.data_ptr(): "apply_to_map", dz.data.data_ptr(): "apply_to_gradient"}
        name = in_place.get(du.data.data_ptr())
        run(name, *args) if name else run("apply", *args, du.whole())
        return
    for x, g, y, (m, k, b, s, p, q), c, n in zip(
        *(each.blocks() for each in (u, dz, du)),
        u.spread(vectors),
        *(u.scratch() for _ in range(2)),
        strict=True,
    ):
        torch.sub(x, m, out=c)
        if not written:
            torch.mul(_factor_(torch.mul(c, k, out=n).add_(b), s), g.to(u.dtype), out=n)
        dn = (y if written else n).mul_(k)
        if of_batch is not None:  # else an infinity in u would make NaN of zero
            dn.add_(c.mul_(p).sub_(q))
        if not written:
            y.copy_(dn)


def _factor_(n: Tensor, slope: Tensor) -> Tensor:
    """The derivative of the activation: 1 above 0, else the slope; in place of n."""
    return n.gt_(0).mul_(1 - slope).add_(slope)


def reference(u: Tensor, dz: Tensor, norm: Norm, batch: bool) -> tuple[Tensor, ...]:
    """The meaning of `bn_act_backward`: autograd through the reference of `bn_act`."""
    parameters = {name: getattr(norm, name) for name in ("weight", "bias", "slope")}
    leaves: dict[str, Any] = {
        name: p.detach().clone().requires_grad_() for name, p in parameters.items() if isinstance(p, Tensor)
    }
    u = u.detach().clone().requires_grad_()
    with torch.enable_grad():
        if batch:
            mean, var = batch_statistics.reference(u)
            norm = replace(norm, mean=mean, var=var)
        z = bn_act.reference(u, replace(norm, **leaves))
    return torch.autograd.grad(z, [u, *leaves.values()], dz)


def sums_reference(u: Tensor, dz: Tensor, norm: Norm) -> Tensor:
    """The meaning of `bn_act_sums`."""
    _, dweight, dbias, dslope = reference(u, dz, norm, False)
    return torch.stack((dbias, dweight / norm.inverse_deviation.to(dweight.dtype), dslope)).to(
        widest(u.device)
    )


def gradient_reference(u: Tensor, dz: Tensor, norm: Norm, sums: Tensor | None, values: int) -> Tensor:
    """The meaning of `bn_act_gradient`: the gradient at fixed statistics, less what goes through these."""
    (du, *_) = reference(u, dz, norm, False)
    if sums is None:
        return du
    wide = torch.promote_types(u.dtype, torch.float32)
    mean, scale = (v.to(wide)[:, None, None] for v in norm.vectors[:2])
    dbias, dot = (v.to(wide)[:, None, None] / values for v in sums[:2])
    by_u = dot * norm.inverse_deviation.square().to(wide)[:, None, None]
    found: Tensor = du.to(wide) - scale * (dbias + (u.to(wide) - mean) * by_u)
    return found.to(u.dtype)


def example_inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Norm, bool]:
    """Arguments of a small call of `bn_act_backward`."""
    u, norm = bn_act.example_inputs(device, dtype)
    return u, gradient_like(u), norm, True


def sums_example_inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Norm]:
    """Arguments of a small call of `bn_act_sums`."""
    u, dz, norm, _ = example_inputs(device, dtype)
    return u, dz, norm


def gradient_example_inputs(
    device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Norm, Tensor, int]:
    """Arguments of a small call of `bn_act_gradient`: the first image of two."""
    u, dz, norm, _ = example_inputs(device, dtype)
    sums = sums_reference(u, dz, norm).detach()
    return u[:1], gradient_like(u[:1]), norm, sums, u.numel() // u.shape[1]


KERNELS = (
    Kernel(bn_act_backward, reference, example_inputs),
    Kernel(bn_act_sums, sums_reference, sums_example_inputs),
    Kernel(bn_act_gradient, gradient_reference, gradient_example_inputs),
)
