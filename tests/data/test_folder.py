"""Any folder with a class table: what tables say, and every way they can be wrong."""

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from revseg.data import Folder, create_dataset
from revseg.data.class_file import read_class_file
from tests.data.test_images import png

SIZE = (5, 7)
RANDOM = np.random.default_rng(1)
PIXELS = RANDOM.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
PLACES = RANDOM.integers(0, 3, SIZE)

TABLE = """
classes:
  - background
  - {name: crop, id: 7, colour: [0, 160, 60]}
  - {name: weed, ids: [8, 9], colour: "#c83232"}
ignore: [255, "#000000"]
"""


def write(root, label, table=TABLE, image=None, layout="{kind}/train", ending="png"):
    root.mkdir(exist_ok=True)
    (root / "classes.yaml").write_text(table)
    images, labels = (root / layout.format(kind=kind) for kind in ("images", "labels"))
    for folder in (images, labels):
        folder.mkdir(parents=True, exist_ok=True)
    if callable(image):
        image(images)
    else:
        Image.fromarray(PIXELS if image is None else image).save(images / f"x.{ending}")
    if callable(label):
        label(labels / "x.png")
    else:
        Image.fromarray(label).save(labels / "x.png")
    return root


def stored(values=(0, 7, 9)):
    return np.array(values, dtype=np.uint8)[PLACES]


@pytest.mark.parametrize("layout", ["{kind}/train", "train/{kind}"])
def test_layouts(tmp_path, layout):
    dataset = Folder(write(tmp_path / "mine", stored(), layout=layout, ending="jpg"), "train")
    image, label = dataset[0]
    dataset.verify()
    assert image.shape == (3, *SIZE)
    assert np.array_equal(label.numpy(), PLACES)
    assert dataset.names == ("x",)
    assert dataset.classes.names == ("background", "crop", "weed")
    assert dataset.classes.colours[1:] == ((0, 160, 60), (200, 50, 50))
    with pytest.raises(
        FileNotFoundError, match=r"no images and labels of the split 'val' in .*; expected .*images"
    ):
        Folder(tmp_path / "mine", "val")


def test_lists_and_suffixes(tmp_path):
    root = write(tmp_path, stored(), TABLE + "label_suffix: _mask\n")
    (root / "labels/train/x.png").rename(root / "labels/train/x_mask.png")
    assert len(Folder(root, "train")) == 1
    (root / "few.txt").write_text("images/train/x.png labels/train/x_mask.png\n")
    assert np.array_equal(Folder(root, "few")[0][1].numpy(), PLACES)


def test_colours(tmp_path):
    colours = np.array([[10, 20, 30], [0, 160, 60], [200, 50, 50]], dtype=np.uint8)
    table = TABLE.replace("- background", "- {name: background, colour: [10, 20, 30]}")
    picture = colours[PLACES]
    dataset = Folder(write(tmp_path, picture, table), "train")
    assert np.array_equal(dataset[0][1].numpy(), PLACES)
    picture[0, :4] = (0, 0, 0), (1, 2, 3), (1, 2, 3), (255, 255, 255)
    write(tmp_path, picture, table)
    with pytest.raises(
        ValueError, match=r"colour #010203 in 2 pixels, #ffffff in 1 pixels: .*x\.png; give it"
    ):
        dataset[0]
    # a palette whose indices mean nothing
    palette = Image.fromarray(colours[PLACES]).quantize(8)
    write(tmp_path, palette.save, table + "labels: colours\n")
    assert np.array_equal(Folder(tmp_path, "train")[0][1].numpy(), PLACES)
    write(tmp_path, colours[PLACES], "classes: [a, b, c]")
    with pytest.raises(ValueError, match=r"expected class ids, got colours: .*x\.png; to read colours give"):
        Folder(tmp_path, "train")[0]


def test_unknown_ids_are_counted(tmp_path):
    ids = stored()
    ids[0, :3] = 12, 12, 40
    dataset = Folder(write(tmp_path, ids), "train")
    with pytest.raises(
        ValueError, match=r"the id 12 in 2 pixels, 40 in 1 pixels: .*x\.png; .* ignore in .*yaml"
    ):
        dataset[0]
    ids[0, :3] = 255
    label = Folder(write(tmp_path, ids), "train")[0][1]
    assert label[0, :3].tolist() == [255, 255, 255]


