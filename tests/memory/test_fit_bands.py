"""Networks fitted by bands: less memory than running again gives, and gradients as near to those of real numbers as plain ones."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn

from revseg import fit
from revseg.layers.bands.cut import Bands
from revseg.memory import Plan, peak_bytes, predict, row_by_bands, run_again
from revseg.memory.apply import Part, apply_parts
from tests.memory.nets import DOUBLES, NETS, Decoder, ResNet, UNet, Volumes

LOSS = nn.CrossEntropyLoss()
SIZE = (2, 3, 64, 96)
MANY = Bands(bytes=1, kept=0, part=16)  # of maps that are small


ALL = {**NETS, "decoder": Decoder, "volumes": Volumes}


def batch(size=SIZE):
    return torch.randn(size), torch.randint(0, 5, (size[0], *size[2:]))


def trained(model, images, labels, autocast=None):
    """Names and values after a step: output, gradients of images and parameters, buffers."""
    model = copy.deepcopy(model)
    images = images.clone().requires_grad_()
    torch.manual_seed(1)
    with torch.autocast("cpu", autocast) if autocast else torch.enable_grad():
        logits = model(images)
        LOSS(logits, labels).backward()
    found = {"logits": logits.detach(), "images": images.grad}
    found |= {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    found |= {name: b.to(images.dtype) for name, b in model.named_buffers()}
    return list(found), list(found.values())


def assert_same_step(model, fitted, size=SIZE):
    """In float64."""
    images, labels = batch(size)
    names, plain = trained(copy.deepcopy(model).double(), images.double(), labels)
    _, ours = trained(copy.deepcopy(fitted).double(), images.double(), labels)
    scale = max(each.norm() for each in plain[2:])
    for name, a, b in zip(names, ours, plain, strict=True):
        assert (a - b).norm() <= 1e-9 * max(b.norm(), 1e-3 * scale), name


def by_bands(names=DOUBLES, **options):
    return [Part(name, 0, 6, by_bands=True, **options) for name in names]


CASES = {**{name: (net, (2, 3, 40, 56)) for name, net in ALL.items()}, "odd": (Decoder, (3, 3, 52, 44))}
CASES["volumes"] = (Volumes, (2, 1, 12, 8, 10))


def rows_of(block):
    """Convolution and norm, three times: what a bottleneck can do by bands."""
    names = [tuple(f"{block}.{kind}{i}" for kind in ("conv", "bn")) for i in (1, 2, 3)]
    return [Part(block, 3 * i, 3 * i + 2, each, True) for i, each in enumerate(names)]


@pytest.mark.parametrize(("net", "size"), CASES.values(), ids=CASES)
def test_a_network_fitted_by_bands_is_the_network(net, size, monkeypatch):
    """In float64: where float32 rounds to the other side of an activation's kink, a whole pixel differs."""
    model = net()
    if net is UNet:
        model.dropout.p = 0.0  # masks are drawn in float32
    state = copy.deepcopy(model.state_dict())
    larger = (*size[:2], *(4 * length for length in size[2:]))  # where maps outweigh weights
    plan = fit(model, torch.empty(larger, device="meta"), LOSS, time=3, bands=True).plan
    if net is ResNet:  # blocks of few channels, in which running again is as good
        plan = dataclasses.replace(plan, parts=(Part("stem", 0, 4, by_bands=True), *rows_of("layers.0.1")))
    if net is NETS["branches"]:  # the same blocks
        rows = [*rows_of("stages.0.high.1"), *rows_of("stages.1.low.0")]
        plan = dataclasses.replace(plan, parts=(Part("split", 0, 2, by_bands=True), *rows))
    if net is Volumes:  # small ones, which need no bands
        names = ("conv1", "norm1", "act1", "conv2", "norm2")
        rows = [
            Part(each, 0, 5, tuple(f"{each}.{name}" for name in names), True) for each in ("first", "second")
        ]
        plan = dataclasses.replace(plan, parts=(*rows, Part("join", 0, 3, by_bands=True)))
    assert any(part.by_bands for part in plan.parts) == (net is not NETS["transformer"])
    monkeypatch.setattr(run_again, "BANDS", MANY)
    fitted = plan.apply(model)
    assert list(fitted.state_dict()) == list(state)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert_same_step(model, fitted, size)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("net", [UNet, Decoder])
