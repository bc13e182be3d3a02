"""Functions that give their gradients themselves, in the place of a second run with a graph."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from revseg import AdditiveCoupling, AffineCoupling, OneSidedCoupling, ReversibleSequence, Stack
from revseg.replay.call import Call
from tests.exact.twins import assert_exact
from tests.helpers import (
    assert_bitwise,
    assert_same_result,
    assert_same_step,
    default_loss,
    gradient_error,
    modes,
    run_step,
    small_f,
    small_input,
    twin,
)
from tests.layers.stack_twins import layer, stirred

COUPLINGS = [AdditiveCoupling, OneSidedCoupling, AffineCoupling]
couplings = pytest.mark.parametrize("coupling", COUPLINGS)


class Again(nn.Sequential):
    """A stack that is run again with a graph."""

    def __init__(self, stack):
        super().__init__(stack)

    def forward(self, x):
        return self[0](x)


def stack(out_channels=4):
    return stirred(Stack(*small_f(4, out_channels)))


def block_of(coupling):
    if coupling is OneSidedCoupling:
        return coupling(stack())
    return coupling(stack(4 * coupling.value_channels), stack(4 * coupling.value_channels))


def sequence(coupling=AdditiveCoupling, depth=3, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ReversibleSequence([block_of(coupling) for _ in range(depth)], **options).double()


@pytest.fixture
def graphs(monkeypatch):
    """The functions that were run again with a graph."""
    found = []
    rerun = Call.rerun

    def counted(self, *args, **kwargs):
        found.append(self.fn)
        return rerun(self, *args, **kwargs)

    monkeypatch.setattr(Call, "rerun", counted)
    return found


@couplings
@modes
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_a_step_is_that_of_plain_autograd(coupling, options, train, graphs):
    ours = sequence(coupling, **options).train(train)
    assert_same_step(ours, twin(ours), small_input())
    assert graphs == []


@couplings
def test_bits_are_those_of_a_run_with_a_graph(coupling, graphs):
    ours = sequence(coupling)
    graphed = copy.deepcopy(ours)
    for block in graphed:
        for name in ("f", "g"):
            if isinstance(getattr(block, name, None), Stack):
                setattr(block, name, Again(getattr(block, name)))
    mine = run_step(ours, small_input())
    assert graphs == []
    theirs = run_step(graphed, small_input())
    assert graphs
    for each in (theirs.gradients, theirs.buffers):
        for name in list(each):
            each[name.replace("f.0.", "f.").replace("g.0.", "g.")] = each.pop(name)
    assert_bitwise(mine, theirs)


@pytest.mark.parametrize("exact", [True, "lossless"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_exact_modes_stay_exact(exact, dtype, graphs):
    couplings = COUPLINGS[:2] if exact is True else COUPLINGS
    x = small_input(2, 8, 6, 5, dtype=torch.float32)
    assert_exact([block_of(each) for each in couplings], x, exact, dtype)
    assert graphs == []


@couplings
def test_under_autocast_and_a_backward_pass_outside_of_it(coupling, graphs):
    ours = sequence(coupling).float()
    plain = twin(ours)
    for backward_inside in (False, True):
        gradients = []
        for net in (ours, plain):
            net.zero_grad()
            x = small_input(dtype=torch.float32)
            with torch.autocast("cpu", torch.bfloat16):
                y = net(x)
            with torch.autocast("cpu", torch.float16, enabled=backward_inside):
                default_loss(y).backward()
            gradients.append({"x": x.grad} | {name: p.grad for name, p in net.named_parameters()})
        assert gradient_error(*gradients) < 2e-2
    assert graphs == []


def test_frozen_parts_and_inputs_get_no_gradients():
    ours = sequence()
    for p in [*ours[1].f.parameters(), ours[0].g[0].weight, ours[2].g[2].weight]:
        p.requires_grad_(False)
    assert_same_step(ours, twin(ours), small_input())
    assert_same_step(ours, twin(ours), small_input(requires_grad=False))
    assert ours[1].f[0].weight.grad is None


def test_a_parameter_in_several_places_gets_the_sum():
    ours = sequence()
    ours[0].f[3].bias = ours[0].f[0].bias  # twice in one function
    ours[1].f = ours[0].f  # one function twice
    ours[2].g[2].weight = ours[0].g[2].weight  # in two functions
    assert_same_step(ours, twin(ours), small_input())


def test_gradients_of_the_gradient():
    ours = sequence(depth=2)
    found = []
    for net in (ours, twin(ours)):
        x = small_input()
        inputs = [x, *net.parameters()]
        first = torch.autograd.grad(default_loss(net(x)), inputs, create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        second = torch.autograd.grad(penalty, inputs, allow_unused=True)
        found.append(dict(enumerate(second)))
    assert gradient_error(*found) < 1e-8


def test_a_second_backward_pass_finds_the_same():
    ours, x = sequence(), small_input()
    loss = default_loss(ours(x))
    a, b = (torch.autograd.grad(loss, [x, *ours.parameters()], retain_graph=True) for _ in range(2))
    assert all(torch.equal(i, j) for i, j in zip(a, b, strict=True))


def test_other_weights_by_functional_call():
    ours, x = sequence(), small_input()
    weights = {name: (p.detach() * 1.1).requires_grad_() for name, p in ours.named_parameters()}
    found = []
    for net in (ours, twin(ours)):
        loss = default_loss(functional_call(net, weights, (x,)))
        found.append(dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True)))
    assert gradient_error(*found) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_happens_between_the_passes_changes_nothing(dtype):
    """Running statistics moved on, other modes, a hook: the second run is that of the forward pass."""
    ours = sequence().to(dtype).eval()
    expected = run_step(ours, small_input(dtype=dtype))
    x = small_input(dtype=dtype)
    torch.manual_seed(7)
    loss = default_loss(ours(x))
    ours.train()
    with torch.no_grad():
        ours(3 + small_input(dtype=dtype))
    ours.zero_grad()
    ours[0].f[0].register_forward_hook(lambda *_: pytest.fail("a hook of later"))
    loss.backward()
    found = {"input 0": x.grad} | {name: p.grad for name, p in ours.named_parameters()}
    for name, gradient in expected.gradients.items():
        assert torch.equal(found[name], gradient), name


@pytest.mark.parametrize("where", ["stack", "layer", "everywhere"])
def test_hooks_are_called_in_both_runs(where):
    ours, calls = sequence(depth=1), []

    def hook(*_):
        calls.append(1)

    f = ours[0].f
    if where == "everywhere":
        handle = nn.modules.module.register_module_forward_hook(hook)
    else:
        handle = (f if where == "stack" else f[0]).register_forward_hook(hook)
    try:
        y = ours(small_input())
        forward = len(calls)
        y.sum().backward()
    finally:
        handle.remove()
    assert forward > 0
    assert len(calls) > forward


def test_a_row_with_another_module_has_a_graph(graphs):
    ours = sequence(depth=1)
    ours[0].f = Stack(nn.Tanh(), *ours[0].f)
    assert_same_step(ours, twin(ours), small_input())
    assert graphs


def test_a_function_may_change_the_size_of_no_stream():
    net = ReversibleSequence(AdditiveCoupling(Stack(layer(4, 4, stride=2)), stack())).double()
    with pytest.raises(ValueError, match="cannot update a stream"):
        net(small_input())


def test_weights_changed_before_the_backward_pass_are_noticed():
    ours = sequence()
    loss = default_loss(ours(small_input()))
    with torch.no_grad():
        ours[0].f[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_stream_without_gradient_gets_none():
    ours = sequence(OneSidedCoupling, depth=1)
    y1, y2 = ours((small_input(2, 4, 6, 5), small_input(2, 4, 6, 5, seed=1)))
    plain = twin(ours)
    z1, _ = plain((small_input(2, 4, 6, 5), small_input(2, 4, 6, 5, seed=1)))
    y1.sum().backward()
    z1.sum().backward()
    assert_same_grads(ours, plain)
    assert y2.requires_grad


def assert_same_grads(ours, plain):
    found = ({name: p.grad for name, p in net.named_parameters()} for net in (ours, plain))
    assert gradient_error(*found) < 1e-9


def test_buffers_are_those_of_one_step():
    ours = sequence()
    plain = twin(ours)
    for _ in range(2):
        mine, theirs = run_step(ours, small_input()), run_step(plain, small_input())
        assert_same_result(mine, theirs)
    assert ours[0].f[1].num_batches_tracked == 2


@pytest.mark.parametrize("strides", [(12, 1, 4, 4), (77, 1, 4, 9)])
@pytest.mark.parametrize("options", [{}, {"keep": 1}, {"per_block": True}], ids=str)
def test_a_function_sees_the_same_strides_in_both_runs(strides, options):
    """A view of the input has other strides along sides of length 1, and a convolution then rounds otherwise."""
    seen = []

    class Spy(nn.Tanh):
        def forward(self, x):
            seen.append(x.stride())
            return super().forward(x)

    x = torch.randn(1, 4, 3, 1).as_strided((1, 4, 3, 1), strides) if strides[0] == 12 else None
    x = torch.randn(200).as_strided((1, 4, 3, 1), strides) if x is None else x
    net = ReversibleSequence(AdditiveCoupling(Spy(), nn.Identity()), **options)
    y1, y2 = net((x.clone().requires_grad_(), x.detach().requires_grad_()))
    (y1.sum() + y2.sum()).backward()
    assert len(set(seen)) == 1
