"""The contract of a network, for every one of the registry, in a narrow edition where it has any.

A new network takes part by its line in `MODELS`; it gets a line in `NARROW` if its defaults are heavy.
"""

import inspect

import pytest
import torch
from torch.nn.modules.dropout import _DropoutNd

from revseg.files import save_weights
from revseg.losses import UpsampleCrossEntropy
from revseg.memory.policy import MEMORY_LEVELS
from revseg.models import MODELS, create_model, list_models, load_model
from tests.helpers import assert_same_result, relative_error, run_step
from tests.models import networks
from tests.models.networks import by_state_names

CLASSES = 5
NARROW = {
    "bisenet_resnet18": {"width": 8},
    "bisenet_xception39": {"width": 4},
    "cfpnet": {"widths": (4, 16, 32), "dilations": ((2,), (4, 8))},
    "cgnet": {"widths": (4, 16, 32), "blocks": (2, 3)},
    "dabnet": {"widths": (4, 16, 32), "dilations": ((2,), (4, 8))},
    "enet": {"widths": (4, 8, 16), "depth": 1, "repeats": 1},
    "enet_rev": {"widths": (8, 16, 32), "depth": 1, "repeats": 1},
    "erfnet": {"widths": (4, 8, 16), "depth": 1, "repeats": 1, "dilations": (2, 4)},
    "erfnet_rev": {"widths": (4, 8, 16), "depth": 1, "repeats": 1, "dilations": (2, 4)},
    "espnet": {"widths": (4, 8, 16), "p": 1, "q": 2},
    "espnet_rev": {"widths": (4, 10, 20), "p": 1, "q": 2},
    "fpenet": {"widths": (4, 8, 16), "blocks": (2, 2), "expansion": 2},
    "fssnet": {"widths": (8, 16, 32), "factorized": 1, "dilations": (2, 5)},
    "icnet": {"width": 8},
    "pspnet": {"width": 4, "depth": 50},
    "segnet": {"widths": (8, 8, 16, 16, 16)},
    "vnet": {"widths": (4, 8, 16)},
}
SIZE = (33, 49)  # of images
SIZES = {}  # of networks to which such an image means nothing
# Where rounding flips a ReLU that much hangs on, on one processor or another, in plain modules as often as in ours,
# outputs are compared alone.
FLIPPED = ("bisenet_xception39", "erfnet_rev", "icnet", "segnet")
UNUSED = {}  # prefixes of parameters that the network documents as unused

each_model = pytest.mark.parametrize("name", list_models())


def has(name, option):
    return option in inspect.signature(MODELS[name]).parameters


