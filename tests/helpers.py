"""What the tests share: small networks, their plain twins, and the comparison of one training step.

A step is right when all that it leaves behind is that of plain autograd: outputs, every gradient
(and which gradients are None), every buffer, and the random state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from revseg import (
    AdditiveCoupling,
    AffineCoupling,
    Coupling,
    OneSidedCoupling,
    Recompute,
    ReversibleSequence,
    cli,
)
from revseg.testing import plain_twin

# For tensors this small a second thread only waits, longest when tests run side by side.
torch.set_num_threads(1)

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}

modes = pytest.mark.parametrize(
    "options", [{}, {"per_block": True}, {"keep": 2}], ids=["whole", "per_block", "keep"]
)
needs_cuda = pytest.mark.needs_cuda

Loss = Callable[..., Tensor]

# Maps that torch keeps alive during a backward pass: the gradient that came, where a function cannot take it over.
HELD_BY_TORCH = 0 if hasattr(torch.autograd.Function, "boxed_grads_call") else 1


def small_f(channels: int = 4, out_channels: int | None = None) -> nn.Sequential:
    """conv 3x1, batch norm, PReLU, conv 1x3, batch norm, PReLU: the paper's F, small."""
    out = channels if out_channels is None else out_channels
    return nn.Sequential(
        nn.Conv2d(channels, channels, (3, 1), padding=(1, 0)),
        nn.BatchNorm2d(channels),
        nn.PReLU(channels),
        nn.Conv2d(channels, out, (1, 3), padding=(0, 1)),
        nn.BatchNorm2d(out),
        nn.PReLU(out),
    )


def small_block(coupling: type[Coupling] = AdditiveCoupling, channels: int = 8) -> Coupling:
    """A coupling of small functions for streams of channels / 2."""
    half = channels // 2
    if issubclass(coupling, OneSidedCoupling):
        return coupling(small_f(half))
    out = half * coupling.value_channels
    return coupling(small_f(half, out), small_f(half, out))


def small_sequence(
    coupling: type[Coupling] = AdditiveCoupling, depth: int = 3, channels: int = 8, **options: Any
) -> ReversibleSequence:
    """`depth` small blocks in double precision, the same ones at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ReversibleSequence([small_block(coupling, channels) for _ in range(depth)], **options).double()


def all_couplings(channels: int = 8, **options: Any) -> ReversibleSequence:
    """One block of each coupling, in double precision."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kinds = (AdditiveCoupling, OneSidedCoupling, AffineCoupling)
        return ReversibleSequence([small_block(kind, channels) for kind in kinds], **options).double()


def recomputed(*layers: nn.Module) -> nn.Sequential:
    """A convolution, recomputed layers, a convolution; always the same, in double precision."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inner = layers or (
            nn.Conv2d(8, 8, 1),
            nn.BatchNorm2d(8),
            nn.Tanh(),
            nn.Dropout(0.3),
            nn.Conv2d(8, 8, 3, padding=1),
        )
        outer = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)
        return nn.Sequential(outer[0], Recompute(nn.Sequential(*inner)), outer[1]).double()


def small_input(
    *shape: int, dtype: torch.dtype = torch.float64, seed: int = 0, requires_grad: bool = True
) -> Tensor:
    """Normal random numbers [2, 8, 6, 5], or of the given shape; leaves the random state alone.

    Rounded from float64, so the numbers of two dtypes are the same up to rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape or (2, 8, 6, 5), dtype=torch.float64, generator=generator)
    x = x.to(dtype)
    return x.requires_grad_() if requires_grad else x  # inside a function transform not even to False


def pair_of_inputs(requires_grad: Sequence[bool] = (True, True)) -> list[Tensor]:
    """Two streams [2, 4, 6, 5] in double precision."""
    return [small_input(2, 4, 6, 5, seed=i, requires_grad=each) for i, each in enumerate(requires_grad)]


