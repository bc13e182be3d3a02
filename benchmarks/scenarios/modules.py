"""Scenarios of `benchmarks.scenarios`: modules that run again, blocks of one's own, what is counted and predicted."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.scenarios.chain import Chain, Found, NotOfferedError, conv_tanh, loss_of
from benchmarks.ways import EVERY, OURS, TWINS
from revseg import AdditiveCoupling, Coupling, Recompute, ReversibleSequence, reversible
from revseg.memory import peak_bytes, predicted_peak_bytes

Call = Callable[..., Any]


def _options(way: str) -> dict[str, Any]:
    """Of the sequence that stands for one of our ways."""
    return {"revseg exact": {"exact": True}, "revseg lossless": {"exact": "lossless"}}.get(way, {})


def _run_again(way: str, module: Call) -> Call:
    """The module as the way runs it a second time in the backward pass."""
    if way in ("plain", "plain momentum"):
        return module
    if way in OURS:
        return Recompute(module)  # type: ignore[arg-type]
    if way == "checkpoint":
        return lambda *args, **kwargs: checkpoint(module, *args, use_reentrant=False, **kwargs)
    if way == "torch-remat":
        import torch_remat  # type: ignore[import-not-found]

        return torch_remat.checkpoint(region_name="module")(module)  # type: ignore[no-any-return]
    raise NotOfferedError(f"{way} runs no ordinary module again")


@dataclasses.dataclass
class _Outputs:
    main: Tensor
    aux: Tensor


class _TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> _Outputs:
        y = self.conv(x)
        return _Outputs(y, 2 * y)


def dataclass_returned(way: str) -> Found:
    """A module that returns a dataclass is run again: the right gradient, or an error"""
    torch.manual_seed(0)
    module = _TwoHeads()
    net = _run_again(way, module)
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    found = net(x)
    (loss_of(found.main) + found.aux.mean()).backward()
    return {"dx": x.grad} | {name: p.grad for name, p in module.named_parameters()}


def encoder_in_evaluation(way: str) -> Found:
    """A transformer's encoder in evaluation mode with padding, run again: the values and gradients of plain autograd"""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1).eval()
    net = _run_again(way, encoder)
    x, mask = torch.randn(2, 6, 8, requires_grad=True), torch.zeros(2, 6, dtype=torch.bool)
    mask[1, 4:] = True
    y = net(x, src_key_padding_mask=mask)
    loss_of(y).backward()
    return {"output": y.detach(), "dx": x.grad} | {name: p.grad for name, p in encoder.named_parameters()}


class _ReZero(Coupling):
    """y = x + alpha h, where alpha learns."""

    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__(f, g)
        self.alpha = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def couple(self, x: Tensor, h: Tensor) -> Tensor:  # type: ignore[override]
        return x + self.alpha * h

    def uncouple(self, y: Tensor, h: Tensor) -> Tensor:  # type: ignore[override]
        return y - self.alpha * h