def network(name, **options):
    """The narrow network, always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create_model(name, CLASSES, **(NARROW.get(name, {}) | options))


def images(name, n=2, size=None):
    return networks.images(*(size or SIZES.get(name, SIZE)), n=n)


def labels_of(x):
    labels = torch.randint(0, CLASSES, (len(x), *x.shape[-2:]), generator=torch.Generator().manual_seed(1))
    labels[:, :3] = 255
    return labels


def step(model, x):
    """One training step of the loss."""
    labels, criterion = labels_of(x), UpsampleCrossEntropy()
    return by_state_names(run_step(model, x, lambda *heads: criterion(heads, labels)))


def scaled(name, factor, more=0):
    return tuple(factor * length + more for length in SIZES.get(name, SIZE))


@each_model
@pytest.mark.parametrize(("factor", "more"), [(1, 0), (1, 15), (2, -1)])
def test_logits_of_any_size_at_the_stride_of_the_model(name, factor, more):
    model = network(name).eval()
    size = scaled(name, factor, more)
    x = images(name, 1, size)
    for each in (x, x.float() / 255):
        logits = model(each)
        assert isinstance(logits, torch.Tensor)
        assert logits.shape == (1, CLASSES, *(-(-length // model.stride) for length in size))
        assert logits.dtype == torch.float32


@each_model
def test_training_gives_a_tuple_if_there_are_auxiliary_heads(name):
    x = images(name)
    logits = network(name)(x)
    assert isinstance(logits, tuple) == has(name, "aux")
    if has(name, "aux"):
        assert len(logits) > 1
        assert all(head.shape[:2] == (2, CLASSES) for head in logits)
        assert isinstance(network(name, aux=False)(x), torch.Tensor)
        assert len(network(name, aux=False).state_dict()) < len(network(name).state_dict())


@each_model
def test_state_does_not_depend_on_the_level(name):
    reference = network(name).state_dict()
    for memory in MEMORY_LEVELS:
        model = network(name, memory=memory)
        state = model.state_dict()
        assert list(state) == list(reference)
        assert all(torch.equal(state[key], value) for key, value in reference.items())
        changed = {key: value + 1 for key, value in reference.items()}
        model.load_state_dict(changed)
        assert all(torch.equal(value, changed[key]) for key, value in model.state_dict().items())


@each_model
def test_what_it_does_not_know_is_refused(name):
    with pytest.raises(ValueError, match=f"unknown hyperparameter 'widht' of {name}; choose one of .*memory"):
        network(name, widht=3)
    with pytest.raises(
        ValueError, match="unknown memory level 'low'; choose one of lowest, balanced, fastest"
    ):
        network(name, memory="low")
    with pytest.raises(ValueError, match="num_classes of at least 1, got 0"):
        create_model(name, 0, **NARROW.get(name, {}))
    with pytest.raises(ValueError, match=r"expected images \[N, 3, H, W\]"):
        network(name)(torch.zeros(1, 4, 33, 49))


@each_model
def test_outputs_and_buffers_are_bitwise_the_same_at_all_levels(name):
    x = images(name)
    fastest = step(network(name, memory="fastest"), x)
    for memory in ("lowest", "balanced"):
        found = step(network(name, memory=memory), x)
        for ours, expected in zip(found.outputs, fastest.outputs, strict=True):
            assert torch.equal(ours, expected)
        assert all(torch.equal(found.buffers[key], value) for key, value in fastest.buffers.items())
        with torch.no_grad():
            ours, expected = (network(name, memory=m).eval()(x) for m in (memory, "fastest"))
        assert torch.equal(ours, expected)


@each_model
def test_gradients_are_the_same_at_all_levels(name, monkeypatch):
    """In double precision; and those of PyTorch's own modules."""
    x = images(name)
    results = [step(network(name, memory=memory).double(), x) for memory in MEMORY_LEVELS]
    monkeypatch.setenv("REVSEG_KERNELS", "0")
    plain = step(network(name, memory="fastest").double(), x)
    for result in results:
        assert_same_result(result, plain, 1e-9)


@each_model
def test_gradients_are_as_near_to_float64_as_those_of_the_modules(name, monkeypatch):
    x = images(name)
    models = [network(name, memory=memory) for memory in MEMORY_LEVELS]
    plain, exact = network(name, memory="fastest"), network(name, memory="fastest").double()
    for module in (each for model in (*models, plain, exact) for each in model.modules()):
        if isinstance(module, _DropoutNd):
            module.p = 0.0  # masks differ between dtypes

    def compared(model):
        result = step(model, x)
        return dict(enumerate(result.outputs)) if name in FLIPPED else result.gradients

    ours = [compared(model) for model in models]
    monkeypatch.setenv("REVSEG_KERNELS", "0")
    truth = compared(exact)
    bound = 2 * relative_error(compared(plain), truth)
    for found in ours:
        assert relative_error(found, truth) <= bound


@pytest.mark.parametrize("name", [name for name in list_models() if has(name, "save_activations")])
def test_saving_activations_changes_no_number(name):
    x = images(name)
    ours, saved = network(name), network(name, save_activations=True)
    assert list(ours.state_dict()) == list(saved.state_dict())
    assert_same_result(step(ours.double(), x), step(saved.double(), x), 1e-9)


@each_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_parameter_learns(name, dtype):
    """A step of the loss gives every parameter a finite gradient, in float32 and under autocast to bfloat16."""
    model = network(name)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        result = step(model, images(name))
    unused = UNUSED.get(name, ())
    for parameter, gradient in result.gradients.items():
        if parameter == "input 0":
            assert gradient is None
        elif parameter.startswith(tuple(unused)) and unused:
            assert gradient is None, f"{parameter} is documented as unused"
        else:
            assert gradient is not None, parameter
            assert gradient.isfinite().all(), parameter
    assert all(buffer.isfinite().all() for buffer in result.buffers.values())


@each_model
def test_weights_file_rebuilds_the_model(name, tmp_path):
    model = network(name).eval()
    path = tmp_path / "weights.safetensors"
    description = {"model": name, "num_classes": CLASSES, "hyperparameters": NARROW.get(name, {})}
    save_weights(path, model.state_dict(), description)
    x = images(name, 1)
    for memory in MEMORY_LEVELS:
        assert torch.equal(load_model(path, memory=memory)(x), model(x))
