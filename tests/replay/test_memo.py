"""Results noted in a first run and handed out in a second; batch statistics are the reason."""

import threading

import pytest
import torch
from torch import nn

from revseg import AdditiveCoupling, Recompute, ReversibleSequence, ops
from revseg.layers.blocks import asymmetric_pairs
from revseg.models.policy import MEMORY_LEVELS
from revseg.models.vnet import VNet
from revseg.replay.memo import noting, remember, reminding
from tests.helpers import assert_same_step, default_loss, small_input, twin


class Counter:
    """Makes 0, 1, 2, …; `made` is how many."""

    def __init__(self):
        self.made = 0

    def __call__(self):
        self.made += 1
        return self.made - 1


def test_outside_of_runs_it_makes():
    make = Counter()
    assert [remember(make), remember(make)] == [0, 1]


def test_a_second_run_is_handed_the_results_in_order():
    make = Counter()
    with noting() as results:
        first = [remember(make) for _ in range(3)]
    with reminding(results):
        assert [remember(make) for _ in range(3)] == first == [0, 1, 2]
    with reminding(results):  # a third run, as with a kept graph
        assert [remember(make) for _ in range(3)] == first
    assert make.made == 3
    assert remember(make) == 3


def test_a_result_of_none_is_a_result():
    calls = []
    with noting() as results:
        remember(lambda: calls.append(1))
    with reminding(results):
        assert remember(lambda: calls.append(1)) is None
    assert calls == [1]


def test_more_calls_in_the_second_run_make_their_own():
    make = Counter()
    with noting() as results:
        remember(make)
    with reminding(results):
        assert [remember(make) for _ in range(3)] == [0, 1, 2]
    assert results == [0]


def test_a_run_inside_of_a_run():
    """An inner first run is part of the outer one, and of its second run."""
    make = Counter()

    def outer():
        a = remember(make)
        with noting() as inner:
            b = [remember(make), remember(make)]
        return [a, *b, remember(make)], inner

    with noting() as results:
        values, inner = outer()
    assert values == results == [0, 1, 2, 3]
    assert inner == [1, 2]
    with reminding(results):
        again, inner_again = outer()
        with reminding(inner_again):  # the inner function's own second run
            assert [remember(make), remember(make)] == [1, 2]
        assert remember(make) == make.made - 1
    assert again == values
    assert inner_again == inner
    assert make.made == 5


@pytest.mark.parametrize("context", [noting, lambda: reminding([7])])
def test_an_exception_leaves_no_run_behind(context):
    make = Counter()

    def inner():
        with context():
            raise ZeroDivisionError

    with noting() as results:
        with pytest.raises(ZeroDivisionError):
            inner()
        assert remember(make) == 0
    with pytest.raises(ZeroDivisionError):
        inner()
    assert remember(make) == 1
    assert results == [0]


def test_threads_do_not_see_the_runs_of_others():
    make, found = Counter(), []
    with reminding([7]):
        thread = threading.Thread(target=lambda: found.append(remember(make)))
        thread.start()
        thread.join()
        assert remember(make) == 7
    assert found == [0]


@pytest.fixture
def computed(monkeypatch):
    """The shapes of maps whose statistics were computed."""
    seen = []

    def counted(u):
        seen.append(tuple(u.shape))
        return original(u)

    original = ops.batch_statistics
    monkeypatch.setattr(ops, "batch_statistics", counted)
    return seen


def again(pair):
    return Recompute(pair)


NETS = {
    "sequence": lambda: ReversibleSequence(*(AdditiveCoupling(pairs(), pairs()) for _ in range(2))),
    "per block": lambda: ReversibleSequence(AdditiveCoupling(pairs(), pairs()), per_block=True),
    "recompute": lambda: Recompute(asymmetric_pairs(8, (1, 2))),
    "nested": lambda: Recompute(nn.Sequential(Recompute(asymmetric_pairs(8, (1,), wrap=again)))),
    "recompute inside": lambda: ReversibleSequence(AdditiveCoupling(pairs(wrap=again), pairs(wrap=again))),
    "sequence inside": lambda: Recompute(ReversibleSequence(AdditiveCoupling(pairs(wrap=again), pairs()))),
    "exact": lambda: ReversibleSequence(AdditiveCoupling(pairs(), pairs()), exact=True),
    "lossless": lambda: ReversibleSequence(AdditiveCoupling(pairs(), pairs()), exact="lossless"),
}


def pairs(**options):
    return asymmetric_pairs(4, (1,), **options)


@pytest.mark.parametrize("kind", NETS)
def test_statistics_are_computed_once_a_step(kind, computed):
    net = NETS[kind]()
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for step in (1, 2):
        computed.clear()
        default_loss(net(small_input(dtype=torch.float32))).backward()
        assert len(computed) == len(norms)
        assert [int(m.num_batches_tracked) for m in norms] == [step] * len(norms)


@pytest.mark.parametrize("kind", [kind for kind in NETS if kind not in ("exact", "lossless")])
def test_a_step_is_that_of_the_plain_twin(kind):
    net = NETS[kind]().double()
    assert_same_step(net, twin(net), small_input())


@pytest.mark.parametrize("memory", MEMORY_LEVELS)
def test_statistics_of_a_network_are_computed_once_a_step(memory, computed):
    net = VNet(num_classes=2, widths=(4, 8, 16), memory=memory)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    net(torch.zeros(2, 3, 33, 49)).square().mean().backward()
    assert len(computed) == len(norms)
    assert all(m.num_batches_tracked == 1 for m in norms)
    computed.clear()
    net.eval()(torch.zeros(2, 3, 33, 49)).square().mean().backward()
    assert computed == []


def test_the_second_run_uses_the_statistics_of_the_first(monkeypatch):
    """And asks for no others."""
    net = ReversibleSequence(AdditiveCoupling(pairs(), pairs()))
    z = net(small_input(dtype=torch.float32))
    monkeypatch.setattr(ops, "batch_statistics", lambda u: 1 / 0)
    default_loss(z).backward()
    assert all(p.grad is not None for p in net.parameters())
