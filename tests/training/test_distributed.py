"""Two processes make the steps of one, keep what it keeps, and end together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import TORCH

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the runs of `processes.py` came to."""
    result = subprocess.run(
        [sys.executable, HERE / "processes.py", tmp_path_factory.mktemp("runs")],
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def skip_what_is_refused(found, parallel):
    """Torch 2.8 adds up what `fully_shard` should take the mean of, over gloo; newer ones do not."""
    if parallel == "fsdp" and TORCH < (2, 9):
        for message in found["fsdp refused"]:
            assert (
                "makes a gradient of -2 of -1 in each process, which is not the mean; use --parallel ddp"
                in message
            )
        pytest.skip("fully_shard is refused under this torch")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_make_the_steps_of_one_at_the_same_global_batch(found, parallel):
    """Batch norm, class weights and pixels without a label count over both; summed in another order."""
    skip_what_is_refused(found, parallel)
    assert found[f"{parallel} codes"] == [0, 0]
    assert (
        found[parallel]["weights"] < 1e-5
    )  # of the largest weight of each tensor, after two steps in float32
    assert found[parallel]["loss"] < 1e-6
    assert found[parallel]["val_loss"] < 1e-6
    assert found[parallel]["iou"]  # one matrix, in which every sample counts once


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_one_process_writes_and_all_go_on(found, parallel):
    skip_what_is_refused(found, parallel)
    assert found[f"{parallel} files"] == [
        ".lock",
        "best.safetensors",
        "last.pt",
        "log.jsonl",
        "settings.json",
    ]
    if f"{parallel} resumed" not in found:
        pytest.skip("FSDP goes on with REVSEG_SLOW=1: its imports take seconds in each process")
    assert found[f"{parallel} resumed"] == [0, 0]
    assert found[f"{parallel} epochs"] == 2


def test_a_process_that_fails_ends_the_job_and_the_checkpoint_is_good(found):
    assert found["dying codes"] == [1, 1]
    assert found["dying seconds"] < 60  # seconds, on a machine with nothing else to do
    assert found["messages"][0].startswith("PeerError: another process of the job has ended")
    assert found["messages"][1] == "ValueError: this process fails"
    assert found["dying step"] == 1


def test_a_signal_to_one_process_stops_all_after_the_same_step(found):
    assert found["stopped codes"] == [143, 143]
    assert (
        found["stopped"]
        == ["StoppedError: stopped by SIGTERM; saved at epoch 1, step 2: --resume goes on from there"] * 2
    )
