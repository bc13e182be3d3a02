"""The processes of a run: one, or those that torchrun started.

Each process has its share of every batch. Gradients are averaged by DistributedDataParallel, or
parameters, gradients and optimizer are sharded by FSDP2. The first process alone writes files.
What a process does next (go on, save, stop) all of them decide together, after each step.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from revseg.training.settings import TrainSettings


class PeerError(RuntimeError):
    """Another process of the job has failed; its own message says why."""


class Team:
    """The processes of a run, as one of them sees it.

    Attributes:
        rank: The number of this process.
        size: How many there are.
        device: Where tensors are exchanged.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None):
        self.rank, self.size, self.device = rank, size, device or torch.device("cpu")

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def sums(self, *values: float) -> list[float]:
        """Each value summed over the processes, float64."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]

    def mean(self, value: float) -> float:
        """The mean of a number over the processes."""
        return self.sums(value)[0] / self.size

    def highest(self, *values: int) -> list[int]:
        """The highest of each number among the processes."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return [int(value) for value in tensor.tolist()]

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the processes, in its place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """The value of each process, everywhere."""
        values = [value]
        if self.size > 1:
            values *= self.size
            dist.all_gather_object(values, value)
        return values

    def first(self, value: Any) -> Any:
        """The value of the first process, everywhere."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]


def local_rank() -> int:
    """The number of this process on its machine, as torchrun says it."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def joined(device: torch.device) -> Iterator[Team]:
    """The processes that torchrun started together with this one; alone without torchrun.

    Raises:
        PeerError: If another process ends while this one waits for it.
    """
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        yield Team()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Team(dist.get_rank(), dist.get_world_size(), device)
    except (RuntimeError, dist.DistBackendError) as error:
        if _is_of_peer(error):
            raise PeerError(
                "another process of the job has ended, and says why itself; --resume goes on from the last checkpoint"
            ) from error
        raise
    finally:
        dist.destroy_process_group()


def _is_of_peer(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistBackendError) or any(
        words in text for words in ("connection closed by peer", "connection reset", "broken pipe", "gloo")
    )


def shared_out(model: nn.Module, settings: TrainSettings, team: Team, device: torch.device) -> nn.Module:
    """The network as the processes train it together; itself, if there is one process."""
    if team.size == 1:
        return model
    if settings.parallel == "fsdp":
        from torch.distributed.fsdp import fully_shard

        _check_mean(device)
        return fully_shard(model)  # type: ignore[return-value]
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def _check_mean(device: torch.device) -> None:
    """Refuses `fully_shard` where it adds gradients up, as torch 2.8 does over gloo, instead of taking their mean."""
    from torch.distributed.fsdp import fully_shard

    probe: Any = fully_shard(nn.PReLU(1).to(device))  # a network of one weight, which draws no random numbers
    probe(torch.full((1, 1), -1.0, device=device)).sum().backward()
    found = float(probe.weight.grad.full_tensor())
    if found != -1:
        raise ValueError(
            f"fully_shard of torch {torch.__version__} makes a gradient of {found:g} of -1 in each process, which is not "
            "the mean; use --parallel ddp, or a newer torch"
        )


def inner(model: nn.Module) -> nn.Module:
    """The network itself, without what wraps it."""
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod  # type: ignore[assignment]
    return model


def without_reduction(model: nn.Module, last: bool) -> Any:
    """A context in which gradients are only added up here, until the last batch of a step."""
    if last or not isinstance(model, DistributedDataParallel):
        return nullcontext()
    return model.no_sync()


def full_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state dicts of a network and its optimizer, whole, whatever wraps or shards them."""
    if not is_sharded(model):
        return inner(model).state_dict(), optimizer.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, state = get_state_dict(inner(model), optimizer, options=options)
    return dict(weights), dict(state)


def full_weights(model: nn.Module) -> dict[str, Any]:
    """The state dict of a network, whole; all processes take part."""
    if not is_sharded(model):
        return inner(model).state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return dict(get_model_state_dict(inner(model), options=options))


def load_full_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, weights: dict[str, Any], state: dict[str, Any]
) -> None:
    """Loads what `full_state` gave.

    Raises:
        RuntimeError: If the tensors do not fit.
        ValueError: If the groups of the optimizer do not fit.
    """
    if not is_sharded(model):
        inner(model).load_state_dict(weights)
        optimizer.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    set_state_dict(
        inner(model),
        optimizer,
        model_state_dict=weights,
        optim_state_dict=state,
        options=StateDictOptions(full_state_dict=True),
    )


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards the parameters; its package, which takes seconds to import, is there then."""
    return any(kind.__name__ == "FSDPModule" for kind in type(inner(model)).__mro__)
