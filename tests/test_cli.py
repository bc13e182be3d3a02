import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from revseg.cli import COMMANDS, main
from revseg.commands import train as training
from revseg.training.settings import OUTPUTS

ROOT = Path(__file__).parents[1]
SMALL = ["--model-args", "widths=4,8,16", "--threads", "1"]
SHORT = ["--train-samples", "4", "--val-samples", "2", "--batch", "2", "--epochs", "1"]
TINY = ["train", "--size", "64", "128", *SHORT, *SMALL]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Leaves out measuring memory; the end-to-end test, in a process of its own, has it."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(training, "compare_memory", lambda *_: {"reversible": 1, "saved": 2})
    yield
    torch.set_num_threads(threads)


def run(*arguments, cwd, code=None):
    """The command in a process of its own."""
    command = [sys.executable, *(["-c", code] if code else ["-m", "revseg"]), *map(str, arguments)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def refused(capsys, *arguments):
    """What `main` says on stderr when it refuses."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return " ".join(message.split())


@pytest.fixture
def camvid(tmp_path):
    """Two samples a split in the layout of CamVid."""
    root = tmp_path / "camvid"
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for folder, shape, high in ((split, (32, 48, 3), 256), (f"{split}annot", (32, 48), 12)):
            (root / folder).mkdir(parents=True)
            for name in ("a", "b"):
                pixels = generator.integers(0, high, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(root / folder / f"{name}.png")
    return root


def camvid_command(root, out):
    return ["train", "--data", "camvid", "--root", root, "--epochs", 1, "--batch", 2, "--out", out]


def test_end_to_end_in_a_process(tmp_path):
    result = run(*TINY, "--out", "runs/x", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert sorted(os.listdir(tmp_path / "runs/x")) == sorted(OUTPUTS)
    assert "epoch 1/1  loss" in result.stdout
    assert "Peak memory of a training step" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["train", "--epoch", "3"], 2),
        (["train", "--batch", "0"], 2),
    ],
)
def test_arguments_are_answered_without_torch(arguments, code, tmp_path):
    program = (
        "import sys, atexit\n"
        "atexit.register(lambda: print('torch' in sys.modules))\n"
        "from revseg.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    result = run(*arguments, cwd=tmp_path, code=program)
    assert result.returncode == code
    assert result.stdout.splitlines()[-1] == "False"
    assert "Traceback" not in result.stderr


def test_interrupt_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "validate", interrupt)
    assert main([*TINY, "--out", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().err.splitlines() == [
        "revseg: interrupted; if an epoch was finished, --resume continues after it"
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "-1"], "expected --lr of at least 0, got -1"),
        (["--lr", "nan"], "expected --lr of at least 0, got nan"),
        (["--betas", "0.9", "1.0"], "expected --betas in [0, 1), got (0.9, 1.0)"),
        (["--size", "8", "100"], "expected --size of at least 16 x 16, got 8 x 100"),
        (["--size", "100"], "--size"),
        (["--epochs", "0"], "expected --epochs of at least 1, got 0"),
        (["--train-samples", "0"], "expected --train-samples of at least 1, got 0"),
        (["--threads", "0"], "expected --threads of at least 1, got 0"),
        (["--seed", "4294967296"], "expected --seed below 2**32"),
        (["--class-weights", "x"], "unknown --class-weights 'x'; choose one of none, enet"),
        (["--resume", "--overwrite"], "--resume continues a run and --overwrite replaces it"),
        (["--model-args", "widths"], "expected --model-args as key=value, got 'widths'"),
        (["--exact", "--lossless"], "--exact and --lossless are two ways to the same end"),
        (["--model-args", "exact=True"], "--model-args cannot set exact"),
        (["--model-args", "save_activations=True"], "--model-args cannot set save_activations"),
        (["--model-args", "width=3"], "unknown hyperparameter 'width' of vnet; choose one of widths"),
        (["--model-args", "widths=1,2"], "expected three rising widths"),
        (["--model-args", "widths=8"], "wrong kind of value in --model-args widths=8"),
        (["--model-args", "coupling=x"], "unknown coupling 'x'; choose one of one_sided, additive"),
        (["--model", "vnte"], "unknown model 'vnte'; choose one of"),
        (["--data", "cityscape"], "unknown data set 'cityscape'; choose one of"),
        (["--data", "camvid"], "camvid needs the folder of its files"),
        (["--root", "missing"], "expected --root to be a folder, got missing"),
        (["--device", "gpu"], "unknown --device 'gpu'; choose one of auto, cpu, cuda"),
        (["--typo", "3"], "Unrecognized options: --typo"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments_are_refused_before_anything_is_made(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, "train", *arguments)
    assert not os.listdir(tmp_path)


def test_out_folder_with_a_run_is_not_touched(tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text("precious")
    message = refused(capsys, *TINY, "--out", tmp_path)
    assert f"{tmp_path} holds a run already (log.jsonl): choose another --out, --resume" in message
    assert (tmp_path / "log.jsonl").read_text() == "precious"


def test_out_folder_that_cannot_be(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    message = refused(capsys, *TINY, "--out", tmp_path / "file" / "run")
    assert f"cannot write to --out {tmp_path}/file/run: {tmp_path}/file is a file" in message


def test_out_folder_without_permission(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda *_: False)  # a chmod would not stop root
    assert f"no permission to write in {tmp_path}" in refused(capsys, *TINY, "--out", tmp_path / "run")


def test_full_disk_is_one_sentence(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("revseg.training.run.save_checkpoint", full)
    assert "No space left on device" in refused(capsys, *TINY, "--out", tmp_path / "run")


def test_resume_without_a_run(tmp_path, capsys):
    assert f"nothing to resume: {tmp_path}/last.pt does not exist" in refused(
        capsys, *TINY, "--out", tmp_path, "--resume"
    )


@pytest.mark.parametrize("content", ["garbage", "truncated", "foreign"])
def test_resume_from_an_unfit_checkpoint(content, tmp_path, capsys):
    path = tmp_path / "last.pt"
    torch.save({"weights": torch.zeros(100)}, path)
    if content == "truncated":
        path.write_bytes(path.read_bytes()[:300])
    elif content == "garbage":
        path.write_bytes(b"garbage" * 100)
    message = refused(capsys, *TINY, "--out", tmp_path, "--resume")
    assert str(path) in message
    assert ("is not a checkpoint of revseg" if content == "foreign" else "is damaged") in message


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_named(camvid, tmp_path, capsys, workers):
    path = camvid / "train" / "a.png"
    path.write_bytes(path.read_bytes()[:50])
    message = refused(capsys, *camvid_command(camvid, tmp_path / "run"), "--workers", workers)
    assert message.startswith(f"revseg: cannot read the image {path}")


def test_label_out_of_range_is_named(camvid, tmp_path, capsys):
    path = camvid / "trainannot" / "b.png"
    Image.fromarray(np.full((32, 48), 77, dtype=np.uint8)).save(path)
    message = refused(capsys, *camvid_command(camvid, tmp_path / "run"))
    assert "got 77" in message
    assert str(path) in message


def test_image_without_label_is_named(camvid, tmp_path, capsys):
    (camvid / "valannot" / "b.png").unlink()
    assert str(camvid / "val" / "b.png") in refused(capsys, *camvid_command(camvid, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_images_of_different_sizes_need_a_size(camvid, tmp_path, capsys):
    for folder in ("train", "trainannot"):
        with Image.open(camvid / folder / "a.png") as image:
            image.resize((40, 40), Image.Resampling.NEAREST).save(camvid / folder / "a.png")
    command = camvid_command(camvid, tmp_path / "run")
    assert "different sizes (32 x 48, 40 x 40): give --size, or --batch 1" in refused(capsys, *command)
    assert main([str(argument) for argument in (*command, *SMALL, "--size", 33, 47, "--overwrite")]) == 0


def test_failed_runs_and_bugs_differ(tmp_path, monkeypatch, capsys):
    def fail_with(error):
        def fail(_):
            raise error

        monkeypatch.setattr(training, "train", fail)
        return main([*TINY, "--out", str(tmp_path / "run")])

    assert fail_with(training.DivergedError("the loss became nan at step 3")) == 1
    assert capsys.readouterr().err == "revseg: the loss became nan at step 3\n"
    assert fail_with(ModuleNotFoundError("No module named 'safetensors'", name="safetensors")) == 2
    assert "pip install 'revseg[train]'" in capsys.readouterr().err
    for bug in (RuntimeError("a bug"), ModuleNotFoundError("a bug", name="revseg.missing")):
        with pytest.raises(type(bug), match="a bug"):
            fail_with(bug)


def test_every_command_can_be_imported():
    import importlib

    for _, target in COMMANDS.values():
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function))
