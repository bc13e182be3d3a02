"""The contract of a network, for every one of the registry, in a narrow edition where it has any.

A new network takes part by its line in `MODELS`; it gets a line in `NARROW` if its defaults are heavy.
"""

import inspect
from functools import partial

import pytest
import torch
from torch.nn.modules.dropout import _DropoutNd

from revseg.files import save_weights
from revseg.layers.bands.cut import Bands
from revseg.layers.images import IMAGENET, Normalization, normalize_images
from revseg.losses import UpsampleCrossEntropy
from revseg.memory import saved_bytes
from revseg.models import MODELS, create_model, list_models, load_model
from revseg.models.policy import MEMORY_LEVELS, MemoryPolicy
from tests.helpers import assert_same_result, relative_error, run_step
from tests.models import networks
from tests.models.networks import by_state_names

CLASSES = 5
SMALL_BANDS = MemoryPolicy(stages=True, bands=Bands(bytes=2000))  # the least level, cut here too
LEVELS = (SMALL_BANDS, *(level for level in MEMORY_LEVELS if level != "least"))
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
COUNTS = {  # parameters, and 10^9 operations of one image of 1024 x 2048, of the networks as they are published
    "bisenet_resnet18": (13_494_777, 207.4),
    "bisenet_xception39": (1_842_289, 55.5),
    "cfpnet": (272_147, 41.2),
    "cgnet": (496_306, 54.1),
    "dabnet": (756_643, 81.8),
    "enet": (364_311, 31.4),
    "enet_rev": (371_115, 31.4),
    "erfnet": (2_064_191, 212.8),
    "erfnet_rev": (2_076_223, 212.8),
    "espnet": (363_462, 37.4),
    "espnet_rev": (356_678, 36.7),
    "fpenet": (361_687, 33.8),
    "fssnet": (199_603, 23.4),
    "icnet": (6_707_321, 58.1),
    "pspnet": (68_072_166, 4186.9),
    "segnet": (29_453_971, 2604.4),
    "vnet": (162_272, 12.7),
}
SIZE = (33, 49)  # of images
# Where rounding flips a ReLU that much hangs on, on one processor or another, in plain modules as often as in ours,
# outputs are compared alone.
FLIPPED = ("bisenet_xception39", "erfnet_rev", "icnet", "segnet")
each_model = pytest.mark.parametrize("name", list_models())


def has(name, option):
    return option in inspect.signature(MODELS[name]).parameters


