"""The doors of a `ReversibleSequence`, its options, and the memory it promises."""

import copy

import pytest
import torch
from torch import nn

from revseg import AdditiveCoupling, OneSidedCoupling, ReversibleSequence, is_recomputing
from revseg.engine.steps import HandedOver
from revseg.memory import peak_bytes, saved_bytes
from revseg.testing import distances, plain_twin, training_step
from tests.helpers import Averaging, small_block, small_f, small_sequence


def test_one_tensor_or_a_pair_goes_in_and_the_same_comes_out():
    body = small_sequence()
    x = torch.randn(2, 8, 5, 7, dtype=torch.float64)
    y = body(x)
    y1, y2 = body(x.chunk(2, 1))
    y3, _ = body(list(x.chunk(2, 1)))
    torch.testing.assert_close(y, torch.cat((y1, y2), 1))
    torch.testing.assert_close(y1, y3)
    torch.testing.assert_close(body.inverse(y), x)
    for found, wanted in zip(body.inverse((y1, y2)), x.chunk(2, 1), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (1, 2, 3, 3), (2, 4, 3, 5, 7)])
def test_any_number_of_dimensions(shape):
    channels = shape[1] // 2
    body = ReversibleSequence(
        OneSidedCoupling(lambda x: x.sin()),
        AdditiveCoupling(nn.Flatten(0) if len(shape) == 0 else nn.Tanh(), lambda x: x.cos() / channels),
    )
    x = torch.randn(shape, dtype=torch.float64)
    assert distances(training_step(body, x), training_step(plain_twin(body), x))["gradients"] < 1e-12
    assert body(x).shape == x.shape


def test_blocks_can_be_a_list_and_are_found_again():
    blocks = [small_block() for _ in range(3)]
    body = ReversibleSequence(blocks)
    assert len(body) == 3
    assert list(body) == blocks
    assert body[1] is blocks[1]
    assert "keep=0" in repr(body)
    assert set(body.state_dict()) == set(plain_twin(body).state_dict())


def test_an_empty_sequence_changes_nothing():
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    y = ReversibleSequence()(x)
    assert torch.equal(y, x)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize(
    ("x", "error", "sentence"),
    [
        (torch.ones(2, 5, 3, 3), ValueError, r"expected an even number of channels, got 5 in \[2, 5, 3, 3\]"),
        (torch.ones(4), ValueError, r"expected a tensor \[N, C, ...\], got \[4\]"),
        (
            torch.ones(1, 4, 3, 3, dtype=torch.int64),
            TypeError,
            "expected floating-point streams, got torch.int64",
        ),
        (
            torch.ones(1, 4, 3, 3, dtype=torch.uint8),
            TypeError,
            "expected floating-point streams, got torch.uint8",
        ),
        (
            (torch.ones(1, 2, 3), torch.ones(1, 2, 4)),
            ValueError,
            "expected two streams of one shape, dtype and device",
        ),
        (
            (torch.ones(1, 2), torch.ones(1, 2).double()),
            ValueError,
            "expected two streams of one shape, dtype",
        ),
        ((torch.ones(1, 2),) * 3, TypeError, "expected one tensor or a pair of tensors, got 3 of them"),
        ("image", TypeError, "expected one tensor or a pair of tensors, got str"),
        (None, TypeError, "expected one tensor or a pair of tensors, got NoneType"),
    ],
)
@pytest.mark.parametrize("save_activations", [False, True])
def test_bad_input_is_refused_at_the_door(x, error, sentence, save_activations):
    body = ReversibleSequence(AdditiveCoupling(nn.Tanh(), nn.Tanh()), save_activations=save_activations)
    with pytest.raises(error, match=sentence):
        body(x)
    with pytest.raises(error, match=sentence):
        body.inverse(x)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "sentence"),
    [
        ((nn.Conv2d(1, 1, 1),), {}, TypeError, "expected block 0 to be a Coupling, .* got Conv2d"),
        (([small_f(), small_f()],), {}, TypeError, "expected block 0 to be a Coupling, .* got Sequential"),
        ((), {"check": "maybe"}, ValueError, "expected check to be .*got 'maybe'"),
        ((), {"keep": -1}, ValueError, "expected keep to be a number of updates, 0 or more, got -1"),
        ((), {"keep": True}, ValueError, "expected keep to be a number of updates, 0 or more, got True"),
    ],
)
def test_bad_arguments_are_refused(arguments, options, error, sentence):
    with pytest.raises(error, match=sentence):
        ReversibleSequence(*arguments, **options)


def test_a_coupling_needs_functions():
    with pytest.raises(TypeError, match="expected g to be a module or a function, got int"):
        AdditiveCoupling(nn.Tanh(), 3)


@pytest.mark.parametrize("keep", [0, 1, 3, 100])
@pytest.mark.parametrize("per_block", [False, True])
def test_a_custom_coupling_and_every_keep(keep, per_block):
    body = ReversibleSequence(
        [Averaging(small_f(), small_f()) for _ in range(3)], keep=keep, per_block=per_block
    ).double()
    x = torch.randn(2, 8, 5, 7)
    found = distances(training_step(body, x), training_step(plain_twin(body), x))
    assert found["outputs"] == found["buffers"] == 0
    assert found["gradients"] < 1e-12


