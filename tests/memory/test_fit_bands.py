"""Networks fitted by bands: less memory than running again gives, and gradients as near to those of real numbers as plain ones."""

import copy
import dataclasses
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from revseg import fit
from revseg.layers.bands.cut import Bands
from revseg.memory import Plan, peak_bytes, predict, row_by_bands, run_again
from revseg.memory.apply import Part, apply_parts
from tests.memory.nets import NETS, ResNet, UNet, conv_norm

LOSS = nn.CrossEntropyLoss()
SIZE = (2, 3, 64, 96)
MANY = Bands(bytes=1, kept=0, part=16)  # of maps that are small
DOUBLES = ("down.0", "down.1", "down.2", "join.0", "join.1")


class Decoder(nn.Module):
    """Maps of several sizes raised and joined, before an activation too; dense connections."""

    class Dense(nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            self.norm1, self.relu1 = nn.BatchNorm2d(inputs), nn.ReLU(inplace=True)
            self.conv1 = nn.Conv2d(inputs, 16, 1, bias=False)
            self.norm2, self.relu2 = nn.BatchNorm2d(16), nn.ReLU(inplace=True)
            self.conv2 = nn.Conv2d(16, outputs, 3, padding=1, bias=False)

        def forward(self, maps):
            x = torch.cat(maps, 1)
            return self.conv2(self.relu2(self.norm2(self.conv1(self.relu1(self.norm1(x))))))

    def __init__(self, classes=5):
        super().__init__()
        self.stem = nn.Sequential(*conv_norm(3, 8, 3, 2), nn.ReLU(inplace=True))
        self.deeper = nn.Sequential(
            *conv_norm(8, 8, 3, 2), nn.ReLU(inplace=True), *conv_norm(8, 8), nn.ReLU()
        )
        self.dense = nn.ModuleList(Decoder.Dense(8 + 8 * i, 8) for i in range(3))
        self.lateral = nn.Conv2d(8, 8, 1)
        self.fuse = nn.Sequential(*conv_norm(40, 16), nn.ReLU(inplace=True))
        self.head = nn.Conv2d(16, classes, 1)

    def forward(self, x):
        first = self.stem(x)
        maps = [self.deeper(first)]
        for block in self.dense:
            maps.append(block(maps))
        raised = [
            F.interpolate(each, first.shape[2:], mode="bilinear", align_corners=True) for each in maps[:2]
        ]
        raised += [F.interpolate(each, scale_factor=2) for each in maps[2:]]
        y = self.fuse(torch.cat([self.lateral(first), *raised], dim=1))
        return F.interpolate(self.head(y), x.shape[2:], mode="bilinear")


class Volumes(nn.Module):
    """A residual encoder with instance norm and a decoder with batch norm, in three dimensions."""

    class Residual(nn.Module):
        def __init__(self, inputs, outputs, stride):
            super().__init__()
            self.conv1, self.norm1 = (
                nn.Conv3d(inputs, outputs, 3, stride, 1),
                nn.InstanceNorm3d(outputs, affine=True),
            )
            self.act1, self.conv2 = nn.LeakyReLU(inplace=True), nn.Conv3d(outputs, outputs, 3, padding=1)
            self.norm2, self.act2 = nn.InstanceNorm3d(outputs, affine=True), nn.LeakyReLU(inplace=True)
            self.skip = nn.Sequential(nn.AvgPool3d(stride), nn.Conv3d(inputs, outputs, 1, bias=False))

        def forward(self, x):
            y = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))
            return self.act2(y + self.skip(x))

    def __init__(self, width=4, classes=5):
        super().__init__()
        self.first = Volumes.Residual(1, width, 1)
        self.second = Volumes.Residual(width, 2 * width, 2)
        self.raised = nn.ConvTranspose3d(2 * width, width, 2, 2)
        row = nn.Conv3d(2 * width, width, 3, padding=1), nn.BatchNorm3d(width), nn.ReLU(inplace=True)
        self.join, self.head = nn.Sequential(*row), nn.Conv3d(width, classes, 1)

    def forward(self, x):
        first = self.first(x)
        return self.head(self.join(torch.cat([first, self.raised(self.second(first))], 1)))


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


