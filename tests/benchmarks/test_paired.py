"""Two checkouts in turns: the same one is as fast as itself, and what cannot run says so."""

import argparse

import pytest

from benchmarks import paired, record

TOY = ["--rounds", "1", "--steps", "1", "--depth", "1", "--shape", "1", "8", "6", "10"]


def test_a_checkout_beside_itself(tmp_path):
    root = str(record.ROOT)
    paired.main([root, root, "--cases", "revseg Stack", *TOY, "--out", str(tmp_path)])
    (row,) = record.read(tmp_path / "paired.jsonl")["rows"]
    assert row["question"] == "step of 1 blocks, revseg Stack"
    assert row["before"] == row["after"] == paired.commit(record.ROOT)
    assert row["ratio"]["low"] == row["ratio"]["median"] > 0
    assert row["before_s"] > 0


def test_channels_last_is_a_case_of_its_own():
    args = argparse.Namespace(depth=16, shape=[2, 64, 128, 256], size=[512, 1024])
    assert "layout=torch.channels_last)" in paired.code_of("revseg exact channels_last", args)
    assert "layout=torch.contiguous_format)" in paired.code_of("revseg exact", args)
    assert "workload('revseg exact', 16" in paired.code_of("revseg exact channels_last", args)
    assert (
        paired.question("revseg exact channels_last", args) == "step of 16 blocks, revseg exact channels_last"
    )


def test_rounds_take_turns_and_the_ratio_is_after_through_before(tmp_path, monkeypatch):
    before, after = tmp_path / "before", tmp_path / "after"
    for path in (before, after):
        (path / "revseg").mkdir(parents=True)
    order = []

    def seconds(code, checkout, steps, threads):
        order.append(checkout.name)
        return {"before": 2.0, "after": 3.0}[checkout.name]

    monkeypatch.setattr(paired, "seconds", seconds)
    monkeypatch.setattr(paired, "commit", lambda checkout: checkout.name)
    out = ["--out", str(tmp_path)]
    paired.main([str(before), str(after), "--cases", "revseg", "--rounds", "2", *out])
    assert order == ["before", "after", "after", "before"]
    paired.main([str(before), str(after), "--cases", "vnet lowest", "--rounds", "2", *out])
    rows = record.read(tmp_path / "paired.jsonl")["rows"]
    assert [row["question"] for row in rows] == ["step of 16 blocks, revseg", "step of VNet, lowest"]
    assert {row["ratio"]["median"] for row in rows} == {1.5}
    paired.main([str(before), str(after), "--cases", "revseg", "--rounds", "2", *out])
    assert (
        len(record.read(tmp_path / "paired.jsonl")["rows"]) == 2
    )  # the one is measured again, the other stays


def test_a_step_that_fails_says_where(tmp_path, capsys):
    with pytest.raises(RuntimeError, match=r"(?s)in .*: .*no such thing"):
        paired.seconds("raise ValueError('no such thing')", record.ROOT, 1, 1)
    with pytest.raises(SystemExit):
        paired.main([str(tmp_path), str(tmp_path)])
    assert "expected a checkout" in capsys.readouterr().err
