"""What people do with a chain of reversible blocks, and what is right.

A scenario is a function of a `Chain`: it runs one way and returns what must be equal to what plain
autograd gives in the same scenario, tensors and numbers by name. It may also refuse, by an
exception. What is compared is all that a step leaves behind: outputs, gradients, buffers, the random state.
"""

from collections.abc import Callable

from benchmarks.scenarios.around import (
    autocast,
    channels_last,
    compiled,
    copied,
    distributed,
    distributed_with_unused,
    evaluation,
    exception,
    function_transform,
    hidden_state,
    odd_channels,
    other_weights,
    parameters_changed,
    without_grad,
)
from benchmarks.scenarios.chain import Found
from benchmarks.scenarios.functions import (
    buffer_that_learns,
    loss_on_something_inside,
    mask_changed_inside,
    method_with_batch_norm,
    noisy_weight,
    prompt_in_a_frozen_beginning,
    replaced_forward,
    spectral_normed,
)
from benchmarks.scenarios.modules import (
    appended_after_conversion,
    coupling_that_learns,
    dataclass_returned,
    encoder_in_evaluation,
    flops,
    gradients_that_stand,
    prediction_of_dropped_gradients,
    side_input,
)
from benchmarks.scenarios.step import (
    a_step,
    accumulation,
    all_frozen,
    autograd_grad,
    backward_by_inputs,
    backward_twice,
    batch_norm,
    double_backward,
    dropout,
    hooks_on_tensors,
    input_stays,
    input_without_gradient,
    output_changed_in_place,
    partly_frozen,
    random_state,
    saved_before,
    shared_functions,
    skip_around,
    two_forwards,
)

SCENARIOS: dict[str, Callable[[str], Found]] = {
    scenario.__name__.replace("_", " "): scenario
    for scenario in (
        a_step, batch_norm, dropout, random_state, evaluation, input_without_gradient, partly_frozen, all_frozen, shared_functions,
        accumulation, two_forwards, autograd_grad, backward_by_inputs, hooks_on_tensors, backward_twice,
        double_backward, other_weights, function_transform, parameters_changed, output_changed_in_place,
        saved_before, skip_around, input_stays, without_grad, hidden_state, exception, channels_last, copied,
        compiled, autocast, distributed, distributed_with_unused, odd_channels,
        mask_changed_inside, prompt_in_a_frozen_beginning, buffer_that_learns, spectral_normed, noisy_weight, replaced_forward,
        method_with_batch_norm, loss_on_something_inside, dataclass_returned, encoder_in_evaluation, coupling_that_learns,
        side_input, appended_after_conversion, flops, gradients_that_stand, prediction_of_dropped_gradients,
    )
}  # fmt: skip
