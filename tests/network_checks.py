"""What the tests of the networks share: counts, memory levels, and twins under official names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from revseg.levels import MEMORY_LEVELS
from revseg.memory import saved_bytes
from revseg.models import load_official
from tests.helpers import Result, assert_same_result, run_step

Make = Callable[..., Any]  # takes hyperparameters, gives a network


def parameters_of(make: Make, **options: Any) -> int:
    """How many parameters, without making any."""
    with torch.device("meta"):
        return sum(p.numel() for p in make(**options).parameters())


def gflops_of(make: Make, **options: Any) -> float:
    """10^9 operations, two per multiply-add, of one image of 1024 x 2048 in evaluation."""
    with torch.device("meta"):
        network, image = make(**options).eval(), torch.empty(1, 3, 1024, 2048)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image)
    return counter.get_total_flops() / 1e9


def some_images(*size: int, n: int = 2) -> Tensor:
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


def step_of(network: nn.Module, x: Tensor) -> Result:
    """One training step, by the names of the state dict, in which no wrapper shows."""
    result = run_step(network, x)
    for values in (result.gradients, result.buffers):
        for name in list(values):
            values[name.replace("module.", "")] = values.pop(name)
    return result


def assert_levels_agree(make: Make, size: tuple[int, int], n: int = 2, **options: Any) -> None:
    """The same state dict, outputs and buffers to the bit, and gradients in float64, at all levels."""
    x = some_images(*size, n=n)
    fastest = made(make, memory="fastest", **options)
    names = list(fastest.state_dict())
    expected = step_of(fastest, x)
    exact = step_of(made(make, memory="fastest", **options).double(), x)
    fastest.eval()
    for memory in ("balanced", "lowest"):
        other = made(make, memory=memory, **options)
        assert list(other.state_dict()) == names
        found = step_of(other, x)
        assert all(torch.equal(a, b) for a, b in zip(found.outputs, expected.outputs, strict=True))
        assert all(torch.equal(found.buffers[name], value) for name, value in expected.buffers.items())
        other.eval()
        with torch.no_grad():
            assert torch.equal(other(x), fastest(x))
        assert_same_result(step_of(made(make, memory=memory, **options).double(), x), exact, 1e-9)


def assert_levels_keep_less(make: Make, **options: Any) -> None:
    """Between forward and backward pass each level keeps less than the one before."""

    def kept(memory: str) -> int:
        with torch.device("meta"):
            network = make(memory=memory, **options)
            images = torch.empty(1, 3, 256, 512, dtype=torch.uint8)
        return saved_bytes(lambda: network(images))

    lowest, balanced, fastest = map(kept, MEMORY_LEVELS)
    assert lowest < balanced < 0.7 * fastest


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
    ours, plain = step_of(network, x), official_step(x)
    network, official, x = network.double(), official.double(), x.double()
    load_official(network, official.state_dict())
    found = step_of(network, x)
    exact = official_step(x)
    assert_same_result(found, exact, 1e-9)
    assert _output_error(ours, exact) <= 2 * _output_error(plain, exact)
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(x), official.eval()(x), rtol=1e-9, atol=1e-9)


def _output_error(ours: Result, exact: Result) -> float:
    pairs = zip(ours.outputs, exact.outputs, strict=True)
    return float(sum((a.double() - b).square().sum() for a, b in pairs)) ** 0.5
