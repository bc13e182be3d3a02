"""Whole networks by every way, at toy size: gradients, updates, the front, and the table."""

import pytest
import torch

from benchmarks import measure, network_ways, record, report
from benchmarks.network_ways import WAYS, NotAllowedError, blocks
from benchmarks.questions import whole_networks
from benchmarks.rivals import is_available

SHAPE = [1, 32, 64]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(whole_networks, "CHECKED", (2, 32, 64))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("way", [way for way in WAYS if not way.startswith("compile")])
@pytest.mark.filterwarnings("ignore")  # rivals use names that torch has deprecated
def test_every_way_trains_vnet_or_says_why_not(way):
    if not is_available(way):
        pytest.skip(f"{way} is not installed")
    row = {}
    for part in whole_networks._job("vnet", way, SHAPE, 0, 1, "cpu"):
        row |= part
    if way in ("save_on_cpu", "revseg reversible"):
        assert row == {
            "note": "on a CPU it is plain" if way == "save_on_cpu" else "no rows of residual blocks"
        }
        return
    assert row["gradient_error"] < (0.1 if way == "revseg exact" else 1e-4), row
    assert row["peak_mib"] > 0
    if way.startswith(("plain", "revseg")):
        assert row["updates"] == 1
    if way in network_ways.REVERSIBLE and way != "FrEIA":  # it does run another library's blocks
        assert row["updates"] > 1


def test_others_take_stacks_and_run_again():
    plain, lowest = (WAYS[way]("unet", (1, 32, 64)) for way in ("plain", "revseg lowest"))
    shapes = [[p.shape for p in each.model.parameters()] for each in (plain, lowest)]
    assert shapes[0] == shapes[1]
    assert {type(block).__name__ for block in blocks(lowest.model)} >= {"Recompute"}
    assert whole_networks.batch_norm_updates(lowest) == 1
    with pytest.raises(NotAllowedError, match="no rows of blocks"):
        WAYS["checkpoint sqrt"]("unet", (1, 32, 64))


def test_the_front_is_what_none_beats():
    points = {"a": (1.0, 100), "b": (0.9, 120), "c": (1.1, 100), "d": (1.2, 50)}
    rows = [{"way": w, "ratio": {"median": t}, "peak_mib": p} for w, (t, p) in points.items()]
    assert whole_networks.front([*rows, {"way": "e", "note": "not run"}]) == ["b", "a", "d"]


def test_the_batch_is_what_the_memory_holds():
    one = whole_networks.largest_batch("vnet", (64, 128), 0, 4)
    most = whole_networks.largest_batch("vnet", (64, 128), 2**40, 4)
    few = whole_networks.largest_batch("vnet", (64, 128), 10 * 2**20, 99)
    assert (one, most) == (1, 4)
    assert 1 < few < 10


def test_a_network_is_measured_its_table_and_picture_made(tmp_path):
    ways = ["plain", "revseg lowest", "revseg reversible"]
    arguments = ["--names", "vnet", "--ways", *ways, "--size", "32", "64", "--rounds", "1", "--threads", "1"]
    measure.ask("whole_networks", [*arguments, "--most-images", "1", "--out", str(tmp_path)])
    plain, lowest, reversible = record.read(tmp_path / "whole_networks.jsonl")["rows"]
    assert lowest["peak_mib"] < plain["peak_mib"]
    assert lowest["ratio"]["median"] > 0
    assert reversible["note"] == "no rows of residual blocks"
    text = report.readme(tmp_path)
    assert "| vnet, batch 1 | peak MiB | time | gradients off by | updates |" in text
    assert "Not run: revseg reversible (no rows of residual blocks)." in text
    assert "Whole networks, a training step at 32 x 64" in report.overview(tmp_path)
    assert (tmp_path / "whole_networks.png").stat().st_size > 5_000


def test_a_network_whose_steps_were_not_timed_has_no_panel(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(whole_networks.picture, "scatter", lambda axes, points, *_: drawn.append(points))
    rows = [
        {"network": "vnet", "way": "plain", "peak_mib": 4.0, "ratio": {"median": 1.0}},
        {"network": "segnet", "way": "plain", "peak_mib": 8.0},
    ]
    whole_networks.draw({"rows": rows}, tmp_path / "picture.png")
    assert drawn == [{"plain": (1.0, 4.0)}]
    assert (tmp_path / "picture.png").is_file()
