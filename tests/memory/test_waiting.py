"""Maps that wait in a fitted network: made by nobody who can do without, and made right for whoever writes to them."""

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
