"""CamVid over miniature trees: every layout people have, and every way a tree can be broken."""

import numpy as np
import pytest
import torch
from PIL import Image

from revseg.data import CAMVID, CamVid, create_dataset

SIZE = (6, 9)  # H, W


def pixels(seed):
    return np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def ids(seed, size=SIZE):
    return np.random.default_rng(seed).integers(0, 12, size, dtype=np.uint8)


def write_split(root, split="train", count=3, ending="png"):
    (root / split).mkdir(parents=True)
    (root / f"{split}annot").mkdir()
    for number in range(count):
        Image.fromarray(pixels(number)).save(root / split / f"f{number}.{ending}")
        Image.fromarray(ids(number)).save(root / f"{split}annot" / f"f{number}.png")
    return root


def write_list(root, *lines, split="train"):
    (root / f"{split}.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture
def root(tmp_path):
    return write_split(tmp_path / "CamVid")


def test_folders(root):
    dataset = CamVid(root, "train")
    assert dataset.names == ("f0", "f1", "f2")
    assert dataset.classes is CAMVID
    assert len(dataset) == 3
    for number, (image, label) in enumerate(dataset):
        assert (image.dtype, label.dtype) == (torch.uint8, torch.uint8)
        assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels(number))
        expected = ids(number)
        expected[expected == 11] = 255
        assert np.array_equal(label.numpy(), expected)


@pytest.mark.parametrize("ending", ["PNG", "jpg", "JPEG", "webp", "bmp", "tif", "tiff", "ppm"])
def test_any_image_ending(tmp_path, ending):
    dataset = CamVid(write_split(tmp_path, ending=ending), "train")
    image, label = dataset[1]
    assert image.shape == (3, *SIZE)
    assert label.shape == SIZE
    assert dataset.names[1] == "f1"


def test_splits_are_separate(root):
    write_split(root, "val", count=1)
    assert len(CamVid(root, "val")) == 1
    with pytest.raises(FileNotFoundError, match=r"missing folder .*test"):
        CamVid(root, "test")
    with pytest.raises(ValueError, match=r"unknown split 'trian' of camvid; choose one of train, val, test"):
        CamVid(root, "trian")


def test_first_samples_only(root):
    assert CamVid(root, "train", samples=2).names == ("f0", "f1")
    assert len(CamVid(root, "train", samples=9)) == 3
    with pytest.raises(ValueError, match="at least one sample, got 0"):
        CamVid(root, "train", samples=0)


@pytest.mark.parametrize(
    "line",
    [
        "/SegNet/CamVid/train/f1.png /SegNet/CamVid/trainannot/f1.png",
        "train/f1.png trainannot/f1.png",
        "CamVid/train/f1.png CamVid/trainannot/f1.png",
        "./train/f1.jpg\ttrainannot/f1.png",
        "{root}/train/f1.png {root}/trainannot/f1.png",
    ],
)
def test_list_files(root, line):
    write_list(root, "", line.format(root=root), "train/f0.png trainannot/f0.png")
    dataset = CamVid(root, "train")
    assert dataset.names == ("f1", "f0")
    assert np.array_equal(dataset[0][0].permute(1, 2, 0).numpy(), pixels(1))
    assert np.array_equal(dataset[0][1].numpy() == 255, ids(1) == 11)


@pytest.mark.parametrize(
    ("lines", "error", "message"),
    [
        (("train/f0.png trainannot/f0.png", "train/f9.png trainannot/f9.png"), FileNotFoundError,
         r"train\.txt, line 2: cannot find train/f9\.png"),
        (("/SegNet/CamVid/train/f0.png /SegNet/CamVid/labels/f0.png",), FileNotFoundError,
         r"line 1: cannot find /SegNet/CamVid/labels/f0\.png"),
        (("train/f0.png",), ValueError, r"line 1: expected the paths .* got 'train/f0\.png'"),
        (("train/f0.png trainannot/f0.png",) * 2, ValueError, "line 2: the image f0 is listed twice"),
        (("",), ValueError, "no images in the list"),
    ],
)  # fmt: skip
def test_broken_lists(root, lines, error, message):
    write_list(root, *lines)
    with pytest.raises(error, match=message):
        CamVid(root, "train")


def test_an_image_never_stands_for_its_label(root):
    # by its file name alone the label would be found as the image beside the list
    Image.fromarray(pixels(0)).save(root / "f0.png")
    write_list(root, "/a/b/c/f0.png /a/b/d/f0.png")
    with pytest.raises(FileNotFoundError, match=r"/a/b/c/f0\.png"):
        CamVid(root, "train")


