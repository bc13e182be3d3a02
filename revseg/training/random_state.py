"""Everything random in a run, from one seed.

The order of the samples, their random changes and the seeds of the loader's processes follow from
the seed and the number of the epoch, so a run that continues need not replay the epochs before. What
else is random draws from the default generators of Python, numpy and torch, whose state can be kept.
"""

import random
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from revseg.training.stop import leave_to_the_main_process


def seed_everything(seed: int) -> None:
    """Sets the default generators of Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_worker(worker: int) -> None:
    """Begins a process that loads samples: its generators have the seed torch gave it, signals are not its business."""
    seed = torch.initial_seed()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    leave_to_the_main_process()


def seed_epoch(batches: DataLoader[Any], seed: int, epoch: int) -> None:
    """Sets the seeds of the loader's processes for an epoch."""
    assert isinstance(batches.generator, torch.Generator)
    batches.generator.manual_seed((seed << 31) + epoch)


def random_state() -> dict[str, Any]:
    """The state of every default generator, in types that torch loads without executing anything."""
    numpy: Any = np.random.get_state(legacy=False)
    key, position = numpy["state"]["key"].tolist(), numpy["state"]["pos"]
    return {
        "python": random.getstate(),
        "numpy": {**numpy, "state": {"key": key, "pos": position}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Continues every default generator where `random_state` found it."""
    random.setstate(state["python"])
    key = np.array(state["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state({**state["numpy"], "state": {**state["numpy"]["state"], "key": key}})
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