def test_binary_masks_of_0_and_255(tmp_path):
    table = "classes: [{name: ground}, {name: thing, id: 255}]"
    dataset = Folder(write(tmp_path, (PLACES > 0).astype(np.uint8) * 255, table), "train")
    assert np.array_equal(dataset[0][1].numpy(), PLACES > 0)
    write(tmp_path, Image.fromarray(PLACES > 0).save, "classes: [ground, thing]")
    assert np.array_equal(Folder(tmp_path, "train")[0][1].numpy(), PLACES > 0)


def test_wide_ids(tmp_path):
    ids = np.array([0, 1000, 60000], dtype=np.uint16)[PLACES]
    table = "classes: [a, {name: b, id: 1000}, {name: c, id: 60000}]"
    assert np.array_equal(Folder(write(tmp_path, ids, table), "train")[0][1].numpy(), PLACES)
    write(tmp_path, ids, table.replace("60000", "60001"))
    with pytest.raises(ValueError, match=r"the id 60000 in \d+ pixels"):
        Folder(tmp_path, "train")[0]


def saved(name, pixels):
    def save(folder):
        if name.endswith(".npy"):
            np.save(folder / name, pixels)
        elif name.endswith(".tif"):
            tifffile.imwrite(
                folder / name,
                pixels.squeeze(),
                photometric="minisblack",
                planarconfig="contig" if pixels.shape[2] > 1 else None,
            )
        else:
            png(folder / name, pixels, 16, {1: 0, 3: 2, 4: 6}[pixels.shape[2]])

    return save


@pytest.mark.parametrize("name", ["x.npy", "x.tif", "x.png"])
@pytest.mark.parametrize("count", [1, 3, 4, 6])
def test_16_bits_by_the_range(tmp_path, name, count):
    if name == "x.png" and count == 6:
        return  # PNG has at most four channels
    deep = RANDOM.integers(0, 5000, (*SIZE, count)).astype(np.uint16)
    channels = [1, 1, 1] if count == 1 else [3, 1, 2]
    table = TABLE + f"image: {{channels: {channels}, range: [100, 4195]}}\n"
    dataset = Folder(write(tmp_path, stored(), table, saved(name, deep)), "train")
    dataset.verify()
    expected = np.rint(((deep.astype(float) - 100) * 255 / 4095).clip(0, 255))[
        :, :, [c - 1 for c in channels]
    ]
    assert np.array_equal(dataset[0][0].permute(1, 2, 0).numpy(), expected)
    if count == 4:
        return
    write(tmp_path, stored(), TABLE + "image: {channels: [5]}\n", saved(name, deep))
    with pytest.raises(ValueError, match=r"channel 5, got|say what is black and white"):
        Folder(tmp_path, "train")[0]


