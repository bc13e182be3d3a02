"""DistributedDataParallel around a reversible network.

    torchrun --nproc-per-node 2 examples/distributed.py

Nothing is special: gradients of early blocks are sent while later ones are still being undone.
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from revseg import AdditiveCoupling, Recompute, ReversibleSequence


def function(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())


def network(channels: int, depth: int) -> nn.Sequential:
    half = channels // 2
    body = ReversibleSequence([AdditiveCoupling(function(half), function(half)) for _ in range(depth)])
    return nn.Sequential(Recompute(nn.Conv2d(3, channels, 3, padding=1)), body, nn.Conv2d(channels, 5, 1))


def main(size: int = 32, channels: int = 16, depth: int = 4, steps: int = 3) -> nn.Module:
    """Trains some steps on this process's share, and returns the network."""
    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    torch.manual_seed(dist.get_rank())  # data of its own; DDP gives all the weights of the first
    net = DistributedDataParallel(network(channels, depth).to(device))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(steps):
        images = torch.randn(2, 3, size, size, device=device)
        labels = torch.randint(5, (2, size, size), device=device)
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(net(images), labels)
        value.backward()
        optimizer.step()
        if dist.get_rank() == 0:
            print(f"loss {value.item():.3f}")
    module: nn.Module = net.module
    del net  # it holds the process group, whose threads could wait for ever for the thread that frees it
    dist.destroy_process_group()
    return module


if __name__ == "__main__":
    main()
