"""`revseg predict`: files in, pictures out, names kept, nothing lost."""

import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from revseg.cli import main
from revseg.data import CITYSCAPES
from revseg.files import save_weights
from revseg.inference import runtimes, tiff
from revseg.inference.automatic import AutomaticRunner, why_not
from revseg.inference.trained import load
from revseg.inference.windows import Windows
from revseg.models import create_model
from tests.inference.test_runtimes import needs_onnx


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "vnet.safetensors"
    torch.manual_seed(0)
    description = {
        "model": "vnet",
        "num_classes": 19,
        "hyperparameters": {},
        "classes": list(CITYSCAPES.names),
    }
    save_weights(path, create_model("vnet").state_dict(), description)
    return path


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    for i, name in enumerate(("a.png", "below/a.jpg", "below/deeper/c.webp")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (24, 40, 3), dtype=np.uint8)).save(
            folder / name
        )
    return folder


def predict(weights, *words, out):
    return main(["predict", str(weights), *map(str, words), "--out", str(out), "--threads", "1"])


def test_a_folder_keeps_its_structure_and_every_kind_is_written(weights, photos, tmp_path):
    out = tmp_path / "out"
    assert predict(weights, photos, "--write", "colour", "overlay", "train-ids", "label-ids", out=out) == 0
    names = ["a.png", "below/a.png", "below/deeper/c.png"]
    for kind in ("colour", "overlay", "train-ids", "label-ids"):
        assert sorted(str(p.relative_to(out / kind)) for p in (out / kind).rglob("*.png")) == names
    model = load(weights)
    labels = model.predict(photos / "below" / "a.jpg")
    written = {
        kind: np.array(Image.open(out / kind / "below" / "a.png"))
        for kind in ("colour", "train-ids", "label-ids")
    }
    assert np.array_equal(written["train-ids"], labels.numpy())
    assert np.array_equal(written["colour"], CITYSCAPES.colorize(labels).numpy())
    from revseg.inference.pictures import CITYSCAPES_IDS

    assert np.array_equal(written["label-ids"], np.array(CITYSCAPES_IDS)[labels.numpy()])


def test_it_goes_on_where_it_stopped_and_overwrites_when_asked(weights, photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert predict(weights, photos / "a.png", out=out) == 0
    (out / "colour" / "a.png").write_bytes(b"mine")
    assert predict(weights, photos, out=out) == 0
    assert (out / "colour" / "a.png").read_bytes() == b"mine"
    assert (out / "colour" / "below" / "a.png").is_file()
    assert "1 images had all their results already" in capsys.readouterr().out
    assert predict(weights, photos, "--overwrite", out=out) == 0
    assert (out / "colour" / "a.png").read_bytes() != b"mine"


def test_patterns_and_lists(weights, photos, tmp_path, monkeypatch):
    assert predict(weights, photos / "**" / "*.webp", out=tmp_path / "pattern") == 0
    assert [p.name for p in (tmp_path / "pattern").rglob("*.png")] == ["c.png"]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{photos / 'a.png'}\n\n"))
    assert predict(weights, "-", out=tmp_path / "list") == 0
    assert (tmp_path / "list" / "colour" / "a.png").is_file()


def test_a_broken_image_is_named_and_the_rest_is_done(weights, photos, tmp_path, capsys):
    (photos / "0.png").write_bytes(b"no image")
    assert predict(weights, photos, out=tmp_path / "out") == 1
    said = capsys.readouterr()
    assert "passed over" in said.out
    assert "1 images could not be predicted, the first is" in said.err
    assert len(list((tmp_path / "out").rglob("*.png"))) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.png"], "expected a file, a folder, a pattern, a video, camera:0 or -, got nowhere.png"),
        (["nothing*.png"], "no image fits nothing*.png"),
        (["--write", "color", "--", "a.png"], "unknown --write color"),
        (["--overlap", "2", "--", "a.png"], "expected --overlap between 0 and 0.9"),
        (["--scales", "0.01", "--", "a.png"], "expected --scales between 0.1 and 10, got (0.01,)"),
        (["--write", "--", "a.png"], "expected something to write; choose some of colour"),
        (
            ["--runtime", "tensorrt", "--", "a.png"],
            "unknown --runtime tensorrt; choose one of auto, pytorch, compile",
        ),
        (["camera:front"], "expected a camera as camera:0, camera:1, ..., got camera:front"),
    ],
)
def test_wrong_words_are_refused(words, message, weights, tmp_path, capsys):
    try:
        code = main(["predict", str(weights), "--out", str(tmp_path / "out"), *words])
    except SystemExit as error:
        code = error.code
    assert code == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in said
    assert not (tmp_path / "out").exists()