def coupling_that_learns(way: str) -> Found:
    """A coupling with a parameter of its own"""
    chain = Chain("plain", conv_tanh)
    alphas = [torch.tensor(0.5, dtype=torch.float64, requires_grad=True) for _ in chain.pairs]

    def block(f: nn.Module, g: nn.Module, alpha: Tensor, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        y1 = x1 + alpha * f(x2)
        return y1, x2 + alpha * g(y1)

    x = chain.leaf()
    if way in OURS:
        couplings = [_ReZero(f, g) for f, g in chain.pairs]
        alphas = [each.alpha for each in couplings]
        y = ReversibleSequence(couplings, **_options(way))(x)
    elif way in ("plain", "checkpoint", "torch-remat"):
        streams = x.chunk(2, 1)
        for (f, g), alpha in zip(chain.pairs, alphas, strict=True):
            streams = _run_again(way, block)(f, g, alpha, *streams)
        y = torch.cat(streams, 1)
    else:
        raise NotOfferedError(f"{way} was given no coupling of that kind")
    loss_of(y).backward()
    return chain.left_behind(dx=x.grad, **{f"alpha {i}": alpha.grad for i, alpha in enumerate(alphas)})


class _Block(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.conv(x))


def appended_after_conversion(way: str) -> Found:
    """A layer appended to a converted row of blocks is its last layer"""
    torch.manual_seed(0)
    row = nn.Sequential(nn.Conv2d(3, 4, 1), *(_Block(4) for _ in range(3)), nn.Conv2d(4, 4, 1), nn.ReLU())
    x = torch.randn(1, 3, 5, 6)
    if way in OURS:
        row = reversible(row, x)[0]  # type: ignore[assignment]
    elif way != "plain":
        raise NotOfferedError(f"{way} converts no networks, or another kind")
    length, before = len(row), row(x)
    row.append(last := nn.Conv2d(4, 2, 1))
    return {
        "one more": len(row) - length,
        "last": row[-1] is last,
        "applied": torch.equal(row(x), last(before)),
    }


def prediction_of_dropped_gradients(way: str) -> Found:
    """The predicted peak of a step that drops its gradients first is the measured one"""
    if way not in OURS and way != "plain":
        raise NotOfferedError(f"{way} predicts nothing")

    def prepare() -> Callable[[], None]:
        pairs = [(nn.Conv2d(256, 256, 1), nn.Conv2d(256, 256, 1)) for _ in range(4)]
        net, parameters = EVERY[way](pairs), [p for pair in pairs for each in pair for p in each.parameters()]
        for p in parameters:
            p.grad = torch.zeros_like(p)

        def step() -> None:
            y = net(torch.randn(1, 512, 2, 2))
            for p in parameters:
                p.grad = None
            y.square().mean().backward()

        return step

    step = prepare()
    measured, predicted = peak_bytes(step, before=step), predicted_peak_bytes(prepare)
    gradients = 8 * (256 * 256 + 256) * 4  # bytes, many times the activations
    return {"predicted within a tenth of the gradients": abs(predicted - measured) < 0.1 * gradients}


def flops(way: str) -> Found:
    """`FlopCounterMode` around a step counts at least plain's operations, and at most two forward passes more"""
    counted = []
    for each in (TWINS.get(way, "plain"), way):
        chain = Chain(each, conv_tanh)
        x = chain.leaf()
        with FlopCounterMode(display=False) as counter:
            loss_of(chain.net(x)).backward()
        counted.append(counter.get_total_flops())
    once, mine = counted
    return {"at least plain's": mine >= once, "two forward passes more at most": 3 * mine <= 5 * once}


def gradients_that_stand(way: str) -> Found:
    """Where gradients already stand, a step takes at most half more memory than plain autograd's"""
    peaks = []
    for each in (TWINS.get(way, "plain"), way):
        chain = Chain(each, lambda c: nn.Conv2d(c, c, 1), depth=12, dtype=torch.float32, shape=(1, 256, 4, 4))
        step = _step_of(chain)
        step()
        peaks.append(peak_bytes(step, before=step))
    return {"at most half more": peaks[1] <= 1.5 * peaks[0]}


def _step_of(chain: Chain) -> Callable[[], None]:
    x = chain.leaf()
    return lambda: chain.net(x).square().mean().backward()


class _Conditioned(nn.Module):
    """A function of a stream and of a side input."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv, self.side = nn.Conv2d(c, c, 1), nn.Linear(3, c)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return torch.tanh(self.conv(x) + self.side(context)[:, :, None, None])


def side_input(way: str) -> Found:
    """A side input that every function reads, and that learns"""
    chain = Chain("plain", _Conditioned)
    x, context = chain.leaf(), torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    net = _with_side_input(way, chain)
    loss_of(net(x, context)).backward()
    return chain.left_behind(dx=x.grad, context=context.grad)


def _with_side_input(way: str, chain: Chain) -> Call:
    """The chain as a function of x and the side input."""
    if way in OURS:
        return ReversibleSequence([AdditiveCoupling(f, g) for f, g in chain.pairs], **_options(way))
    if way == "revlib":
        import revlib  # type: ignore[import-not-found]

        halves: Iterator[nn.Module] = (half for pair in chain.pairs for half in pair)
        return revlib.ReversibleSequential(*halves, split_dim=1)  # type: ignore[no-any-return]
    if way not in ("plain", "checkpoint", "torch-remat"):
        raise NotOfferedError(f"{way} calls functions with a stream alone")

    def block(f: Call, g: Call, x1: Tensor, x2: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        y1 = x1 + f(x2, context)
        return y1, x2 + g(y1, context)

    def net(x: Tensor, context: Tensor) -> Tensor:
        streams = x.chunk(2, 1)
        for f, g in chain.pairs:
            streams = _run_again(way, block)(f, g, *streams, context)
        return torch.cat(streams, 1)

    return net