@pytest.mark.parametrize(("net", "size"), CASES.values(), ids=CASES)
def test_a_network_fitted_by_bands_is_the_network(net, size, monkeypatch):
    """In float64: where float32 rounds to the other side of an activation's kink, a whole pixel differs."""
    model = net()
    if net is UNet:
        model.dropout.p = 0.0  # masks are drawn in float32
    state = copy.deepcopy(model.state_dict())
    larger = (*size[:2], *(4 * length for length in size[2:]))  # where maps outweigh weights
    plan = fit(model, torch.empty(larger, device="meta"), LOSS, time=3, bands=True).plan
    if net is Volumes:  # small ones, which need no bands
        names = ("conv1", "norm1", "act1", "conv2", "norm2")
        rows = [
            Part(each, 0, 5, tuple(f"{each}.{name}" for name in names), True) for each in ("first", "second")
        ]
        plan = dataclasses.replace(plan, parts=(*rows, Part("join", 0, 3, by_bands=True)))
    assert any(part.by_bands for part in plan.parts) == (net is not NETS["transformer"])
    monkeypatch.setattr(run_again, "_BANDS", MANY)
    fitted = plan.apply(model)
    assert list(fitted.state_dict()) == list(state)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert_same_step(model, fitted, size)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("net", [UNet, Decoder])
def test_lower_precision_is_as_near_as_plain(net, autocast, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(run_again, "_BANDS", MANY)
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


def test_what_is_joined_never_is():
    """A map of 16 channels at full size is neither kept nor made: its row reads what it is made of."""
    model, (images, labels) = UNet(), batch((4, 3, 128, 192))
    fitted = apply_parts(model, by_bands())
    made = []

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func in (torch.cat, F.conv_transpose2d, F.max_pool2d):
                made.append((func, result.numel()))
            return result

    with Spy():  # sees what goes on to PyTorch
        loss = LOSS(fitted(images), labels)
    joined = 4 * 16 * 128 * 192
    assert F.max_pool2d in [func for func, _ in made]
    assert max(size for func, size in made if func is torch.cat) <= joined // 2  # bands
    assert F.conv_transpose2d not in [func for func, _ in made]
    loss.backward()


def test_bands_inside_of_what_runs_again(monkeypatch):
    monkeypatch.setattr(run_again, "_BANDS", MANY)
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
    monkeypatch.setattr(run_again, "_BANDS", MANY)
    model = Decoder()
    model(torch.randn(SIZE))
    parts = [Part("fuse", 0, 3, by_bands=True), Part("deeper", 0, 6, by_bands=True)]
    assert_same_step(model.eval(), apply_parts(model, parts))


class Written(nn.Module):
    """Writes to a map behind the join that read it."""

    def __init__(self):
        super().__init__()
        self.stem, self.fuse = nn.Conv2d(3, 4, 1), nn.Sequential(*conv_norm(8, 4), nn.ReLU())

    def forward(self, x):
        x = self.stem(x)
        both = torch.cat([x, x * 2], 1)
        x.add_(1)
        return self.fuse(both)


def test_a_map_that_is_written_to_while_it_waits():
    fitted = apply_parts(Written(), [Part("fuse", 0, 3, by_bands=True)])
    with pytest.raises(
        RuntimeError, match=r"expected what cat was called with to stay as it is until its result is read"
    ):
        fitted(torch.randn(2, 3, 8, 8))


class WrittenAfterJoin(nn.Module):
    """Writes to what a join returned, before it is read."""

    def __init__(self, graph):
        super().__init__()
        self.stem, self.graph = nn.Conv2d(3, 4, 1), graph
        self.fuse = nn.Sequential(*conv_norm(8, 4), nn.ReLU())

    def forward(self, x):
        x = self.stem(x)
        both = torch.cat([x, 2 * x], 1)
        if self.graph:
            F.relu(both, inplace=True)
        else:
            with torch.no_grad():
                both.mul_(3)
        return self.fuse(both)


@pytest.mark.parametrize("graph", [True, False])
def test_a_map_that_waits_and_is_written_to_is_made(graph):
    torch.manual_seed(0)
    model, images = WrittenAfterJoin(graph).double(), torch.randn(2, 3, 8, 8).double()
    fitted = apply_parts(model, [Part("fuse", 0, 3, by_bands=True)])
    for each in (model, fitted):
        each(images).square().mean().backward()
    for a, b in zip(fitted.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


class WrittenAfterPool(nn.Module):
    """Writes to what a pool returned, before it is read."""

    def __init__(self):
        super().__init__()
        self.stem, self.fuse = nn.Conv2d(3, 4, 1), nn.Sequential(*conv_norm(4, 4), nn.ReLU())

    def forward(self, x):
        x = F.max_pool2d(self.stem(x), 2)
        x.mul_(3)
        return self.fuse(x)


@pytest.mark.parametrize("part", [Part("fuse"), Part("fuse", 0, 3, by_bands=True)])
def test_what_was_written_to_is_not_made_again_without_that(part):
    model, images = WrittenAfterPool(), torch.randn(2, 3, 8, 8)
    fitted = apply_parts(model, [part])
    for each in (model, fitted):
        each(images).square().mean().backward()
    for a, b in zip(fitted.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
