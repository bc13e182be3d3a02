"""`Recompute` under contexts, checkpoints, transforms, threads and compilers; against plain autograd.

The number in a comment is the line of the list of failures the tests were written from.
"""

import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from revseg import Recompute
from revseg.memory import saved_bytes
from tests.helpers import (
    assert_equal_gradients,
    assert_same_gradients,
    default_loss,
    gradients_of,
    recomputed,
    run_step,
    small_f,
    small_input,
    twin,
)


def both(steps, net=None):
    """What `steps(net)` returns for the network and for its plain twin, from one seed."""
    net = recomputed() if net is None else net
    results = []
    for module in (net, twin(net)):
        torch.manual_seed(5)
        results.append(steps(module))
    return results


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize(
    "context",
    [
        lambda: torch.autograd.detect_anomaly(),
        lambda: torch.autograd.graph.save_on_cpu(),
        lambda: torch.autograd.graph.saved_tensors_hooks(
            lambda x: x.numpy(force=True).copy(), torch.from_numpy
        ),
    ],
    ids=["anomaly", "save_on_cpu", "hooks"],
)
def test_contexts_change_nothing(context):  # 51, 52
    net = recomputed()
    plain = run_step(twin(net), small_input())
    with context():
        ours = run_step(net, small_input())
    assert_equal_gradients(ours.gradients, plain.gradients)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_and_inside_is_right(reentrant):  # 53
    def steps(net):
        x = small_input()
        default_loss(checkpoint(net, x, use_reentrant=reentrant)).backward()
        return gradients_of(net, x=x)

    net = recomputed()
    net[1].module[1] = nn.Identity()  # the checkpoint would count the batch twice
    assert_equal_gradients(*both(steps, net))

    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = small_f(8)

        def forward(self, x):
            return checkpoint(self.layers, x, use_reentrant=False)

    net = Recompute(Inside()).double()
    plain = run_step(nn.Sequential(net.module.layers), small_input())
    assert_same_gradients(
        dict(enumerate(run_step(net, small_input()).gradients.values())),
        dict(enumerate(plain.gradients.values())),
    )


def test_functional_call_differentiates_by_the_parameters_it_was_given():  # 54
    def steps(net):
        given = {name: (2 * p).detach().requires_grad_() for name, p in net.named_parameters()}
        x = small_input()
        default_loss(functional_call(net, given, x)).backward()
        assert all(p.grad is None for p in net.parameters())
        return {name: p.grad for name, p in given.items()} | {"x": x.grad}

    assert_equal_gradients(*both(steps))


def test_function_transforms_take_the_plain_path():  # 55
    net = recomputed().eval()

    def fn(x):
        return default_loss(net(x))

    x = small_input(requires_grad=False)
    plain = torch.autograd.grad(fn(z := small_input()), z)[0]
    torch.testing.assert_close(torch.func.grad(fn)(x), plain)
    _, dy = torch.func.jvp(fn, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(dy, plain.sum())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(fn(dual)).tangent, plain.sum())


def test_forward_mode_by_a_parameter_is_refused():  # 55
    net = recomputed().eval()
    name = "1.module.0.weight"
    with torch.autograd.forward_ad.dual_level():
        weight = net.get_parameter(name)
        dual = torch.autograd.forward_ad.make_dual(weight, torch.ones_like(weight))
        with pytest.raises(NotImplementedError, match="forward mode AD"):
            functional_call(net, dict(net.named_parameters()) | {name: dual}, small_input())


def test_batched_gradients_are_right():  # 55
    net = recomputed().eval()
    directions = small_input(3, 2, 2, 6, 5, requires_grad=False)
    found = []
    for module in (net, twin(net)):
        x = small_input()
        found.append(torch.autograd.grad(module(x), x, directions, is_grads_batched=True)[0])
    torch.testing.assert_close(*found)


def test_inference_mode_and_no_grad_keep_nothing():  # 56, 57
    net = recomputed().eval()
    expected = net(small_input()).detach()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            y = net(small_input(requires_grad=False))
            assert not y.requires_grad
            assert torch.equal(y, expected)


@pytest.mark.parametrize("backward", [False, True])
def test_a_graph_is_freed_without_the_garbage_collector(backward):  # 58
    seen = []

    class Watched(nn.Module):
        def forward(self, x):
            seen.append(weakref.ref(h := x.sin()))
            return h.tanh()

    gc.collect()
    gc.disable()
    try:
        y = Recompute(nn.Sequential(nn.Conv2d(8, 8, 1), Watched())).double()(small_input())
        use = weakref.ref(y.grad_fn.use)
        if backward:
            y.sum().backward()
        del y
        assert use() is None
        assert not any(ref() is not None for ref in seen)
    finally:
        gc.enable()


def test_four_threads_add_up():  # 90
    net = recomputed()
    net[1].module[1] = nn.Identity()  # whose statistics depend on the order of the threads
    net[1].module[3] = nn.Identity()
    plain = twin(net)
    for module in (net, plain):
        threads = [
            threading.Thread(target=lambda s=s, m=module: default_loss(m(small_input(seed=s))).backward())
            for s in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert_same_gradients(gradients_of(net), gradients_of(plain), tolerance=1e-13)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "follow",
    [lambda net, x: torch.export.export(net, (x,)).module(), torch.jit.trace],
    ids=["export", "trace"],
)
def test_export_and_tracing_take_the_plain_path(follow):  # 88
    net = recomputed().eval()
    x = small_input(requires_grad=False)
    assert torch.equal(follow(net, x)(x), net(x))


def test_a_compiled_network_keeps_the_saving_and_the_numbers():  # 86
    torch.compiler.reset()
    net = recomputed(*(small_f(8) for _ in range(4)))
    compiled = torch.compile(net, backend="aot_eager")
    plain = run_step(twin(net), small_input())
    ours = run_step(compiled, small_input())
    assert_same_gradients(
        {name.removeprefix("_orig_mod."): g for name, g in ours.gradients.items()}, plain.gradients, 1e-13
    )
    assert saved_bytes(lambda: compiled(small_input())) == saved_bytes(lambda: net(small_input()))


def test_without_gradients_and_as_plain_twin_everything_is_one_graph():  # 86
    torch.compiler.reset()
    net = recomputed().eval()
    expected = net(x := small_input())
    assert torch.equal(torch.compile(twin(net), backend="eager", fullgraph=True)(x), expected)
    with torch.no_grad():
        assert torch.equal(torch.compile(net, backend="eager", fullgraph=True)(x), expected)
