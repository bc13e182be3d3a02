"""The parts of a training step one by one, each beside its twin of PyTorch's functions.

A case makes two steps from the same tensors: ours and the twin's. Where the two give the same values, both return
them, and a test compares; a backward pass is that of a graph that is kept. Maps are those of a middle stage,
2 x 32 x 128 x 256 in float32 (8 MiB).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revseg import AdditiveCoupling, ReversibleSequence, ops
from revseg.exact.grid import GridRule
from revseg.exact.residue import pack, restore
from revseg.ops import asymmetric_conv

MAP, TOY = (2, 32, 128, 256), (2, 8, 24, 32)
TINY = (1, 8, 4, 4)  # of a sequence, where all is overhead
CLASSES, STRIDE, POOLS = 19, 8, (3, 5, 7)
Step = Callable[[], Any]


class Pair(NamedTuple):
    """Two steps, and whether they return the same values up to rounding."""

    ours: Step
    plain: Step
    same: bool = True


class Maps(NamedTuple):
    """A map, a gradient or second stream of its shape, and the parameters of a layer."""

    u: Tensor  # [N, C, H, W]
    dz: Tensor
    conv: Tensor  # [C, C, 3, 1]
    weight: Tensor  # [C]
    bias: Tensor
    slope: Tensor

    @classmethod
    def of(cls, shape: Sequence[int]) -> "Maps":
        generator = torch.Generator().manual_seed(0)
        c = shape[1]
        draw = partial(torch.randn, generator=generator)
        return cls(draw(shape), draw(shape), draw(c, c, 3, 1) / (3 * c) ** 0.5, *draw(3, c).abs().add(0.1))

    def norm(self) -> ops.Norm:
        return ops.Norm(*ops.batch_statistics(self.u), self.weight, self.bias, self.slope, 1e-3)

    def leaves(self) -> "Maps":
        return Maps(*(each.clone().requires_grad_() for each in self))


def _activated(m: Maps) -> Tensor:
    return F.prelu(F.batch_norm(m.u, None, None, m.weight, m.bias, True, 0.0, 1e-3), m.slope)


def bn_act(m: Maps) -> Pair:
    """Statistics and the activated map, as a training step takes them."""
    return Pair(lambda: ops.bn_act(m.u, m.norm()), lambda: _activated(m))


def bn_act_backward(m: Maps) -> Pair:
    norm, leaves = m.norm(), m.leaves()
    z = _activated(leaves)
    inputs = (leaves.u, leaves.weight, leaves.bias, leaves.slope)
    return Pair(
        lambda: ops.bn_act_backward(m.u, m.dz, norm, True),
        lambda: torch.autograd.grad(z, inputs, m.dz, retain_graph=True),
    )


def batch_statistics(m: Maps) -> Pair:
    def plain() -> tuple[Tensor, Tensor]:
        var, mean = torch.var_mean(m.u, (0, 2, 3), correction=0)
        return mean, var

    return Pair(lambda: ops.batch_statistics(m.u), plain)


def conv_of_bn_act(m: Maps) -> Pair:
    """A 3 x 1 convolution that reads a raw map, and the statistics of its own."""

    def plain() -> tuple[Tensor, Tensor, Tensor]:
        u = torch.conv2d(_activated(m), m.conv, None, 1, (1, 0))
        var, mean = torch.var_mean(u, (0, 2, 3), correction=0)
        return u, mean, var

    return Pair(lambda: asymmetric_conv(m.u, m.norm(), m.conv, 1, True), plain)


def _pools(u: Tensor) -> Tensor:
    first, *rest = (F.avg_pool2d(u, k, 2, k // 2, count_include_pad=False) for k in POOLS)
    return sum(rest, first)


def sum_of_pools(m: Maps) -> Pair:
    return Pair(lambda: ops.sum_of_pools(m.u, POOLS), lambda: _pools(m.u))


def sum_of_pools_backward(m: Maps) -> Pair:
    u = m.u.clone().requires_grad_()
    y = _pools(u)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return Pair(
        lambda: ops.sum_of_pools_backward(dy, m.u, POOLS),
        lambda: torch.autograd.grad(y, u, dy, retain_graph=True)[0],
    )


def upsample_cross_entropy(m: Maps) -> Pair:
    """The loss at 8 times the size, and the gradient of the logits."""
    logits, labels = _logits(m)

    def step(loss_of: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        loss = loss_of()
        return loss.detach(), torch.autograd.grad(loss, logits)[0]

    return Pair(
        partial(step, lambda: ops.upsample_cross_entropy(logits, labels)),
        partial(step, lambda: F.cross_entropy(_scores(logits, labels), labels.long())),
    )


def upsample_argmax(m: Maps) -> Pair:
    logits, labels = _logits(m)
    logits = logits.detach()
    return Pair(
        lambda: ops.upsample_argmax(logits, labels.shape[1:]),
        lambda: _scores(logits, labels).argmax(1).to(torch.uint8),
    )


def _logits(m: Maps) -> tuple[Tensor, Tensor]:
    """Logits [N, C, h, w], a quarter of the map in each direction, and labels [N, 8h, 8w]."""
    n, h, w = m.u.shape[0], m.u.shape[2] // 4, m.u.shape[3] // 4
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, CLASSES, (n, STRIDE * h, STRIDE * w), generator=generator, dtype=torch.uint8)
    return torch.randn(n, CLASSES, h, w, generator=generator).requires_grad_(), labels


def _scores(logits: Tensor, labels: Tensor) -> Tensor:
    return F.interpolate(logits, labels.shape[1:], mode="bilinear")


def sequence_step(m: Maps) -> Pair:
    """Forward and backward of one block on a tiny tensor: what the engine costs a block, against autograd."""
    torch.manual_seed(0)
    block = AdditiveCoupling(*(nn.Conv2d(TINY[1] // 2, TINY[1] // 2, 1) for _ in "fg"))
    x = torch.randn(TINY).requires_grad_()

    def step(net: nn.Module) -> tuple[Tensor, ...]:
        return torch.autograd.grad(net(x).sum(), [x, *block.parameters()])

    ways = (ReversibleSequence(block, save_activations=saved) for saved in (False, True))
    return Pair(*(partial(step, net) for net in ways))


def exact_add(m: Maps) -> Pair:
    """The sum x + h on the grid of `exact=True`, rounding of h included; the twin is the plain sum."""
    return Pair(lambda: GridRule().couple(m.u, m.dz), lambda: m.u + m.dz, same=False)


def exact_subtract(m: Maps) -> Pair:
    y = GridRule().couple(m.u, m.dz)
    return Pair(lambda: GridRule().uncouple(y, m.dz), lambda: y - m.dz, same=False)


def residue_pack(m: Maps) -> Pair:
    """A coupling undone, and its residue packed; the twin keeps the stream itself, as a copy."""
    y = m.u + m.dz
    return Pair(lambda: pack(m.u, y - m.dz)[0], m.u.clone, same=False)


def residue_unpack(m: Maps) -> Pair:
    """The stream restored, bit for bit; the twin undoes the update and leaves the error."""
    y = m.u + m.dz
    packed, layout = pack(m.u, y - m.dz)
    return Pair(lambda: restore(y - m.dz, packed, layout), lambda: y - m.dz)


CASES: dict[str, Callable[[Maps], Pair]] = {
    case.__name__: case
    for case in (
        bn_act,
        bn_act_backward,
        batch_statistics,
        conv_of_bn_act,
        sum_of_pools,
        sum_of_pools_backward,
        upsample_cross_entropy,
        upsample_argmax,
        sequence_step,
        exact_add,
        exact_subtract,
        residue_pack,
        residue_unpack,
    )
}
