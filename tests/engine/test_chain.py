"""Each update is an autograd function of its own: gradients arrive where plain autograd's would."""

import pytest
import torch
from torch import nn

from revseg import AdditiveCoupling, ReversibleSequence
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
