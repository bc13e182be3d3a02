"""Two processes: data parallel, sharded, synchronised statistics. Each scenario against its plain twin.

All scenarios run in one pair of processes, which write what they found; each test reads its own.
"""

import os
import sys

import pytest
import torch
import torch.distributed as dist
from filelock import FileLock  # torch depends on it

from tests.failures.distributed_scenarios import RANKS, SCENARIOS, run_scenarios

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available() or sys.platform != "linux", reason="needs gloo"
)


def spawn(folder, names):
    """Run the scenarios; what each found, for both ranks."""
    context = torch.multiprocessing.spawn(run_scenarios, (str(folder), names), nprocs=RANKS, join=False)
    context.join(timeout=90)
    for process in context.processes:
        process.kill()
    ranks = [torch.load(folder / str(rank)) for rank in range(RANKS)]
    return {name: [rank.get(name, "did not finish") for rank in ranks] for name in names}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each scenario found; run by one of the workers of pytest-xdist, read by all."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    with FileLock(root / "distributed.lock"):
        if not (root / "distributed.found").exists():
            found = spawn(tmp_path_factory.mktemp("ranks"), [name for name in SCENARIOS if "gpu" not in name])
            torch.save(found, root / "distributed.found")
        return torch.load(root / "distributed.found")


RIGHT = [name for name in SCENARIOS if not any(word in name for word in ("order", "function", "gpu"))]


@pytest.mark.parametrize("name", RIGHT)
def test_distributed_training_is_that_of_the_plain_twin(results, name):
    """65, 83, 85: three steps: outputs, gradients after the reduction, parameters, buffers."""
    for error in results[name]:
        assert isinstance(error, float), error
        assert error <= 1e-9


@pytest.mark.needs_cuda  # as torch's SyncBatchNorm does
def test_synced_batch_norm_is_that_of_the_plain_twin(tmp_path):
    """65: the second run repeats the collectives, on all ranks alike."""
    for error in spawn(tmp_path, ["synced batch norm on a gpu"])["synced batch norm on a gpu"]:
        assert isinstance(error, float), error
        assert error <= 1e-9


def test_blocks_send_their_gradients_while_earlier_blocks_still_run(results):
    """84: each update hands its gradients on before the one before runs."""
    for events in [*results["order, blocks"], *results["order, sequence"]]:
        assert "sent" in events[events.index(2) : events.index(0)], events


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("fsdp blocks of one function", "per_block=True"),
        ("fsdp functions", "shard the sequence"),
        ("fsdp functions per block", "shard the"),
        ("fsdp function of Recompute", "the Recompute around it"),
    ],
)
def test_parts_that_cannot_be_sharded_are_an_error(results, name, advice):
    """85: not a gradient that is silently lost."""
    for message in results[name]:
        assert isinstance(message, str), f"no error, but no gradient for {message}"
        assert message.startswith(("RuntimeError", "ValueError", "TypeError")), message
        assert advice in message.splitlines()[0], message
