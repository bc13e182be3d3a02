"""The table of all networks: counted, predicted, timed and drawn."""

import json

from benchmarks import report
from benchmarks.networks import main, peaks
from revseg.levels import MEMORY_LEVELS


def test_networks_are_counted_predicted_timed_and_drawn(tmp_path, monkeypatch):
    names = ["vnet", "enet", "bisenet_xception39"]
    arguments = ["--names", *names, "--size", "64", "128", "--time-size", "32", "64", "--rounds", "1"]
    monkeypatch.setattr("sys.argv", ["networks", *arguments, "--threads", "1", "--out", str(tmp_path)])
    main()
    rows = {row["network"]: row for row in json.loads((tmp_path / "networks.json").read_text())["rows"]}
    assert list(rows) == names
    assert (rows["vnet"]["parameters"], rows["vnet"]["gflops"]) == (162_272, 12.7)
    assert (rows["enet"]["parameters"], rows["enet"]["gflops"]) == (364_311, 31.4)
    assert rows["bisenet_xception39"]["parameters"] == 1_541_963
    assert rows["vnet"]["time"]["ratio"]["median"] > 0
    text = report.readme(tmp_path)
    assert "| bisenet_xception39 | 1.542 | 5.8 [1] | 55.5 | 4 |" in text


def test_a_lower_level_takes_less():
    found = peaks("erfnet", (128, 256))
    lowest, balanced, fastest = (found[level] for level in MEMORY_LEVELS)
    assert lowest < balanced < fastest <= found["plain"]
