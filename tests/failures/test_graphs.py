"""One graph or module used in many ways, and what it keeps alive.

The number in a comment is the line of the list of failures the tests were written from.
"""

import pytest
import torch
from torch import nn

from revseg import AdditiveCoupling, AffineCoupling, OneSidedCoupling, ReversibleSequence
from tests.helpers import (
    all_couplings,
    assert_same_gradients,
    assert_same_result,
    assert_same_step,
    default_loss,
    gradient_error,
    gradients_of,
    modes,
    pair_of_inputs,
    run_step,
    small_f,
    small_input,
    twin,
)

# --- functions and tensors in more than one place -------------------------------------------------


@pytest.mark.parametrize("as_pair", [False, True], ids=["tensor", "pair"])
def test_an_empty_sequence_is_the_identity(as_pair):  # 37
    sequence = ReversibleSequence()
    x = pair_of_inputs() if as_pair else small_input()
    ours, _ = assert_same_step(sequence, twin(sequence), x)
    torch.testing.assert_close(torch.cat(ours.outputs, 1), torch.cat(x, 1) if as_pair else x)
    assert len(sequence) == 0


class Within(nn.Module):
    """A module called by `call(module, x)`."""

    def __init__(self, module, call):
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x):
        return self.call(self.module, x)


class Shared(nn.Module):
    """Modules and tensors used in more than one place, inside the sequence and outside."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        f, g = small_f(), small_f()
        block = AdditiveCoupling(f, g)
        tied = small_f()
        tied[0].weight = f[0].weight
        self.outside = nn.Conv2d(8, 8, 1)
        self.f = f
        self.body = ReversibleSequence(
            block,
            AdditiveCoupling(f, f),
            block,
            OneSidedCoupling(tied),
            block,
            AffineCoupling(small_f(4, 8), small_f(4, 8)),
            **options,
        )

    def forward(self, x):
        x = self.outside(x)
        x = x + self.f(x[:, :4]).repeat(1, 2, 1, 1)
        return self.body(x) + self.f(x[:, 4:]).repeat(1, 2, 1, 1)


@modes
def test_shared_functions_blocks_and_parameters_add_their_gradients(options):  # 38
    module = Shared(**options).double()
    assert_same_step(module, twin(module), small_input())


@modes
def test_weights_shared_with_the_outside_keep_all_gradients_under_autocast(options):  # 38
    """Autocast caches cast weights; one cached inside, without gradient, would cut off the uses after it."""

    def call(module, x):
        with torch.autocast("cpu", torch.bfloat16):
            return module(x)

    module = Shared(**options)
    x = small_input(dtype=torch.float32)
    ours, plain = (
        run_step(each, x, lambda y: default_loss(y.float()))
        for each in (Within(module, call), Within(twin(module), call))
    )
    assert gradient_error(ours.gradients, plain.gradients) < 0.05


@modes
def test_one_tensor_may_be_both_streams(options):  # 38
    class Twice(nn.Module):
        def __init__(self, sequence):
            super().__init__()
            self.sequence = sequence

        def forward(self, x):
            return self.sequence((x, x))

    sequence = all_couplings(**options)
    assert_same_step(Twice(sequence), Twice(twin(sequence)), small_input(2, 4, 6, 5))


# --- one graph, many uses -----------------------------------------------------------------------


@modes
def test_a_second_backward_pass_adds_the_same_and_moves_nothing(options):  # 39
    torch.manual_seed(3)
    block = AdditiveCoupling(nn.Sequential(small_f(), nn.Dropout(0.5)), small_f())
    sequence = ReversibleSequence(block, OneSidedCoupling(small_f()), **options).double()
    twice = []
    for module in (sequence, twin(sequence)):
        torch.manual_seed(7)
        x = small_input()
        loss = default_loss(module(x))
        loss.backward(retain_graph=True)
        first = {name: g.clone() for name, g in gradients_of(module, x=x).items()}
        buffers = {name: b.clone() for name, b in module.named_buffers()}
        state = torch.get_rng_state()
        loss.backward()
        assert_same_gradients(gradients_of(module, x=x), {name: 2 * g for name, g in first.items()})
        torch.testing.assert_close(dict(module.named_buffers()), buffers, rtol=0, atol=0)
        assert torch.equal(torch.get_rng_state(), state)
        twice.append(gradients_of(module, x=x))
    assert_same_gradients(*twice)


@modes
def test_the_two_outputs_may_be_differentiated_one_after_the_other(options):  # 39
    sequence = all_couplings(**options)

    class InTurn:
        """Backward from each output on its own; hands on a sum whose backward adds nothing."""

        def __call__(self, y1, y2):
            default_loss(y1).backward(retain_graph=True)
            return default_loss(y2)

    assert_same_step(sequence, twin(sequence), pair_of_inputs(), InTurn())


@modes
def test_a_second_backward_pass_without_retaining_gets_torch_message(options):  # 40
    loss = default_loss(all_couplings(**options)(small_input()))
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@modes
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_forward_passes_may_be_differentiated_in_any_order(order, options):  # 41
    sequence = all_couplings(**options)
    results = []
    for module in (sequence, twin(sequence)):
        inputs = [small_input(seed=i) for i in range(2)]
        losses = [default_loss(module(x)) for x in inputs]
        for i in order:
            losses[i].backward()
        results.append((gradients_of(module, a=inputs[0], b=inputs[1]), dict(module.named_buffers())))
    (ours, ours_buffers), (plain, plain_buffers) = results
    assert_same_gradients(ours, plain)
    torch.testing.assert_close(ours_buffers, plain_buffers)


@modes
def test_outputs_and_sequence_may_be_used_twice_in_one_graph(options):  # 42
    class TwiceUsed(nn.Module):
        def __init__(self, sequence):
            super().__init__()
            self.sequence = sequence

        def forward(self, x):
            y = self.sequence(x)
            z = self.sequence(y.tanh() + x)
            return y * z, z + y, self.sequence((y[:, :4], z[:, :4]))[1]

    sequence = all_couplings(**options)
    ours, plain = TwiceUsed(sequence), TwiceUsed(twin(sequence))
    assert_same_step(ours, plain, small_input())


def test_a_step_after_a_step_is_right():  # 41
    """Training: five steps of an optimizer end at the same parameters, buffers and all."""
    sequence = all_couplings()
    results = []
    for module in (sequence, twin(sequence)):
        optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
        for seed in range(5):
            run_step(module, small_input(seed=seed))
            optimizer.step()
        results.append(run_step(module, small_input(seed=9)))
    assert_same_result(*results, tolerance=1e-8)


# --- functions and parameters that change, tensors that are nobody's ------------------------------


@modes
@pytest.mark.parametrize("change", ["parameter", "function"])
def test_what_is_replaced_after_the_forward_pass_still_gets_its_gradient(change, options):  # 54
    sequence = all_couplings(**options)
    results = []
    for module in (sequence, twin(sequence)):
        x, block = small_input(), module[0]
        loss = default_loss(module(x))
        old = dict(block.f.named_parameters())
        if change == "parameter":
            block.f[0].weight = nn.Parameter(torch.zeros_like(block.f[0].weight))
        else:
            block.f = nn.Identity()
        loss.backward()
        results.append({"x": x.grad} | {name: p.grad for name, p in old.items()})
    assert_same_gradients(*results)


@modes
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.filterwarnings("ignore:Using backward")
def test_a_tensor_from_outside_is_refused_by_name(leaf, create_graph, options):  # 35
    """Its gradient would stay None: the function is no module, so nobody knows of the tensor."""
    factor = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    used = factor if leaf else factor.exp()
    sequence = ReversibleSequence(AdditiveCoupling(lambda x: x.sin() * used, small_f()), **options).double()
    loss = default_loss(sequence(small_input()))
    try:
        loss.backward(create_graph=create_graph)
    except RuntimeError as error:
        message = str(error)
        for parameter in sequence.parameters():
            parameter.grad = None
    else:
        message = f"no error, and a gradient of {factor.grad}"
    assert "requires grad and is no parameter of it" in message


def test_the_reference_of_these_tests_would_notice():
    """A gradient that is zero instead of None, and one that is off by a millionth."""
    sequence = all_couplings()
    ours, plain = (run_step(module, small_input()) for module in (sequence, twin(sequence)))
    assert_same_result(ours, plain)
    ours.gradients["input 0"] = ours.gradients["input 0"] * (1 + 1e-6)
    with pytest.raises(AssertionError, match="gradients differ"):
        assert_same_result(ours, plain)
    plain.gradients["input 0"] = None
    with pytest.raises(AssertionError, match="None in one of the two only"):
        assert_same_result(ours, plain)