def test_missing_folders(root, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        CamVid(tmp_path / "nowhere", "train")
    for label in (root / "trainannot").iterdir():
        label.unlink()
    (root / "trainannot").rmdir()
    with pytest.raises(FileNotFoundError, match=r"missing folder .*trainannot"):
        CamVid(root, "train")


def test_empty_folder(tmp_path):
    root = write_split(tmp_path, count=0)
    (root / "train" / "notes.txt").write_text("no image")
    (root / "train" / "._f0.png").write_bytes(b"left by another system")
    with pytest.raises(ValueError, match=r"no images in .*train"):
        CamVid(root, "train")


def test_alone(root):
    (root / "trainannot" / "f1.png").rename(root / "trainannot" / "other.png")
    with pytest.raises(ValueError, match=r"f1\.png: an image without a label in .*trainannot"):
        CamVid(root, "train")
    (root / "train" / "f1.png").unlink()
    with pytest.raises(ValueError, match=r"other\.png: a label without an image in .*train"):
        CamVid(root, "train")


def test_two_images_of_one_stem(root):
    Image.fromarray(pixels(0)).save(root / "train" / "f1.jpg")
    with pytest.raises(ValueError, match=r"one file for f1, got .*f1\.jpg and .*f1\.png"):
        CamVid(root, "train")


def test_sizes_differ(root):
    Image.fromarray(ids(0, (6, 8))).save(root / "trainannot" / "f1.png")
    with pytest.raises(
        ValueError, match=r"\[6, 9\] for .*train.f1\.png and \[6, 8\] for .*trainannot.f1\.png"
    ):
        CamVid(root, "train")[1]


@pytest.mark.parametrize("value", [12, 31, 254])
def test_label_out_of_range(root, value):
    label = ids(1)
    label[2, 3] = value
    Image.fromarray(label).save(root / "trainannot" / "f1.png")
    with pytest.raises(ValueError, match=rf"labels 0 to 11 or 255, got {value}: .*f1\.png"):
        CamVid(root, "train")[1]


def test_void_as_255(root):
    label = ids(1)
    label[label == 11] = 255
    expected = CamVid(root, "train")[1][1]
    Image.fromarray(label).save(root / "trainannot" / "f1.png")
    assert torch.equal(CamVid(root, "train")[1][1], expected)


def test_labels_as_jpeg_are_refused(root):
    # their compression makes ids of pixels that were never there
    (root / "trainannot" / "f1.png").unlink()
    Image.fromarray(ids(1)).save(root / "trainannot" / "f1.jpg")
    dataset = CamVid(root, "train")
    with pytest.raises(ValueError, match=r"without loss, as PNG, got one whose compression .*f1\.jpg"):
        dataset.verify()
    with pytest.raises(ValueError, match=r"without loss, as PNG, got JPEG, whose compression .*f1\.jpg"):
        dataset[1]


def test_equal_stems_of_two_sequences(root):
    for number, sequence in enumerate(("s1", "s2")):
        for kind in ("train", "trainannot"):
            (root / kind / sequence).mkdir()
            (root / kind / f"f{number}.png").rename(root / kind / sequence / "a.png")
    dataset = CamVid(root, "train")
    assert dataset.names == ("train_f2", "s1_a", "s2_a")
    assert np.array_equal(dataset[2][0].permute(1, 2, 0).numpy(), pixels(1))


def test_colour_label(root):
    Image.fromarray(pixels(1)).save(root / "trainannot" / "f1.png")
    with pytest.raises(
        ValueError,
        match=r"^expected a label of one 8-bit channel of class ids, got mode RGB: .*trainannot.f1\.png",
    ):
        CamVid(root, "train")[1]


def test_palette_label_holds_ids(root):
    label = Image.fromarray(ids(1)).convert("L")
    palette = Image.new("P", label.size)
    palette.putdata(list(ids(1).flatten()))
    palette.putpalette([value for colour in CAMVID.colours for value in colour] + [0, 0, 0])
    expected = CamVid(root, "train")[1][1]
    palette.save(root / "trainannot" / "f1.png")
    with Image.open(root / "trainannot" / "f1.png") as stored:
        assert stored.mode == "P"
    assert torch.equal(CamVid(root, "train")[1][1], expected)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK"])
def test_images_become_rgb(root, mode):
    ending = "tif" if mode == "CMYK" else "png"
    (root / "train" / "f1.png").unlink()
    Image.fromarray(pixels(1)).convert(mode).save(root / "train" / f"f1.{ending}")
    assert CamVid(root, "train")[1][0].shape == (3, *SIZE)


@pytest.mark.parametrize("folder", ["train", "trainannot"])
@pytest.mark.parametrize("damage", ["cut", "empty", "text", "wrong checksum"])
def test_damaged_files(root, folder, damage):
    path = root / folder / "f1.png"
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 0xFF
    bad = {"cut": good[: len(good) * 2 // 3], "empty": b"", "text": b"not found", "wrong checksum": flipped}
    path.write_bytes(bad[damage])
    with pytest.raises(ValueError, match=rf"cannot read the image .*{folder}.f1\.png"):
        CamVid(root, "train")[1]


def test_16_bit_image(root):
    Image.fromarray(np.zeros(SIZE, dtype=np.uint16)).save(root / "train" / "f1.png")
    with pytest.raises(ValueError, match=r"8 bits a channel, got mode I;16.*f1\.png"):
        CamVid(root, "train")[1]


def test_factory_resizes_before_the_transform(root):
    seen = []

    def transform(image, label, generator):
        seen.append((tuple(image.shape), tuple(label.shape)))
        return image, label

    dataset = create_dataset("camvid", "train", root=root, size=(4, 5), transform=transform)
    image, label = dataset[0]
    assert seen == [((3, 4, 5), (4, 5))]
    assert set(label.flatten().tolist()) <= {*range(11), 255}
    assert image.dtype == torch.uint8
