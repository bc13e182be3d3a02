"""`Recompute` as a module: state dicts, copies, modes, exceptions, nesting.

The number in a comment is the line of the list of failures the tests were written from.
"""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from revseg import AdditiveCoupling, Recompute, ReversibleSequence, is_recomputing
from tests.helpers import (
    assert_same_step,
    default_loss,
    gradient_error,
    gradients_of,
    recomputed,
    small_f,
    small_input,
    small_sequence,
    twin,
)


def test_state_dicts_are_those_without_the_wrapper():  # 80
    plain = nn.Sequential(nn.Conv2d(8, 8, 1), small_f(8))
    torch.manual_seed(9)
    net = nn.Sequential(nn.Conv2d(8, 8, 1), Recompute(Recompute(copy.deepcopy(plain[1]).apply(shaken))))
    assert list(net.state_dict()) == list(plain.state_dict())
    net.load_state_dict(plain.state_dict())
    for name, value in plain.state_dict().items():
        assert torch.equal(net.state_dict()[name], value), name
    with pytest.raises(RuntimeError, match="Missing key"):
        net.load_state_dict({})
    wrong = plain.state_dict() | {"1.stray": torch.zeros(())}
    with pytest.raises(RuntimeError, match="Unexpected key"):
        net.load_state_dict(wrong)
    single = Recompute(nn.Conv2d(8, 8, 1))
    single.load_state_dict(plain[0].state_dict())
    assert torch.equal(single.module.weight, plain[0].weight)


def shaken(module):
    for p in module.parameters(recurse=False):
        p.data.add_(1)


def by_pickle(net):
    return pickle.loads(pickle.dumps(net))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle])
def test_copies_are_complete_and_leave_a_live_graph_alone(duplicate):  # 89
    net = recomputed(small_f(8), nn.Dropout(0.3))
    x = small_input()
    loss = default_loss(net(x))
    other = duplicate(net)
    assert_same_step(other, twin(other), small_input(), tolerance=0.0)
    assert other.state_dict().keys() == net.state_dict().keys()
    loss.backward()
    assert x.grad is not None


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_lazy_modules_take_shape_in_the_first_run():  # 75
    torch.manual_seed(0)
    net = nn.Sequential(Recompute(nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())))
    x = small_input(dtype=torch.float32)
    default_loss(net(x)).backward()
    assert net[0].module[0].weight.grad is not None
    assert_same_step(net, twin(net), x, tolerance=0.0)


def test_the_second_run_is_in_the_mode_of_the_first():  # 76, 77
    net = recomputed()
    results = []
    for module in (net, twin(net)):
        x = small_input()
        torch.manual_seed(0)
        loss = default_loss(module(x))
        module.eval()
        module(small_input(seed=3))
        torch.manual_seed(5)
        loss.backward()
        assert not any(m.training for m in module.modules())
        results.append(gradients_of(module, x=x))
    assert gradient_error(*results) == 0


def test_an_exception_in_the_second_run_leaves_no_trace():  # 78
    class Fails(nn.Module):
        armed = False

        def forward(self, x):
            if is_recomputing() and Fails.armed:
                raise KeyboardInterrupt
            return x * torch.rand(())

    net = recomputed(nn.BatchNorm2d(8), Fails(), nn.Conv2d(8, 8, 1))
    x = small_input()
    torch.manual_seed(0)
    loss = default_loss(net(x))
    before = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    Fails.armed = True
    with pytest.raises(KeyboardInterrupt):
        loss.backward(retain_graph=True)
    Fails.armed = False
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[0][name]), name
    assert torch.equal(torch.get_rng_state(), before[1])
    assert net[1].module[0].weight.grad is None


# --- nesting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"keep": 1}, {"per_block": True}], ids=str)
def test_inside_the_functions_of_a_sequence(options):  # 53
    torch.manual_seed(0)
    f, g = (Recompute(nn.Sequential(small_f(4), nn.Dropout(0.3))) for _ in range(2))
    net = ReversibleSequence(AdditiveCoupling(f, g), AdditiveCoupling(g, small_f(4)), **options).double()
    assert_same_step(net, twin(net), small_input())


def test_around_a_sequence_and_around_itself():  # 53
    assert_same_step(net := recomputed(small_sequence(), Recompute(small_f(8))), twin(net), small_input())


def test_a_module_used_twice_and_parameters_shared_with_the_outside():  # 38
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Recompute(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Tanh()))

        def forward(self, x):
            y = self.inner(self.inner(x))
            return F.conv2d(y, self.inner.module[0].weight)

    torch.manual_seed(0)
    net = Twice().double()
    assert_same_step(net, twin(net), small_input(), tolerance=1e-13)


class Named(nn.Module):
    """Whose part is called as that of a `Recompute`."""

    def __init__(self):
        super().__init__()
        self.module, self.weight = nn.Linear(3, 3), nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return self.module(x) * self.weight


NETWORKS = {
    "one": lambda: Recompute(nn.Conv2d(3, 3, 1)),
    "in a row": lambda: nn.Sequential(Recompute(nn.Conv2d(3, 3, 1)), nn.Conv2d(3, 3, 1)),
    "with buffers": lambda: nn.Sequential(Recompute(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))),
    "inside of itself": lambda: Recompute(nn.Sequential(Recompute(nn.Conv2d(3, 3, 1)), nn.PReLU())),
    "a part called module": lambda: nn.Sequential(Recompute(Named())),
    "around a part called module": lambda: Recompute(Recompute(Named())),
}  # fmt: skip


@pytest.mark.parametrize("kind", NETWORKS)
def test_parameters_by_their_names_can_be_loaded(kind):
    """As a moving average saves them that was written by hand; they were skipped."""
    net = NETWORKS[kind]()
    saved = {
        name: torch.full_like(t, i)
        for i, (name, t) in enumerate([*net.named_parameters(), *net.named_buffers()])
    }
    assert not any(net.load_state_dict(dict(saved)))
    for name, t in [*net.named_parameters(), *net.named_buffers()]:
        assert torch.equal(t, saved[name])
    twin = NETWORKS[kind]()
    twin.load_state_dict(net.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), net.parameters(), strict=True))


def test_names_that_fit_nothing_are_reported():
    net = nn.Sequential(Recompute(nn.Linear(3, 3)))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        net.load_state_dict({**net.state_dict(), "0.other": torch.zeros(1)})
