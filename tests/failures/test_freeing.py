"""What a graph holds goes with the graph, and gradients lie as their parameters do."""

import gc
import weakref

import pytest
import torch
from torch import nn

from revseg import AdditiveCoupling, OneSidedCoupling, ReversibleSequence
from tests.helpers import (
    all_couplings,
    assert_same_step,
    default_loss,
    gradient_error,
    modes,
    run_step,
    small_input,
    twin,
)


class Watched(nn.Module):
    """Keeps weak references to what it was given and what it made."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.seen = []

    def forward(self, x):
        h = self.conv(x)
        self.seen += [weakref.ref(x), weakref.ref(h)]
        return h.tanh()


def alive_in(sequence):
    """The references of its functions to tensors that were not freed."""
    watched = [module for module in sequence.modules() if isinstance(module, Watched)]
    return [each for module in watched for each in module.seen if each() is not None]


@modes
@pytest.mark.parametrize("backward", [False, True])
def test_a_graph_is_freed_without_the_garbage_collector(backward, options):  # 58
    sequence = ReversibleSequence(
        AdditiveCoupling(Watched(), Watched()), OneSidedCoupling(Watched()), **options
    )
    gc.collect()
    gc.disable()
    try:
        y = sequence(small_input(dtype=torch.float32))
        node = y.grad_fn.next_functions[0][0] if options.get("per_block") else y.grad_fn
        node = weakref.ref(node)
        if backward:
            y.sum().backward()
        del y
        assert node() is None
        assert not alive_in(sequence)
    finally:
        gc.enable()


@modes
def test_the_graph_of_second_derivatives_is_freed_too(options):  # 58
    sequence = ReversibleSequence(
        AdditiveCoupling(Watched(), Watched()), OneSidedCoupling(Watched()), **options
    )
    gc.collect()
    gc.disable()
    try:
        x = small_input(dtype=torch.float32)
        (dx,) = torch.autograd.grad(sequence(x).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(dx.sum(), x)
        del dx, second
        assert not alive_in(sequence)
    finally:
        gc.enable()


@modes
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_have_the_layout_of_their_parameters(layout, options):  # 59
    sequence = all_couplings(**options).to(memory_format=layout)
    x = small_input().detach().contiguous(memory_format=layout).requires_grad_()
    ours, plain = assert_same_step(sequence, twin(sequence), x)
    for name, gradient in ours.gradients.items():
        assert gradient.stride() == plain.gradients[name].stride(), name


@modes
def test_gradients_are_added_to_the_views_they_have(options):  # 59
    """As the buckets of distributed training are: `.grad` is a view of one flat tensor, and stays it."""
    sequence = all_couplings(**options)
    plain = run_step(twin(sequence), small_input())
    flat = torch.ones(sum(p.numel() for p in sequence.parameters()), dtype=torch.float64)
    pieces = flat.split([p.numel() for p in sequence.parameters()])
    for parameter, piece in zip(sequence.parameters(), pieces, strict=True):
        parameter.grad = piece.view_as(parameter)
    x = small_input()
    default_loss(sequence(x)).backward()
    for parameter, piece in zip(sequence.parameters(), pieces, strict=True):
        assert parameter.grad.data_ptr() == piece.data_ptr()
    found = {name: p.grad - 1 for name, p in sequence.named_parameters()}
    assert gradient_error({"input 0": x.grad} | found, plain.gradients) < 1e-9
