"""Predicted peaks are those that the allocator would see."""

import copy
import weakref

import pytest
import torch
from torch import nn

from revseg import AdditiveCoupling, Recompute, ReversibleSequence, reversible
from revseg.losses import UpsampleCrossEntropy
from revseg.memory import UnpredictableError, peak_bytes, predict, predicted_peak_bytes
from revseg.testing import plain_twin

SIZE = (2, 16, 64, 96)


class Residual(nn.Module):
    """One map used four times: autograd adds three gradients, in place."""

    def __init__(self, keep_gradient=False):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(16, 16, 1, bias=False) for _ in range(4))
        self.keep_gradient = keep_gradient

    def forward(self, x):
        x = x * 2
        if self.keep_gradient:
            x.retain_grad()
        return torch.stack([conv(x).tanh() for conv in self.convs]).sum(0)


def chain(depth=4, **options):
    def f():
        return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.PReLU(8))

    return ReversibleSequence([AdditiveCoupling(f(), f()) for _ in range(depth)], **options)


NETWORKS = {
    "residual": Residual,
    "residual whose gradient is kept": lambda: Residual(keep_gradient=True),
    "convolutions": lambda: nn.Sequential(
        *(nn.Conv2d(16, 16, 3, padding=1) for _ in range(4)), nn.ReLU(True)
    ),
    "reversible": chain,
    "reversible, exact": lambda: chain(exact=True),
    "reversible, keep=2": lambda: chain(keep=2),
    "reversible, saved": lambda: chain(save_activations=True),
    "recomputed": lambda: nn.Sequential(Recompute(chain(save_activations=True)), nn.Conv2d(16, 4, 1)),
}


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_the_prediction_is_the_measurement(network):
    def prepare():
        net, x = network(), torch.ones(SIZE, requires_grad=True)
        for tensor in (x, *net.parameters()):
            tensor.grad = torch.zeros_like(tensor)
        return lambda: net(x).square().mean().backward()

    predicted, measured = predicted_peak_bytes(prepare), peak_bytes(prepare())
    assert predicted == pytest.approx(measured, rel=0.03)


def test_random_state_is_left_alone():
    before = torch.get_rng_state()
    predicted_peak_bytes(lambda: lambda: torch.randn(10))
    assert torch.equal(torch.get_rng_state(), before)


# --- any module ---------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, channels=8):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return torch.relu(x + self.norm(self.conv(x)))


def resnet(depth=4):
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), *(Block() for _ in range(depth)), nn.Conv2d(8, 5, 1))


def measured(model, images, labels, loss, optimizer=None):
    def step():
        loss(model(images), labels).backward()
        if optimizer is not None:
            optimizer.step()
        model.zero_grad()

    return peak_bytes(step, before=step)


@pytest.mark.parametrize("optimizer", [None, "adam"])
def test_a_network_that_exists(optimizer):
    model, images = resnet(), torch.randn(2, 3, 64, 96)
    labels = torch.zeros(2, 32, 48, dtype=torch.int64)
    prediction = predict(model, images, nn.CrossEntropyLoss(), optimizer)
    real = None if optimizer is None else torch.optim.Adam(model.parameters())
    assert prediction.step_bytes == pytest.approx(
        measured(model, images, labels, nn.CrossEntropyLoss(), real), rel=0.03
    )
    assert prediction.peak == sum(prediction.parts.values()) == prediction.before + prediction.step_bytes


def test_the_model_is_left_as_it_was():
    model = resnet().eval()
    model[1].conv.weight.grad = torch.ones_like(model[1].conv.weight)
    before, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    images = torch.randn(2, 3, 16, 16)
    gradient, state = model[1].conv.weight.grad, torch.get_rng_state()
    predict(model, images, optimizer="sgd")
    assert not model.training
    assert model[1].calls == 0
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model[1].conv.weight.grad is gradient
    assert torch.equal(torch.get_rng_state(), state)


def test_no_weights_and_no_images_are_needed():
    with torch.device("meta"):
        model, images = nn.Sequential(nn.Linear(1 << 16, 1 << 16), nn.ReLU()), torch.empty(4, 1 << 16)
    prediction = predict(model, images, optimizer="adam")
    weights = 4 * (1 << 16) * ((1 << 16) + 1)
    assert prediction.parts["parameters"] == weights
    assert prediction.parts["optimizer"] == pytest.approx(2 * weights)
    assert prediction.peak > 4 * weights


def test_the_table_names_who_stands_at_the_peak():
    model = resnet()
    prediction = predict(model, torch.empty(2, 3, 64, 96), nn.CrossEntropyLoss(), "adam")
    kept = {row.name: row.kept for row in prediction.modules}
    assert (
        kept["1.conv"] == kept["1"] == 2 * 8 * 32 * 48 * 4
    )  # the input of batch norm, the output of the ReLU
    assert "1.conv Conv2d" in str(prediction)
    assert prediction.parts["inputs"] == 2 * 3 * 64 * 96 * 4 + 2 * 32 * 48 * 8


