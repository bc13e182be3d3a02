"""A fitted network: less memory, as planned, and the same numbers to the bit."""

import copy
import gc
import pickle
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from revseg import fit
from revseg.memory import Plan, peak_bytes, predict
from revseg.memory.apply import Part, apply_parts
from revseg.memory.fit import Search
from revseg.memory.step import Step
from tests.memory.nets import NETS, ResNet, Transformer, UNet, conv_norm

LOSS = nn.CrossEntropyLoss()
SIZE = (2, 3, 64, 96)


def trained(model, images, labels):
    """Loss, gradients and buffers after a step."""
    model = copy.deepcopy(model)
    torch.manual_seed(1)
    loss = LOSS(model(images), labels)
    loss.backward()
    gradients = [torch.zeros(()) if p.grad is None else p.grad for p in model.parameters()]
    return [loss, *gradients, *model.buffers()]


def measured(model, images, labels):
    def step():
        model.loss(images, labels).backward()
        model.zero_grad()

    return peak_bytes(step, before=step)


@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_a_fitted_network_is_the_network(net):
    model, images = net(), torch.randn(SIZE)
    labels = torch.randint(0, 5, (2, *SIZE[2:]))
    state = copy.deepcopy(model.state_dict())
    fitted = fit(model, images, LOSS, time=3)
    assert fitted.plan.parts
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert list(fitted.state_dict()) == list(state)
    assert [name for name, _ in fitted.named_modules()] == [name for name, _ in model.named_modules()]
    for ours, plain in zip(trained(fitted, images, labels), trained(model, images, labels), strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("net", [UNet, Transformer])
def test_the_plan_is_the_measurement(net):
    model, images = net(), torch.randn(4, 3, 96, 96)
    labels = torch.randint(0, 5, (4, 96, 96))
    fitted = fit(model, images, LOSS, time=3)
    prediction = predict(fitted, images, LOSS, by_bands=True)
    assert fitted.plan.by_bands
    assert prediction.peak == fitted.plan.peak < fitted.plan.before
    assert prediction.step_bytes == pytest.approx(measured(fitted, images, labels), rel=0.05)


@pytest.mark.parametrize("net", [ResNet, UNet])
def test_a_budget_between_is_met(net):
    model, images = net(), torch.empty(4, 3, 128, 128, device="meta")
    least, plain = fit(model, images, LOSS, time=3).plan.peak, predict(model, images, LOSS).peak
    peaks = []
    for share in (0.25, 0.75):
        budget = int(least + share * (plain - least))
        plan = fit(model, images, LOSS, budget=budget).plan
        assert plan.peak <= budget
        peaks.append(plan)
    assert peaks[-1].time <= peaks[0].time  # more memory, no more time
    assert peaks[0].peak <= peaks[-1].peak


def test_an_impossible_budget_says_the_least():
    model, images = UNet(), torch.empty(4, 3, 128, 128, device="meta")
    with pytest.raises(ValueError, match=r"a budget of at least ([0-9.]+) MiB .* got 1.0 MiB") as error:
        fit(model, images, LOSS, budget="1MiB")
    least = float(str(error.value).split("at least ")[1].split()[0])
    assert fit(model, images, LOSS, budget=f"{least + 0.1}MiB").plan.peak <= (least + 0.1) * 2**20


def test_what_fits_is_left_as_it_is():
    fitted = fit(UNet(), torch.empty(SIZE), LOSS, budget="10GB")
    assert fitted.plan.parts == ()
    assert fitted.plan.time == 1.0


def test_a_plan_is_a_value(tmp_path):
    model, images = ResNet(), torch.randn(SIZE)
    plan = fit(model, images, LOSS, time=3).plan
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    second = ResNet()
    assert plan.apply(second).plan == plan
    assert "runs again" in str(plan)
    assert fit(model, images, LOSS, time=3).plan == plan
    with pytest.raises(ValueError, match=r"expected a network with a module '.*', got Linear"):
        plan.apply(nn.Linear(1, 1))
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(ValueError, match=r"expected a plan as JSON"):
        Plan.load(tmp_path / "plan.json")


def test_plans_do_not_depend_on_the_garbage_collector():
    """What a trace has looked at is let go by itself, at once: what waits for the collector would count as if it were kept."""
    found = []
    for collect in (False, True):
        gc.disable()
        module_call = nn.Module.__call__

        def call(module, *args, collect=collect, module_call=module_call):
            result = module_call(module, *args)
            if collect:
                gc.collect()
            return result

        nn.Module.__call__ = call
        try:
            found.append(Search(UNet(), torch.empty(SIZE), Step(LOSS))._estimate(False).live({}))
        finally:
            nn.Module.__call__ = module_call
            gc.enable()
    assert np.array_equal(*found)


def test_a_fitted_network_is_fitted_anew():
    model, images = UNet(), torch.empty(SIZE)
    fitted = fit(model, images, LOSS, time=3)
    assert fit(fitted, images, LOSS, time=3).plan == fitted.plan
    assert type(fit(fitted, images, LOSS, budget="10GB").down[0]) is nn.Sequential


def test_copies_and_pickles():
    model, images = ResNet(), torch.randn(SIZE)
    labels = torch.randint(0, 5, (2, *SIZE[2:]))
    fitted = fit(model, images, LOSS, time=3)
    for other in (copy.deepcopy(fitted), pickle.loads(pickle.dumps(fitted))):
        assert other.plan == fitted.plan
        for a, b in zip(trained(other, images, labels), trained(fitted, images, labels), strict=True):
            assert torch.equal(a, b)
        assert predict(other, images, LOSS, by_bands=fitted.plan.by_bands).peak == fitted.plan.peak
    assert isinstance(fitted.layers[0], nn.Sequential)
    assert fitted.double().layers[0][0].conv1.weight.dtype == torch.float64


def test_segments_of_a_row():
    """A long row is cut into segments, and pieces of these again."""
    row = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(32)))
    x = torch.randn(512, 64)
    fitted = fit(row, x, lambda y: y.square().mean(), time=3)
    assert any(part.first is not None for part in fitted.plan.parts)
    plain, ours = (
        predict(row, x, lambda y: y.square().mean()),
        predict(fitted, x, lambda y: y.square().mean()),
    )
    assert ours.parts["kept activations"] < plain.parts["kept activations"] / 3
    for model in (row, fitted):
        model(x).square().mean().backward()
    assert all(
        torch.equal(p.grad, q.grad) for p, q in zip(row.parameters(), fitted.parameters(), strict=True)
    )


