"""What the tests of single networks share: counts, levels, and plain twins with official names."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from revseg.models import load_official
from tests.helpers import assert_same_result, run_step


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def gflops(make: Callable[[], nn.Module], height: int = 1024, width: int = 2048) -> float:
    """Billions of operations for one image, two a multiply-add, of convolutions and matrix products."""
    with torch.device("meta"):
        model = make().eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, height, width, device="meta"))
    return counter.get_total_flops() / 1e9


def images(*size: int, n: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, *size), dtype=torch.uint8, generator=generator)


def by_state_names(result):
    """A result with the names of the state dict, in which no wrapper shows."""
    for values in (result.gradients, result.buffers):
        for name in list(values):
            values[name.replace("module.", "")] = values.pop(name)
    return result


def step(model: nn.Module, x: Tensor):
    return by_state_names(run_step(model, x))


def from_seed(make: Callable[..., nn.Module], **options: object) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(**options)


def assert_levels_agree(make: Callable[..., nn.Module], x: Tensor, **options: object) -> None:
    """Outputs and buffers bitwise, gradients in float64, and the names, at every level."""
    fastest = from_seed(make, memory="fastest", **options)
    reference, exact = step(fastest, x), step(from_seed(make, memory="fastest", **options).double(), x)
    for level in ("balanced", "lowest"):
        model = from_seed(make, memory=level, **options)
        assert list(model.state_dict()) == list(fastest.state_dict())
        found = step(model, x)
        assert torch.equal(found.outputs[0], reference.outputs[0])
        for name, value in reference.buffers.items():
            assert torch.equal(found.buffers[name], value), name
        assert_same_result(step(from_seed(make, memory=level, **options).double(), x), exact, 1e-9)
        fastest.load_state_dict(model.state_dict())


def assert_modules_agree(make: Callable[..., nn.Module], x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of the fused layers is one of PyTorch's own modules, in float64."""
    ours = step(from_seed(make, memory="fastest").double(), x)
    monkeypatch.setenv("REVSEG_KERNELS", "0")
    assert_same_result(ours, step(from_seed(make, memory="fastest").double(), x), 1e-9)


def assert_official(model: nn.Module, twin: nn.Module, x: Tensor, prefix: str = "") -> None:
    """With the weights of the twin, which has the official names, the model computes what that computes.

    Outputs, running statistics and gradients of a training step, in float64, x at stride 1.
    """
    model, twin = model.double(), twin.double()
    for bn in (m for m in twin.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(bn.weight, 1, 0.2), nn.init.normal_(bn.bias), nn.init.normal_(bn.running_mean)
        nn.init.uniform_(bn.running_var, 0.5, 2)
    load_official(model, {f"{prefix}{name}": value for name, value in twin.state_dict().items()})
    torch.testing.assert_close(model.eval()(x), twin.eval()(x))
    ours, theirs = step(model.train(), x), run_step(twin.train(), x)
    torch.testing.assert_close(ours.outputs, theirs.outputs)
    translate = type(model).from_official
    for kind in ("gradients", "buffers"):
        mine, expected = getattr(ours, kind), getattr(theirs, kind)
        torch.testing.assert_close(mine.pop("input 0", None), expected.pop("input 0", None))
        torch.testing.assert_close(mine, translate(expected))