def test_inference_keeps_nothing():
    model, images = resnet(8), torch.empty(2, 3, 64, 96)
    trained, inferred = predict(model, images), predict(model, images, train=False)
    assert inferred.parts["kept activations"] == 0
    assert inferred.step_bytes < trained.step_bytes / 2

    def step():
        with torch.no_grad():
            model.eval()(images)

    assert inferred.step_bytes == pytest.approx(peak_bytes(step, before=step), rel=0.03)


def test_autocast():
    model, images = resnet(8), torch.empty(2, 3, 128, 96)
    whole, half = (
        predict(model, images, device="cuda"),
        predict(model, images, autocast=torch.bfloat16, device="cuda"),
    )
    assert half.parts["kept activations"] < whole.parts["kept activations"]


@pytest.mark.parametrize(
    "change",
    {
        "to": lambda net: net.to(torch.float64),
        "double": lambda net: net.double(),
        "channels_last": lambda net: net.to(memory_format=torch.channels_last),
        "deepcopy": copy.deepcopy,
        "reversible": lambda net: reversible(net, torch.zeros(1, 3, 16, 16))[0],
        "plain_twin": lambda net: plain_twin(ReversibleSequence([AdditiveCoupling(Block(4), Block(4))])),
    }.items(),
    ids=lambda item: item[0],
)
def test_what_prepare_makes_of_a_network(change):
    """`.to()` could not swap weights, deepcopy killed the process, `reversible` saw no values."""
    name, convert = change
    channels = 8 if name == "plain_twin" else 3

    def prepare():
        net = convert(resnet())
        dtype = next(net.parameters()).dtype

        def step():
            net(torch.ones(2, channels, 64, 96, dtype=dtype)).sum().backward()
            net.zero_grad(set_to_none=False)

        return step

    step = prepare()
    assert predicted_peak_bytes(prepare) == pytest.approx(peak_bytes(step, before=step), rel=0.03)


def test_networks_that_exist_in_prepare():
    net, x = nn.Sequential(Block(), Block()), torch.ones(2, 8, 64, 96, requires_grad=True)
    state = copy.deepcopy(net.state_dict())
    step = lambda: net(x).sum().backward()
    predicted = predicted_peak_bytes(lambda: step)
    assert x.grad is None
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())
    assert predicted == pytest.approx(peak_bytes(step, before=step), rel=0.03)


@pytest.mark.parametrize("none", [True, False])
def test_gradients_that_are_freed_in_the_step(none):
    def prepare():
        net = nn.Sequential(*(nn.Linear(256, 256) for _ in range(6)))

        def step():
            y = net(torch.ones(4, 256))
            net.zero_grad(set_to_none=none)
            y.sum().backward()

        return step

    step = prepare()
    assert predicted_peak_bytes(prepare) == pytest.approx(peak_bytes(step, before=step), rel=0.03)


def test_numbers_that_follow_from_constants_can_be_read():
    """Drop path rates: `[x.item() for x in torch.linspace(0, rate, depth)]`."""

    def prepare():
        rates = [x.item() for x in torch.linspace(0, 0.5, 4)]
        net = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Dropout(rate)) for rate in rates))
        assert rates[3] == 0.5
        return lambda: net(torch.ones(2, 8)).sum().backward()

    assert predicted_peak_bytes(prepare) > 0


@pytest.mark.parametrize(
    "look",
    [lambda y: y.sum().item(), lambda y: bool(y.isnan().any()), lambda y: y[y > 0], lambda y: y.nonzero()],
)
def test_who_looks_at_values_is_told_the_line(look):
    class Looks(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            look(y)
            return y

    with pytest.raises(UnpredictableError, match=r"test_predict.py:\d+: `.*lambda y"):
        predict(Looks(2, 2), torch.ones(2, 2))


def test_tied_and_shared_weights_count_once():
    net = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    net[1].weight = net[0].weight
    assert predict(net, torch.ones(1, 64)).parts["parameters"] == 64 * 64 * 4


def test_recurrent_layers_keep_their_weights():
    net = nn.LSTM(8, 8)
    weights = net._flat_weights
    predict(net, torch.ones(3, 2, 8), lambda y: y[0].sum())
    assert net._flat_weights is weights
    assert all(a is b for a, b in zip(weights, net.parameters(), strict=True))
    assert all(p.grad is None for p in weights)


def test_several_arguments():
    class Two(nn.Module):
        def forward(self, x, *, mask):
            return {"out": x * mask}

    x = torch.ones(4, 256, requires_grad=True)
    both = {"x": x, "mask": torch.ones(256)}
    assert predict(Two(), both, lambda y: y["out"].sum()).parts["inputs"] == x.nbytes + 1024
    assert x.grad is None


def test_bad_input():
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got function"):
        predict(lambda x: x, torch.ones(1))
    with pytest.raises(ValueError, match=r"unknown optimizer 'adm'; choose one of adam, adamw, rmsprop, sgd"):
        predict(nn.Linear(1, 1), torch.ones(1, 1), optimizer="adm")


def test_nothing_stays():
    model = resnet()
    kept = weakref.ref(
        predict(model, torch.ones(1, 3, 8, 8), UpsampleCrossEntropy(), torch.optim.Adam(model.parameters()))
    )
    assert kept() is None
    assert "_apply" not in vars(model)
    assert copy.deepcopy(model.double())[0].weight.dtype == torch.float64
