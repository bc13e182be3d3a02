"""The parts of a step: the two ways of a case agree, and the measurement makes its table."""

import pytest
import torch

from benchmarks import measure, record, report
from benchmarks.micro.cases import CASES, TOY, Maps


def tensors(value):
    return [value] if isinstance(value, torch.Tensor) else list(value)


@pytest.mark.parametrize("case", CASES)
def test_ours_and_its_twin_compute_the_same(case):
    pair = CASES[case](Maps.of(TOY))
    found, expected = tensors(pair.ours()), tensors(pair.plain())
    if pair.same:
        for ours, plain in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.to(plain.dtype), plain, rtol=1e-4, atol=1e-4)


def test_exact_undoing_is_exact_where_its_twin_is_not():
    maps = Maps.of(TOY)
    stream = CASES["residue_unpack"](maps).ours()
    assert torch.equal(stream, maps.u)
    assert not torch.equal(CASES["residue_unpack"](maps).plain(), maps.u)


def test_one_case_is_timed_and_its_table_drawn(tmp_path):
    arguments = ["--toy", "--cases", "exact_add", "--rounds", "3", "--threads", "1"]
    measure.ask("micro", [*arguments, "--out", str(tmp_path)])
    (row,) = record.read(tmp_path / "micro.jsonl")["rows"]
    assert row["ours"]["rounds"] == row["plain"]["rounds"] == 3
    assert row["ours"]["median_ms"] > 0
    assert "| exact_add | " in report.readme(tmp_path)
