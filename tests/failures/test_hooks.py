"""Hooks see what they see in plain autograd: as often, the same values, and what they change counts.

The number in a comment is the line of the list of failures the tests were written from.
"""

import collections
import warnings

import pytest
import torch
from torch import nn

from revseg import AdditiveCoupling, OneSidedCoupling, ReversibleSequence, is_recomputing
from tests.helpers import (
    all_couplings,
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


def shared_sequence(**options):
    """A function used twice, a block used three times, a weight tied between two functions."""
    torch.manual_seed(0)
    f, tied = small_f(), small_f()
    tied[0].weight = f[0].weight
    block = AdditiveCoupling(f, small_f())
    return ReversibleSequence(
        block, AdditiveCoupling(f, tied), block, OneSidedCoupling(small_f()), block, **options
    ).double()


def counted(module, register):
    """Counts by parameter name, of the hooks that `register(parameter, count)` puts on each."""
    counts = collections.Counter()
    for name, parameter in module.named_parameters():
        register(parameter, lambda *_, name=name: counts.update([name]))
    return counts


# --- hooks on parameters ------------------------------------------------------------------------


@modes
@pytest.mark.parametrize("make", [all_couplings, shared_sequence], ids=["own", "shared"])
def test_parameter_hooks_fire_once_and_what_they_return_counts(make, options):  # 24
    sequence = make(**options)
    reference = twin(sequence)

    def register(parameter, count):
        def hook(gradient):
            count()
            return 3 * gradient

        parameter.register_hook(hook)

    counts = [counted(module, register) for module in (sequence, reference)]
    plain_gradients = run_step(make(**options, save_activations=True), small_input()).gradients
    ours, _ = assert_same_step(sequence, reference, small_input())
    assert counts[0] == counts[1]
    assert set(counts[0].values()) == {1}
    name = "blocks.0.f.0.weight"
    assert gradient_error({name: ours.gradients[name]}, {name: 3 * plain_gradients[name]}) < 1e-9


@modes
@pytest.mark.filterwarnings("ignore:Using backward")
def test_parameter_hooks_fire_once_under_create_graph(options):  # 24
    sequence = shared_sequence(**options)
    counts = []
    for module in (sequence, twin(sequence)):
        counts.append(counted(module, lambda p, count: p.register_hook(lambda g: count())))
        default_loss(module(small_input())).backward(create_graph=True)
        for parameter in module.parameters():
            parameter.grad = None  # which refers to itself by its graph
    assert counts[0] == counts[1]


@modes
@pytest.mark.parametrize("make", [all_couplings, shared_sequence], ids=["own", "shared"])
def test_post_accumulate_hooks_fire_once_also_for_shared_parameters(make, options):  # 25
    sequence = make(**options)
    counts = counted(sequence, lambda p, count: p.register_post_accumulate_grad_hook(count))
    assert_same_step(sequence, twin(sequence), small_input())
    assert counts == dict.fromkeys([name for name, _ in sequence.named_parameters()], 1)


@modes
def test_an_optimizer_step_inside_the_backward_pass_trains_the_same(options):  # 26
    sequence = shared_sequence(**options)
    reference = twin(sequence)
    gradients = []
    for module in (sequence, reference):
        optimizers = {p: torch.optim.SGD([p], 0.1, momentum=0.9) for p in module.parameters()}

        def step(parameter, optimizers=optimizers):
            optimizers[parameter].step()
            parameter.grad = None

        for parameter in module.parameters():
            parameter.register_post_accumulate_grad_hook(step)
        for seed in range(3):
            result = run_step(module, small_input(seed=seed))
        gradients.append(result.gradients)
        assert all(p.grad is None for p in module.parameters())
    assert gradient_error(*gradients) < 1e-9
    torch.testing.assert_close(sequence.state_dict(), reference.state_dict(), rtol=1e-9, atol=1e-9)


# --- hooks on modules inside the functions ------------------------------------------------------


@modes
def test_backward_hooks_inside_a_function_fire_once_and_change_the_gradient(options):  # 27
    sequence = all_couplings(**options)
    reference = twin(sequence)
    seen = []
    for module in (sequence, reference):
        mine = []
        seen.append(mine)

        def after(m, grad_input, grad_output, mine=mine):
            mine.append((type(m).__name__, grad_input[0], grad_output[0]))
            return (2 * grad_input[0],)

        def before(m, grad_output, mine=mine):
            mine.append((type(m).__name__, grad_output[0]))
            return (grad_output[0] + 1e-3,)

        for block in module:
            block.f[3].register_full_backward_hook(after)
            block.f[1].register_full_backward_pre_hook(before)
    unhooked = run_step(all_couplings(), small_input())
    ours, _ = assert_same_step(sequence, reference, small_input())
    assert len(seen[0]) == len(seen[1]) == 6
    for (kind, *mine), (plain_kind, *plain) in zip(*seen, strict=True):
        assert kind == plain_kind
        torch.testing.assert_close(mine, plain, rtol=1e-8, atol=1e-10)
    assert gradient_error(ours.gradients, unhooked.gradients) > 1e-2


@modes
def test_forward_hooks_see_the_same_values_and_can_tell_the_second_run(options):  # 28
    sequence = all_couplings(**options)
    runs = {False: [], True: []}

    def hook(module, inputs, output):
        runs[is_recomputing()].append((name_of[module], inputs[0].detach().clone(), output.detach().clone()))

    name_of = {module: name for name, module in sequence.named_modules()}
    for name, module in sequence.named_modules():
        if ".f." in name or ".g." in name:
            module.register_forward_hook(hook)
    y = sequence(small_input())
    assert not is_recomputing()
    default_loss(y).backward()
    assert not is_recomputing()
    names = [name for name, *_ in runs[False]]
    assert len(names) == len(set(names)) == 30
    kept = 12 if options.get("keep") else 0
    assert len(runs[True]) == 30 - kept
    first = {name: values for name, *values in runs[False]}
    for name, *values in runs[True]:
        torch.testing.assert_close(values, first[name], rtol=1e-9, atol=1e-9)


@modes
def test_forward_hooks_that_change_values_are_right(options):  # 29
    sequence = all_couplings(**options)
    for block in sequence:
        block.f[0].register_forward_hook(
            lambda m, inputs, output: output * m.bias.exp().mean() + inputs[0].mean()
        )
        block.f[4].register_forward_pre_hook(lambda m, inputs: (inputs[0].sin(),))
        block.f.register_forward_hook(lambda m, inputs, output: output.cos())
    assert_same_step(sequence, twin(sequence), small_input())


OLD_HOOKS = {"weight_norm": nn.utils.weight_norm, "spectral_norm": nn.utils.spectral_norm}


@modes
@pytest.mark.parametrize("old", OLD_HOOKS)
def test_norms_of_weights_by_forward_hooks_are_right(old, options):  # 29
    sequences = []
    for _ in range(2):  # what these hooks leave on a module cannot be deep-copied after a run
        sequence = all_couplings(**options)
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            for block in sequence:
                OLD_HOOKS[old](block.f[0])
        sequences.append(sequence)
    sequences[1].save_activations = True
    for seed in range(2):
        assert_same_step(*sequences, small_input(seed=seed))


@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"],
)
def test_hooks_on_a_block_fire_or_are_refused(register):  # 29
    """One autograd function for all blocks calls no block, so its hooks would be skipped in silence."""
    sequence = all_couplings()
    getattr(sequence[1], register)(lambda *arguments: None)
    with pytest.raises(
        RuntimeError, match=r"block 1 \(OneSidedCoupling\) has hooks of its own.*per_block=True"
    ):
        sequence(small_input())


