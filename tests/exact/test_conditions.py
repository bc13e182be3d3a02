"""Exact modes: what has to stay the same between the passes, and the other ways through autograd."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from revseg import (
    AdditiveCoupling,
    InversionError,
    ReversibleSequence,
    is_recomputing,
)
from revseg.exact.conditions import conditions
from tests.exact.twins import Branches, assert_exact, blocks_of, exact_modes, float_input, networks
from tests.helpers import assert_bitwise, needs_cuda, run_step, small_block, small_f


def trained(sequence, x):
    run_step(sequence, x.requires_grad_())


# --- conditions ----------------------------------------------------------------------------------


def set_and_reset(setter, new, old):
    setter(new)
    return functools.partial(setter, old)


def kernels_of_attention():
    context = sdpa_kernel(SDPBackend.MATH)
    context.__enter__()
    return lambda: context.__exit__(None, None, None)


def without_mkldnn():
    context = torch.backends.mkldnn.flags(enabled=False)
    context.__enter__()
    return lambda: context.__exit__(None, None, None)


CHANGES = {
    "get_num_threads": lambda: set_and_reset(torch.set_num_threads, 2, 1),
    "are_deterministic_algorithms_enabled": lambda: set_and_reset(
        lambda on: torch.use_deterministic_algorithms(on, warn_only=True), False, True
    ),
    "get_float32_matmul_precision": lambda: set_and_reset(
        torch.set_float32_matmul_precision, "medium", "highest"
    ),
    "backends.mkldnn.enabled": without_mkldnn,
    "backends.cuda.flash_sdp_enabled": kernels_of_attention,
}


@exact_modes
@pytest.mark.parametrize("setting", CHANGES)
def test_a_setting_that_changes_between_the_passes_is_named(setting, exact):
    sequence = ReversibleSequence(small_block(), exact=exact)
    loss = sequence(float_input()).square().sum()
    reset = CHANGES[setting]()
    try:
        with pytest.raises(
            InversionError, match=rf"^torch\.{setting} was \S+ in the forward pass and is \S+ in"
        ):
            loss.backward()
    finally:
        reset()


@exact_modes
@pytest.mark.skipif(
    not hasattr(torch.backends.mkldnn, "matmul"), reason="settings of newer versions of torch"
)
def test_newer_names_of_settings_may_be_used(exact):
    # Setting one makes torch refuse to tell what the older names are set to.
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "bf16"
        assert_exact([small_block()], float_input(), exact)
        loss = ReversibleSequence(small_block(), exact=exact)(float_input()).sum()
        matmul.fp32_precision = "ieee"
        with pytest.raises(InversionError, match=r"mkldnn.matmul.fp32_precision was bf16 .* and is ieee"):
            loss.backward()
    finally:
        matmul.fp32_precision = before


def test_kernels_chosen_by_timing_are_refused(monkeypatch):
    assert conditions(torch.device("cuda"))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    assert conditions(torch.device("cpu"))
    with pytest.raises(
        RuntimeError, match=r"torch.backends.cudnn.benchmark may choose others; set it to False"
    ):
        conditions(torch.device("cuda"))


class Flips(nn.Module):
    """Gives another last bit in one place when it runs again."""

    def forward(self, x):
        y = x.tanh().clone()
        if is_recomputing():
            y[1, 2, 17, 13] *= 1 + 2e-3
        return y


@exact_modes
def test_one_wrong_value_among_thousands_is_noticed(exact):
    # A sample of the streams would miss it, and has to let rounding pass.
    x = float_input(2, 8, 24, 24)
    sequence = ReversibleSequence(AdditiveCoupling(Flips(), nn.Tanh()), exact=exact)
    with pytest.raises(InversionError, match=r"not bit for bit that of the forward pass.* hidden state"):
        trained(sequence, x)
    sequence.check = "warn"
    with pytest.warns(RuntimeWarning, match="not bit for bit"):
        trained(sequence, x)
    sequence.check = None
    trained(sequence, x)
    default = ReversibleSequence(AdditiveCoupling(Flips(), nn.Tanh()))
    trained(default, x)


# --- the ways of autograd ------------------------------------------------------------------------


@exact_modes
def test_a_second_backward_pass_gives_the_same_bits(exact):
    ours, plain = networks([AdditiveCoupling(Branches(), small_f())], exact)
    gradients = []
    for net in (ours, plain):
        x = float_input()
        loss = net(x).square().sum()
        for _ in range(2):
            gradients += [torch.autograd.grad(loss, [x, *net.parameters()], retain_graph=True)]
    for others in gradients[1:]:
        assert all(map(torch.equal, gradients[0], others))


@exact_modes
def test_gradients_with_a_graph_are_exact_and_theirs_are_close(exact):
    ours, plain = networks([AdditiveCoupling(Branches(), Branches())] * 3, exact)
    first, second = [], []
    for net in (ours, plain):
        x = float_input()
        loss = net(x.transpose(2, 3)).square().mean()
        first.append(torch.autograd.grad(loss, [x, *net.parameters()], create_graph=True))
        second.append(torch.autograd.grad(sum(g.square().sum() for g in first[-1]), [x, *net.parameters()]))
    assert all(map(torch.equal, *first))
    for a, b in zip(*second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


@exact_modes
def test_function_transforms(exact):
    ours, plain = (net.network for net in networks([AdditiveCoupling(Branches(), nn.Tanh())], exact))
    x = float_input().detach()
    found = []
    for net in (ours, plain):

        def loss(parameters, x, net=net):
            return torch.func.functional_call(net, parameters, (x,)).square().sum()

        each = torch.func.vmap(torch.func.grad(loss), (None, 0))(dict(net.named_parameters()), x[:, None])
        found.append(each)
    for name, expected in found[1].items():
        assert torch.equal(found[0][name], expected)
    alone = copy.deepcopy(plain)
    alone(x[:1]).square().sum().backward()
    torch.testing.assert_close(
        found[0]["blocks.0.f.a.weight"][0], alone[0].f.a.weight.grad, rtol=1e-3, atol=1e-3
    )


@exact_modes
def test_residues_go_through_the_hooks_of_saved_tensors(exact):
    ours, plain = networks(blocks_of(AdditiveCoupling, 3), exact)
    with torch.autograd.graph.save_on_cpu():
        result = run_step(ours, float_input())
    assert_bitwise(result, run_step(plain, float_input()))


# --- no waiting for a GPU ------------------------------------------------------------------------


@needs_cuda
def test_the_range_is_watched_without_waiting_for_the_gpu():
    sequence = ReversibleSequence(blocks_of(AdditiveCoupling, 3), exact=True).cuda()
    x = float_input(2, 8, 16, 16).cuda().detach().requires_grad_()
    sequence(x).sum().backward()  # libraries wait when they are first used
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sequence(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    too_large = torch.full_like(x, 5000.0)
    sequence(too_large)
    torch.cuda.synchronize()
    with pytest.raises(InversionError, match="the input: exact=True adds without error"):
        sequence(x)  # the next pass reports it
