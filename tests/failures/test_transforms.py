"""Function transforms, forward-mode derivatives and `functional_call`: right or refused.

The number in a comment is the line of the list of failures the tests were written from.
"""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap

from revseg import AdditiveCoupling, AffineCoupling, OneSidedCoupling, ReversibleSequence
from tests.helpers import (
    all_couplings,
    default_loss,
    gradient_error,
    gradients_of,
    modes,
    small_input,
    twin,
)

# --- other parameters ---------------------------------------------------------------------------


@modes
def test_functional_call_differentiates_by_the_parameters_it_was_given(options):  # 54
    """Its parameters are gone from the modules when the backward pass runs the functions again."""
    sequence = all_couplings(**options)
    results = []
    for module in (sequence, twin(sequence)):
        x = small_input()
        given = {
            name: (p.detach() + 0.1 * small_input(*p.shape, requires_grad=False)).requires_grad_()
            for name, p in module.named_parameters()
        }
        default_loss(functional_call(module, given, (x,))).backward()
        assert all(p.grad is None for p in module.parameters())
        results.append({"x": x.grad} | {name: p.grad for name, p in given.items()})
    assert gradient_error(*results) < 1e-9


@modes
def test_parameters_computed_from_others_pass_the_gradient_on(options):  # 54
    sequence = all_couplings(**options)
    results = []
    for module in (sequence, twin(sequence)):
        x, factor = small_input(), torch.tensor(1.1, dtype=torch.float64, requires_grad=True)
        default_loss(
            functional_call(module, {n: p * factor for n, p in module.named_parameters()}, (x,))
        ).backward()
        results.append(gradients_of(module, x=x, factor=factor))
    assert results[0]["factor"].abs() > 1e-6
    assert gradient_error(*results) < 1e-9


# --- function transforms ------------------------------------------------------------------------


def smooth_sequence(**options):
    torch.manual_seed(0)

    def fn(out_channels=4):
        return nn.Sequential(nn.Conv2d(4, out_channels, 3, padding=1), nn.Tanh())

    return ReversibleSequence(
        AdditiveCoupling(fn(), fn()), OneSidedCoupling(fn()), AffineCoupling(fn(8), fn(8)), **options
    ).double()


def scalar(y):
    return (y * torch.linspace(-1, 1, y.shape[-1], dtype=y.dtype)).mean() + y.square().mean()


def by_parameters(module, x):
    return grad(lambda given: scalar(functional_call(module, given, (x,))))(dict(module.named_parameters()))


TRANSFORMS = {
    "grad": lambda m, x: grad(lambda z: scalar(m(z)))(x),
    "grad by parameters": by_parameters,
    "grad of grad": lambda m, x: grad(lambda z: grad(lambda w: scalar(m(w)))(z).square().sum())(x),
    "vjp": lambda m, x: vjp(m, x)[1](x),
    "jvp": lambda m, x: jvp(m, (x,), (x.sin(),)),
    "jacrev": lambda m, x: jacrev(lambda z: m(z).mean((0, 2, 3)))(x),
    "vmap": lambda m, x: vmap(m)(torch.stack((x, x + 1))),
    "per-sample gradients": lambda m, x: vmap(grad(lambda z: scalar(m(z[None]))))(x),
}


@modes
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_function_transforms_are_right(transform, options):  # 55
    sequence = smooth_sequence(**options)
    x = small_input(2, 8, 4, 3, requires_grad=False)
    ours, plain = (TRANSFORMS[transform](module, x) for module in (sequence, twin(sequence)))
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)


@modes
@pytest.mark.parametrize("vectorised", [False, True])
def test_batched_gradients_are_right_or_refused(vectorised, options):  # 55
    sequence, x = smooth_sequence(**options), small_input(2, 8, 4, 3)
    directions = small_input(3, 2, 8, 4, 3, requires_grad=False)

    def jacobian_rows(module):
        y = module(x)
        if vectorised:
            return torch.autograd.grad(y, x, directions, is_grads_batched=True)[0]
        return torch.stack([torch.autograd.grad(y, x, d, retain_graph=True)[0] for d in directions])

    plain = jacobian_rows(twin(sequence))
    try:
        ours = jacobian_rows(sequence)
    except RuntimeError as error:
        refusal = str(error)
    else:
        refusal = ""
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)
    assert not refusal or (vectorised and "is_grads_batched" in refusal), refusal


@modes
@pytest.mark.parametrize("as_pair", [False, True], ids=["tensor", "pair"])
def test_forward_mode_differentiation_is_right(as_pair, options):  # 55
    sequence = smooth_sequence(**options)
    x, dx = small_input(requires_grad=False), small_input(seed=1, requires_grad=False)
    results = []
    for module in (sequence, twin(sequence)):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, dx)
            y = module(dual.chunk(2, 1) if as_pair else dual)
            results.append([forward_ad.unpack_dual(each).tangent for each in (y if as_pair else [y])])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@modes
def test_forward_mode_differentiation_by_a_parameter_is_right_or_refused(options):  # 55
    sequence, x = smooth_sequence(**options), small_input(requires_grad=False)
    results = []
    for module in (twin(sequence), sequence):
        with forward_ad.dual_level():
            given = {
                name: forward_ad.make_dual(p, torch.ones_like(p)) if name == "blocks.0.f.0.weight" else p
                for name, p in module.named_parameters()
            }
            try:
                tangent = forward_ad.unpack_dual(functional_call(module, given, (x,))).tangent
            except RuntimeError as error:
                results.append(str(error))
            else:
                results.append(tangent)
    plain, ours = results
    assert ours is not None, "the tangent is lost"
    if not isinstance(ours, str):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)
