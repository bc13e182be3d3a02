"""Each kernel by itself, against the functions of PyTorch that it stands in for.

The floor of an operation is the time in which a copy moves the maps that the operation has to read and write,
each of `UNITS` times the size of one map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.setup import Setup, name_of, random, rounded
from benchmarks.gpu.timing import Step, bandwidth, race
from benchmarks.record import Row
from revseg import ops
from revseg.ops import asymmetric_conv, asymmetric_conv_backward

POOLS = (3, 5, 7)


class Maps(NamedTuple):
    """Arguments: maps of one layer, and its parameters."""

    x: Tensor  # [N, C, H, W]
    dz: Tensor
    vertical: Tensor  # [C, C, 3, 1]
    horizontal: Tensor
    weight: Tensor  # of batch norm, [C]
    bias: Tensor
    slope: Tensor

    @classmethod
    def of(cls, setup: Setup, dtype: torch.dtype) -> Maps:
        c = setup.stream[1]
        x, dz = (random(setup.stream, setup, dtype, seed) for seed in (0, 1))
        vertical, horizontal = (
            random((c, c, *size), setup, dtype, 2) / (3 * c) ** 0.5 for size in ((3, 1), (1, 3))
        )
        weight, bias, slope = (0.25 + random((c,), setup, torch.float32, seed).abs() for seed in (3, 4, 5))
        return cls(x, dz, vertical, horizontal, weight, bias, slope)

    def norm(self, u: Tensor) -> ops.Norm:
        return ops.Norm(*ops.batch_statistics(u), self.weight, self.bias, self.slope, 1e-3)

    def rows(self) -> Maps:
        """The same in PyTorch's default layout."""
        return Maps(*(each.contiguous() for each in self))


Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


class Operation(NamedTuple):
    """How often a map is moved; our function of the maps, PyTorch's, and what makes steps of them."""

    units: float
    ours: Callable[[Maps], Step]
    plain: Callable[[Maps, Wrap], Step]


def measure(setup: Setup, dtype: torch.dtype) -> Iterator[Row]:
    """Rows of case, way, dtype, shape, times and the fraction of the floor."""
    torch.backends.cudnn.allow_tf32 = True
    maps = Maps.of(setup, dtype)
    rate = bandwidth(setup)
    for name, operation in OPERATIONS.items():
        ways: dict[str, Step] = {}
        for way, make in (
            ("revseg", lambda o: o.ours(maps)),
            ("eager", lambda o: o.plain(maps.rows(), _as_it_is)),
            ("eager channels_last", lambda o: o.plain(maps, _as_it_is)),
            ("compile", lambda o: o.plain(maps, partial(torch.compile, backend=setup.compiler))),
        ):
            ways[way] = _made_when_called(partial(make, operation))
        floor = operation.units * maps.x.nbytes / rate if rate else 0.0
        for way, found in race(ways, setup).items():
            row: Row = {"case": name, "way": way, "dtype": name_of(dtype), "shape": list(setup.stream)}
            if "ms" in found and floor:
                share = 1e3 * floor / found["ms"]["median"]
                row |= {"floor_ms": rounded(1e3 * floor), "of_floor": rounded(share)}
            yield row | found


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _made_when_called(make: Callable[[], Step]) -> Step:
    """A step that is made by its first call, so that a failure to make it is that of this way alone."""
    made: list[Step] = []

    def step() -> object:
        if not made:
            made.append(make())
        return made[0]()

    return step


# --- PyTorch's functions -------------------------------------------------------------------------


def _activated(x: Tensor, m: Maps) -> Tensor:
    n = F.batch_norm(x, None, None, m.weight, m.bias, True, 0.0, 1e-3)
    return F.prelu(n, m.slope.to(n.dtype))


def _forward(function: Callable[[Maps], Any]) -> Callable[[Maps, Wrap], Step]:
    return lambda m, wrap: partial(torch.no_grad()(wrap(function)), m)


