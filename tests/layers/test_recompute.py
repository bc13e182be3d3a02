"""`Recompute`: the numbers of plain autograd bit for bit, its inputs kept and nothing else.

The number in a comment is the line of the list of failures the tests were written from.
"""

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from revseg import InversionError, Recompute
from revseg.memory import peak_bytes, saved_bytes
from tests.helpers import (
    HELD_BY_TORCH,
    Through,
    assert_equal_gradients,
    assert_same_step,
    default_loss,
    gradient_error,
    gradients_of,
    needs_cuda,
    recomputed,
    run_step,
    small_f,
    small_input,
    twin,
)


def stem():
    """Everything that a second run could do wrong, in double precision; always the same."""
    torch.manual_seed(0)
    spectral = nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 8, 3, padding=1))
    return nn.Sequential(
        nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.4), nn.PReLU(4), spectral
    ).double()


def assert_same_bits(net, x):
    assert_same_step(net, twin(net), x, tolerance=0.0)


@pytest.mark.parametrize("requires_grad", [True, False], ids=["variable", "constant"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_step_is_that_of_plain_autograd(training, requires_grad):  # 33, 61, 63, 66, 67, 73
    net = recomputed(stem()).train(training)
    for seed in range(3):
        assert_same_bits(net, small_input(seed=seed, requires_grad=requires_grad))


def test_a_step_is_that_of_the_module_without_wrapper():
    net = Recompute(stem())
    ours, plain = run_step(net, small_input()), run_step(stem(), small_input())
    assert torch.equal(ours.outputs[0], plain.outputs[0])
    for name, gradient in plain.gradients.items():
        mine = ours.gradients[name if name.startswith("input") else f"module.{name}"]
        assert torch.equal(mine, gradient), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_of_the_forward_pass_holds_in_the_second_run(dtype):  # 81
    layers = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.PReLU(8))
    results = []
    for net in (Recompute(layers), twin(Recompute(layers))):
        x = small_input(dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            y = net(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            default_loss(y).backward()
        assert y.dtype == torch.bfloat16
        results.append(gradients_of(net, x=x))
    assert_equal_gradients(*results)


@needs_cuda
def test_a_step_on_the_gpu_is_that_of_plain_autograd():  # 69
    net = recomputed(stem()).cuda()
    x = small_input().detach().cuda().requires_grad_()
    assert_same_step(net, twin(net), x, tolerance=1e-9)


def test_only_the_input_is_saved():
    x = small_input(4, 8, 32, 32, dtype=torch.float32)
    layers = Recompute(nn.Sequential(*[small_f(8) for _ in range(4)]))
    assert saved_bytes(lambda: layers(x)) == x.nbytes
    assert saved_bytes(lambda: twin(layers)(x)) > 20 * x.nbytes


def test_an_integer_input_is_kept_for_the_second_run():
    results = []
    layers = Recompute(nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3)).double())
    for net in (layers, twin(layers)):
        default_loss(net(torch.tensor([[0, 1, 4]]))).backward()
        results.append(gradients_of(net))
    assert_equal_gradients(*results)


# --- arguments and results of any kind ----------------------------------------------------------


class Mixture(nn.Module):
    """Takes and returns nested tensors and other values."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x, pair, *, scale=1.0, extra=None):
        a, (b, name) = self.linear(x), pair
        y = {"sum": a + b, "parts": [a * scale, (b.sin(), name)], "none": None, "count": 7}
        if extra is not None:
            y["extra"] = extra["deep"] * a
        return y


def test_nested_arguments_and_results_keep_their_structure():
    net = Recompute(Mixture().double())
    results = []
    for module in (net, twin(net)):
        x, b, deep = (small_input(2, 3, seed=seed) for seed in range(3))
        y = module(x, (b, "name"), scale=2.0, extra={"deep": deep})
        assert list(y) == ["sum", "parts", "none", "count", "extra"]
        assert isinstance(y["parts"], list)
        assert isinstance(y["parts"][1], tuple)
        assert (y["parts"][1][1], y["none"], y["count"]) == ("name", None, 7)
        default_loss(y["sum"], y["parts"][0], y["parts"][1][0], y["extra"]).backward()
        results.append(gradients_of(module, x=x, b=b, deep=deep))
    assert_equal_gradients(*results)


def test_results_that_no_loss_uses_get_no_gradient():  # 35
    net = Recompute(Mixture().double())
    for module in (net, twin(net)):
        x, b = small_input(2, 3), small_input(2, 3, seed=1)
        module(x, (b, ""))["parts"][1][0].sum().backward()
        assert x.grad is None
        assert b.grad is not None
        assert all(p.grad is None for p in module.parameters())


class Shared(nn.Module):
    """Returns its input, views of it, views of one tensor, a buffer, one tensor twice."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("table", torch.ones(2, 4))

    def forward(self, x):
        y = self.linear(x)
        return x, x[:, :2], *y.chunk(2, 1), y.flatten(), y, y, self.table


def test_results_share_no_memory_with_each_other_or_with_the_module():  # 36, 44
    net = Recompute(Shared().double())
    x = small_input(2, 4)
    y = net(x)
    assert y[5] is y[6]
    plain = twin(net)(small_input(2, 4))
    for ours, theirs in zip(y, plain, strict=True):
        assert torch.equal(ours, theirs)
    assert not net.module.table.requires_grad
    with torch.no_grad():
        for each in (*y[:6], y[7]):
            each.zero_()
    assert torch.equal(net.module.table, torch.ones(2, 4))
    assert torch.equal(x, small_input(2, 4))
    results = []
    for module in (net, twin(net)):
        x = small_input(2, 4)
        default_loss(*module(x)).backward()
        results.append(gradients_of(module, x=x))
    assert gradient_error(*results) < 1e-15  # the same terms, added in another order


def test_the_same_tensor_twice_stays_one_tensor():  # 38
    """Attention takes another path when query, key and value are one object."""
    attention = nn.MultiheadAttention(8, 2, dropout=0.1).double()
    net = Recompute(attention)
    results = []
    for module in (net, twin(net)):
        x = small_input(3, 2, 8)
        torch.manual_seed(0)
        y, weights = module(x, x, x)
        default_loss(y, weights).backward()
        results.append(gradients_of(module, x=x))
    assert_equal_gradients(*results)


LAYOUTS = {  # 13, 59
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[:1].expand(2, -1, -1, -1),
    "permuted": lambda x: x.permute(0, 1, 3, 2),
}


@pytest.mark.parametrize("view", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_of_the_input_is_right(view):
    assert_same_bits(Through(recomputed(stem()), view), small_input())


def test_results_of_any_layout_are_compared():
    class Permuted(nn.Module):
        def forward(self, x):
            return x.sin().permute(0, 3, 1, 2), x.cos().expand(3, *x.shape), x.exp()[..., ::2]

    assert_same_bits(Recompute(Permuted()), small_input())


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [nn.ReLU(inplace=True), nn.Hardtanh(inplace=True)], ids=repr)
def test_a_module_that_writes_to_its_input_is_refused(inplace):  # 49
    with pytest.raises(RuntimeError, match=r"Recompute\(Sequential\): the module writes to its input"):
        recomputed(inplace, nn.Conv2d(8, 8, 1))(small_input())
    assert_same_bits(recomputed(nn.Conv2d(8, 8, 1), inplace), small_input())


calls = itertools.count(1)
HIDDEN = {  # 70
    "python": lambda x: x * random.random(),
    "counter": lambda x: x * next(calls),
}


@pytest.mark.parametrize("check", ["error", "warn", None])
@pytest.mark.parametrize("fn", HIDDEN.values(), ids=HIDDEN)
def test_hidden_state_is_noticed(fn, check):
    net = Recompute(Through(nn.Conv2d(8, 8, 1).double(), fn), check=check)
    loss = default_loss(net(small_input()))
    if check == "error":
        with pytest.raises(InversionError, match="the module gave other values"):
            loss.backward()
    elif check == "warn":
        with pytest.warns(RuntimeWarning, match="the module gave other values"):
            loss.backward()
    else:
        loss.backward()


def test_nan_and_infinity_raise_no_false_alarm():  # 8
    net = recomputed(small_f(8))
    for value in (float("nan"), float("inf")):
        x = small_input()
        x.data[0, 0, 0, 0] = value
        default_loss(net(x)).backward()
        assert not x.grad.isfinite().all()


def test_what_is_no_module_and_no_check_is_refused():
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got function"):
        Recompute(F.relu)
    with pytest.raises(ValueError, match="expected check to be"):
        Recompute(nn.ReLU(), check="maybe")


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)
        )

    def forward(self, x):
        return torch.relu(x + self.f(x))


@pytest.mark.parametrize(
    "module",
    [Residual(), nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU())],
    ids=["residual", "layer"],
)
@pytest.mark.parametrize("requires_grad", [True, False])
def test_a_step_takes_no_more_than_with_the_checkpoint_of_torch(module, requires_grad):
    """It held the incoming gradient, one map more, until the last one was made."""
    x, head = torch.randn(2, 8, 64, 64, requires_grad=requires_grad), nn.Conv2d(8, 1, 1)

    def peak(body):
        def step():
            module.zero_grad()
            head(body(x)).square().mean().backward()

        return peak_bytes(step, before=step)

    ours, theirs = peak(Recompute(module)), peak(lambda x: checkpoint(module, x, use_reentrant=False))
    fingerprint = x.nbytes // 8
    assert ours <= theirs + fingerprint + HELD_BY_TORCH * x.nbytes
