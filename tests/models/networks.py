"""What the tests of the networks share: counts, memory levels, and plain twins under official names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from revseg.layers.images import IMAGENET
from revseg.losses import UpsampleCrossEntropy
from revseg.memory import peak_bytes
from revseg.models import load_official
from tests.helpers import Result, assert_same_result, run_step

Make = Callable[..., Any]  # takes hyperparameters, gives a network


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def count_of(make: Make, **options: Any) -> int:
    """How many parameters, without making any."""
    with torch.device("meta"):
        return count(make(**options))


def gflops(make: Make, **options: Any) -> float:
    """10^9 operations, two per multiply-add, of one image of 1024 x 2048 in evaluation; found without any values."""
    with torch.device("meta"):
        network, image = make(**options).eval(), torch.empty(1, 3, 1024, 2048)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image)
    return counter.get_total_flops() / 1e9


def peak(model: nn.Module, size: tuple[int, int] = (128, 128), n: int = 2) -> int:
    """The most bytes that a training step allocates at one time, beside parameters and gradients."""
    x = images(*size, n=n)
    labels = torch.randint(0, 2, (n, *size), dtype=torch.uint8)
    criterion = UpsampleCrossEntropy()

    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # else the gradients would count, which no level saves

    def step() -> None:
        criterion(model(x), labels).backward()

    return peak_bytes(step, before=step)  # the first one tries the compiled loops of the CPU, a map more


def images(*size: int, n: int = 2) -> Tensor:
    """The same random bytes at each call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, *size), dtype=torch.uint8, generator=generator)


def made(make: Make, **options: Any) -> Any:
    """A network from one seed, whose batch norms are not at their simple initial values."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = make(**options)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
    return network


def by_state_names(result: Result) -> Result:
    """A result with the names of the state dict, in which no wrapper shows."""
    for values in (result.gradients, result.buffers):
        for name in list(values):
            values[name.replace("module.", "")] = values.pop(name)
    return result


def step(network: nn.Module, x: Tensor) -> Result:
    """One training step, by the names of the state dict."""
    return by_state_names(run_step(network, x))


def assert_modules_agree(make: Make, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of the fused layers is one of PyTorch's own modules, in float64."""
    ours = step(made(make, memory="fastest").double(), x)
    monkeypatch.setenv("REVSEG_KERNELS", "0")
    assert_same_result(ours, step(made(make, memory="fastest").double(), x), 1e-9)


def assert_official(model: nn.Module, twin: nn.Module, x: Tensor, prefix: str = "") -> None:
    """With the weights of the twin, which has the official names, the model computes what that computes.

    Outputs, running statistics and gradients of a training step, in float64, x at stride 1.
    """
    model, twin = model.double(), twin.double()
    for bn in (m for m in twin.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(bn.weight, 1, 0.2), nn.init.normal_(bn.bias), nn.init.normal_(bn.running_mean)
        nn.init.uniform_(bn.running_var, 0.5, 2)
    load_official(model, {f"{prefix}{name}": value for name, value in twin.state_dict().items()}, IMAGENET)
    torch.testing.assert_close(model.eval()(x), twin.eval()(x))
    ours, theirs = step(model.train(), x), run_step(twin.train(), x)
    torch.testing.assert_close(ours.outputs, theirs.outputs)
    translate = type(model).from_official
    for kind in ("gradients", "buffers"):
        mine, expected = getattr(ours, kind), getattr(theirs, kind)
        torch.testing.assert_close(mine.pop("input 0", None), expected.pop("input 0", None))
        torch.testing.assert_close(mine, translate(expected))


def assert_same_as_official(network: nn.Module, official: nn.Module, size: tuple[int, int]) -> None:
    """A step is that of a plain network under official names whose weights are loaded.

    In float64 to the last digits. In float32 the outputs are at most twice as far from that as those
    of the plain network; gradients would say little, as each ReLU that rounding flips moves them more
    than all other rounding.

    Args:
        network: Its class has a `from_official`.
        official: Plain PyTorch modules named as in the official code; in training it returns what
            `network` does.
        size: Height and width of the images.
    """
    rename: Callable[[Any], Any] = type(network).from_official  # type: ignore[attr-defined]

    def official_step(x: Tensor) -> Result:
        result = run_step(official, x)
        of_input = {"input 0": result.gradients.pop("input 0")}
        result.gradients, result.buffers = of_input | rename(result.gradients), rename(result.buffers)
        return result

    load_official(network, {f"module.{name}": value for name, value in official.state_dict().items()})
    x = torch.randn(2, 3, *size)
    ours, plain = step(network, x), official_step(x)
    network, official, x = network.double(), official.double(), x.double()
    load_official(network, official.state_dict())
    found = step(network, x)
    exact = official_step(x)
    assert_same_result(found, exact, 1e-9)
    assert _output_error(ours, exact) <= 2 * _output_error(plain, exact)
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(x), official.eval()(x), rtol=1e-9, atol=1e-9)


def _output_error(ours: Result, exact: Result) -> float:
    pairs = zip(ours.outputs, exact.outputs, strict=True)
    return float(sum((a.double() - b).square().sum() for a, b in pairs)) ** 0.5