def _backward(
    function: Callable[[Maps], Tensor], inputs: Callable[[Maps], list[Tensor]]
) -> Callable[[Maps, Wrap], Step]:
    """The backward pass alone, of a graph that is kept."""

    def make(m: Maps, wrap: Wrap) -> Step:
        m = Maps(*(each.detach().requires_grad_() for each in m))
        y = wrap(function)(m)
        dy = m.dz.detach() if m.dz.shape == y.shape else torch.ones_like(y)
        return lambda: torch.autograd.grad(y, inputs(m), dy, retain_graph=True)

    return make


def _layer(m: Maps) -> Tensor:
    return _activated(torch.conv2d(m.x, m.horizontal, None, 1, (0, 1)), m)


def _convolved(z: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    u = torch.conv2d(z, weight, None, 1, (weight.shape[2] // 2, weight.shape[3] // 2))
    return u, *torch.var_mean(u.float(), (0, 2, 3))


def _pools(m: Maps) -> Tensor:
    x = m.x
    pools = [F.avg_pool2d(x, k, 2, k // 2, count_include_pad=False) for k in POOLS]
    return pools[0] + pools[1] + pools[2]


# --- ours ----------------------------------------------------------------------------------------


def _bn_act(m: Maps) -> Step:
    norm = m.norm(m.x)
    return lambda: ops.bn_act(m.x, norm)


def _bn_act_add(m: Maps) -> Step:
    norm = m.norm(m.x)
    return lambda: ops.bn_act_add(m.x, norm, m.dz)


def _bn_act_backward(m: Maps) -> Step:
    norm = m.norm(m.x)
    return lambda: ops.bn_act_backward(m.x, m.dz, norm, True)


def _conv_of_norm(m: Maps) -> Step:
    norm = m.norm(m.x)
    return lambda: asymmetric_conv(m.x, norm, m.horizontal, 1, True)


def _conv_backward(m: Maps) -> Step:
    norm_x = m.norm(m.x)
    u = asymmetric_conv(m.x, norm_x, m.horizontal, 1, False)[0]
    norm = m.norm(u)
    sums = ops.bn_act_sums(u, m.dz, norm)
    return lambda: asymmetric_conv_backward(u, m.dz, norm, sums, True, m.x, norm_x, m.horizontal, 1)


def _pools_backward(m: Maps) -> Step:
    dy = torch.ones_like(ops.sum_of_pools(m.x, POOLS))
    return lambda: ops.sum_of_pools_backward(dy, m.x, POOLS)


OPERATIONS = {
    "batch_statistics": Operation(
        1,
        lambda m: lambda: ops.batch_statistics(m.x),
        _forward(lambda m: torch.var_mean(m.x.float(), (0, 2, 3))),
    ),
    "bn_act": Operation(2, _bn_act, _forward(lambda m: _activated(m.x, m))),
    "bn_act_add": Operation(3, _bn_act_add, _forward(lambda m: m.dz + _activated(m.x, m))),
    "bn_act_backward": Operation(
        5,
        _bn_act_backward,
        _backward(lambda m: _activated(m.x, m), lambda m: [m.x, m.weight, m.bias, m.slope]),
    ),
    "asymmetric_conv 3x1": Operation(
        2,
        lambda m: lambda: asymmetric_conv(m.x, None, m.vertical, 1, True),
        _forward(lambda m: _convolved(m.x, m.vertical)),
    ),
    "asymmetric_conv 1x3 of bn_act": Operation(
        2, _conv_of_norm, _forward(lambda m: _convolved(_activated(m.x, m), m.horizontal))
    ),
    "asymmetric_conv_backward": Operation(
        4, _conv_backward, _backward(_layer, lambda m: [m.x, m.horizontal, m.weight, m.bias, m.slope])
    ),
    "sum_of_pools": Operation(1.25, lambda m: lambda: ops.sum_of_pools(m.x, POOLS), _forward(_pools)),
    "sum_of_pools_backward": Operation(1.25, _pools_backward, _backward(_pools, lambda m: [m.x])),
}
