"""Modules called one after the other run again as one, and keep the pieces of what they are called with."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from revseg.memory import predict, saved_bytes
from revseg.memory.apply import Part, apply_parts
from revseg.memory.segments import with_segments
from revseg.memory.step import Step
from revseg.memory.trace import Tracer
from tests.memory.nets import ResNet, UNet, conv_norm

LOSS = nn.CrossEntropyLoss()


def trained(model, images, labels):
    """Loss, gradients and buffers after a step."""
    torch.manual_seed(1)
    model.zero_grad()
    loss = LOSS(model(images), labels)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters()), *model.buffers()]


def assert_same(fitted, model, size=(2, 3, 32, 48)):
    images, labels = torch.randn(size), torch.randint(0, 5, (size[0], *size[2:]))
    model = copy.deepcopy(model)
    for ours, plain in zip(trained(fitted, images, labels), trained(model, images, labels), strict=True):
        assert torch.equal(ours, plain)
    fitted.eval()
    model.eval()
    assert torch.equal(fitted(images), model(images))


def segments_of(model, size=(2, 3, 32, 48)):
    """The members of all segments outside of rows."""
    tracer, _ = Step(LOSS).run(model, torch.empty(size), Tracer, Tracer.noting)
    return {call.members for call in with_segments(tracer, model) if call.members}


def block(place, *members, first=0):
    names = tuple(f"{place}.{member}" for member in members)
    return Part(place, first, first + len(members), names)


def test_layers_of_a_block_are_segments():
    found = segments_of(ResNet())
    first = "layers.0.1"
    assert (f"{first}.conv1", f"{first}.bn1", f"{first}.relu") in found
    assert not any(f"{first}.downsample" in members for members in found)  # what it reads others read too


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_segments_in_a_block_that_runs_again(copied):
    torch.manual_seed(0)
    model, place = ResNet(), "layers.0.1"
    one, two = block(place, "conv1", "bn1", "relu"), block(place, "conv2", "bn2", "relu", first=3)
    three = block(place, "conv3", "bn3", first=6)
    both = Part(place, 0, 6, (*one.members, *two.members))
    for parts in ([one], [one, two, three], [Part(place), one, two], [Part(place), both, two, three]):
        assert_same(copied(apply_parts(model, parts)), model)


class Listed(nn.Module):
    """Calls what is in a list, and now and then reads what is between."""

    def __init__(self, reads=False, skips=False):
        super().__init__()
        self.blocks = nn.ModuleList([conv_norm(3, 5), *(conv_norm(5, 5) for _ in range(5))])
        self.reads, self.skips, self.left_out = reads, skips, False

    def forward(self, x):
        kept = []
        for i, each in enumerate(self.blocks):
            if not (self.left_out and i == 3):
                x = each(x)
            if self.reads and i == 2:
                kept.append(x)
        return x + kept[0] if kept else x


def test_entries_of_a_list():
    found = segments_of(Listed())
    assert tuple(f"blocks.{i}" for i in range(6)) in found
    reading = segments_of(Listed(reads=True))
    assert {tuple(f"blocks.{i}" for i in range(*ends)) for ends in ((0, 3), (3, 6))} <= reading
    assert not any("blocks.2" in members and "blocks.3" in members for members in reading)


def test_a_network_that_does_something_else_than_planned():
    model = Listed()
    names = tuple(f"blocks.{i}" for i in range(1, 6))
    fitted = apply_parts(model, [Part("", 1, 6, names)])
    assert_same(fitted, model)
    fitted.train()
    fitted.left_out = True
    with pytest.raises(RuntimeError, match=r"expected Sequential to be called as when the plan was made"):
        fitted(torch.randn(2, 3, 32, 48))
    fitted.left_out = False
    fitted(torch.randn(2, 3, 32, 48)).sum().backward()
    with pytest.raises(ValueError, match=r"expected a network with a module 'blocks.1', got ResNet"):
        apply_parts(ResNet(), [Part("", 1, 6, names)])


class Scaled(nn.Module):
    """A block that is called with more than its map."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x, scale, shift=0.0):
        return torch.tanh(self.conv(x)) * scale + shift


def test_the_first_of_a_segment_may_have_other_arguments():
    """A transformer's block got the size of the map too, and its segment could not be called with it."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.norm, self.head = Scaled(), nn.BatchNorm2d(3), nn.Conv2d(3, 5, 1)

        def forward(self, x):
            return self.head(self.norm(self.block(x, 2, shift=0.5)))

    torch.manual_seed(0)
    model = Network()
    assert ("block", "norm") in segments_of(model)
    assert_same(apply_parts(model, [Part("", 0, 2, ("block", "norm"))]), model)


def test_shapes_between_are_those_of_the_result():
    """`x.shape` is read between two modules: it must be right."""
    assert not any(
        "conv" in a and "pool" in b for members in segments_of(Shrinks()) for a in members for b in members
    )


class Shrinks(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.pool, self.head = nn.Conv2d(3, 5, 1), nn.MaxPool2d(2), nn.Conv2d(5, 5, 1)

    def forward(self, x):
        x = self.conv(x)
        size = x.shape[2:]
        return F.interpolate(self.head(self.pool(x)), size)


def test_members_with_hooks_are_left_alone():
    model = ResNet()
    model.layers[0][1].bn1.register_forward_hook(lambda module, args, y: None)
    assert not any("layers.0.1.bn1" in members for members in segments_of(model))


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_pieces_are_kept_for_joined_and_raised_maps(mode):
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.join = (
                conv_norm(3, 4),
                conv_norm(3, 8, stride=4),
                nn.Sequential(*conv_norm(12, 5), nn.ReLU()),
            )

        def forward(self, x):
            high, low = self.a(x), self.b(x)
            return self.join(torch.cat([high, F.interpolate(low, high.shape[2:], mode=mode)], 1))

    torch.manual_seed(0)
    model = Decoder()
    fitted = apply_parts(model, [Part("join")])
    assert_same(fitted, model)
    fitted.train()
    images = torch.randn(2, 3, 32, 48)
    joined, high, low = (2 * c * 32 * 48 * 4 // s for c, s in ((12, 1), (4, 1), (8, 16)))
    kept = saved_bytes(lambda: fitted(images))
    assert high + low < kept < joined + high


def test_a_plan_by_pieces_is_predicted():
    model, images = UNet(), torch.randn(2, 3, 64, 64)
    fitted = apply_parts(model, [Part("join.1"), Part("join.0")])
    assert predict(fitted, images, LOSS).peak < predict(model, images, LOSS).peak
    assert_same(fitted, model, (2, 3, 64, 64))