def test_a_video_without_a_frame_is_refused(weights, tmp_path, monkeypatch, capsys):
    class Empty:
        def __init__(self, path):
            self.isOpened, self.release = lambda: path.endswith("empty.mp4"), lambda: None

        def read(self):
            return False, None

    monkeypatch.setitem(sys.modules, "cv2", SimpleNamespace(VideoCapture=Empty))
    for name, message in (("empty.mp4", "empty.mp4 holds no frame"), ("no.mp4", "no.mp4 as a video")):
        (tmp_path / name).touch()
        assert predict(weights, tmp_path / name, out=tmp_path / "out") == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_two_images_of_one_name_are_refused(weights, photos, tmp_path, capsys):
    assert predict(weights, photos / "a.png", photos / "below" / "a.jpg", out=tmp_path / "out") == 2
    assert "would both be written as a" in capsys.readouterr().err


def test_large_images_go_by_windows(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(tiff, "LARGE", 1000)
    pixels = np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "large.tif", pixels, tile=(32, 32), compression="zlib")
    options = ["--window", "64", "64", "--write", "train-ids", "overlay"]
    assert predict(weights, tmp_path / "large.tif", *options, out=tmp_path / "out") == 0
    labels = load(weights).predict(pixels, windows=Windows(64, 64))
    assert np.array_equal(tifffile.imread(tmp_path / "out" / "train-ids" / "large.tif"), labels.numpy())
    assert tifffile.imread(tmp_path / "out" / "overlay" / "large.tif").shape == (90, 130, 3)


@needs_onnx
def test_a_runtime_that_is_named_gives_the_same_labels(weights, photos, tmp_path, capsys):
    for runtime in ("pytorch", "onnx"):
        assert (
            predict(weights, photos, "--runtime", runtime, "--write", "train-ids", out=tmp_path / runtime)
            == 0
        )
    assert "ONNX Runtime for images of 24 x 40, prepared in" in capsys.readouterr().out
    for path in (tmp_path / "pytorch").rglob("*.png"):
        other = tmp_path / "onnx" / path.relative_to(tmp_path / "pytorch")
        assert (np.array(Image.open(path)) == np.array(Image.open(other))).mean() > 0.99


def test_a_runtime_that_cannot_run_is_said_before_anything_is_written(
    weights, photos, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    assert predict(weights, photos, "--runtime", "onnx", out=tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert said == "revseg: ONNX Runtime needs onnx, onnxscript, onnxruntime: pip install 'revseg[export]'\n"
    monkeypatch.setitem(runtimes.RUNTIMES, "compile", lambda network, images, any_size: 1 / 0)
    assert predict(weights, photos, "--runtime", "compile", out=tmp_path / "out") == 1
    assert (
        "torch.compile cannot run this network on images of 24 x 40: division by zero"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()
    assert predict(weights, photos, out=tmp_path / "out") == 0
    assert "run by PyTorch: ONNX Runtime needs onnx" in capsys.readouterr().out


def test_the_choice_knows_how_many_images_come(weights, photos, tmp_path, monkeypatch, capsys):
    """Of folders, patterns and files the number is known, of lists on the standard input nobody knows it."""
    expected = []
    monkeypatch.setattr(AutomaticRunner, "expect", lambda self, *numbers: expected.append(numbers))
    assert predict(weights, photos, out=tmp_path / "folder") == 0
    assert predict(weights, photos / "a.png", photos / "below" / "*" / "*", out=tmp_path / "files") == 0
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{photos / 'a.png'}\n"))
    assert predict(weights, "-", out=tmp_path / "list") == 0
    assert expected == [(0, 3), (1, 2), (2, 1), (0, 2), (1, 1), (0, None)]
    reason = why_not(torch.device("cpu")) or "too few images of a size for another runtime to pay"
    assert f"run by PyTorch: {reason}" in " ".join(capsys.readouterr().out.split())


def test_windows_are_run_by_pytorch_unless_a_runtime_is_named(weights, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(AutomaticRunner, "run_of", lambda self, images: 1 / 0)
    assert predict(weights, photos, "--window", "16", "32", out=tmp_path / "out") == 0