@pytest.mark.parametrize("register", ["register_forward_hook", "register_full_backward_hook"])
def test_hooks_on_a_block_fire_once_per_block(register):  # 29
    sequence = all_couplings(per_block=True)
    fired = []
    for block in sequence:
        getattr(block, register)(lambda m, *arguments: fired.append(type(m).__name__))
    assert_same_step(sequence, all_couplings(save_activations=True), small_input())
    assert sorted(fired) == ["AdditiveCoupling", "AffineCoupling", "OneSidedCoupling"]


@modes
def test_hooks_on_the_sequence_are_right(options):  # 29
    sequence = all_couplings(**options)
    reference = twin(sequence)
    for module in (sequence, reference):
        module.register_forward_pre_hook(lambda m, inputs: (inputs[0] * 2,))
        module.register_forward_hook(lambda m, inputs, output: output.sin())
        module.register_full_backward_hook(lambda m, grad_input, grad_output: (grad_input[0] * 3,))
    assert_same_step(sequence, reference, small_input())


# --- hooks on tensors at the boundary -----------------------------------------------------------


@modes
def test_retained_and_hooked_gradients_of_the_joined_output_are_right(options):  # 30
    sequence = all_couplings(**options)
    seen = []
    for module in (sequence, twin(sequence)):
        x = small_input()
        y = module(x)
        y.retain_grad()
        y.register_hook(lambda g: g * 2)
        default_loss(y).backward()
        seen.append(gradients_of(module, x=x, y=y))
    assert gradient_error(*seen) < 1e-9


@modes
def test_gradients_of_an_output_stream_are_those_at_the_boundary(options):  # 30
    """In plain autograd the first output of a V module is also read inside it, by the second.

    There its gradient holds that part too, and a hook changes it. Here it is the derivative of
    the loss by the output alone, so a hook changes what comes from outside and nothing else.
    """
    sequence = all_couplings(**options)
    weights = [small_input(2, 4, 6, 5, seed=5 + i, requires_grad=False) for i in range(2)]
    y = sequence(pair_of_inputs())
    for each in y:
        each.retain_grad()
    sum((each * weight).sum() for each, weight in zip(y, weights, strict=True)).backward()
    torch.testing.assert_close([each.grad for each in y], weights)

    def loss(y1, y2):
        y1.register_hook(lambda g: g * 2)
        return (y1 * weights[0]).sum() + (y2 * weights[1]).sum()

    hooked = run_step(sequence, pair_of_inputs(), loss)
    plain = run_step(
        twin(sequence), pair_of_inputs(), lambda y1, y2: (y1 * 2 * weights[0]).sum() + (y2 * weights[1]).sum()
    )
    assert gradient_error(hooked.gradients, plain.gradients) < 1e-9


@modes
def test_hooks_on_the_input_fire_once(options):  # 30
    sequence = all_couplings(**options)
    seen = []
    for module in (sequence, twin(sequence)):
        x = small_input()
        inner = x * 1
        mine = []
        inner.register_hook(mine.append)
        inner.retain_grad()
        default_loss(module(inner)).backward()
        assert len(mine) == 1
        seen.append({"inner": inner.grad, "x": x.grad})
    assert gradient_error(*seen) < 1e-9
