"""`Stack` and what belongs to its modules: state dicts, hooks, parametrizations, copies, transforms, compilers."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules import module as hooks_of_all
from torch.nn.utils import parametrizations, prune

from revseg.layers.blocks import ConvBNAct, ImageConvBNAct
from revseg.layers.stack import Stack
from revseg.models.vnet import CPP
from tests.helpers import assert_same_result, default_loss, gradient_error, run_step, small_input
from tests.layers.stack_twins import Plain, by_name, layer, small_stack

SHAPE = (2, 8, 9, 7)


def test_state_is_that_of_the_three_modules():
    block = ConvBNAct(8, 6, 3)
    plain = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6, eps=1e-3), nn.PReLU(6))
    assert list(block.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(block.state_dict())
    x = small_input(*SHAPE, dtype=torch.float32)
    torch.testing.assert_close(block(x), plain(x))
    block.load_state_dict(plain.state_dict())
    torch.testing.assert_close(block.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("name", ["", "0", "0.0", "0.1", "0.2", "1", "1.0", "1.0.0", "1.1.1", "1.1.2"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_of_every_module_fire(name, kind):
    stack, fired = small_stack(), []
    getattr(stack.get_submodule(name), f"register_{kind}_hook")(lambda *args: fired.append(1))
    x = small_input(*SHAPE)
    default_loss(stack(x)).backward()
    assert fired == [1]
    plain = small_stack()
    default_loss(Plain(plain)(z := small_input(*SHAPE))).backward()
    torch.testing.assert_close(x.grad, z.grad)


@pytest.mark.parametrize("name", ["norm", "norm.0", "norm.1", "pointwise", "pools", "pools.1"])
def test_hooks_inside_of_cpp_fire(name, runs):
    cpp, fired = CPP(3, 8), []
    cpp.get_submodule(name).register_forward_hook(lambda *args: fired.append(1))
    cpp(torch.zeros(2, 3, 9, 9))
    assert runs == []
    assert len(fired) == (name != "pools")  # a list is never called


@pytest.mark.parametrize(
    "register",
    [
        hooks_of_all.register_module_forward_hook,
        hooks_of_all.register_module_forward_pre_hook,
        hooks_of_all.register_module_full_backward_hook,
        hooks_of_all.register_module_full_backward_pre_hook,
    ],
)
def test_hooks_of_all_modules_fire(register):
    stack, fired = small_stack(), []
    handle = register(lambda module, *args: fired.append(type(module)) or None)
    try:
        default_loss(stack(small_input(*SHAPE))).backward()
    finally:
        handle.remove()
    assert fired.count(nn.Conv2d) == fired.count(nn.BatchNorm2d) == 3


def test_a_hook_can_change_what_comes_out(runs):
    stack = small_stack()
    expected = stack(small_input(*SHAPE)) * 2
    stack[1].register_forward_hook(lambda module, args, z: z * 2)
    torch.testing.assert_close(stack(small_input(*SHAPE)), expected)
    stack[1][0].register_forward_pre_hook(lambda module, args: (args[0] * 0,))
    assert not torch.allclose(stack(small_input(*SHAPE)), expected)
    assert runs == [3, 1, 2, 1, 1, 1]


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "change",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
    ],
    ids=["weight_norm", "spectral_norm", "old weight_norm", "old spectral_norm", "prune"],
)
def test_changed_weights_take_the_plain_path(change, runs):
    stack = Stack(layer(8, 6), layer(6, 6), layer(6, 5)).double()
    plain = Plain(stack)
    results = []
    for module, inner in ((stack, stack), (plain, plain.stack)):
        torch.manual_seed(0)  # spectral norm draws
        change(inner[1][0])
        results.append(run_step(module, small_input(*SHAPE)))
        results[-1].gradients = by_name(results[-1].gradients)
        results[-1].buffers = by_name(results[-1].buffers)
    assert_same_result(*results, 1e-9)
    assert runs == [1, 1]


def test_weights_may_be_ordinary_attributes():
    """As in the replicas of `nn.DataParallel`, whose `parameters()` are empty."""
    stack, x = Stack(layer(8, 6), layer(6, 5)).double(), small_input(*SHAPE)
    expected = Plain(stack)(x)
    weight = stack[0][0].weight
    del stack[0][0].weight
    stack[0][0].weight = weight * 1
    z = stack(x)
    torch.testing.assert_close(z, expected)
    z.sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_stacks_of_their_own(again, runs):
    stack = Stack(ImageConvBNAct(3, 6), layer(6, 5)).double()
    images = torch.randint(0, 256, (2, 3, 9, 7), dtype=torch.uint8)
    twin = again(stack)
    ours, theirs = run_step(stack, images), run_step(twin, images)
    assert gradient_error(ours.gradients, theirs.gradients) == 0
    assert all(torch.equal(a, b) for a, b in zip(stack.buffers(), twin.buffers(), strict=True))
    assert runs == [2, 2]


def test_function_transforms_take_the_plain_path(runs):
    stack, x = small_stack().eval(), small_input(*SHAPE, requires_grad=False)

    def loss(x):
        return default_loss(stack(x))

    runs.clear()
    plain = torch.autograd.grad(loss(z := small_input(*SHAPE)), z)[0]
    assert runs == [3]
    torch.testing.assert_close(torch.func.grad(loss)(x), plain)
    ones = torch.ones_like(x)
    torch.testing.assert_close(torch.func.jvp(loss, (x,), (ones,))[1], plain.sum())
    many = small_input(3, *SHAPE, requires_grad=False)
    torch.testing.assert_close(torch.func.vmap(stack)(many), torch.stack([stack(each) for each in many]))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, ones)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent, plain.sum())
    assert runs == [3] * 4


def test_forward_mode_by_a_parameter_is_right_or_refused():
    stack, x = small_stack().eval(), small_input(*SHAPE, requires_grad=False)
    weight = stack[0][0].weight
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(weight, torch.ones_like(weight))
        with pytest.raises((NotImplementedError, RuntimeError), match=r"forward mode AD|jvp"):
            torch.func.functional_call(stack, {"0.0.weight": dual}, x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_traces_and_exports_hold_ordinary_operations(runs):
    stack, x = (
        small_stack(torch.float32).eval(),
        small_input(*SHAPE, dtype=torch.float32, requires_grad=False),
    )
    traced = torch.jit.trace(stack, x, check_trace=False)  # the check would run the stack itself
    exported = torch.export.export(stack, (x,)).module()
    assert runs == []
    other = small_input(*SHAPE, dtype=torch.float32, seed=1, requires_grad=False)
    expected = stack(other)
    torch.testing.assert_close(traced(other), expected)
    torch.testing.assert_close(exported(other), expected)


def test_compiled_it_gives_the_same():
    stack = small_stack()
    ours, plain = run_step(torch.compile(stack, backend="eager"), small_input(*SHAPE)), None
    plain = run_step(Plain(small_stack()), small_input(*SHAPE))
    torch.testing.assert_close(ours.outputs, plain.outputs)
    torch.testing.assert_close([*ours.gradients.values()], [*plain.gradients.values()])


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_tensors_without_values(device):
    """Shapes are found, and gradients too, as memory predictions need them."""
    with FakeTensorMode() if device == "fake" else torch.device("meta"):
        stack = Stack(layer(8, 6, stride=2), layer(6, 5), CPP(5, 9))
        x = torch.empty(2, 8, 33, 31, requires_grad=True)
        z = stack(x)
        z.sum().backward()
    assert z.shape == (2, 9, 9, 8)
    assert x.grad.shape == x.shape
    assert all(p.grad.shape == p.shape for p in stack.parameters())
