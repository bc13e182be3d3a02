"""Scenarios of `benchmarks.scenarios`: functions that hold, hide or replace what others do not look for."""

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from benchmarks.scenarios.chain import Chain, Found, conv_tanh, loss_of


class _Masked(nn.Module):
    """A convolution whose output is masked by what was handed over as an attribute."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 1)
        self.mask: Tensor = torch.ones(())

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.conv(x)) * self.mask


def mask_changed_inside(way: str) -> Found:
    """A mask kept as an attribute changes inside the map between two micro-batches: the right gradient, or an error"""
    chain = Chain(way, _Masked, shape=(2, 64, 16, 16))
    masks = [m for m in chain.functions.modules() if isinstance(m, _Masked)]
    loss = torch.zeros((), dtype=torch.float64)
    for inside in (0.0, 1.0):
        mask = torch.ones(2, 1, 16, 16, dtype=torch.float64)
        mask[:, :, 2:14, 2:14] = inside
        for each in masks:
            each.mask = mask
        loss = loss + loss_of(chain.net(chain.leaf()))
    loss.backward()
    return chain.left_behind()


class _Prompted(nn.Module):
    """A frozen convolution plus a tensor from outside, which is no parameter of its own."""

    def __init__(self, c: int, prompt: list[Tensor]) -> None:
        super().__init__()
        self.conv, self.prompt = nn.Conv2d(c, c, 1).requires_grad_(False), prompt

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x) + self.prompt[0]
        return y


def prompt_in_a_frozen_beginning(way: str) -> Found:
    """A tensor from outside learns although the first function has nothing that learns, nor has the input"""
    chain = Chain(way, conv_tanh)
    prompt = torch.ones(1, 4, 1, 1, dtype=chain.x.dtype, requires_grad=True)
    torch.manual_seed(2)
    first = _Prompted(4, [prompt]).to(chain.x.dtype)
    chain.pairs[0] = (first, chain.pairs[0][1])
    chain.functions[0][0] = first  # type: ignore[index]
    chain.again()
    loss_of(chain.net(chain.x.clone())).backward()
    return chain.left_behind(prompt=prompt.grad)


class _Scaled(nn.Module):
    """A convolution scaled by a buffer, which another network may have made."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 1)
        self.register_buffer("scale", torch.ones(1, c, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.conv(x)) * self.scale


def buffer_that_learns(way: str) -> Found:
    """A buffer that requires grad, made by another network: the right gradient, or an error"""
    chain = Chain(way, _Scaled)
    z = torch.full((1, 4, 1, 1), 0.5, dtype=chain.x.dtype, requires_grad=True)
    chain.pairs[0][0].scale = z * 2  # type: ignore[assignment]
    loss_of(chain.net(chain.leaf())).backward()
    return chain.left_behind(z=z.grad)


def _norm(c: int) -> nn.BatchNorm2d:
    """Without running statistics, which have a scenario of their own."""
    return nn.BatchNorm2d(c, track_running_stats=False)


def _spectral(c: int) -> nn.Module:
    return nn.Sequential(spectral_norm(nn.Conv2d(c, c, 3, padding=1)), _norm(c), nn.ReLU())


def spectral_normed(way: str) -> Found:
    """Spectral norm iterates once a step"""
    return Chain(way, _spectral).step()


class _Noise(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * (1 + 0.1 * torch.randn_like(weight))


def _noisy(c: int) -> nn.Module:
    conv = nn.Conv2d(c, c, 1)
    nn.utils.parametrize.register_parametrization(conv, "weight", _Noise())
    return nn.Sequential(conv, _norm(c), nn.ReLU())


def noisy_weight(way: str) -> Found:
    """A weight that is drawn anew is drawn once a step, and is the same in both runs"""
    return Chain(way, _noisy).step()


def _activated(c: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(c, c, 1), _norm(c), nn.ReLU())


def replaced_forward(way: str) -> Found:
    """The `forward` of an instance is replaced, as accelerate and quantizers do"""
    chain = Chain(way, _activated)
    for f, _ in chain.pairs:
        f[2].forward = lambda x: 0.5 * torch.tanh(x)  # type: ignore[index, assignment]
    chain.again()
    return chain.step()


class _Owner(nn.Module):
    """Has a method that a coupling may be given, and a batch norm that the method reaches."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(c, affine=False)

    def helper(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x)
        return y


def method_with_batch_norm(way: str) -> Found:
    """A bound method as a function, which reaches a batch norm: each batch counts once, or an error"""
    chain = Chain(way, conv_tanh)
    owner = _Owner(4).to(chain.x.dtype)
    chain.pairs[0] = (owner.helper, chain.pairs[0][1])  # type: ignore[assignment]
    chain.again()
    x = chain.leaf()
    loss_of(chain.net(x)).backward()
    return chain.left_behind(dx=x.grad, **dict(owner.named_buffers()))


class _Gated(nn.Module):
    """A gate whose mean is kept, for a loss of its own."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.gate = nn.Conv2d(c, c, 1)
        self.balance: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x).sigmoid()
        self.balance = gate.mean().square()
        return x * gate


def loss_on_something_inside(way: str) -> Found:
    """A loss on what a function kept of its inside: the right gradient, or an error"""
    chain = Chain(way, _Gated)
    y = chain.net(chain.leaf())
    balances = [m.balance for m in chain.functions.modules() if isinstance(m, _Gated)]
    (loss_of(y) + sum(each for each in balances if each is not None)).backward()
    return chain.left_behind()
