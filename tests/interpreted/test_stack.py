"""Stacks of asymmetric convolutions through their kernels, against the modules of PyTorch."""

import copy

import pytest
import torch
from torch import Tensor, nn

from revseg import OneSidedCoupling, ReversibleSequence, ops
from revseg.kernels.asymmetric_conv import gpu
from revseg.layers.blocks import asymmetric_pairs
from revseg.layers.stack import Stack
from tests.helpers import Result, relative_error, run_step, small_input
from tests.layers.stack_twins import layer, stirred

F32 = torch.float32


@pytest.fixture(autouse=True)
def _large_tiles(monkeypatch):
    """The interpreter takes as long for a large tile as for a small one."""
    monkeypatch.setattr(gpu, "tile_size", lambda vertical, channels_last: (8, 16))


@pytest.fixture
def calls(monkeypatch):
    """The operations that ran, and for a convolution whether it took statistics."""
    seen = []

    def counted(name, run):
        def call(*args):
            seen.append((name, args[-1]) if name == "asymmetric_conv" else name)
            return run(*args)

        return call

    for name in ("asymmetric_conv", "asymmetric_conv_backward", "batch_statistics", "bn_act_sums"):
        monkeypatch.setattr(ops, name, counted(name, getattr(ops, name)))
    return seen


def modules_alone(monkeypatch, module: nn.Module, x: Tensor) -> tuple[Result, Result]:
    """A step without kernels, and one in float64."""
    with monkeypatch.context() as patch:
        patch.setenv("REVSEG_KERNELS", "0")
        plain = run_step(copy.deepcopy(module), x)
        exact = run_step(copy.deepcopy(module).double(), x.double().detach().requires_grad_(x.requires_grad))
    return plain, exact


def assert_near(found: Result, plain: Result, exact: Result) -> None:
    """At most twice the error of the modules: outputs, gradients, buffers."""
    for kind in ("outputs", "gradients", "buffers"):
        mine, theirs, truth = (
            dict(enumerate(r.outputs)) if kind == "outputs" else getattr(r, kind)
            for r in (found, plain, exact)
        )
        error, allowed = relative_error(mine, truth), 2 * relative_error(theirs, truth)
        assert error <= allowed, f"{kind}: {error:.2g}, of {allowed:.2g}"


STACKS = {
    "two pairs": lambda: [asymmetric_pairs(8, (1, 3))],
    "others between": lambda: [layer(8, 8, (3, 1)), layer(8, 12, 3), layer(12, 12, (1, 5), dilation=2), layer(12, 12, (1, 3), stride=2)],
    "one slope": lambda: [asymmetric_pairs(8, (2,), activation="prelu_shared")],
}  # fmt: skip


@pytest.mark.parametrize("kind", STACKS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("train", [True, False])
def test_makes_at_most_twice_the_error_of_its_modules(monkeypatch, calls, kind, layout, train):
    stack = stirred(Stack(*STACKS[kind]())).train(train)
    x = small_input(1, 8, 9, 15, dtype=F32).detach().contiguous(memory_format=layout).requires_grad_()
    plain, exact = modules_alone(monkeypatch, stack, x)
    assert not calls
    assert_near(run_step(stack, x), plain, exact)
    assert (
        calls.count("asymmetric_conv_backward") == {"two pairs": 4, "others between": 2, "one slope": 2}[kind]
    )


def test_statistics_and_sums_take_no_pass_of_their_own_but_for_the_last_layer(calls):
    stack = asymmetric_pairs(8, (1, 2))
    run_step(stack, small_input(1, 8, 5, 7, dtype=F32))
    assert calls == [("asymmetric_conv", True)] * 4 + ["bn_act_sums"] + ["asymmetric_conv_backward"] * 4


@pytest.mark.parametrize("train", [True, False])
def test_without_gradients_the_numbers_are_the_same(train):
    stack = stirred(Stack(layer(8, 8, (3, 1)), layer(8, 8, (1, 3)), layer(8, 8), layer(8, 8, (3, 1)))).train(
        train
    )
    x = small_input(1, 8, 5, 7, dtype=F32, requires_grad=False)
    given = x.clone()
    with torch.no_grad():
        y = copy.deepcopy(stack)(x)
    assert torch.equal(y, stack(x))
    assert torch.equal(x, given)


@pytest.mark.parametrize("frozen", ["input", "convolutions", "norms", "first"])
def test_frozen_parts_get_no_gradient_and_others_theirs(monkeypatch, frozen):
    stack = stirred(asymmetric_pairs(8, (1,)))
    for name, p in stack.named_parameters():
        chosen = {"convolutions": p.ndim == 4, "norms": ".1." in name, "first": name.startswith("0.0")}
        p.requires_grad_(not chosen.get(frozen, False))
    x = small_input(1, 8, 9, 15, dtype=F32, requires_grad=frozen != "input")
    plain, exact = modules_alone(monkeypatch, stack, x)
    assert_near(run_step(stack, x), plain, exact)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_reversible_sequence_of_them(monkeypatch, calls, layout):
    body = ReversibleSequence([OneSidedCoupling(stirred(asymmetric_pairs(8, (1, 2)))) for _ in range(2)])
    x = small_input(1, 16, 9, 15, dtype=F32).detach().contiguous(memory_format=layout).requires_grad_()
    plain, exact = modules_alone(monkeypatch, body, x)
    calls.clear()
    assert_near(run_step(body, x), plain, exact)
    convolutions = [call[1] for call in calls if call[0] == "asymmetric_conv"]
    assert convolutions == [True] * 8 + [False] * 8  # the second run remembers the statistics
    assert "batch_statistics" not in calls


def test_autocast_lowers_what_a_convolution_reads(monkeypatch, calls):
    body = ReversibleSequence(OneSidedCoupling(stirred(asymmetric_pairs(8, (1,)))))

    class Autocast(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == F32):
                return self.module(x)

    x = small_input(1, 16, 9, 15, dtype=F32)
    plain, exact = modules_alone(monkeypatch, Autocast(body), x)
    assert_near(run_step(Autocast(body), x), plain, exact)
    assert calls.count("asymmetric_conv_backward") == 2