def network(name, **options):
    """The narrow network, always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create_model(name, **({"num_classes": CLASSES} | NARROW.get(name, {}) | options))


def stirred_network(name, **options):
    """The same, away from the simple values that batch norms begin with."""
    return networks.made(partial(network, name), **options)


def images(n=2, size=SIZE):
    return networks.images(*size, n=n)


def labels_of(x, classes=CLASSES):
    labels = torch.randint(0, classes, (len(x), *x.shape[-2:]), generator=torch.Generator().manual_seed(1))
    labels[:, :3] = 255
    return labels


def step(model, x, classes=CLASSES):
    """One training step of the loss."""
    labels, criterion = labels_of(x, classes), UpsampleCrossEntropy()
    return by_state_names(run_step(model, x, lambda *heads: criterion(heads, labels)))


@each_model
def test_parameters_and_operations_are_the_published(name):
    make = partial(create_model, name)
    assert (networks.count_of(make), round(networks.gflops(make), 1)) == COUNTS[name]


@each_model
@pytest.mark.parametrize("size", [(33, 49), (48, 64), (97, 130), (16, 17), (1, 1)], ids=str)
def test_logits_of_any_size_at_the_stride_of_the_model(name, size):
    """Bytes give what the same images give as normalised floats."""
    model = network(name).eval()
    x = images(1, size)
    with torch.no_grad():
        logits = model(x)
        assert logits.shape == (1, CLASSES, *(-(-length // model.stride) for length in size))
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, model(normalize_images(x)), rtol=1e-4, atol=1e-5)


@each_model
def test_any_channels_of_images_and_one_class(name):
    """A normalization that is set reaches every layer that reads images."""
    model, x = network(name, in_channels=2, num_classes=1), torch.randint(0, 256, (2, 2, *SIZE)).byte()
    found = step(model, x, classes=2)
    assert found.gradients.pop("input 0") is None
    assert all(gradient.isfinite().all() for gradient in found.gradients.values())
    model.eval()
    with torch.no_grad():
        before = model(x)
        assert before.shape[:2] == (2, 1)
        model.normalization = Normalization((0.1, 0.3), (1.0, 0.8), flipped=True)
        torch.testing.assert_close(model(x), model(model.normalization(x)), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(model(x), before)
    with pytest.raises(ValueError, match="expected a normalization of 2 channels, got one of 3"):
        model.normalization = IMAGENET
    with pytest.raises(ValueError, match=r"expected images \[N, 2, H, W\], got shape \[2, 3, 33, 49\]"):
        model(images())


@each_model
def test_one_pixel_cannot_be_trained_on_and_says_what_to_do(name):
    with pytest.raises(
        ValueError, match=r"left of images \[1, 3, 1, 1\].*at least two images.*--batch 2.*--size"
    ):
        network(name)(images(1, (1, 1)))


@each_model
def test_each_level_keeps_less(name):
    """Between forward and backward pass; of the network as it is published."""

    def kept(memory):
        with torch.device("meta"):
            model, x = create_model(name, memory=memory), torch.empty(1, 3, 64, 64, dtype=torch.uint8)
        return saved_bytes(lambda: model(x))

    least, lowest, balanced, fastest = map(kept, MEMORY_LEVELS)
    assert least <= lowest
    assert lowest < 0.8 * balanced
    assert balanced < 0.55 * fastest


@each_model
def test_training_gives_a_tuple_if_there_are_auxiliary_heads(name):
    x = images()
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
        ValueError, match="unknown memory level 'low'; choose one of least, lowest, balanced, fastest"
    ):
        network(name, memory="low")
    with pytest.raises(ValueError, match="num_classes of at least 1, got 0"):
        network(name, num_classes=0)
    with pytest.raises(ValueError, match="in_channels of at least 1, got 0"):
        network(name, in_channels=0)
    with pytest.raises(TypeError, match="expected a memory level or a MemoryPolicy, got int"):
        network(name, memory=3)
    with pytest.raises(ValueError, match=r"expected images \[N, 3, H, W\]"):
        network(name)(torch.zeros(1, 4, 33, 49))


@each_model
@pytest.mark.parametrize(("n", "size"), [(2, SIZE), (1, (64, 96))], ids=str)
def test_outputs_and_buffers_are_bitwise_the_same_at_all_levels(name, n, size):
    x = images(n, size)
    fastest = step(stirred_network(name, memory="fastest"), x)
    for memory in ("lowest", "balanced"):
        found = step(stirred_network(name, memory=memory), x)
        for ours, expected in zip(found.outputs, fastest.outputs, strict=True):
            assert torch.equal(ours, expected)
        assert all(torch.equal(found.buffers[key], value) for key, value in fastest.buffers.items())
        with torch.no_grad():
            ours, expected = (stirred_network(name, memory=m).eval()(x) for m in (memory, "fastest"))
        assert torch.equal(ours, expected)


@each_model
def test_gradients_are_the_same_at_all_levels(name, monkeypatch):
    """In double precision; and those of PyTorch's own modules."""
    x = images()
    results = [step(stirred_network(name, memory=memory).double(), x) for memory in LEVELS]
    monkeypatch.setenv("REVSEG_KERNELS", "0")
    plain = step(stirred_network(name, memory="fastest").double(), x)
    for result in results:
        assert_same_result(result, plain, 1e-9)


@each_model
def test_gradients_are_as_near_to_float64_as_those_of_the_modules(name, monkeypatch):
    x = images()
    models = [network(name, memory=memory) for memory in LEVELS]
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
    x = images()
    ours, saved = network(name), network(name, save_activations=True)
    assert list(ours.state_dict()) == list(saved.state_dict())
    assert_same_result(step(ours.double(), x), step(saved.double(), x), 1e-9)


@each_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_parameter_learns(name, dtype):
    """A step of the loss gives every parameter a finite gradient, in float32 and under autocast to bfloat16."""
    model = network(name)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        result = step(model, images())
    for parameter, gradient in result.gradients.items():
        if parameter == "input 0":
            assert gradient is None
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
    x = images(1)
    for memory in MEMORY_LEVELS:
        assert torch.equal(load_model(path, memory=memory)(x), model(x))
