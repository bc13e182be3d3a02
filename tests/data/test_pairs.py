"""List files as people have them, and names that tell files apart."""

from pathlib import Path

import pytest

from revseg.data.pairs import files_by_stem, listed_pairs, unique_names


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.mark.parametrize(
    "line",
    [
        "images/a b.png labels/a b.png",
        '"images/a b.png" "labels/a b.png"',
        "images/a b.png,labels/a b.png",
        '"images/a b.png", "labels/a b.png"',
        "images/a b.png;labels/a b.png",
        "images/a b.png\tlabels/a b.png",
        r"images\a b.png labels\a b.png",
        r"C:\Users\me\set\images\a b.png,C:\Users\me\set\labels\a b.png",
        "images/c,d.png labels/c,d.png",
        "images/c,d.png,labels/c,d.png",
        "images/e#f.png labels/e#f.png",
        "/home/me/a set/images/a b.png /home/me/a set/labels/a b.png",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le with mark"])
def test_lines(tmp_path, line, encoding):
    touch(
        tmp_path, *(f"{kind}/{name}.png" for kind in ("images", "labels") for name in ("a b", "c,d", "e#f"))
    )
    text = f"# image, label\n\n  # more\n{line}\r\n"
    mark = "\ufeff" if "mark" in encoding else ""
    (tmp_path / "train.txt").write_bytes((mark + text).encode(encoding.partition(" ")[0]))
    (image, label) = listed_pairs(tmp_path / "train.txt")[0]
    assert image.relative_to(tmp_path).parts[0] == "images"
    assert label == tmp_path / "labels" / image.name


def test_a_backslash_in_a_name(tmp_path):
    touch(tmp_path, "images/a\\b.png", "labels/a\\b.png")
    (tmp_path / "train.txt").write_text("images/a\\b.png labels/a\\b.png")
    assert listed_pairs(tmp_path / "train.txt")[0].image.name == "a\\b.png"


def test_equal_stems_of_two_sequences(tmp_path):
    names = [f"{kind}/{sequence}/1.png" for sequence in ("s1", "s2") for kind in ("images", "labels")]
    touch(tmp_path, *names)
    (tmp_path / "train.txt").write_text("\n".join(" ".join(names[i : i + 2]) for i in (0, 2)))
    pairs = listed_pairs(tmp_path / "train.txt")
    assert unique_names([pair.image for pair in pairs]) == ["s1_1", "s2_1"]
    assert sorted(files_by_stem(tmp_path / "images", (".png",))) == ["s1/1", "s2/1"]


def test_linked_folders(tmp_path):
    touch(tmp_path, "elsewhere/1.png", "images/a/2.png", "images/.trash/3.png", "images/__MACOSX/4.png")
    (tmp_path / "images/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images/a/up").symlink_to(tmp_path / "images")
    assert sorted(files_by_stem(tmp_path / "images", (".png",))) == ["a/2", "b/1"]


def test_what_cannot_be_read_is_named(tmp_path):
    listing = tmp_path / "train.txt"
    listing.write_bytes(b"images/\xff.png labels/x.png")
    with pytest.raises(ValueError, match=r"UTF-8 or UTF-16, got other bytes: .*train\.txt"):
        listed_pairs(listing)
    touch(tmp_path, "images/a.png")
    listing.write_text("images/a.png labels/a.png")
    with pytest.raises(FileNotFoundError, match=r"train\.txt, line 1: cannot find labels/a\.png"):
        listed_pairs(listing)
    listing.write_text("images/a.png")
    with pytest.raises(ValueError, match=r"line 1: expected the paths of an image and its label"):
        listed_pairs(listing)


def test_names():
    assert unique_names([Path("x/a.png"), Path("x/b.png")]) == ["a", "b"]
    assert unique_names([Path("x/a.png"), Path("y/a.png"), Path("y/b.png")]) == ["x_a", "y_a", "y_b"]
    assert unique_names([Path("x/a.png"), Path("x/a.jpg")]) == ["a_1", "a_2"]
    assert unique_names([]) == []