def test_images_without_a_range_are_refused(tmp_path):
    deep = RANDOM.integers(0, 5000, (*SIZE, 3)).astype(np.uint16)
    dataset = Folder(write(tmp_path, stored(), TABLE, saved("x.png", deep)), "train")
    with pytest.raises(ValueError, match=r"8 bits a channel, got mode RGB: .*x\.png"):
        dataset.verify()
    write(tmp_path, stored(), TABLE, saved("x.npy", deep))
    (tmp_path / "images/train/x.png").unlink()
    with pytest.raises(
        ValueError, match=r"got uint16 from \d+ to \d+: .*x\.npy; say what is black and white"
    ):
        Folder(tmp_path, "train")[0]
    floats = deep.astype(np.float32)
    floats[0, 0, 0] = np.nan
    write(tmp_path, stored(), TABLE + "image: {range: [0, 1]}", saved("x.npy", floats))
    with pytest.raises(ValueError, match=r"finite numbers, got NaN or infinity: .*x\.npy"):
        Folder(tmp_path, "train")[0]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("", "the table: expected keys and values, got None"),
        ("classes: []", r"list of classes under the key classes, got \[\]"),
        ("clases: [a]", "unknown key 'clases'; .*did you mean 'classes'"),
        ("classes: [{name: a, color: [1, 2, 3]}]", "class 0: unknown key 'color'; .*did you mean 'colour'"),
        (
            "classes: [{name: a, id: 1}, {name: b, id: 1}]",
            r"class 1 \(b\): the id 1 is that of class 0 \(a\) already",
        ),
        ("classes: [a, {name: b, ids: [2, 0]}]", r"class 1 \(b\): the id 0 is that of class 0 \(a\)"),
        ("classes: [a, a]", "class 1: the name 'a' stands there twice"),
        ("classes: [yes, b]", "class 0: expected keys and values, got True"),
        ("classes: [{name: no}]", "class 0: expected a name, got False; put names such as yes"),
        ("classes: [{name: a, id: -1}]", r"class 0 \(a\): expected an id of at least 0, got -1"),
        ("classes: [{name: a, id: 1, ids: [2]}]", r"class 0 \(a\): expected id or ids, got both"),
        ("classes: [{name: a, colour: [1, 2]}]", r"colour \[r, g, b\] of bytes or .*, got \[1, 2\]"),
        ("classes: [{name: a, colour: [1, 2, 256]}]", r"got \[1, 2, 256\]"),
        ("classes:\n- {name: a, colour: '#12345g'}", "got '#12345g'"),
        ("classes:\n- name: a\n  colour: #123456", "got None; put #rrggbb in quotes"),
        (
            "classes: [{name: a, colour: [1, 2, 3]}, {name: b, colour: '#010203'}]",
            "colour #010203 is that of class 0",
        ),
        ("classes: [a]\nignore: [0]", "ignore: the id 0 is that of class 0"),
        ("classes: [a]\nignore: ['black']", "ignore: expected a colour .*, got 'black'"),
        ("classes: [a]\nlabels: colors", "labels: ids or labels: colours, got 'colors'"),
        (
            "classes: [a, {name: b, colour: [1, 2, 3]}]\nlabels: colours",
            "a colour for each class, got none for a",
        ),
        ("classes: [a]\nimage: {channels: [0, 1, 2]}", r"channels, counted from 1, got \[0, 1, 2\]"),
        ("classes: [a]\nimage: {channels: [1, 2]}", r"1 or 3 channels"),
        ("classes: [a]\nimage: {range: [5, 5]}", r"range \[black, white\], got \[5, 5\]"),
        ("classes: [a]\nimage: {rang: [0, 5]}", "image: unknown key 'rang'; .*did you mean 'range'"),
        ("classes: [a, b", "is not YAML"),
        (f"classes: [{', '.join(f'c{i}' for i in range(256))}]", "at most 255 classes, got 256"),
    ],
)
def test_wrong_tables(tmp_path, table, message):
    path = tmp_path / "classes.yaml"
    path.write_text(table)
    with pytest.raises(ValueError, match=message) as error:
        read_class_file(path)
    assert str(path) in str(error.value)


def test_default_colours_differ(tmp_path):
    path = tmp_path / "classes.yaml"
    path.write_text(f"classes: [{', '.join(f'c{i}' for i in range(255))}]")
    assert len(set(read_class_file(path).classes.colours)) == 255


def test_missing_table(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a class table .*classes\.yaml, got none"):
        Folder(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match="which is no folder"):
        Folder(tmp_path / "nowhere", "train")


def test_verify_names_every_broken_file(tmp_path):
    root = write(tmp_path, stored())
    for name in ("a", "b", "c"):
        Image.fromarray(PIXELS).save(root / f"images/train/{name}.png")
        Image.fromarray(stored()).save(root / f"labels/train/{name}.png")
    dataset = Folder(root, "train")
    dataset.verify()
    Image.fromarray(PIXELS[:, :3]).save(root / "images/train/a.png")
    (root / "images/train/b.png").write_bytes((root / "images/train/b.png").read_bytes()[:-60])
    Image.fromarray(stored()).save(root / "labels/train/c.png", format="JPEG")
    with pytest.raises(ValueError, match=r"\[5, 3\] for .*a\.png") as error:
        dataset.verify()
    assert len(error.value.problems) == 3
    assert "b.png" in error.value.problems[1]
    assert "without loss" in error.value.problems[2]


def test_factory(tmp_path):
    root = write(tmp_path, stored())
    other = tmp_path / "coarse.yaml"
    other.write_text("classes: [soil, {name: plant, ids: [7, 9]}]")
    for table in (
        other,
        other.name if root == tmp_path else f"../{other.name}",
    ):  # a path from the folder too
        dataset = create_dataset("folder", "train", root=root, table=table)
        assert torch.equal(dataset[0][1], torch.from_numpy(PLACES > 0).to(torch.uint8))
    with pytest.raises(
        FileNotFoundError, match=r"expected a class table, got nowhere\.yaml, which is no file"
    ):
        create_dataset("folder", "train", root=root, table="nowhere.yaml")
