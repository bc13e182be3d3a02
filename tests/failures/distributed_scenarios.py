"""Training by two processes: networks, how they are wrapped, and what each scenario finds beside its plain twin."""

import datetime
import traceback

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as collectives
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from revseg import AdditiveCoupling, OneSidedCoupling, Recompute, ReversibleSequence, is_recomputing
from tests.helpers import default_loss, gradient_error, small_f, small_input, twin

RANKS = 2
SMALL_BUCKETS = 1e-3  # MiB; about one parameter each


class Network(nn.Module):
    """A stem, a reversible body, a head."""

    def __init__(self, *blocks, **options):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.body = ReversibleSequence(*blocks, **options)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.head(self.body(self.stem(x)))


class SometimesUnused(nn.Module):
    """One of its two layers is used for one batch, the other for the next."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(small_f() for _ in range(2))
        self.never = nn.Linear(3, 3)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.count += 1
        return self.layers[int(self.count) % 2](x)


class SyncedNorm(nn.Module):
    """Batch norm over the batches of all ranks: collectives forward and backward, on a CPU too."""

    def __init__(self, channels=4):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))

    def forward(self, x):
        values = torch.stack((x.mean((0, 2, 3)), x.square().mean((0, 2, 3))))
        mean, square = collectives.all_reduce(values) / RANKS
        with torch.no_grad():
            self.mean.lerp_(mean, 0.1)
        return (x - mean[:, None, None]) / (square - mean.square() + 1e-5).sqrt()[:, None, None]


def network(**options):
    torch.manual_seed(0)
    blocks = (
        AdditiveCoupling(small_f(), small_f()),
        OneSidedCoupling(small_f()),
        AdditiveCoupling(small_f(), small_f()),
    )
    return Network(*blocks, **options).double()


def recomputed_network():
    """Layers that are run again outside of the sequence."""
    net = network()
    net.stem = Recompute(nn.Sequential(net.stem, SyncedNorm(8).double()))
    net.head = Recompute(net.head)
    return net


def tied_network():
    torch.manual_seed(0)
    f, g = small_f(), small_f()
    g[0].weight = f[0].weight
    return Network(AdditiveCoupling(f, g), OneSidedCoupling(f)).double()


def network_with_one_block_twice():
    torch.manual_seed(0)
    block = AdditiveCoupling(small_f(), small_f())
    return Network(block, OneSidedCoupling(small_f()), block).double()


def network_of(f):
    torch.manual_seed(0)
    return Network(AdditiveCoupling(f(), f()), OneSidedCoupling(f())).double()


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def train(model, rank, steps=3, accumulate=1):
    """All that the steps leave behind: outputs, gradients, parameters, buffers."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    device = next(model.parameters()).device
    found = {}
    for step in range(steps):
        optimizer.zero_grad()
        for i in range(accumulate):
            x = small_input(2, 3, 4, 3, seed=100 * step + 10 * i + rank, requires_grad=False).to(device)
            if i + 1 < accumulate:
                with model.no_sync():
                    default_loss(model(x)).backward()
            else:
                y = model(x)
                default_loss(y).backward()
        optimizer.step()
        found[f"output {step}"] = y.detach()
        for name, p in model.named_parameters():
            found[f"gradient {step} {name}"] = None if p.grad is None else full(p.grad).clone()
    found |= {f"value {name}": full(p).detach() for name, p in model.named_parameters()}
    return found | {f"buffer {name}": full(b) for name, b in model.named_buffers()}


def error_against_twin(net, rank, wrap=DistributedDataParallel, accumulate=1, **options):
    plain = twin(net)
    return gradient_error(
        train(wrap(net, **options), rank, accumulate=accumulate),
        train(wrap(plain, **options), rank, accumulate=accumulate),
    )


def with_hook(net):
    """DDP whose buckets are summed by a hook, in half the numbers."""

    def hook(_, bucket):
        future = dist.all_reduce(bucket.buffer().mul_(0.5), async_op=True).get_future()
        return future.then(lambda f: f.value()[0])

    model = DistributedDataParallel(net)
    model.register_comm_hook(None, hook)
    return model


def order_of_events(per_block):
    """The names of blocks as they are run again, and "sent" for each bucket of gradients."""
    net = network(per_block=per_block)
    model = DistributedDataParallel(net, bucket_cap_mb=SMALL_BUCKETS)
    events = []

    def hook(_, bucket):
        events.append("sent")
        return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0])

    model.register_comm_hook(None, hook)
    for i, block in enumerate(net.body):
        block.f.register_forward_hook(lambda *_, i=i: events.append(i) if is_recomputing() else None)
    for step in range(3):  # buckets are laid out anew after the first step
        events.clear()
        default_loss(model(small_input(2, 3, 4, 3, seed=step))).backward()
    return events


