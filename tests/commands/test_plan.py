"""`revseg plan` says what fits, `revseg memory` what a step really takes."""

import json

import pytest

from revseg.cli import main
from revseg.commands.plan import largest
from tests.helpers import refused


def test_the_table_and_the_levels(capsys):
    assert main(["plan", "vnet", "--size", "32x64", "--batch", "1", "--optimizer", "none"]) == 0
    out = capsys.readouterr().out
    assert "kept activations" in out
    assert "all levels: fastest" in out


@pytest.mark.parametrize(
    ("power", "budget", "expected"), [(1, 1000, 98), (1, 19, 0), (1, 34, 1), (2, 1000, 9)]
)
def test_the_largest_is_found_in_few_tries(power, budget, expected):
    tried = []

    def peak(n):
        tried.append(n)
        return 15 + 10 * n**power + n % 2

    assert largest(peak, budget, 4, power) == expected
    assert len(tried) <= 7


def test_a_network_of_ones_own(capsys, tmp_path, monkeypatch):
    (tmp_path / "own_network.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Conv2d(3, 5, 3, padding=1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = ["--size", "32x32", "--batch", "1", "--dtype", "bf16", "--budget", "8MB"]
    assert main(["plan", "own_network:make", *words]) == 0
    out = capsys.readouterr().out
    assert "8MB: this step fits; the largest batch of 32 x 32 is " in out
    assert "the largest images of this shape in a batch of 1: " in out


def test_a_network_of_ones_own_is_fitted(capsys, tmp_path, monkeypatch):
    (tmp_path / "own_unet.py").write_text(
        "from tests.memory.nets import UNet\ndef make():\n    return UNet(width=16)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = ["memory", "own_unet:make", "--size", "64x96", "--budget", "12MiB"]
    assert main([*words, "--out", str(tmp_path / "memory.json"), "--picture", str(tmp_path / "own.png")]) == 0
    assert "UNet: peak" in capsys.readouterr().out
    plain, fitted = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert plain["level"] == "as it is"
    assert fitted["measured"] < plain["measured"]
    assert (tmp_path / "own.png").exists()
    assert main(["memory", "enet", "--size", "64x96", "--budget", "12MiB"]) == 2
    assert "expected a network of your own with --budget, got 'enet'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["resnet5"], "unknown model 'resnet5'"),
        (["enet", "--memory", "low"], "unknown memory level 'low'; choose one of fastest, balanced, lowest"),
        (["enet", "--budget", "much"], "expected a budget like 10GB or 800MiB, got 'much'"),
        (["no.such:make"], "expected module:factory, got 'no.such:make'"),
    ],
)
def test_bad_input(capsys, words, message):
    assert main(["plan", *words, "--size", "32x32", "--batch", "1"]) == 2
    assert message in capsys.readouterr().err


def test_sizes_below_one_are_refused(capsys):
    message = refused(capsys, "plan", "enet", "--size", "32x32", "--batch", "1", "--classes", "0")
    assert "expected --size, --batch and --classes of at least 1, got 32 x 32, 1 and 0" in message


def test_measured_beside_predicted(capsys, tmp_path):
    out, picture = tmp_path / "memory.json", tmp_path / "memory.html"
    words = [
        "memory",
        "enet",
        "--size",
        "96x192",
        "--memory",
        "fastest",
        "--out",
        str(out),
        "--picture",
        str(picture),
    ]
    assert main(words) == 0
    assert "measured" in capsys.readouterr().out
    (row,) = json.loads(out.read_text())["rows"]
    assert row["predicted"] == pytest.approx(row["measured"], rel=0.03)
    assert picture.exists()
