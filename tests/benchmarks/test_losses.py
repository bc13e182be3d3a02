"""The benchmark of upsampling and cross-entropy at toy size, and what it compares."""

import pytest
import torch

from benchmarks import record, report
from benchmarks.questions import upsample_cross_entropy as benchmark

TOY = (2, 19, 4, 6)


@pytest.mark.parametrize("task", benchmark.TASKS)
def test_both_ways_compute_the_same(task):
    plain, ours, trained = benchmark.TASKS[task]
    found = []
    for function in (plain, ours):
        logits, labels = benchmark.example(TOY, torch.float32, trained)
        benchmark.step(function, logits, labels)
        result = function(logits, labels).detach()
        found.append([result.float(), *([logits.grad] if trained else [])])
    torch.testing.assert_close(*found)


def test_rows_and_their_tables(tmp_path):
    rows = [
        benchmark.memory(task, way, torch.float32, TOY) for task in benchmark.TASKS for way in benchmark.WAYS
    ]
    peaks = {(row["task"], row["way"]): row["peak_mib"] for row in rows}
    assert all(peaks[task, "revseg"] < peaks[task, "PyTorch"] for task in benchmark.TASKS)
    record.write("upsample_cross_entropy", "?", rows, {"factor": 8}, tmp_path)
    table = report.readme(tmp_path)
    assert "| 2 x 19 x 4 x 6 to 32 x 48 | float32 PyTorch | float32 revseg |" in table
    assert "Ratio of the time" not in table

    rows += [row | {"heap": "default", "threads": 2} for row in benchmark.times(2, TOY)]
    record.write("upsample_cross_entropy", "?", rows, {"factor": 8}, tmp_path)
    assert "| 2 x 19 x 4 x 6 to 32 x 48 | 2 threads, heap default |" in report.readme(tmp_path)
