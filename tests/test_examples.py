"""The programs of examples/ do what they say, at toy sizes."""

import json
import re
import runpy
import subprocess
from pathlib import Path

import pytest
import torch

from revseg import create_model, load
from revseg.data import create_dataset
from revseg.files import save_weights
from tests.test_readme import assert_commands

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def main():
    """The function `main` of an example."""

    def main(name, **sizes):
        return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](**sizes)

    return main


def test_the_list_is_whole():
    listed = (EXAMPLES / "README.md").read_text()
    for path in (path for kind in ("py", "sh", "ipynb") for path in EXAMPLES.glob(f"*.{kind}")):
        assert f"[{path.name}]({path.name})" in listed


def test_unet_that_fits(main):
    assert main("unet_that_fits", size=128, steps=1) >= 4 / 3


def test_one_large_image(main, capsys):
    peak, losses = main("one_large_image", size=(96, 161), steps=2)
    assert peak > 0
    assert losses[1] < losses[0]
    assert "peak of the step" in capsys.readouterr().out
    program = runpy.run_path(str(EXAMPLES / "one_large_image.py"))
    assert program["compare"]((65, 96)) < 1e-4


def test_classifier(main, capsys):
    assert main("classifier", size=16, width=8, depth=4, steps=1) > 2
    assert "'1.0', '1.1', '1.2', '1.3'" in capsys.readouterr().out


def test_volumes(main):
    assert main("volumes", size=8, width=8, blocks=3, steps=1) > 2


def test_transformer(main, capsys):
    assert main("transformer", length=16, width=16, depth=4, steps=4) > 3
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert losses[-1] < losses[0]


def test_time_conditioned(main):
    net = main("time_conditioned", size=8, channels=8, depth=2, steps=1)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.time.parameters())


def test_own_coupling(main):
    learned = main("own_coupling", size=8, depth=2, steps=2)
    assert all(value != pytest.approx(0.1, abs=1e-6) for value in learned)


def test_rare_classes(main, tmp_path):
    """Scores differ by the offsets, and mIoU on the images that chose them is no lower."""
    torch.manual_seed(0)
    images = create_dataset("synthetic", "train", size=(32, 64), samples=2)
    network = create_model("vnet", 19)
    weights, out = tmp_path / "weights.safetensors", tmp_path / "out.safetensors"
    said = {"model": "vnet", "num_classes": 19, "hyperparameters": {}, "classes": list(images.classes.names)}
    save_weights(weights, network.state_dict(), said)
    offsets = main(
        "rare_classes",
        weights=str(weights),
        data="synthetic",
        out=str(out),
        share=1.0,
        samples=2,
        size=(32, 64),
    )
    assert offsets.abs().sum() > 0
    before, after = load(weights), load(out)
    image = images[0][0][None]
    assert torch.allclose(after(image), before(image) + offsets[:, None, None], atol=1e-6)
    assert after.description["provenance"]["offsets of classes"] == offsets.tolist()


def test_distributed(main, tmp_path, monkeypatch):
    """One process; several are tested with the training program."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    net = main("distributed", size=8, channels=8, depth=2, steps=1)
    assert all(p.grad is not None for p in net.parameters())


def batches_seen(net):
    """What the batch norms of a network have counted: once a batch, though blocks run again."""
    return {int(value) for name, value in net.state_dict().items() if name.endswith("num_batches_tracked")}


def test_lightning(main, tmp_path):
    pytest.importorskip("lightning", reason="an environment of the oldest versions has none")
    net = main("lightning_training", size=(32, 64), samples=4, epochs=1, folder=str(tmp_path))
    assert all(p.isfinite().all() for p in net.parameters())
    assert batches_seen(net) == {2}


def test_accelerate(main, capsys):
    """Gradients that are accumulated make one step of two batches."""
    pytest.importorskip("accelerate", reason="an environment of the oldest versions has none")
    net = main("accelerate_training", size=(32, 64), samples=4, epochs=1, mixed_precision="bf16")
    assert re.search(r"epoch 1: loss \d\.\d{3}", capsys.readouterr().out)
    assert batches_seen(net) == {2}
    assert all(p.dtype == torch.float32 for p in net.parameters())


def test_slurm():
    """The script is one for the shell, and its last command one for `revseg`."""
    script = EXAMPLES / "slurm.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text().replace("\\\n", " ")
    (command,) = re.findall(r"-m (revseg train .*)", text)
    assert_commands(
        command.replace('"${resume[@]}"', "--resume").replace("$DATA", "data").replace("$out", "runs/x")
    )


def test_notebook(tmp_path, monkeypatch, capsys):
    """Its cells run one after the other; what stands below them was printed by them."""
    monkeypatch.chdir(tmp_path)
    cells = [
        c for c in json.loads((EXAMPLES / "camvid.ipynb").read_text())["cells"] if c["cell_type"] == "code"
    ]
    assert all(cell["outputs"] for cell in cells[1:])
    names = {}
    for cell in cells:
        code = "".join(cell["source"]).replace("else 24", "else 4").replace("epochs=2", "epochs=1")
        exec(compile(code, "camvid.ipynb", "exec"), names)  # noqa: S102
        if "predict(" in code and "model" in names and "meta" in code:
            ours, theirs = (
                re.findall(r"(\w+) +(\d+) MiB", text)
                for text in (capsys.readouterr().out, "".join(cell["outputs"][0]["text"]))
            )
            assert [name for name, _ in ours] == [name for name, _ in theirs]
            for (_, found), (_, told) in zip(ours, theirs, strict=True):
                assert float(found) == pytest.approx(float(told), rel=0.1)  # older torch holds one map more
    assert names["predicted"].shape == names["label"].shape
    assert (tmp_path / "runs/notebook/best.safetensors").is_file()