def test_a_forward_on_the_instance_runs_again_too():
    model, images = UNet(), torch.randn(SIZE)
    labels = torch.randint(0, 5, (2, *SIZE[2:]))
    for block in model.down:
        block.forward = types.MethodType(lambda self, x: 2 * nn.Sequential.forward(self, x), block)
    fitted = fit(model, images, LOSS, time=3)
    for ours, plain in zip(trained(fitted, images, labels), trained(model, images, labels), strict=True):
        assert torch.equal(ours, plain)


class Skip(nn.Module):
    """A residual block whose input is read beyond it too."""

    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.inner = conv_norm(width, width)

        def forward(self, x):
            return F.relu(self.inner(x) + x)

    def __init__(self, width=8):
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, width, 3), Skip.Block(width)
        self.head = nn.Conv2d(2 * width, 5, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.head(torch.cat([x, self.block(x)], 1))


def test_sums_of_three_gradients_round_otherwise():
    """What runs again adds up its two of them first."""
    model, images = Skip(), torch.randn(4, 3, 48, 48)
    exact = copy.deepcopy(model).double()
    fitted = apply_parts(model, [Part("block")])
    exact(images.double()).square().mean().backward()
    outputs = [network(images) for network in (fitted, model)]
    for output in outputs:
        output.square().mean().backward()
    assert torch.equal(*outputs)
    for (name, ours), plain, wide in zip(
        fitted.named_parameters(), model.parameters(), exact.parameters(), strict=True
    ):
        if name.startswith("stem"):
            errors = [(p.grad - wide.grad).norm() for p in (ours, plain)]
            assert errors[0] <= 2 * errors[1]
        else:
            assert torch.equal(ours.grad, plain.grad)


def test_bad_input():
    with pytest.raises(ValueError, match=r"expected one of budget, factor and time"):
        fit(UNet(), torch.empty(SIZE))
    with pytest.raises(ValueError, match=r"expected a budget like 10GB or 800MiB, got '10 lots'"):
        fit(UNet(), torch.empty(SIZE), budget="10 lots")
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got str"):
        fit("unet", torch.empty(SIZE), time=2)


class Calls(nn.Module):
    """Calls what it is given: its second run knows nothing of the parameters in that."""

    def forward(self, run, *inputs):
        return run(*inputs)


class ByMethods(nn.Module):
    """Parts of it are methods, called through a module, as `revseg.layers.rerun.Rerun` does; one weight is used by two modules."""

    class Reads(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = [weight]  # that of another module, and no parameter of this one

        def forward(self, x):
            return F.relu(F.conv2d(x, self.weight[0], padding=1))

    def __init__(self):
        super().__init__()
        self.call, self.stem, self.body = (
            Calls(),
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1),
        )
        self.again, self.head = self.Reads(self.body.weight), nn.Conv2d(8, 5, 1)
        self.rest = nn.Sequential(*(nn.Sequential(*conv_norm(8, 8), nn.ReLU()) for _ in range(4)))

    def encoded(self, x):
        return F.relu(self.body(F.relu(self.stem(x))))

    def forward(self, x):
        return self.head(self.rest(self.again(self.call(self.encoded, x))))


def test_what_uses_parameters_of_others_does_not_run_again():
    """Their gradients would be lost: ENet's encoder was chosen, and `fit` ended in an error."""
    torch.manual_seed(0)
    model, images, labels = ByMethods(), torch.randn(2, 3, 32, 48), torch.randint(0, 5, (2, 32, 48))
    fitted = fit(model, images, LOSS, time=10)
    assert not {"call", "again"} & {part.name for part in fitted.plan.parts}
    assert fitted.plan.parts
    for ours, plain in zip(trained(fitted, images, labels), trained(model, images, labels), strict=True):
        assert torch.equal(ours, plain)
