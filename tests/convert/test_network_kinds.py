"""Networks that are converted though they are written otherwise: lists, several inputs, windows, tied weights."""

import collections
import copy

import pytest
import torch
from torch import nn

from revseg import reversible
from revseg.testing import plain_twin
from tests.helpers import assert_same_step
from tests.residual_nets import (
    PreActivation,
    images,
    row,
)


def test_transformer_blocks_are_residual_too():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=True)
            self.patches, self.blocks = nn.Conv2d(3, 8, 4, 4), nn.Sequential(layer, copy.deepcopy(layer))

        def forward(self, x):
            return self.blocks(self.patches(x).flatten(2).transpose(1, 2))

    model, chains = reversible(Tokens().double(), images(8, 8))
    assert chains == [["blocks.0", "blocks.1"]]
    assert_same_step(model, plain_twin(model), images(8, 12))


def test_names_that_are_no_numbers_stay():
    names = ["stem", "first", "second", "head"]
    modules = nn.Conv2d(3, 4, 1), PreActivation(4), PreActivation(4), nn.Conv2d(4, 2, 1)
    model = nn.Sequential(collections.OrderedDict(zip(names, modules, strict=True)))
    model, _ = reversible(model, images(8, 8, dtype=torch.float32))
    assert list(model._modules) == ["stem", "first", "head"]


class Rows(nn.Module):
    """Blocks in a list, called as `call` says."""

    def __init__(self, call, depth=4):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.blocks = nn.ModuleList(PreActivation(8) for _ in range(depth))
        self.call = call

    def forward(self, x):
        return self.call(self.blocks, self.stem(x))


def one_after_another(blocks, x):
    for block in blocks:
        x = block(x)
    return x


def by_index(blocks, x):
    for i in range(4):
        x = blocks[i](x)
    return x


def and_back(blocks, x):
    for block in reversed(blocks):
        x = block(x)
    return x


def features(blocks, x):
    found = []
    for block in blocks:
        x = block(x)
        found.append(x)
    return found[1] + x, found[2]


def with_something_between(blocks, x):
    x = blocks[1](blocks[0](x)).flip(3)
    return blocks[3](blocks[2](x))


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (one_after_another, [["blocks.0", "blocks.1", "blocks.2", "blocks.3"]]),
        (by_index, [["blocks.0", "blocks.1", "blocks.2", "blocks.3"]]),
        (features, [["blocks.0", "blocks.1"]]),
        (with_something_between, [["blocks.0", "blocks.1"], ["blocks.2", "blocks.3"]]),
    ],
)
def test_modules_in_a_list_that_are_called_in_a_row_are_converted(call, expected):
    model = Rows(call).double()
    converted, chains = reversible(model, images(8, 8))
    assert chains == expected
    assert len(converted.blocks) == 4
    x = images(7, 9)
    if all(len(chain) == 2 for chain in chains):  # which compute what they did
        torch.testing.assert_close(converted(x), model(x))
    assert_same_step(converted, plain_twin(converted), x)


def test_modules_in_a_list_called_in_another_order_are_left():
    with pytest.raises(ValueError, match=r"blocks\.0 to blocks\.3: a block, but not only the next one reads"):
        reversible(Rows(and_back), images(8, 8, dtype=torch.float32))


def test_blocks_without_an_effect_at_the_start_hide_nothing():
    """A last batch norm of weight 0 makes each block an identity: then the order could not be seen."""
    model = Rows(features)
    for block in model.blocks:
        for p in block.parameters():
            nn.init.zeros_(p)
    assert reversible(model, images(8, 8, dtype=torch.float32))[1] == [["blocks.0", "blocks.1"]]


class Timed(nn.Module):
    def __init__(self):
        super().__init__()
        self.row = row(PreActivation, channels=3)

    def forward(self, x, t):
        x = x["image"] if isinstance(x, dict) else x[0] if isinstance(x, list) else x
        return self.row(x + t)


@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: [x], lambda x: {"image": x}], ids=["one", "list", "dict"]
)
def test_a_network_of_several_inputs_is_converted(wrap):
    model, x = Timed(), images(8, 8, dtype=torch.float32)
    converted, chains = reversible(model, (wrap(x), torch.ones(1)))
    assert chains == [["row.1", "row.2", "row.3"]]
    torch.testing.assert_close(converted(wrap(x), 1.0), plain_twin(converted)(wrap(x), 1.0))


class Windows(PreActivation):
    """Four windows an image."""

    def forward(self, x):
        return super().forward(x.view(len(x) // 4, 4, *x.shape[1:]).flatten(0, 1))


def normed(channels):
    block = PreActivation(channels)
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            nn.utils.parametrizations.weight_norm(module)
    return block


def tied(blocks):
    for block in blocks[1:]:
        block.conv = blocks[0].conv
    return blocks


ROWS = {
    "bound to its batch": lambda: [Windows(4) for _ in range(3)],
    "weight norm": lambda: [normed(4) for _ in range(3)],
    "tied weights": lambda: tied([PreActivation(4) for _ in range(3)]),
    "one block three times": lambda: [PreActivation(4)] * 3,
}


@pytest.mark.parametrize("kind", ROWS)
def test_unusual_blocks_are_converted(kind):
    x = torch.randn(4, 4, 6, 5, dtype=torch.float64)
    model, chains = reversible(nn.Sequential(*ROWS[kind]()).double(), x)
    assert chains == [["0", "1", "2"]]
    assert_same_step(model, plain_twin(model), x)
