"""Each update is an autograd function of its own: gradients arrive where plain autograd's would."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from revseg import AdditiveCoupling, Recompute, ReversibleSequence
from revseg.memory import peak_bytes
from tests.helpers import default_loss, gradient_error, small_input, small_sequence, twin


class Perceptron(nn.Sequential):
    def __init__(self, channels=128):
        super().__init__(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))


def test_where_gradients_stand_a_step_takes_no_more_than_plain_autograd():
    torch.manual_seed(0)
    ours = ReversibleSequence([AdditiveCoupling(Perceptron(), Perceptron()) for _ in range(6)])
    x = torch.randn(8, 256, requires_grad=True)
    peaks = []
    for net in (ours, twin(ours)):

        def step(net=net):
            net(x).square().mean().backward()

        peaks.append(peak_bytes(step, before=step))
    one = sum(p.nbytes for p in ours[0].f.parameters())
    assert peaks[0] <= peaks[1]
    assert (
        peaks[0] < 1.5 * one
    )  # of all parameters' gradients, which are twelve times one, those of one function


def test_gradients_arrive_in_the_order_of_plain_autograd():
    ours = small_sequence(depth=3)
    orders = []
    for net in (ours, twin(ours)):
        order = []
        for name, p in net.named_parameters():
            p.register_post_accumulate_grad_hook(
                lambda _, name=name, order=order: order.append(name.split(".")[1:3])
            )
        default_loss(net(small_input())).backward()
        orders.append([each for i, each in enumerate(order) if i == 0 or each != order[i - 1]])
    assert orders[0] == orders[1] == [[str(i), fn] for i in (2, 1, 0) for fn in "gf"]


@pytest.mark.parametrize("retain", [False, True])
def test_only_what_is_asked_for_is_run(retain):
    """Gradients of the last block alone: the blocks before are not undone."""
    ours = small_sequence(depth=3)
    calls = []
    for i, block in enumerate(ours):
        block.f.register_forward_hook(lambda *_, i=i: calls.append(i))
    x = small_input()
    loss, plain = default_loss(ours(x)), twin(ours)
    calls.clear()
    last = list(ours[2].parameters())
    for _ in range(2 if retain else 1):
        found = torch.autograd.grad(loss, last, retain_graph=retain)
    assert set(calls) == {2}
    expected = torch.autograd.grad(default_loss(plain(x)), list(plain[2].parameters()))
    assert gradient_error(dict(enumerate(found)), dict(enumerate(expected))) < 1e-9
    if retain:  # and the rest is still there
        loss.backward()
        assert all(p.grad is not None for p in ours.parameters())


def prompted():
    """A frozen convolution whose value an outside tensor changes, and a function to train."""
    torch.manual_seed(0)
    prompt = torch.ones(1, 4, 1, 1, requires_grad=True)
    conv = nn.Conv2d(4, 4, 1).requires_grad_(False)
    return prompt, lambda x: conv(x) + prompt, nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh())


@pytest.mark.parametrize("options", [{}, {"per_block": True}, {"keep": 2}, {"exact": "lossless"}], ids=str)
def test_a_frozen_beginning_may_use_an_outside_tensor(options):
    """What needs a gradient was asked before the beginning ran, and the outside tensor got a part of its own."""
    prompt, f, g = prompted()
    found = []
    for save in (True, False):
        net = ReversibleSequence(AdditiveCoupling(f, g), save_activations=save, **options)
        prompt.grad = None
        net(torch.ones(2, 8, 3, 3)).square().sum().backward()
        found.append({"prompt": prompt.grad})
    assert gradient_error(*found) < 1e-5


@pytest.mark.parametrize("options", [{}, {"per_block": True}, {"keep": 2}, {"exact": "lossless"}], ids=str)
def test_elsewhere_an_outside_tensor_is_an_error_also_where_nothing_else_is_asked_for(options):
    _, f, g = prompted()
    net = ReversibleSequence(AdditiveCoupling(f, g), **options)
    streams = torch.ones(2, 4, 3, 3, requires_grad=True), torch.ones(2, 4, 3, 3)  # f reads the second
    with pytest.raises(RuntimeError, match="its gradient would be lost"):
        sum(y.square().sum() for y in net(streams)).backward()


def flops(net, x):
    with FlopCounterMode(display=False) as counter:
        net(x).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("options", [{}, {"per_block": True}, {"keep": 1}, {"exact": "lossless"}], ids=str)
def test_flops_are_those_of_the_twin_and_one_more_run(options):
    """Trackers of modules hook the inputs of functions, and took a leaf among them for a parameter."""
    conv = partial(nn.Conv2d, 4, 4, 3, padding=1)
    ours = ReversibleSequence(AdditiveCoupling(conv(), conv()), AdditiveCoupling(conv(), conv()), **options)
    x = torch.randn(2, 8, 6, 5, requires_grad=True)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ours(x)
    once = counter.get_total_flops()
    again = 3 / 4 if "keep" in options else 1
    assert flops(ours, x) == flops(twin(ours), x) + again * once > 0


def test_flops_of_what_is_recomputed():
    ours, x = (
        Recompute(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())),
        torch.randn(1, 3, 4, 4, requires_grad=True),
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ours(x)
    assert flops(ours, x) == flops(twin(ours), x) + counter.get_total_flops() > 0
