"""One reversible block, y1 = x1 + F(x2), y2 = x2 + y1, against everything that PyTorch has for it.

F is a pair of asymmetric convolutions, 3x1 and 1x3, each with batch norm and PReLU. The floor of a step is the
time in which a copy moves as many bytes as the kernels must: u being one stream, 9 u forward (u1 and u2 are
written and read once, x1, x2, y1, y2 once) and 20 u backward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.gpu.setup import Setup, name_of, random, rounded
from benchmarks.gpu.timing import Step, bandwidth, captured, race
from benchmarks.record import Row
from benchmarks.segmentation import using_kernels
from revseg import OneSidedCoupling, ReversibleSequence
from revseg.layers.blocks import asymmetric_pairs

UNITS = {"F forward": 6, "block forward": 9, "block step": 29}  # maps that are read or written

Streams = tuple[Tensor, Tensor]


def measure(setup: Setup, dtype: torch.dtype) -> Iterator[Row]:
    """Rows of case, way, dtype, shape, times, the fraction of the floor, and the peak of a step.

    Args:
        setup: How the part runs.
        dtype: Of streams and convolutions; batch norm is float32.
    """
    torch.backends.cudnn.allow_tf32 = True
    rate = bandwidth(setup)
    unit = torch.Size(setup.stream).numel() * dtype.itemsize
    for case, ways in (
        ("F forward", forward_ways(setup, dtype, False)),
        ("block forward", forward_ways(setup, dtype, True)),
        ("block step", step_ways(setup, dtype)),
    ):
        for way, found in race(ways, setup, memory=case == "block step").items():
            row = {"case": case, "way": way, "dtype": name_of(dtype), "shape": list(setup.stream)}
            if "ms" in found and rate:
                floor = UNITS[case] * unit / rate
                share = 1e3 * floor / found["ms"]["median"]
                row |= {"floor_ms": rounded(1e3 * floor), "of_floor": rounded(share)}
            yield row | found


def function(setup: Setup, dtype: torch.dtype) -> nn.Module:
    """F, always with the same weights."""
    torch.manual_seed(0)
    f = asymmetric_pairs(setup.stream[1], (1,)).to(setup.device, dtype)
    for module in f.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()  # as in mixed precision, and what cuDNN has kernels for
    return f


def forward_ways(setup: Setup, dtype: torch.dtype, whole: bool) -> dict[str, Step]:
    """The forward pass in training, without a graph: of F alone, or of the whole block."""
    f = function(setup, dtype)
    x1, x2 = streams(setup, dtype)
    block = OneSidedCoupling(f)

    def ours(x1: Tensor, x2: Tensor) -> object:
        return block(x1, x2) if whole else f(x2)

    def of(net: Callable[[Tensor, Tensor], object], on: bool, *inputs: Tensor) -> Step:
        @torch.no_grad()
        def step() -> object:
            with using_kernels(on):
                return net(*inputs)

        return step

    rows = x1.contiguous(), x2.contiguous()
    return {
        "revseg": of(ours, True, x1, x2),
        "eager": of(ours, False, *rows),
        "eager channels_last": of(ours, False, x1, x2),
        "compile": of(torch.compile(ours, backend=setup.compiler), False, x1, x2),
    }


def step_ways(setup: Setup, dtype: torch.dtype) -> dict[str, Step]:
    """A training step: forward, and backward from given gradients to those of streams and parameters."""
    reversible, plain = {"save_activations": False}, {"save_activations": True}
    found = {
        "revseg": training_step(setup, dtype, True, reversible),
        "revseg, activations stored": training_step(setup, dtype, True, plain),
        "eager": training_step(setup, dtype, False, plain, channels_last=False),
        "eager channels_last": training_step(setup, dtype, False, plain),
        "compile": training_step(setup, dtype, False, plain, compiled=True),
        "eager reversible": training_step(setup, dtype, False, reversible, channels_last=False),
        "eager reversible channels_last": training_step(setup, dtype, False, reversible),
    }
    if setup.device != "cpu":
        found["revseg, CUDA graph"] = _as_graph(training_step(setup, dtype, True, reversible))
        found["eager channels_last, CUDA graph"] = _as_graph(training_step(setup, dtype, False, plain))
    return found


def training_step(
    setup: Setup,
    dtype: torch.dtype,
    kernels: bool,
    options: dict[str, bool],
    channels_last: bool = True,
    compiled: bool = False,
) -> Step:
    """One way to train the block."""
    body = ReversibleSequence(copy.deepcopy(OneSidedCoupling(function(setup, dtype))), **options)  # type: ignore[arg-type]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = [each.contiguous(memory_format=layout).requires_grad_() for each in streams(setup, dtype)]
    dy = [random(setup.stream, setup, dtype, seed).contiguous(memory_format=layout) for seed in (2, 3)]
    asked = [*x, *body.parameters()]
    net = torch.compile(body, backend=setup.compiler) if compiled else body

    def step() -> object:
        with using_kernels(kernels):  # `backward` would add gradients to those of the step before
            return torch.autograd.grad(net((x[0], x[1])), asked, dy)

    return step


def streams(setup: Setup, dtype: torch.dtype) -> Streams:
    return random(setup.stream, setup, dtype, 0), random(setup.stream, setup, dtype, 1)


def _as_graph(step: Step) -> Step:
    """The step, captured when it is first called, so that a failure is that of this way alone."""
    graph: list[Step] = []

    def replay() -> object:
        if not graph:
            graph.append(captured(step))
        return graph[0]()

    return replay
