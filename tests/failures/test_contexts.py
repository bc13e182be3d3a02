"""Inside torch's other machinery: anomaly mode, saved-tensor hooks, checkpoints, inference mode.

The number in a comment is the line of the list of failures the tests were written from.
"""

import threading

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from revseg import AdditiveCoupling, OneSidedCoupling, ReversibleSequence
from tests.helpers import (
    all_couplings,
    assert_same_result,
    assert_same_step,
    default_loss,
    gradient_error,
    gradients_of,
    modes,
    run_step,
    small_f,
    small_input,
    small_sequence,
    twin,
)


class Within(nn.Module):
    """A module called by `call(module, x)`."""

    def __init__(self, module, call):
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x):
        return self.call(self.module, x)


# --- anomaly mode, saved-tensor hooks -----------------------------------------------------------


@modes
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anomaly_mode_is_right(options):  # 51
    sequence = all_couplings(**options)
    with torch.autograd.detect_anomaly(check_nan=True):
        assert_same_step(sequence, twin(sequence), small_input())


@modes
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.filterwarnings("ignore")
def test_anomaly_mode_finds_a_nan_inside_a_function(options):  # 51
    def sqrt_of_zero(x):
        return (x * 0).sqrt()

    sequence = ReversibleSequence(
        AdditiveCoupling(small_f(), sqrt_of_zero), OneSidedCoupling(small_f()), **options
    ).double()
    for module in (sequence, twin(sequence)):
        with (
            torch.autograd.detect_anomaly(check_nan=True),
            pytest.raises(RuntimeError, match="returned nan values"),
        ):
            run_step(module, small_input())


@modes
def test_hooks_on_saved_tensors_are_right(options):  # 52
    sequence = all_couplings(**options)
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor.clone()

    def call(module, x):
        with saved_tensors_hooks(pack, lambda tensor: tensor + 0):
            return module(x)

    assert_same_step(Within(sequence, call), Within(twin(sequence), call), small_input())
    assert sizes


@modes
def test_saved_tensors_on_the_cpu_around_and_inside_a_function_are_right(options):  # 52
    class Offloaded(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = small_f()

        def forward(self, x):
            with save_on_cpu():
                return self.f(x)

    def call(module, x):
        with save_on_cpu():
            return module(x)

    sequence = ReversibleSequence(
        AdditiveCoupling(Offloaded(), small_f()), OneSidedCoupling(Offloaded()), **options
    ).double()
    assert_same_step(sequence, twin(sequence), small_input())
    assert_same_step(Within(sequence, call), Within(twin(sequence), call), small_input())


# --- checkpoints and nesting --------------------------------------------------------------------


@modes
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("make", [all_couplings, small_sequence])
def test_a_checkpoint_around_the_sequence_is_right(make, reentrant, options):  # 53
    """The checkpoint runs batch norm twice, around the plain twin as well.

    Graphs that are kept are of the checkpointed run, which is repeated for each: not compared.
    """
    sequence = make(**options)

    def call(module, x):
        return checkpoint(module, x, use_reentrant=reentrant)

    ours, plain = (run_step(Within(module, call), small_input()) for module in (sequence, twin(sequence)))
    if options.get("keep"):
        ours.buffers = plain.buffers
    assert_same_result(ours, plain)


def with_checkpoints(reentrant, **options):
    def call(module, x):
        return checkpoint(module, x, use_reentrant=reentrant)

    def fn():
        return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh(), nn.Dropout(0.5), nn.Conv2d(4, 4, 1))

    fns = [Within(fn(), call) for _ in range(3)]
    return ReversibleSequence(AdditiveCoupling(*fns[:2]), OneSidedCoupling(fns[2]), **options).double()


@modes
def test_a_checkpoint_inside_a_function_is_right(options):  # 53
    sequence = with_checkpoints(False, **options)
    assert_same_step(sequence, twin(sequence), small_input())


@modes
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_reentrant_checkpoint_inside_a_function_gets_torch_message(options):  # 53
    """It calls `.backward()` inside the backward pass, which fits no engine that asks for gradients."""
    with pytest.raises(RuntimeError, match="set use_reentrant=False"):
        run_step(with_checkpoints(True, **options), small_input())


@modes
def test_a_sequence_inside_a_function_of_a_sequence_is_right(options):  # 53
    torch.manual_seed(0)

    def inner():
        block = AdditiveCoupling(nn.Sequential(small_f(2), nn.Dropout(0.5)), small_f(2))
        return ReversibleSequence(block, OneSidedCoupling(small_f(2)))

    outer = ReversibleSequence(
        AdditiveCoupling(inner(), small_f()), OneSidedCoupling(inner()), **options
    ).double()
    assert_same_step(outer, twin(outer), small_input())


# --- grad mode and inference mode ---------------------------------------------------------------


@modes
def test_inference_mode_gives_the_plain_output(options):  # 56
    sequence = all_couplings(**options)
    with torch.inference_mode():
        y = sequence(small_input())
    assert y.is_inference()
    torch.testing.assert_close(y.clone(), twin(sequence)(small_input()).detach())


@modes
@pytest.mark.parametrize("as_pair", [False, True], ids=["tensor", "pair"])
def test_tensors_made_in_inference_mode_train_or_get_torch_message(as_pair, options):  # 56
    sequence = all_couplings(**options)
    with torch.inference_mode():
        x = small_input(requires_grad=False)
        x = [each.clone() for each in x.chunk(2, 1)] if as_pair else x
    try:
        y = sequence(x)
        default_loss(*(y if as_pair else [y])).backward()
    except RuntimeError as error:
        refusal = str(error)
    else:
        refusal = ""
        plain = run_step(twin(sequence), small_input(requires_grad=False)).gradients
        if not as_pair:
            assert gradient_error({"input 0": None} | gradients_of(sequence), plain) < 1e-9
    assert not refusal or "Inference tensors cannot be saved for backward" in refusal


@modes
def test_a_backward_pass_under_no_grad_is_right(options):  # 57
    sequence = all_couplings(**options)
    gradients = []
    for module in (sequence, twin(sequence)):
        x = small_input()
        loss = default_loss(module(x))
        with torch.no_grad():
            loss.backward()
        gradients.append(gradients_of(module, x=x))
    assert gradient_error(*gradients) < 1e-9


@modes
def test_a_backward_pass_in_another_thread_is_right(options):  # 57
    """Grad mode, like autocast, belongs to a thread."""
    sequence = all_couplings(**options)
    plain = run_step(twin(sequence), small_input())
    x = small_input()
    loss = default_loss(sequence(x))
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert gradient_error({"input 0": x.grad} | gradients_of(sequence), plain.gradients) < 1e-9


@modes
@pytest.mark.parametrize("training", [False, True])
def test_a_forward_pass_under_no_grad_keeps_nothing(training, options):  # 57
    sequence = all_couplings(**options).train(training)
    reference = twin(sequence)
    saved = []
    with torch.no_grad(), saved_tensors_hooks(saved.append, lambda x: x):
        y = sequence(small_input())
        expected = reference(small_input())
    assert not y.requires_grad
    assert y.grad_fn is None
    assert not saved
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(dict(sequence.named_buffers()), dict(reference.named_buffers()))
