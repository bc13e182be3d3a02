"""A row by bands hands its map on to the convolution behind it, which is a module of its own."""

import copy
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from revseg import fit
from revseg.memory import Plan, peak_bytes, predict
from revseg.memory.apply import Part, apply_parts
from revseg.memory.segments import with_segments
from revseg.memory.step import Step
from revseg.memory.taking_in import taking_in
from revseg.memory.trace import Tracer
from tests.memory.nets import UNet, conv_norm
from tests.memory.test_fit_bands import LOSS, SIZE, assert_same_step, batch, trained

ROW = Part("join.1", 0, 6, by_bands=True, takes="head")


def unet():
    torch.manual_seed(0)
    model = UNet()
    model.dropout.p = 0.0
    return model


class Nested(nn.Module):
    """As libraries have it: the row at the end of a decoder's block, the classifier in a head."""

    class Block(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.conv, self.norm, self.act = nn.Conv2d(8, 8, 3, padding=1), norm(8), nn.LeakyReLU()
            self.attention = nn.Identity()

        def forward(self, x):
            return self.attention(self.act(self.norm(self.conv(x))))

    def __init__(self, norm=nn.BatchNorm2d, reads=False, activates=False, loops=False):
        super().__init__()
        self.stem = nn.Sequential(*conv_norm(3, 8), nn.ReLU())
        self.decoder = nn.Sequential(self.Block(norm), self.Block(norm))
        self.head = nn.Sequential(nn.Conv2d(8, 5, 3, padding=1), nn.Identity())
        self.reads, self.activates, self.loops = reads, activates, loops

    def forward(self, x):
        x = self.decoder(self.stem(x))
        logits = self.head(F.relu(x) if self.activates else x)
        if self.loops:
            logits = logits + self.head(x)
        return logits + x.mean() if self.reads else logits


LAST = tuple(f"decoder.1.{name}" for name in ("conv", "norm", "act"))
IN_BLOCK = Part("decoder.1", 0, 3, LAST, True, "head.0")
CASES = {
    "list": (unet, [Part("join.0", 0, 6, by_bands=True), ROW]),
    "library": (Nested, [IN_BLOCK]),
    "each image": (lambda: Nested(nn.InstanceNorm2d), [IN_BLOCK]),
    "within what runs again": (unet, [Part("down.0"), ROW, Part("join.0")]),
}


@pytest.mark.parametrize(("net", "parts"), CASES.values(), ids=CASES)
def test_gradients_are_those_of_the_network(net, parts, lengths):
    model = net()
    fitted = apply_parts(model, parts)
    assert list(fitted.state_dict()) == list(model.state_dict())
    assert_same_step(model, fitted)
    together = sum(max(1, part.behind - part.first) for part in parts if part.takes)
    assert together + 1 in lengths


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_lower_precision_is_as_near_as_plain(autocast, lengths):
    model, (images, labels) = unet(), batch()
    fitted = apply_parts(model, [ROW])
    _, exact = trained(copy.deepcopy(model).double(), images.double(), labels)
    wide = torch.cat([each.flatten() for each in exact[1:]])
    ours, plain = (
        (
            torch.cat([each.double().flatten() for each in trained(network, images, labels, autocast)[1][1:]])
            - wide
        ).norm()
        for network in (fitted, model)
    )
    assert ours <= 2 * plain
    assert 7 in lengths


def test_who_looks_at_the_map_finds_it(lengths):
    """It is made then, by bands, and the convolution goes by itself."""

    class Between(UNet):
        def forward(self, x):
            x = self.down[0](x)
            x = self.join[1](torch.cat([x, 2 * x], 1))
            return self.head(torch.tanh(x))

    torch.manual_seed(0)
    model = Between()
    assert_same_step(model, apply_parts(model, [ROW]))
    assert max(lengths) == 6


def test_a_second_reader_is_refused():
    model = Nested(reads=True)
    with pytest.raises(
        RuntimeError, match="expected a map that one convolution alone reads, as when the plan was made"
    ):
        apply_parts(model, [IN_BLOCK])(torch.randn(SIZE))


def test_a_map_that_is_written_to_is_refused():
    class Writes(UNet):
        def forward(self, x):
            skip = self.down[0](x) * 1
            x = self.join[1](torch.cat([skip, 2 * skip], 1))
            skip += 1
            return self.head(x)

    with pytest.raises(RuntimeError, match="was called with to stay as it is"):
        apply_parts(Writes(), [ROW])(torch.randn(SIZE))


def takings(model, size=SIZE):
    """Which rows could take in which convolution."""
    tracer, _ = Step(LOSS).run(model, torch.empty(size, device="meta"), Tracer, Tracer.noting)
    return {(call.key[0], call.takes) for call in taking_in(tracer, model, with_segments(tracer, model))}


def test_rows_are_found_by_what_runs():
    assert ("join.1", "head") in takings(unet())
    assert ("decoder.1", "head.0") in takings(Nested())
    for other in (Nested(reads=True), Nested(activates=True), Nested(loops=True)):
        assert not any(conv == "head.0" for _, conv in takings(other))
    hooked = Nested()
    hooked.head[0].register_forward_hook(lambda module, args, y: None)
    assert not any(conv == "head.0" for _, conv in takings(hooked))


class Wide(nn.Module):
    """Many channels at full size, and few classes: the gradient between stands at the peak."""

    def __init__(self):
        super().__init__()
        wide = (*conv_norm(8, 48), nn.ReLU(inplace=True), *conv_norm(48, 48), nn.ReLU(inplace=True))
        self.stem, self.row = nn.Sequential(*conv_norm(3, 8), nn.ReLU()), nn.Sequential(*wide)
        self.head = nn.Conv2d(48, 5, 1)

    def forward(self, x):
        return self.head(self.row(self.stem(x)))


def test_a_plan_takes_it_where_it_spares_memory(tmp_path):
    torch.manual_seed(0)
    model, images = Wide(), torch.empty(2, 3, 128, 160, device="meta")
    labels = torch.empty(2, 128, 160, dtype=torch.int64, device="meta")
    fitted = fit(model, images, LOSS, time=10, target=labels, bands=True)
    assert any(part.takes == "head" and part.by_bands for part in fitted.plan.parts)
    assert ", and head" in str(fitted.plan)
    fitted.plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == fitted.plan
    older = json.loads((tmp_path / "plan.json").read_text())
    for part in older["parts"]:
        del part["takes"]
    (tmp_path / "older.json").write_text(json.dumps(older))
    assert not any(part.takes for part in Plan.load(tmp_path / "older.json").parts)
    apart = apply_parts(model, [Part(**{**vars(part), "takes": ""}) for part in fitted.plan.parts])
    assert fitted.plan.peak < predict(apart, images, LOSS, target=labels).peak
    for other in (copy.deepcopy(fitted), pickle.loads(pickle.dumps(fitted)), fitted.plan.apply(Wide())):
        for a, b in zip(trained(other, *batch())[1], trained(fitted, *batch())[1], strict=True):
            assert a.shape == b.shape
    real = torch.randn(images.shape), torch.randint(0, 5, labels.shape)

    def step():
        LOSS(fitted(real[0]), real[1]).backward()
        fitted.zero_grad()

    step()
    before = predict(fitted, images, LOSS, target=labels).before
    assert peak_bytes(step, before=step) == pytest.approx(fitted.plan.peak - before, rel=0.05)


def test_outside_of_the_network_and_of_training_it_is_a_row():
    model = unet()
    fitted, images = apply_parts(model, [ROW]), torch.randn(SIZE)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(fitted).eval()(images), copy.deepcopy(model).eval()(images))
    x = torch.randn(2, 16, 32, 48)
    alone = fitted.join[1](x)
    assert type(alone) is torch.Tensor
    torch.testing.assert_close(alone, model.join[1](x), rtol=1e-4, atol=1e-4)


def test_a_plan_for_another_network_is_refused():
    with pytest.raises(ValueError, match="expected a network with a module 'classifier', got UNet"):
        apply_parts(unet(), [Part("join.1", 0, 6, by_bands=True, takes="classifier")])