def sharded(net, parts):
    """FSDP on parts of the network and then on all of it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))
    for part in parts(net):
        fully_shard(part, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def fsdp(rank, parts=lambda net: [], **options):
    return error_against_twin(network(**options), rank, wrap=lambda net: sharded(net, parts))


def gradients_lost(rank, parts, make=network, **options):
    """Parameters that a step leaves without a gradient, where no error says so."""
    model = sharded(make(**options), parts)
    default_loss(model(small_input(2, 3, 4, 3, seed=rank))).backward()
    return [name for name, p in model.named_parameters() if p.grad is None]


def blocks(net):
    return list(net.body)


def functions(net):
    return [block.f for block in net.body]


SCENARIOS = {
    "plain": lambda rank: error_against_twin(network(), rank),
    "per block": lambda rank: error_against_twin(network(per_block=True), rank),
    "keep": lambda rank: error_against_twin(network(keep=2), rank),
    "unused": lambda rank: error_against_twin(network_of(SometimesUnused), rank, find_unused_parameters=True),
    "find unused": lambda rank: error_against_twin(network(), rank, find_unused_parameters=True),
    "static graph": lambda rank: error_against_twin(network(), rank, static_graph=True),
    "static graph, tied": lambda rank: error_against_twin(tied_network(), rank, static_graph=True),
    "tied": lambda rank: error_against_twin(tied_network(), rank),
    "tied, find unused": lambda rank: error_against_twin(tied_network(), rank, find_unused_parameters=True),
    "one block twice": lambda rank: error_against_twin(network_with_one_block_twice(), rank),
    "bucket views": lambda rank: error_against_twin(network(), rank, gradient_as_bucket_view=True),
    "small buckets": lambda rank: error_against_twin(network(), rank, bucket_cap_mb=SMALL_BUCKETS),
    "no_sync": lambda rank: error_against_twin(network(), rank, accumulate=3),
    "no_sync, bucket views": lambda rank: error_against_twin(
        network(), rank, accumulate=3, gradient_as_bucket_view=True
    ),
    "comm hook": lambda rank: error_against_twin(network(), rank, wrap=with_hook),
    "recomputed": lambda rank: error_against_twin(recomputed_network(), rank),
    "recomputed, static graph": lambda rank: error_against_twin(
        recomputed_network(), rank, static_graph=True
    ),
    "recomputed, find unused": lambda rank: error_against_twin(
        recomputed_network(), rank, find_unused_parameters=True
    ),
    "synced norm": lambda rank: error_against_twin(network_of(SyncedNorm), rank),
    "synced batch norm on a gpu": lambda rank: error_against_twin(
        nn.SyncBatchNorm.convert_sync_batchnorm(network()).cuda(), rank
    ),
    "fsdp root": lambda rank: fsdp(rank),
    "fsdp sequence": lambda rank: fsdp(rank, lambda net: [net.body]),
    "fsdp blocks": lambda rank: fsdp(rank, blocks, per_block=True),
    "fsdp recomputed": lambda rank: error_against_twin(
        recomputed_network(), rank, wrap=lambda net: sharded(net, lambda net: [net.stem, net.head])
    ),
    "fsdp sequence, keep": lambda rank: fsdp(rank, lambda net: [net.body], keep=3),
    "fsdp blocks, keep": lambda rank: fsdp(rank, blocks, keep=1, per_block=True),
    "order, sequence": lambda rank: order_of_events(per_block=False),
    "order, blocks": lambda rank: order_of_events(per_block=True),
    "fsdp blocks of one function": lambda rank: gradients_lost(rank, blocks),
    "fsdp functions": lambda rank: gradients_lost(rank, functions),
    "fsdp functions per block": lambda rank: gradients_lost(rank, functions, per_block=True),
    "fsdp function of Recompute": lambda rank: gradients_lost(
        rank, lambda net: [net.head.module], recomputed_network
    ),
}


def run_scenarios(rank, folder, names):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/meet", datetime.timedelta(seconds=60), world_size=RANKS, rank=rank
    )
    found = {}
    for name in names:
        try:
            found[name] = SCENARIOS[name](rank)
        except Exception as error:  # noqa: BLE001 - it is what the scenario found
            found[name] = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        torch.save(found, f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()
