"""Side inputs: every function is called as f(x, *side), and the side inputs get their gradients."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from revseg import AdditiveCoupling, HaarDownsample, OneSidedCoupling, ReversibleSequence, Stack
from revseg.memory import saved_bytes
from tests.helpers import default_loss, gradient_error, small_f, small_input, twin

OPTIONS = [{}, {"per_block": True}, {"keep": 2}, {"exact": True}, {"exact": "lossless"}]
options = pytest.mark.parametrize("options", OPTIONS, ids=str)


class Conditioned(nn.Module):
    """A convolution, scaled by an embedding; features of another network are added."""

    def __init__(self):
        super().__init__()
        self.body, self.scale = small_f(), nn.Linear(5, 4)

    def forward(self, x, embedding, features=None, *, size=0.1):
        y = self.body(x) * self.scale(embedding)[:, :, None, None]
        return y if features is None else y + size * features["maps"][0]


def sequence(depth=2, **options):
    torch.manual_seed(0)
    blocks = [AdditiveCoupling(Conditioned(), Conditioned()) for _ in range(depth)]
    return ReversibleSequence(*blocks, OneSidedCoupling(Conditioned()), **options).double()


def side(requires_grad=True):
    embedding = small_input(2, 5, seed=1, requires_grad=requires_grad)
    return embedding, {
        "maps": [small_input(2, 4, 6, 5, seed=2, requires_grad=requires_grad)],
        "name": "features",
    }


def step(net, given, x=None, create_graph=False):
    x = small_input() if x is None else x
    tensors = [x, given[0], given[1]["maps"][0], *net.parameters()]
    loss = default_loss(net(x, *given))
    if create_graph:
        first = torch.autograd.grad(loss, [t for t in tensors if t.requires_grad], create_graph=True)
        loss = loss + sum(g.square().sum() for g in first)
    asked = [t for t in tensors if t.requires_grad]
    return dict(enumerate(torch.autograd.grad(loss, asked)))


@options
@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_are_those_of_plain_autograd(options, create_graph):
    ours = sequence(**options)
    found, expected = (step(net, side(), create_graph=create_graph) for net in (ours, twin(ours)))
    assert gradient_error(found, expected) < 1e-9


@pytest.mark.parametrize("exact", [True, "lossless"])
def test_exact_modes_are_bitwise(exact):
    ours = sequence(exact=exact)
    found, expected = (step(net, side()) for net in (ours, twin(ours)))
    assert all(torch.equal(found[i], expected[i]) for i in found)


def test_a_frozen_network_still_hands_gradients_to_side_inputs():
    ours = sequence().requires_grad_(False)
    x = small_input(requires_grad=False)
    found, expected = (step(net, side(), x) for net in (ours, twin(ours)))
    assert len(found) == 2
    assert gradient_error(found, expected) < 1e-9


@options
def test_inverse_is_given_them_too(options):
    ours = sequence(**options)
    given = side(requires_grad=False)
    x = small_input(requires_grad=False)
    assert (ours.inverse(ours(x, *given), *given) - x).abs().max() < 1e-3
    assert (ours.inverse(ours(x, *given), 2 * given[0], given[1]) - x).abs().max() > 1e-2


def test_they_are_kept_once_for_the_whole_sequence():
    embedding = torch.randn(2, 5, 1000, requires_grad=True)

    class Mean(nn.Module):
        def forward(self, x, embedding):
            return x.tanh() * embedding.mean()

    def saved(depth):
        net = ReversibleSequence([AdditiveCoupling(Mean(), Mean()) for _ in range(depth)])
        return saved_bytes(lambda: net(torch.randn(2, 8, 6, 5), embedding))

    assert saved(1) == saved(6) >= embedding.nbytes


def test_stacks_and_maps_stand_beside_functions_that_take_them():
    torch.manual_seed(0)

    class Gate(nn.Module):
        def forward(self, x, embedding):
            return x.tanh() * embedding.mean()

    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = Stack(*small_f())

        def forward(self, x, embedding):
            return self.stack(x) + embedding.mean()

    blocks = AdditiveCoupling(Inside(), Gate()), HaarDownsample(), OneSidedCoupling(Gate())
    ours, x = ReversibleSequence(*blocks).double(), small_input(2, 8, 6, 4)
    embedding = small_input(2, 5, seed=1)
    found = []
    for net in (ours, twin(ours)):
        loss = default_loss(net(x, embedding))
        found.append(dict(enumerate(torch.autograd.grad(loss, [x, embedding, *net.parameters()]))))
    assert gradient_error(*found) < 1e-9


def test_other_weights_by_functional_call():
    ours, given, x = sequence(), side(), small_input()
    weights = {name: (p.detach() * 1.1).requires_grad_() for name, p in ours.named_parameters()}
    found = []
    for net in (ours, twin(ours)):
        loss = default_loss(functional_call(net, weights, (x, *given)))
        found.append(dict(enumerate(torch.autograd.grad(loss, [given[0], *weights.values()]))))
    assert gradient_error(*found) < 1e-9


def test_a_side_input_that_is_written_to_is_an_error():
    net = ReversibleSequence(AdditiveCoupling(lambda x, e: x * e.add_(1), lambda x, e: x)).double()
    with pytest.raises(RuntimeError, match="writes to its input"):
        net(small_input(), torch.ones((), dtype=torch.float64))


def test_a_side_input_changed_before_the_backward_pass_is_an_error():
    net, embedding = sequence(), side(requires_grad=False)[0]
    loss = default_loss(net(small_input(), embedding))
    embedding.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_functions_that_take_none_say_so():
    net = ReversibleSequence(AdditiveCoupling(Stack(*small_f()), small_f())).double()
    with pytest.raises(TypeError, match="argument"):
        net(small_input(), torch.ones(1))
