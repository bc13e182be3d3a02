"""Scenarios of `benchmarks.scenarios`: what surrounds a step, and what functions do that they should not."""

import contextlib
import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.scenarios.chain import (
    Chain,
    Found,
    Wrapped,
    conv_tanh,
    loss_of,
    with_batch_norm,
)


def without_grad(way: str) -> Found:
    """A forward pass under no_grad, whose input stays"""
    chain = Chain(way)
    x = chain.x.clone()
    with torch.no_grad():
        y = chain.net(x)
    return chain.left_behind(output=y, input=x)


def evaluation(way: str) -> Found:
    """A step in evaluation mode, with running statistics"""
    chain = Chain(way, with_batch_norm)
    chain.functions.eval()
    chain.again()
    chain.functions.eval()
    return chain.step()


def parameters_changed(way: str) -> Found:
    """Parameters are written to between forward and backward; plain autograd refuses"""
    chain = Chain(way, conv_tanh)
    loss = loss_of(chain.net(chain.leaf()))
    with torch.no_grad():
        for p in chain.functions.parameters():
            p.mul_(2)
    loss.backward()
    return chain.left_behind()


def other_weights(way: str) -> Found:
    """`functional_call` with other weights gets their gradients"""
    chain = Chain(way, conv_tanh)
    model = Wrapped(chain)
    other = {name: (2 * p).detach().requires_grad_() for name, p in model.named_parameters()}
    loss_of(torch.func.functional_call(model, other, (chain.leaf(),))).backward()
    return chain.left_behind(**{f"of other {name}": p.grad for name, p in other.items()})


def function_transform(way: str) -> Found:
    """`torch.func.grad` by the input"""
    chain = Chain(way, conv_tanh)
    return {"dx": torch.func.grad(lambda x: loss_of(chain.net(x)))(chain.x)}


class _Watched(nn.Module):
    """A convolution that notes in which dtype it computes."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 1)
        self.seen: set[torch.dtype] = set()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        self.seen.add(y.dtype)
        return y.to(x.dtype)


def autocast(way: str) -> Found:
    """Under autocast, and a backward pass outside of it, functions compute in the same dtype in both runs."""
    chain = Chain(way, _Watched, dtype=torch.float32)
    x = chain.leaf()
    with torch.autocast("cpu", torch.bfloat16):
        y = chain.net(x)
    loss_of(y).backward()
    watched = (m for m in chain.functions.modules() if isinstance(m, _Watched))
    return {"dtypes": sorted({str(dtype) for m in watched for dtype in m.seen})}


class _Counting(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv, self.calls = nn.Conv2d(c, c, 1), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.conv(x) * (1 + self.calls % 2)
        return y


def hidden_state(way: str) -> Found:
    """A function with hidden state, other values in a second run: the right gradient, or an error"""
    chain = Chain(way, _Counting)
    return {k: v for k, v in chain.step().items() if "buffer" not in k}


def exception(way: str) -> Found:
    """An exception in the second run leaves buffers, modes and the next step as they should be"""
    chain = Chain(way)
    x = chain.leaf()
    armed: list[int] = []

    def stop(grad: Tensor) -> Tensor:
        if armed:
            raise KeyError("stop")
        return grad

    handle = next(chain.functions.parameters()).register_hook(stop)
    armed.append(1)
    with contextlib.suppress(KeyError):
        loss_of(chain.net(x)).backward()
    handle.remove()
    chain.functions.zero_grad()
    loss_of(chain.net(chain.leaf())).backward()
    return chain.left_behind(grad_mode=torch.is_grad_enabled())


def channels_last(way: str) -> Found:
    """An input in channels_last comes out in channels_last"""
    chain = Chain(way, conv_tanh)
    x = chain.x.contiguous(memory_format=torch.channels_last).requires_grad_()
    y = chain.net(x)
    loss_of(y).backward()
    return chain.left_behind(dx=x.grad, kept=y.is_contiguous(memory_format=torch.channels_last))


def copied(way: str) -> Found:
    """A deep copy trains like the original"""
    chain = Chain(way)
    net = chain.net
    if not isinstance(net, nn.Module):
        chain.functions, chain.pairs = _copied_pairs(chain)
        chain.again()
    else:
        chain.net = copy.deepcopy(net)
        chain.functions = _functions_in(chain.net, chain.functions)
    loss_of(chain.net(chain.leaf())).backward()
    return chain.left_behind()


def _copied_pairs(chain: Chain) -> tuple[nn.ModuleList, list[tuple[nn.Module, nn.Module]]]:
    functions = copy.deepcopy(chain.functions)
    return functions, [tuple(pair) for pair in functions]  # type: ignore[misc, arg-type]


def _functions_in(net: nn.Module, like: nn.ModuleList) -> nn.ModuleList:
    """F and g of every block of a copy, found by the order of their first parameters."""
    old = list(like.parameters())
    new = list(net.parameters())
    if len(old) != len(new):
        raise RuntimeError(f"the copy has {len(new)} parameters, not {len(old)}")
    functions = copy.deepcopy(like)
    named = dict(zip((name for name, _ in functions.named_parameters()), new, strict=True))
    for name, p in named.items():
        owner, leaf = name.rsplit(".", 1)
        setattr(functions.get_submodule(owner), leaf, p)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for mine, theirs in zip(
        (m for m in functions.modules() if isinstance(m, nn.BatchNorm2d)), norms, strict=True
    ):
        mine._buffers = theirs._buffers
    return functions


def compiled(way: str) -> Found:
    """Torch.compile of a network with the chain in it"""
    chain = Chain(way)
    x = chain.leaf()
    y = torch.compile(lambda x: chain.net(x * 1.0) * 1.0, backend="aot_eager")(x)
    loss_of(y).backward()
    return chain.left_behind(output=y.detach(), dx=x.grad)


def distributed(way: str) -> Found:
    """DistributedDataParallel around the chain, one process"""
    return _distributed(way, find_unused_parameters=False)


def distributed_with_unused(way: str) -> Found:
    """The same with `find_unused_parameters`"""
    return _distributed(way, find_unused_parameters=True)


# Kept: gloo's destructor waits, with Python's lock in its hands, for a thread that may want that lock.
_GROUPS: list[dist.ProcessGroup | None] = []


def _distributed(way: str, **options: bool) -> Found:
    chain = Chain(way)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    _GROUPS.append(dist.group.WORLD)
    try:
        model = nn.parallel.DistributedDataParallel(Wrapped(chain), **options)
        loss_of(model(chain.leaf())).backward()
    finally:
        dist.destroy_process_group()
    return chain.left_behind()


def odd_channels(way: str) -> Found:
    """An odd number of channels is refused"""
    chain = Chain(way, conv_tanh)
    y = chain.net(torch.randn(2, 7, 6, 10, dtype=torch.float64))
    return {"output": list(y.shape)}
