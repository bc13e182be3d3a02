"""Writing in place, by the caller or by a function: right or refused, and nothing of the caller's is written.

The number in a comment is the line of the list of failures the tests were written from.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from revseg import AdditiveCoupling, InversionError, ReversibleSequence
from tests.helpers import (
    all_couplings,
    assert_same_step,
    default_loss,
    gradient_error,
    gradients_of,
    modes,
    pair_of_inputs,
    run_step,
    small_input,
    twin,
)


def right_or(error, match, sequence, x, loss):
    """The gradients of plain autograd, or the error, whether or not plain autograd raises too."""
    try:
        ours = run_step(sequence, x, loss)
    except error as caught:
        message = str(caught)
    else:
        plain = run_step(twin(sequence), x, loss)
        assert gradient_error(ours.gradients, plain.gradients) < 1e-9
        return "right"
    assert match in message
    return "refused"


# --- the output and what follows ----------------------------------------------------------------

WRITES = {
    "add_": lambda y: y.add_(1),
    "a view": lambda y: y.view(-1).mul_(2),
    "a slice": lambda y: y[:, 1:2].zero_(),
    "an index": lambda y: y.__setitem__((0, 0, 0, 0), 5.0),
    "detached": lambda y: y.detach().add_(1),
    "one element detached": lambda y: y.detach()[0, 0, 0, :1].add_(1),
    "no_grad": lambda y: torch.no_grad()(y.add_)(1),
    "out": lambda y: torch.add(y.detach(), 1, out=y.detach()),
}


@modes
@pytest.mark.parametrize("write", WRITES)
def test_an_output_written_to_is_refused(write, options):  # 43
    def loss(y):
        value = default_loss(y.clone())
        WRITES[write](y)
        return value

    sequence = all_couplings(**options)
    found = right_or(RuntimeError, "modified by an inplace operation", sequence, small_input(), loss)
    assert found == "refused" or options.get("per_block")  # where the joined output is a copy


@modes
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("write", WRITES)
def test_an_output_stream_written_to_is_refused(write, which, options):  # 43
    def loss(*outputs):
        value = default_loss(*(y.clone() for y in outputs))
        WRITES[write](outputs[which])
        return value

    sequence = all_couplings(**options)
    found = right_or(RuntimeError, "modified by an inplace operation", sequence, pair_of_inputs(), loss)
    assert found == "refused"


@pytest.mark.parametrize("write", [lambda y: y.data.add_(1), lambda y: y.detach().numpy().__iadd__(1)])
def test_a_write_that_torch_cannot_see_is_found_by_the_drift_check(write):  # 43
    def loss(y):
        value = default_loss(y)
        write(y)
        return value

    with pytest.raises(InversionError, match="reconstructed input is off"):
        run_step(all_couplings(), small_input(), loss)


@modes
def test_output_streams_are_tensors_of_their_own(options):  # 44
    """Views made inside an autograd function could not be written to at all."""
    y1, y2 = all_couplings(**options)(pair_of_inputs())
    assert y1._base is None
    assert y2._base is None
    assert y1.untyped_storage().data_ptr() != y2.untyped_storage().data_ptr()
    y1.add_(1)
    y2.add_(1)


@modes
@pytest.mark.parametrize("as_pair", [False, True], ids=["tensor", "pair"])
def test_an_inplace_relu_behind_the_sequence_is_right_or_refused(as_pair, options):  # 45
    def loss(*outputs):
        return sum(F.relu(y, inplace=True).square().sum() for y in outputs)

    x = pair_of_inputs() if as_pair else small_input()
    right_or(RuntimeError, "modified by an inplace operation", all_couplings(**options), x, loss)


@modes
def test_an_optimizer_step_before_the_backward_pass_is_refused(options):  # 46
    sequence = all_couplings(**options)
    optimizer = torch.optim.SGD(sequence.parameters(), 0.1)
    x = small_input()
    run_step(sequence, x)
    loss = default_loss(sequence(x))
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@modes
def test_running_statistics_may_move_before_the_backward_pass(options):  # 46
    sequence = all_couplings(**options)
    reference = twin(sequence)
    gradients = []
    for module in (sequence, reference):
        x = small_input()
        loss = default_loss(module(x))
        module(small_input(seed=1))
        loss.backward()
        gradients.append(gradients_of(module, x=x))
    assert gradient_error(*gradients) < 1e-9
    torch.testing.assert_close(dict(sequence.named_buffers()), dict(reference.named_buffers()))


# --- the input and the incoming gradient --------------------------------------------------------


@modes
@pytest.mark.parametrize("as_pair", [False, True], ids=["tensor", "pair"])
def test_the_input_is_neither_written_nor_needed(as_pair, options):  # 47
    sequence = all_couplings(**options)
    x = pair_of_inputs() if as_pair else [small_input()]
    plain = run_step(twin(sequence), x if as_pair else x[0])
    before = [(each.detach().clone(), each._version, each.untyped_storage().nbytes()) for each in x]
    y = sequence(x if as_pair else x[0])
    loss = default_loss(*(y if as_pair else [y]))
    for each, (value, version, size) in zip(x, before, strict=True):
        assert torch.equal(each, value)
        assert each._version == version
        assert each.untyped_storage().nbytes() == size
    with torch.no_grad():
        for each in x:
            each.zero_()
    loss.backward()
    for each, (_, _, size) in zip(x, before, strict=True):
        assert not each.any()
        assert each.untyped_storage().nbytes() == size
    gradients = {f"input {i}": each.grad for i, each in enumerate(x)} | gradients_of(sequence)
    assert gradient_error(gradients, plain.gradients) < 1e-9


@modes
def test_a_freed_input_is_not_needed(options):  # 47
    sequence, x = all_couplings(**options), small_input()
    plain = run_step(twin(sequence), x)
    inner = x * 1
    y = sequence(inner)
    inner.untyped_storage().resize_(0)
    default_loss(y).backward()
    assert gradient_error({"input 0": x.grad} | gradients_of(sequence), plain.gradients) < 1e-9


@modes
@pytest.mark.parametrize("as_pair", [False, True], ids=["tensor", "pair"])
def test_the_incoming_gradient_is_not_written(as_pair, options):  # 48
    fns = [nn.Identity(), torch.tanh]
    for sequence in (all_couplings(**options), ReversibleSequence(AdditiveCoupling(*fns), **options)):
        y = sequence(pair_of_inputs() if as_pair else small_input())
        outputs = y if as_pair else [y]
        incoming = [small_input(*each.shape, seed=9, requires_grad=False) for each in outputs]
        before = [each.clone() for each in incoming]
        torch.autograd.backward(outputs, incoming)
        assert all(map(torch.equal, incoming, before))


def test_one_incoming_gradient_for_both_streams_is_not_added_to_itself():  # 48
    sequence = all_couplings()
    same = small_input(2, 4, 6, 5, seed=9, requires_grad=False)
    gradients = []
    for module in (sequence, twin(sequence)):
        pair = pair_of_inputs()
        torch.autograd.backward(module(pair), [same, same])
        gradients.append(gradients_of(module, x1=pair[0], x2=pair[1]))
    assert gradient_error(*gradients) < 1e-9


EXPANDED = {
    "sum": lambda y: y.sum(),
    "mean over pixels": lambda y: (y.mean((2, 3)) ** 2).sum(),
    "channels": lambda y: (y.sum(1) ** 3).sum(),
    "batch": lambda y: (y.sum(0).exp() * 1e-3).sum(),
}


@modes
@pytest.mark.parametrize("loss", EXPANDED)
@pytest.mark.parametrize("as_pair", [False, True], ids=["tensor", "pair"])
def test_expanded_incoming_gradients_are_right(loss, as_pair, options):  # 60
    sequence = all_couplings(**options)
    x = pair_of_inputs() if as_pair else small_input()
    assert_same_step(sequence, twin(sequence), x, lambda *outputs: sum(map(EXPANDED[loss], outputs)))
