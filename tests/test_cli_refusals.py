"""What the command line refuses before anything is made, and how it names what is wrong with files."""

import os

import numpy as np
import pytest
from PIL import Image

from revseg.cli import main
from tests.helpers import refused
from tests.test_cli import SMALL


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "-1"], "expected --lr of at least 0, got -1"),
        (["--lr", "nan"], "expected --lr of at least 0, got nan"),
        (["--betas", "0.9", "1.0"], "expected --betas in [0, 1), got (0.9, 1.0)"),
        (["--size", "8", "100"], "expected --size of at least 16 x 16, got 8 x 100"),
        (["--size", "100"], "expected --size as height and width, as in 256 512 or 256x512, got 100"),
        (["--size", "4", "a"], "expected --size as height and width, as in 256 512 or 256x512, got 4 a"),
        (["--size", "x"], "expected --size as height and width"),
        (["--epochs", "0"], "expected --epochs of at least 1, got 0"),
        (["--train-samples", "0"], "expected --train-samples of at least 1, got 0"),
        (["--threads", "0"], "expected --threads of at least 1, got 0"),
        (["--seed", "4294967296"], "expected --seed below 2**32"),
        (["--class-weights", "x"], "unknown --class-weights 'x'; choose one of none, enet, erfnet"),
        (["--precision", "bf16"], "unknown --precision 'bf16'; did you mean bfloat16? choose one of"),
        (["--optimizer", "adamW"], "unknown --optimizer 'adamW'; did you mean adamw?"),
        (["--log", "tensorbord"], "unknown --log 'tensorbord'; did you mean tensorboard?"),
        (["--clip", "0"], "expected --clip above 0, got 0"),
        (
            ["--crop", "32", "32", "--scale", "2", "1"],
            "expected --scale 0 < lowest <= highest, got (2.0, 1.0)",
        ),
        (["--scale", "0.5", "2"], "--scale and --crop-classes need the size of a window: give --crop too"),
        (["--budget", "11 apples"], "expected a budget like 10GB or 800MiB, got '11 apples'"),
        (["--ema", "1"], "expected --ema in (0, 1), got 1"),
        (["--allow-change", "lrr"], "unknown --allow-change 'lrr'; did you mean lr?"),
        (["--model", "erfnet", "--exact"], "--exact has no meaning for erfnet: it has no reversible part"),
        (["--weights", "missing"], "expected --weights to be a file, got missing"),
        (["--learning-rate", "3"], "unknown flag --learning-rate; did you mean --lr?"),
        (["--batch-size", "3"], "unknown flag --batch-size; did you mean --batch?"),
        (["--epoch", "3"], "unknown flag --epoch; did you mean --epochs?"),
        (["--Model", "vnet"], "unknown flag --Model; did you mean --model?"),
        (["--resume", "--overwrite"], "--resume continues a run and --overwrite replaces it"),
        (["--model-args", "widths"], "expected --model-args as key=value, got 'widths'"),
        (["--exact", "--lossless"], "--exact and --lossless are two ways to the same end"),
        (["--model-args", "exact=True"], "--model-args cannot set exact"),
        (["--model-args", "save_activations=True"], "--model-args cannot set save_activations"),
        (["--model-args", "width=3"], "unknown hyperparameter 'width' of vnet; choose one of widths"),
        (["--model-args", "widths=1,2"], "expected three rising widths"),
        (["--model-args", "widths=8"], "wrong kind of value in --model-args widths=8"),
        (["--model-args", "coupling=x"], "unknown coupling 'x'; choose one of one_sided, additive"),
        (["--model", "vnett"], "unknown --model 'vnett'; did you mean vnet? choose one of"),
        (["--model", "PSPNet"], "unknown --model 'PSPNet'; did you mean pspnet? choose one of"),
        (["--data", "cityscape"], "unknown --data 'cityscape'; did you mean cityscapes? choose one of"),
        (["--data", "camvid"], "camvid needs the folder of its files"),
        (["--root", "missing"], "expected --root to be a folder, got missing"),
        (["--device", "gpu"], "unknown --device 'gpu'; choose one of auto, cpu, cuda"),
        (["--typo", "3"], "unknown flag --typo; --help lists the flags"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments_are_refused_before_anything_is_made(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, "train", *arguments)
    assert not os.listdir(tmp_path)


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