def test_lower_precision_is_as_near_as_plain(net, autocast, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(run_again, "BANDS", MANY)
    model, (images, labels) = net(), batch()
    if net is UNet:
        model.dropout.p = 0.0
    fitted = apply_parts(
        model,
        by_bands()
        if net is UNet
        else [Part("fuse", 0, 3, by_bands=True), Part("deeper", 0, 6, by_bands=True)],
    )
    _, exact = trained(copy.deepcopy(model).double(), images.double(), labels)
    wide = torch.cat([each.flatten() for each in exact[1:]])
    errors = []
    for network in (fitted, model):
        _, found = trained(network, images, labels, autocast)
        errors.append((torch.cat([each.double().flatten() for each in found[1:]]) - wide).norm())
    assert errors[0] <= 2 * errors[1]


def test_a_budget_that_only_bands_meet():
    model, images = UNet(), torch.empty(4, 3, 128, 128, device="meta")
    labels = torch.empty(4, 128, 128, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match="expected a budget of at least") as error:
        fit(model, images, LOSS, budget=1, target=labels, bands=False)
    least = float(str(error.value).split("at least ")[1].split()[0])
    enough = fit(model, images, LOSS, budget=f"{least + 0.1}MiB", target=labels)
    assert not any(part.by_bands for part in enough.plan.parts)
    fitted = fit(model, images, LOSS, budget=f"{0.85 * least}MiB", target=labels)
    assert any(part.by_bands for part in fitted.plan.parts)
    assert "by bands: " in str(fitted.plan)
    assert fitted.plan.peak <= 0.85 * least * 2**20
    before = predict(fitted, images, LOSS, target=labels).before
    real = torch.randn(images.shape), torch.randint(0, 5, labels.shape)

    def step():
        LOSS(fitted(real[0]), real[1]).backward()
        fitted.zero_grad()

    step()
    assert peak_bytes(step, before=step) == pytest.approx(fitted.plan.peak - before, rel=0.05)


def test_bands_inside_of_what_runs_again(monkeypatch):
    monkeypatch.setattr(run_again, "BANDS", MANY)
    model = Decoder()
    block = ("norm1", "relu1", "conv1", "norm2", "relu2", "conv2")
    rows = [Part(f"dense.{i}", 0, 6, tuple(f"dense.{i}.{name}" for name in block), True) for i in range(3)]
    fitted = apply_parts(
        model, [*rows, *(Part(f"dense.{i}") for i in (0, 2)), Part("fuse", 0, 3, by_bands=True)]
    )
    assert_same_step(model, fitted)


def test_a_plan_by_bands_is_a_value(tmp_path):
    model, (images, labels) = ResNet(), batch()
    fitted = fit(model, images, LOSS, time=3, bands=True)
    fitted.plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == fitted.plan
    _, expected = trained(fitted, images, labels)
    for other in (copy.deepcopy(fitted), pickle.loads(pickle.dumps(fitted)), fitted.plan.apply(model)):
        for a, b in zip(trained(other, images, labels)[1], expected, strict=True):
            assert torch.equal(a, b)


def test_evaluation_and_hooks_take_whole_maps():
    model, images = UNet(), torch.randn(SIZE)
    model.dropout.p = 0.0
    fitted = apply_parts(model, by_bands())
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(fitted).eval()(images), copy.deepcopy(model).eval()(images))
    seen = []
    for network in (model, fitted):
        network.down[0][1].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    assert_same_step(model, fitted)
    assert len(seen) == 3  # in plain training, and in both runs of the fitted one
    assert len({*seen}) == 1


def test_a_compiled_network_goes_by_bands_too(monkeypatch):
    torch._dynamo.reset()
    model, (images, labels) = UNet(), batch()
    model.dropout.p = 0.0
    fitted = apply_parts(model, by_bands()).double()
    rows, layers_of_row = [], row_by_bands.layers_of_row
    monkeypatch.setattr(
        row_by_bands, "layers_of_row", lambda *args: rows.append(layers_of_row(*args)) or rows[-1]
    )
    compiled = torch.compile(copy.deepcopy(fitted), backend="eager")
    LOSS(compiled(images.double()), labels).backward()
    LOSS(fitted(images.double()), labels).backward()
    assert len(rows) == 2 * len(DOUBLES)
    assert all(rows)
    for a, b in zip(compiled.parameters(), fitted.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_evaluation_with_gradients(monkeypatch):
    """Norms by running statistics, as in fine-tuning."""
    monkeypatch.setattr(run_again, "BANDS", MANY)
    model = Decoder()
    model(torch.randn(SIZE))
    parts = [Part("fuse", 0, 3, by_bands=True), Part("deeper", 0, 6, by_bands=True)]
    assert_same_step(model.eval(), apply_parts(model, parts))