class Through(nn.Module):
    """A module that is given a view, or another function, of its input."""

    def __init__(self, module: nn.Module, view: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.module, self.view = module, view

    def forward(self, x: Tensor) -> Any:
        return self.module(self.view(x))


twin = plain_twin  # a deep copy in which everything stores its activations


def default_loss(*outputs: Tensor) -> Tensor:
    """A scalar with another derivative in each value, the first and the second."""
    total: Any = 0.0
    for i, y in enumerate(outputs):
        weight = small_input(*y.shape, dtype=y.dtype, seed=100 + i, requires_grad=False).to(y.device)
        total = total + (weight * y).mean() + 0.1 * (y + weight).square().mean()
    return total


@dataclass
class Result:
    """What one training step leaves behind."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    random_state: Tensor | None = None


def run_step(
    module: nn.Module, x: Tensor | Sequence[Tensor], loss: Loss = default_loss, seed: int = 7
) -> Result:
    """Forward and backward once, from a fixed seed; gradients of the module are reset before.

    Args:
        module: Takes x.
        x: One tensor or several; copied with their strides, and `requires_grad` kept.
        loss: Takes the outputs, one argument each, to a scalar.
        seed: Of the global random state.
    """
    pair = not isinstance(x, Tensor)
    inputs = [each.detach().clone().requires_grad_(each.requires_grad) for each in (x if pair else [x])]
    module.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    y = module(tuple(inputs) if pair else inputs[0])
    outputs = [y] if isinstance(y, Tensor) else list(y)
    loss(*outputs).backward()
    result = Result([each.detach().clone() for each in outputs])
    result.gradients = {f"input {i}": each.grad for i, each in enumerate(inputs)}
    result.gradients |= {name: p.grad for name, p in module.named_parameters()}
    result.buffers = {name: b.detach().clone() for name, b in module.named_buffers()}
    result.random_state = torch.get_rng_state()
    return result


def gradient_error(ours: dict[str, Tensor | None], plain: dict[str, Tensor | None]) -> float:
    """The largest difference of two gradients, by the largest value of the whole plain gradient.

    By the whole: a bias in front of batch norm has a gradient of zero, of which no difference is small.
    """
    assert ours.keys() == plain.keys()
    wrong = [name for name in plain if (ours[name] is None) != (plain[name] is None)]
    assert not wrong, f"None in one of the two only: {wrong}"
    pairs = [(ours[name], expected) for name, expected in plain.items() if expected is not None]
    for a, b in pairs:
        assert a is not None
        assert a.shape == b.shape
    scale = max((b.double().abs().max().item() for _, b in pairs if b.numel()), default=0.0)
    errors = [(a.double() - b.double()).abs().max().item() for a, b in pairs if a is not None and b.numel()]
    if any(math.isnan(error) for error in errors):
        return float("nan")
    return max(errors, default=0.0) / (scale or 1.0)


def assert_same_gradients(
    ours: dict[str, Tensor | None], plain: dict[str, Tensor | None], tolerance: float = 1e-9
) -> None:
    """In float64: the same but for rounding."""
    assert gradient_error(ours, plain) <= tolerance


def assert_equal_gradients(ours: dict[str, Tensor | None], plain: dict[str, Tensor | None]) -> None:
    """The same numbers."""
    assert gradient_error(ours, plain) == 0


def relative_error(ours: dict[str, Tensor | None], exact: dict[str, Tensor | None]) -> float:
    """The length of the difference of two whole gradients by the length of the exact one."""
    assert [name for name in exact if ours[name] is None] == [name for name in exact if exact[name] is None]
    a = torch.cat([g.double().flatten() for name, g in ours.items() if g is not None])
    b = torch.cat([exact[name].double().flatten() for name, g in ours.items() if g is not None])
    return ((a - b).norm() / b.norm()).item()


def assert_same_result(ours: Result, plain: Result, tolerance: float | None = None) -> None:
    """Equal outputs, gradients (None where plain has None), buffers and random state."""
    if tolerance is None:
        tolerance = TOLERANCE[plain.outputs[0].dtype]
    assert len(ours.outputs) == len(plain.outputs)
    for a, b in zip(ours.outputs, plain.outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    error = gradient_error(ours.gradients, plain.gradients)
    assert error <= tolerance, f"gradients differ by {error:.2g} of their scale"
    assert ours.buffers.keys() == plain.buffers.keys()
    for name, buffer in plain.buffers.items():
        torch.testing.assert_close(
            ours.buffers[name], buffer, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    if ours.random_state is not None and plain.random_state is not None:
        assert torch.equal(ours.random_state, plain.random_state), "another random state is left behind"


def assert_bitwise(ours: Result, plain: Result) -> None:
    """Equal to the last bit: outputs, gradients, buffers and random state, NaN where plain has NaN."""
    exact = {"rtol": 0, "atol": 0, "equal_nan": True}
    for kind in ("gradients", "buffers"):
        mine, reference = getattr(ours, kind), getattr(plain, kind)
        assert mine.keys() == reference.keys()
        for name, expected in reference.items():
            assert (mine[name] is None) == (expected is None), name
            if expected is not None:
                torch.testing.assert_close(mine[name], expected, **exact, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(ours.outputs, plain.outputs, **exact)
    assert torch.equal(ours.random_state, plain.random_state)


def assert_same_step(
    ours: nn.Module,
    plain: nn.Module,
    x: Tensor | Sequence[Tensor],
    loss: Loss = default_loss,
    tolerance: float | None = None,
) -> tuple[Result, Result]:
    """Run one step on both and compare all that they leave behind; the two results."""
    mine, reference = run_step(ours, x, loss), run_step(plain, x, loss)
    assert_same_result(mine, reference, tolerance)
    return mine, reference


def gradients_of(module: nn.Module, **others: Tensor) -> dict[str, Tensor | None]:
    """`.grad` of every parameter, and of other tensors by name."""
    return {name: p.grad for name, p in module.named_parameters()} | {k: v.grad for k, v in others.items()}


class Averaging(Coupling):
    """A rule of a user's own: two pure functions and nothing else. Not an addition: only "lossless" undoes it exactly."""

    @classmethod
    def couple(cls, x, h):
        return 0.9 * x + 0.1 * h

    @classmethod
    def uncouple(cls, y, h):
        return (y - 0.1 * h) / 0.9


def refused(capsys, *arguments):
    """What the command line says on stderr when it refuses; how it ends differs between versions of the parser."""
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = end.code
    assert code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return " ".join(message.split())
