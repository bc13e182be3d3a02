"""Maps that wait in a fitted network: made by nobody who can do without, and made right for whoever writes to them."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from revseg.memory.apply import Part, apply_parts
from tests.memory.nets import DOUBLES, UNet, conv_norm


def test_what_is_joined_never_is():
    """A map of 16 channels at full size is neither kept nor made: its row reads what it is made of."""
    model = UNet()
    images, labels = torch.randn(4, 3, 128, 192), torch.randint(0, 5, (4, 128, 192))
    fitted = apply_parts(model, [Part(name, 0, 6, by_bands=True) for name in DOUBLES])
    made = []

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func in (torch.cat, F.conv_transpose2d, F.max_pool2d):
                made.append((func, result.numel()))
            return result

    with Spy():  # sees what goes on to PyTorch
        loss = F.cross_entropy(fitted(images), labels)
    joined = 4 * 16 * 128 * 192
    assert F.max_pool2d in [func for func, _ in made]
    assert max(size for func, size in made if func is torch.cat) <= joined // 2  # bands
    assert F.conv_transpose2d not in [func for func, _ in made]
    loss.backward()


class Written(nn.Module):
    """Writes to a map behind the join that read it.

    Args:
        write: How.
        raised: Whether it is raised first.
    """

    def __init__(self, write, raised):
        super().__init__()
        self.stem, self.fuse = nn.Conv2d(3, 4, 1), nn.Sequential(*conv_norm(8, 4), nn.ReLU())
        self.write, self.raised = write, raised

    def forward(self, x):
        x = self.stem(x) + 1
        x = F.interpolate(x, scale_factor=2, mode="bilinear") if self.raised else x
        both = torch.cat([x, x * 2], 1)
        self.write(x)
        return self.fuse(both) + x.mean()


def _set(x):
    x[:, 1:] = 0


WRITES = {
    "method": lambda x: x.mul_(3),
    "function": lambda x: torch.relu_(x),
    "argument": lambda x: F.relu(x, inplace=True),
    "module": nn.ReLU(inplace=True),
    "place": lambda x: F.dropout(x, 0.5, True, True),
    "out": lambda x: torch.mul(x.detach(), 2, out=x.detach()),
    "item": _set,
    "view": lambda x: x[:, 1:].mul_(2),
    "operator": lambda x: operator.iadd(x, 1),
    "library": lambda x: torch.ops.aten.mul_(x, 2),
}
PARTS = {"again": Part("fuse"), "by bands": Part("fuse", 0, 3, by_bands=True)}


@pytest.mark.parametrize("raised", [False, True], ids=["joined", "raised and joined"])
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_map_that_is_written_to_was_read_before(write, part, raised):
    torch.manual_seed(0)
    model, images = Written(write, raised).double(), torch.randn(2, 3, 8, 8).double()
    fitted = apply_parts(model, [part])
    found = []
    for each in (model, fitted):
        torch.manual_seed(1)
        found.append(each(images))
        found[-1].square().mean().backward()
    torch.testing.assert_close(*found)
    for a, b in zip(fitted.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


class Squared(torch.autograd.Function):
    """Differentiates by itself: PyTorch does not ask who it is before it runs."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


class Reversed(torch.autograd.Function):
    """Gives what it is given; the gradient has the other sign."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -grad


class Tripled(torch.autograd.Function):
    """Writes to what it is given."""

    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        x.mul_(3)
        return x

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad


class ByItself(nn.Module):
    """A function that differentiates by itself reads what is raised and joined."""

    def __init__(self, function):
        super().__init__()
        self.stem, self.row = nn.Conv2d(3, 4, 1), nn.Sequential(*conv_norm(4, 4), nn.ReLU())
        self.head, self.function = nn.Conv2d(8, 2, 1), function

    def forward(self, x):
        x = self.stem(x)
        low = F.interpolate(self.row(x), scale_factor=2, mode="bilinear")
        high = F.conv_transpose2d(x, x.new_ones(4, 4, 2, 2), stride=2)
        return self.head(self.function(torch.cat([high, low], 1)))


@pytest.mark.parametrize("part", [Part("row"), Part("row", 0, 3, by_bands=True)], ids=PARTS)
@pytest.mark.parametrize("function", [Squared.apply, Reversed.apply, Tripled.apply])
def test_who_differentiates_by_itself_gives_a_gradient_to_what_waits(function, part):
    torch.manual_seed(0)
    model, images = ByItself(function).double(), torch.randn(2, 3, 8, 8).double()
    fitted = apply_parts(model, [part])
    for each in (model, fitted):
        each(images).square().mean().backward()
    for a, b in zip(fitted.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_row_that_was_handed_on_to_who_differentiates_by_itself():
    """It would have to run once more, and count its batch once more."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.row, self.head = nn.Sequential(*conv_norm(3, 4), nn.ReLU()), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            return self.head(Squared.apply(self.row(x)))

    fitted = apply_parts(Network(), [Part("row", 0, 3, (), True, "head")])
    loss = fitted(torch.randn(2, 3, 8, 8)).sum()
    with pytest.raises(
        RuntimeError, match="expected the output of a row by bands to be read by PyTorch's functions"
    ):
        loss.backward()


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
