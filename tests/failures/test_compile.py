"""Compilers and export: the saving is kept, or the plain path is taken, or an error says why not."""

import copy
import io

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from revseg import (
    AdditiveCoupling,
    OneSidedCoupling,
    ReversibleSequence,
)
from tests.helpers import (
    all_couplings,
    assert_same_result,
    assert_same_step,
    default_loss,
    gradient_error,
    gradients_of,
    run_step,
    small_f,
    small_input,
    small_sequence,
    twin,
)


def network(body=None):
    """A stem, a reversible body, a head; float64."""
    torch.manual_seed(0)
    body = body or all_couplings()
    return nn.Sequential(nn.Conv2d(3, 8, 1), body, nn.Conv2d(8, 2, 1)).double()


def image(seed=0, dtype=torch.float64):
    return small_input(2, 3, 6, 5, seed=seed, dtype=dtype, requires_grad=False)


def kept_for_backward(net, run):
    """How many numbers autograd packs, parameters not counted."""
    parameters = {p.data_ptr() for p in net.parameters()}
    sizes = []

    def pack(t):
        if t.data_ptr() not in parameters:
            sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run(image())
    return sum(sizes)


@pytest.fixture
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


BACKENDS = ["eager", "aot_eager"]


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_network_keeps_the_saving_and_the_numbers(backend):
    """86: the compiler breaks its graph at the sequence, it does not store activations."""
    kept = {}
    for depth in (1, 4):
        net = network(small_sequence(depth=depth))
        compiled = torch.compile(net, backend=backend)
        expected = run_step(twin(net), image())
        found = run_step(compiled, image())
        found.gradients = {name.removeprefix("_orig_mod."): g for name, g in found.gradients.items()}
        found.buffers = {name.removeprefix("_orig_mod."): b for name, b in found.buffers.items()}
        assert_same_result(found, expected)
        kept[depth] = kept_for_backward(net, compiled)
        torch.compiler.reset()
    plain = twin(net)
    assert kept[4] == kept[1]
    assert kept[4] < kept_for_backward(plain, plain) / 4


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiling_everything_into_one_graph_is_an_error_that_names_the_reason():
    """86: fullgraph=True allows no break."""
    compiled = torch.compile(network(), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"(?i)reversible"):
        compiled(image())


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gradients_and_as_plain_twin_everything_is_one_graph(backend):
    """86: for inference nothing is lost."""
    net = network()
    plain = twin(net)
    compiled = torch.compile(net.eval(), backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(image()), net(image()))
    torch.testing.assert_close(
        torch.compile(plain, backend=backend, fullgraph=True)(image()), network()(image())
    )


class Function(nn.Module):
    """A module of our own: torch does not compile an `nn.Sequential` in place."""

    def __init__(self):
        super().__init__()
        self.body = small_f().double()

    def forward(self, x):
        return torch.tanh(self.body(x))


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("hooks", [False, True], ids=["", "hooks"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_functions_inside_the_engine_give_plain_gradients(backend, hooks):
    """87: batch norm inside them counts once; after two steps nothing new is compiled."""
    torch.manual_seed(0)
    ours = ReversibleSequence(AdditiveCoupling(Function(), Function()), OneSidedCoupling(Function()))
    plain = twin(ours)
    counter = CompileCounterWithBackend(backend)
    for f in (ours[0].f, ours[0].g, ours[1].f):
        f.compile(backend=counter)
    for p in ours.parameters() if hooks else ():
        p.register_hook(lambda g: g)
    for seed in range(2):
        assert_same_step(ours, plain, small_input(seed=seed))
    frames = counter.frame_count
    assert frames
    for seed in range(2, 5):
        assert_same_step(ours, plain, small_input(seed=seed))
    assert counter.frame_count == frames


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_function_with_dropout_keeps_its_masks(backend):
    """87: as an `OptimizedModule`, whose parameters have other names."""
    torch.manual_seed(0)
    f, g = (nn.Sequential(small_f(), nn.Dropout(0.3)).double() for _ in range(2))
    ours = ReversibleSequence(AdditiveCoupling(*(torch.compile(each, backend=backend) for each in (f, g))))
    plain = ReversibleSequence(AdditiveCoupling(*copy.deepcopy((f, g))), save_activations=True)
    expected, found = run_step(plain, small_input()), run_step(ours, small_input())
    found.gradients = {name.replace("._orig_mod", ""): g for name, g in found.gradients.items()}
    found.buffers = {name.replace("._orig_mod", ""): b for name, b in found.buffers.items()}
    assert_same_result(found, expected)


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_training_step_leaves_the_engine_alone():
    """86: a backward pass inside a compiled function; the engine's own frames are not compiled, over and over."""
    found = []
    for net in (small_sequence(), small_sequence(save_activations=True)):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

        @torch.compile(backend="eager")
        def step(x, net=net, optimizer=optimizer):
            optimizer.zero_grad()
            loss = default_loss(net(x))
            loss.backward()
            optimizer.step()

        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            for seed in range(2):
                step(small_input(seed=seed, requires_grad=False))
        found.append(dict(net.state_dict()))
        torch.compiler.reset()
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_autograd_is_right_or_refused():
    """86: torch refuses it for functions that free their incoming gradient."""
    net = small_sequence()
    expected = run_step(twin(net), small_input()).gradients
    x = small_input()
    loss = default_loss(net(x))
    try:
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            loss.backward()
    except RuntimeError as error:
        if "not supported with compiled autograd" not in str(error):
            raise
    else:
        assert gradient_error(gradients_of(net, **{"input 0": x}), expected) <= 1e-9


@pytest.mark.parametrize("where", ["fake", "meta"])
def test_shapes_can_be_followed_without_numbers(where):
    """88: memory is predicted so, for sizes that no machine here could hold."""
    with FakeTensorMode() if where == "fake" else torch.device("meta"):
        net = ReversibleSequence(AdditiveCoupling(small_f(), small_f()), OneSidedCoupling(small_f()))
        x = torch.randn(2, 8, 6, 5, requires_grad=True)
        net(x).sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad.shape == p.shape for p in net.parameters())


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_an_exported_network_is_the_plain_one(training, strict):
    """88: torch.export follows the operations, and its module trains."""
    torch.compiler.reset()
    net = network().train(training)
    x = image()
    exported = torch.export.export(copy.deepcopy(net), (x,), strict=strict).module()
    torch.testing.assert_close(exported(x), twin(net)(x))
    loss = default_loss(exported(x))
    loss.backward()
    expected = run_step(twin(net), x).gradients
    found = gradients_of(exported)
    assert gradient_error(found, {name: expected[name] for name in found}) <= 1e-9


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("options", [{}, {"per_block": True}], ids=str)
def test_a_traced_network_is_the_plain_one(options):
    """88: jit.trace records the operations of the blocks, not an opaque function."""
    net = network(small_sequence(**options)).eval()
    traced = torch.jit.trace(net, (image(),))
    assert "convolution" in str(traced.inlined_graph)
    torch.testing.assert_close(traced(image(seed=1)), net(image(seed=1)))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(image(seed=2)), net(image(seed=2)))
