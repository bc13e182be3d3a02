"""What people do with a chain of reversible blocks, and what is right.

A scenario is a function of a `Chain`: it runs one way and returns what must be equal to what plain
autograd gives in the same scenario, tensors and numbers by name. It may also refuse, by an
exception. What is compared is all that a step leaves behind: outputs, gradients, buffers, the random state.
"""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.ways import WAYS

Found = dict[str, Any]


class Chain:
    """A small chain of one way, the same weights and data at every call.

    Args:
        way: A name in `WAYS`.
        make: Makes f or g from the channels of a stream.
        depth: The number of blocks.
        dtype: Of weights and data.
        shape: N, C, H, W of the input.
    """

    def __init__(
        self,
        way: str,
        make: Callable[[int], nn.Module] | None = None,
        depth: int = 2,
        dtype: torch.dtype = torch.float64,
        shape: tuple[int, int, int, int] = (2, 8, 6, 10),
    ) -> None:
        torch.manual_seed(0)
        make = make or conv_norm
        pairs = [(make(shape[1] // 2), make(shape[1] // 2)) for _ in range(depth)]
        self.functions = nn.ModuleList(nn.ModuleList(pair) for pair in pairs).to(dtype)
        self.x = torch.randn(shape, dtype=dtype)
        self.way, self.pairs = way, pairs
        self.net = WAYS[way](pairs)
        torch.manual_seed(1)

    def again(self) -> None:
        """The chain once more, of functions that were changed since."""
        self.net = WAYS[self.way](self.pairs)

    def leaf(self) -> Tensor:
        return self.x.clone().requires_grad_()

    def left_behind(self, **more: Any) -> Found:
        """Gradients, buffers and random state, and what else a scenario saw."""
        found: Found = {f"gradient of {name}": p.grad for name, p in self.functions.named_parameters()}
        found |= {f"buffer {name}": b.clone() for name, b in self.functions.named_buffers()}
        return found | {"random state": torch.get_rng_state()} | more


def conv_norm(c: int) -> nn.Module:
    """Without batch norm, which has a scenario of its own: what is wrong there shall not hide the rest."""
    return nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.GroupNorm(1, c), nn.PReLU(c))


def with_batch_norm(c: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c), nn.PReLU(c))


def conv_tanh(c: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.Tanh())


def with_dropout(c: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.Dropout(0.3), nn.Tanh())


def loss_of(y: Tensor) -> Tensor:
    return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).mean() + y.square().mean()


# --- the scenarios ---------------------------------------------------------------------------------


def a_step(way: str) -> Found:
    """A training step"""
    chain = Chain(way)
    x = chain.leaf()
    y = chain.net(x)
    loss_of(y).backward()
    return chain.left_behind(output=y.detach(), dx=x.grad)


def batch_norm(way: str) -> Found:
    """Running statistics count each batch once"""
    chain = Chain(way, with_batch_norm)
    x = chain.leaf()
    loss_of(chain.net(x)).backward()
    return chain.left_behind(dx=x.grad)


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
    x = chain.leaf()
    loss_of(chain.net(x)).backward()
    return chain.left_behind(dx=x.grad)


def all_frozen(way: str) -> Found:
    """All parameters are frozen, only the input learns"""
    chain = Chain(way)
    chain.functions.requires_grad_(False)
    chain.again()
    x = chain.leaf()
    loss_of(chain.net(x)).backward()
    return chain.left_behind(dx=x.grad)


def shared_functions(way: str) -> Found:
    """One function in several places"""
    chain = Chain(way, conv_tanh)
    f, g = chain.pairs[0]
    chain.pairs[:] = [(f, g), (f, g)]
    chain.again()
    x = chain.leaf()
    loss_of(chain.net(x)).backward()
    return chain.left_behind(dx=x.grad)


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
    x = chain.leaf()
    loss_of(chain.net(x)).backward()
    return chain.left_behind(dx=x.grad)


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
    model = _Wrapped(chain)
    other = {name: (2 * p).detach().requires_grad_() for name, p in model.named_parameters()}
    loss_of(torch.func.functional_call(model, other, (chain.leaf(),))).backward()
    return chain.left_behind(**{f"of other {name}": p.grad for name, p in other.items()})


class _Wrapped(nn.Module):
    """A chain of any way as a module, its functions under names of our own."""

    def __init__(self, chain: Chain) -> None:
        super().__init__()
        self.functions, self.net = chain.functions, [chain.net]

    def forward(self, x: Tensor) -> Tensor:
        return self.net[0](x)  # type: ignore[no-any-return]


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
    x = chain.leaf()
    loss_of(chain.net(x)).backward()
    return {k: v for k, v in chain.left_behind(dx=x.grad).items() if "buffer" not in k}


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


def _distributed(way: str, **options: bool) -> Found:
    chain = Chain(way)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(_Wrapped(chain), **options)
        loss_of(model(chain.leaf())).backward()
    finally:
        dist.destroy_process_group()
    return chain.left_behind()


def odd_channels(way: str) -> Found:
    """An odd number of channels is refused"""
    chain = Chain(way, conv_tanh)
    y = chain.net(torch.randn(2, 7, 6, 10, dtype=torch.float64))
    return {"output": list(y.shape)}


SCENARIOS: dict[str, Callable[[str], Found]] = {
    scenario.__name__.replace("_", " "): scenario
    for scenario in (
        a_step, batch_norm, dropout, random_state, evaluation, input_without_gradient, partly_frozen, all_frozen, shared_functions,
        accumulation, two_forwards, autograd_grad, backward_by_inputs, hooks_on_tensors, backward_twice,
        double_backward, other_weights, function_transform, parameters_changed, output_changed_in_place,
        saved_before, skip_around, input_stays, without_grad, hidden_state, exception, channels_last, copied,
        compiled, autocast, distributed, distributed_with_unused, odd_channels,
    )
}  # fmt: skip
