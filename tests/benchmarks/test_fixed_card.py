"""What fits a card that holds a plain step, and that a network on it is trained and evaluated."""

import pytest

from benchmarks import measure, record, report
from benchmarks.questions import fixed_card as question

SIZE = (64, 128)
ARGUMENTS = ["--images", "8", "--size", "64", "128", "--samples", "4", "2"]


def test_the_lowest_level_takes_four_times_the_images_on_the_same_card():
    card = question.step_bytes(question.CASES["plain, batch 4"], 4, SIZE)
    assert question.step_bytes(question.CASES["lowest, batch 16"], 16, SIZE) < card


def test_the_card_holds_no_image_more(monkeypatch):
    monkeypatch.setattr(question, "step_bytes", lambda case, batch, size: 100 + 7 * batch)
    assert question.most_images(question.CASES["lowest, as many as fit"], SIZE, 1000) == 128


def test_networks_are_trained_and_it_goes_on_where_it_was_cut_off(tmp_path, capsys):
    cases = ["plain, batch 4", "lowest, batch 4, twice the size"]
    common = ["fixed_card", *ARGUMENTS, "--out", str(tmp_path)]
    measure.main([*common, "--cases", cases[0]])
    measure.main([*common, "--cases", *cases])
    assert capsys.readouterr().out.count("'case': 'plain, batch 4'") == 1
    plain, large = record.read(tmp_path / "fixed_card.jsonl")["rows"]
    assert (plain["case"], large["case"]) == tuple(cases)
    assert [seen for seen, _, _ in plain["curve"]] == [4, 8]
    assert 0 <= large["miou"] <= 1
    assert plain["peak_mib"] == plain["card_mib"] > large["peak_mib"]
    text = report.readme(tmp_path)
    assert "What the saved memory buys" in text
    assert "| lowest, batch 4, twice the size | 4 |" in text
    assert (tmp_path / "fixed_card.png").stat().st_size > 5_000


def test_what_the_card_does_not_hold_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(question, "step_bytes", lambda case, batch, size: batch)
    measure.main(["fixed_card", *ARGUMENTS, "--cases", "lowest, batch 16", "--out", str(tmp_path)])
    (row,) = record.read(tmp_path / "fixed_card.jsonl")["rows"]
    assert row["note"] == "more than the card holds"
    assert "curve" not in row


@pytest.mark.parametrize("seeds", [1, 2])
def test_the_table_has_the_mean_and_the_range(seeds):
    row = {"case": "a", "batch": 4, "peak_mib": 1.0, "steps": 2, "curve": [[4, 1.0, 0.2], [8, 2.0, 0.3]]}
    rows = [row | {"seed": seed, "miou": 0.3 + 0.1 * seed} for seed in range(seeds)]
    _, (line,) = question.table({"rows": rows})
    assert line[4] == ("30.0" if seeds == 1 else "35.0 (30.0 to 40.0)")