def test_keep_runs_the_kept_functions_once():
    runs = []

    class Counted(nn.Module):
        def forward(self, x):
            runs.append(is_recomputing())
            return x.sin()

    x = torch.randn(1, 4, 3, 3, requires_grad=True)
    for keep, wanted in ((0, [False] * 6 + [True] * 6), (2, [False] * 6 + [True] * 4), (6, [False] * 6)):
        runs.clear()
        body = ReversibleSequence([AdditiveCoupling(Counted(), Counted()) for _ in range(3)], keep=keep)
        y = body(x)
        y.sum().backward(retain_graph=True)
        assert runs == wanted
        runs.clear()
        y.sum().backward()
        assert runs == [True] * 6, "a second backward pass runs every function again"


# Memory: exact and the same on every machine, so it may be asserted.


def stack(depth: int, **options) -> ReversibleSequence:
    return ReversibleSequence([AdditiveCoupling(small_f(8), small_f(8)) for _ in range(depth)], **options)


def step_peak(body: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> int:
    """Peak bytes of a training step without the parameters' gradients, which any training holds."""

    def step():
        body(x).backward(dy)

    def warm_up():
        step()
        body.zero_grad(set_to_none=True)

    return peak_bytes(step, before=warm_up) - sum(p.nbytes for p in body.parameters())


def test_peak_memory_does_not_depend_on_depth():
    x = torch.randn(2, 16, 64, 96, requires_grad=True)
    dy = torch.randn_like(x)
    peaks = {depth: step_peak(stack(depth), x, dy) for depth in (4, 16, 64)}
    assert max(peaks.values()) <= 1.02 * min(peaks.values()), peaks
    # the output, the gradient and the pair under reconstruction, and the activations of one function
    half = x.nbytes // 2
    assert peaks[16] <= 13.3 * half + 2 * half, peaks  # x.grad counts here: 2 halves more
    plain = step_peak(stack(16, save_activations=True), x, dy)
    assert plain > 10 * peaks[16]


def test_keeping_the_last_graph_costs_no_peak():
    x = torch.randn(2, 16, 64, 96, requires_grad=True)
    dy = torch.randn_like(x)
    recomputed, kept = (step_peak(stack(4, keep=keep), x, dy) for keep in (0, 1))
    assert kept <= recomputed


@pytest.mark.parametrize("depth", [1, 4, 16])
def test_saved_bytes_are_those_of_the_output(depth):
    x = torch.randn(2, 16, 12, 20, requires_grad=True)
    body = stack(depth)
    assert saved_bytes(lambda: body(x)) == x.nbytes
    assert saved_bytes(lambda: body(x.chunk(2, 1))) == x.nbytes
    assert saved_bytes(lambda: plain_twin(body)(x)) > 4 * depth * x.nbytes
    with torch.no_grad():
        assert saved_bytes(lambda: body(x)) == 0


def test_a_frozen_beginning_saves_nothing_and_is_not_undone():
    body = stack(4)
    for block in list(body)[:3]:
        block.requires_grad_(False)
    runs = []
    body[0].f[0].register_forward_hook(lambda *_: runs.append(is_recomputing()))
    x = torch.randn(2, 16, 6, 10)
    body(x).sum().backward()
    assert runs == [False]
    assert all(p.grad is not None for p in body[3].parameters())


def test_the_result_of_a_run_lets_go_of_its_memory():
    import weakref

    x = torch.randn(2, 16, 6, 10, requires_grad=True)
    y = stack(2, keep=1)(x)
    gone = weakref.ref(y)
    del y
    assert gone() is None, "the graph is freed without the garbage collector"


def test_deepcopy_with_a_live_graph_gives_an_independent_module():
    body = stack(2)
    y = body(torch.randn(2, 16, 6, 10))
    other = copy.deepcopy(body)
    y.sum().backward()
    assert all(p.grad is None for p in other.parameters())


@pytest.mark.parametrize("options", [{}, {"exact": "lossless"}], ids=str)
@pytest.mark.parametrize("grad", [True, False])
def test_streams_that_are_handed_over_go_as_they_are_updated(grad, options):
    """Those of a tuple stay: the frames of all callers hold it."""
    body = small_sequence(OneSidedCoupling, **options)
    x = torch.randn(2, 2, 4, 64, 64, dtype=torch.float64)

    def peak(kind):
        with torch.set_grad_enabled(grad):
            return peak_bytes(lambda: body(kind((x[0].clone(), x[1].clone()))))

    assert peak(tuple) - peak(HandedOver) >= 1.9 * x[0].nbytes
    handed = HandedOver((x[0].clone(), x[1].clone()))
    found, expected = body(handed), body((x[0], x[1]))
    assert not handed
    assert all(map(torch.equal, found, expected))
