"""Scenarios of `benchmarks.scenarios`: a training step, and the ways through autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.scenarios.chain import Chain, Found, conv_tanh, loss_of, with_batch_norm, with_dropout


def a_step(way: str) -> Found:
    """A training step"""
    chain = Chain(way)
    x = chain.leaf()
    y = chain.net(x)
    loss_of(y).backward()
    return chain.left_behind(output=y.detach(), dx=x.grad)


def batch_norm(way: str) -> Found:
    """Running statistics count each batch once"""
    return Chain(way, with_batch_norm).step()


def dropout(way: str) -> Found:
    """Dropout draws the same mask in the second run: the gradient is the slope of the output."""
    chain = Chain(way, with_dropout)
    direction = torch.randn_like(chain.x)

    def loss(x: Tensor) -> Tensor:
        torch.manual_seed(2)
        return loss_of(chain.net(x))

    x = chain.leaf()
    loss(x).backward()
    with torch.no_grad():
        slope = (loss(chain.x + 1e-6 * direction) - loss(chain.x - 1e-6 * direction)) / 2e-6
    along = (direction * x.grad).sum()
    return {"off": round(abs(along - slope).item() / abs(slope).item(), 3)}


def random_state(way: str) -> Found:
    """The backward pass leaves the random state alone."""
    chain = Chain(way, with_dropout)
    loss = loss_of(chain.net(chain.leaf()))
    before = torch.get_rng_state()
    loss.backward()
    return {"changed by backward": not torch.equal(before, torch.get_rng_state())}


def input_without_gradient(way: str) -> Found:
    """The input does not require grad, and a head behind the chain learns too."""
    chain = Chain(way)
    head = torch.ones((), dtype=chain.x.dtype, requires_grad=True)
    loss_of(head * chain.net(chain.x.clone())).backward()
    return chain.left_behind(head=head.grad)


def partly_frozen(way: str) -> Found:
    """Some parameters are frozen"""
    chain = Chain(way)
    for p in (*chain.pairs[0][0].parameters(), chain.pairs[1][1][0].weight):  # type: ignore[index]
        p.requires_grad_(False)
    chain.again()
    return chain.step()


def all_frozen(way: str) -> Found:
    """All parameters are frozen, only the input learns"""
    chain = Chain(way)
    chain.functions.requires_grad_(False)
    chain.again()
    return chain.step()


def shared_functions(way: str) -> Found:
    """One function in several places"""
    chain = Chain(way, conv_tanh)
    f, g = chain.pairs[0]
    chain.pairs[:] = [(f, g), (f, g)]
    chain.again()
    return chain.step()


def autograd_grad(way: str) -> Found:
    """`torch.autograd.grad`, which leaves `.grad` alone"""
    chain = Chain(way)
    x = chain.leaf()
    wanted = [x, *chain.functions.parameters()]
    found = torch.autograd.grad(loss_of(chain.net(x)), wanted)
    return chain.left_behind(**{f"found {i}": g for i, g in enumerate(found)})


def backward_by_inputs(way: str) -> Found:
    """`backward(inputs=[x])`, which leaves the parameters alone"""
    chain = Chain(way)
    x = chain.leaf()
    loss_of(chain.net(x)).backward(inputs=[x])
    return chain.left_behind(dx=x.grad)


def hooks_on_tensors(way: str) -> Found:
    """Hooks on the input and on parameters scale their gradients"""
    chain = Chain(way)
    x = chain.leaf()
    x.register_hook(lambda g: 2 * g)
    for p in chain.functions.parameters():
        p.register_hook(lambda g: 3 * g)
    loss_of(chain.net(x)).backward()
    return chain.left_behind(dx=x.grad)


def double_backward(way: str) -> Found:
    """A gradient penalty"""
    chain = Chain(way, conv_tanh)
    x = chain.leaf()
    (dx,) = torch.autograd.grad(loss_of(chain.net(x)), x, create_graph=True)
    dx.square().sum().backward()
    return chain.left_behind(dx=x.grad)


def backward_twice(way: str) -> Found:
    """Backward twice with `retain_graph`"""
    chain = Chain(way)
    x = chain.leaf()
    loss = loss_of(chain.net(x))
    loss.backward(retain_graph=True)
    loss.backward()
    return chain.left_behind(dx=x.grad)


def accumulation(way: str) -> Found:
    """Gradients of two steps are added"""
    chain = Chain(way)
    for scale in (1.0, 2.0):
        loss_of(chain.net(chain.leaf() * scale)).backward()
    return chain.left_behind()


def two_forwards(way: str) -> Found:
    """Two forward passes, then one backward pass through both"""
    chain = Chain(way)
    a, b = chain.leaf(), chain.leaf()
    (loss_of(chain.net(a)) + loss_of(chain.net(b * 2))).backward()
    return chain.left_behind(da=a.grad, db=b.grad)


def output_changed_in_place(way: str) -> Found:
    """An in-place ReLU behind the chain"""
    chain = Chain(way)
    x = chain.leaf()
    loss_of(F.relu(chain.net(x), inplace=True)).backward()
    return chain.left_behind(dx=x.grad)


def saved_before(way: str) -> Found:
    """A ReLU in front of the chain, which saves its output"""
    chain = Chain(way)
    x = chain.leaf()
    loss_of(chain.net(F.relu(x))).backward()
    return chain.left_behind(dx=x.grad)


def skip_around(way: str) -> Found:
    """A skip connection around the chain"""
    chain = Chain(way)
    x = chain.leaf()
    inner = x * 1.5
    loss_of(inner + chain.net(inner)).backward()
    return chain.left_behind(dx=x.grad)


def input_stays(way: str) -> Found:
    """The caller's input is as it was, after the forward pass and after the step"""
    chain = Chain(way)
    x = chain.leaf()
    y = chain.net(x)
    between = x.detach().clone()
    loss_of(y).backward()
    return {"between": between, "after": x.detach().clone()}
