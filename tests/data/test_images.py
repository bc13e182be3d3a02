"""Images are read as they are meant, or not at all: what decoders change without a word."""

import struct
import zlib

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from revseg.data.images import read_colours, read_header, read_ids, read_image, read_label

RANDOM = np.random.default_rng(0)
WHOLE = [
    *[
        ("x.png", {}),
        ("x.jpg", {}),
        ("x.jpg", {"progressive": True}),
        ("x.webp", {}),
        ("x.webp", {"lossless": True}),
    ],
    *[("x.tif", {}), ("x.tif", {"compression": "tiff_lzw"}), ("x.tif", {"big_tiff": True})],
]
PIXELS = RANDOM.integers(0, 256, (4, 6, 3), dtype=np.uint8)


def png(path, rows, depth, kind):
    """A PNG file with samples of any depth; kind 0 is grey, 2 RGB, 6 RGBA."""

    def chunk(name, content):
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    channels = {0: 1, 2: 3, 6: 4}[kind]
    height, width = rows.shape[0], rows.shape[1]
    if depth == 16:
        lines = [rows[y].astype(">u2").tobytes() for y in range(height)]
    else:
        bits = np.unpackbits(rows.astype(np.uint8)[:, :, None], axis=2)[:, :, 8 - depth :].reshape(height, -1)
        lines = [np.packbits(line).tobytes() for line in bits]
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + line for line in lines))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )
    assert channels * width * depth // 8 <= len(lines[0])
    return path


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_in_every_format(tmp_path, ending, orientation):
    blocks = np.zeros((16, 32, 3), dtype=np.uint8)  # large blocks, which a JPEG keeps
    blocks[:8, :16, 0] = blocks[8:, 16:, 1] = 255
    upright = Image.fromarray(blocks)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # how a camera that was held so stores it
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x.{ending}"
    stored.save(
        path,
        exif=exif,
        **{"webp": {"lossless": True}, "jpg": {"subsampling": 0, "quality": 95}}.get(ending, {}),
    )
    image = read_image(path)
    assert read_header(path).size == tuple(image.shape[1:]) == (16, 32)
    assert int((image.permute(1, 2, 0).int() - torch.from_numpy(blocks).int()).abs().max()) < 10


def test_headers_of_png_with_text(tmp_path, monkeypatch):
    text = PngInfo()
    text.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta tiff:Orientation="6"/>')
    Image.fromarray(PIXELS).save(tmp_path / "turned.png", pnginfo=text)
    assert (
        read_header(tmp_path / "turned.png").size
        == tuple(read_image(tmp_path / "turned.png").shape[1:])
        == (6, 4)
    )
    text = PngInfo()
    text.add_text("Software", "a program")
    Image.fromarray(PIXELS).save(tmp_path / "x.png", pnginfo=text)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", None)  # its pixels are not needed
    assert read_header(tmp_path / "x.png").size == (4, 6)


@pytest.mark.parametrize("kind", [2, 6])
def test_16_bit_colours_are_refused(tmp_path, kind):
    deep = RANDOM.integers(0, 65536, (4, 5, {2: 3, 6: 4}[kind]))
    for path in (png(tmp_path / "x.png", deep, 16, kind), tmp_path / "x.tif"):
        if path.suffix == ".tif":
            tifffile.imwrite(path, deep.astype(np.uint16), photometric="rgb")
        with pytest.raises(
            ValueError, match=rf"8 bits a channel, got mode RGBA? with 16 bits: .*{path.name}"
        ):
            read_image(path)
        assert read_header(path).depth == 16


def test_channels_that_would_be_lost_are_refused(tmp_path):
    six = np.zeros((8, 9, 6), np.uint8)
    tifffile.imwrite(
        tmp_path / "x.tif", six, photometric="rgb", planarconfig="contig", extrasamples=(0, 0, 0)
    )
    with pytest.raises(ValueError, match=r"1, 3 or 4 channels, got 6: .*x\.tif"):
        read_image(tmp_path / "x.tif")


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_ids_of_few_bits_are_not_stretched(tmp_path, depth):
    ids = RANDOM.integers(0, 2**depth, (5, 7))
    path = png(tmp_path / "x.png", ids, depth, 0)
    assert np.array_equal(read_label(path).numpy(), ids)


@pytest.mark.parametrize("depth", [1, 4, 8])
def test_ids_stored_as_white_is_zero(tmp_path, depth):
    # TIFF may count from white; a viewer turns that round, but an id is what is stored
    ids = RANDOM.integers(0, 2**depth, (8, 8)).astype(np.uint8)
    path = tmp_path / "x.tif"
    rows = np.packbits(np.unpackbits(ids[:, :, None], axis=2)[:, :, 8 - depth :].reshape(8, -1), axis=1)
    tags = {256: 8, 257: 8, 258: depth, 259: 1, 262: 0, 273: 134, 277: 1, 278: 8, 279: rows.size}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0)
    path.write_bytes(head + b"\0" * (134 - len(head)) + rows.tobytes())
    assert np.array_equal(read_ids(path), ids)


def test_palettes_of_few_bits_are_indices(tmp_path):
    ids = RANDOM.integers(0, 4, (5, 7), dtype=np.uint8)
    label = Image.fromarray(ids).copy()
    palette = Image.new("P", label.size)
    palette.putdata(ids.flatten().tolist())
    palette.putpalette([9, 9, 9, 80, 0, 0, 0, 80, 0, 0, 0, 80])
    palette.save(tmp_path / "x.png", bits=2)
    assert np.array_equal(read_label(tmp_path / "x.png").numpy(), ids)
    assert read_colours(tmp_path / "x.png")[ids == 1].tolist() == [[80, 0, 0]] * int((ids == 1).sum())


def test_wide_ids(tmp_path):
    ids = RANDOM.integers(0, 65536, (4, 5)).astype(np.uint16)
    Image.fromarray(ids).save(tmp_path / "x.png")
    assert np.array_equal(read_ids(tmp_path / "x.png"), ids)
    with pytest.raises(ValueError, match=r"one 8-bit channel of class ids, got uint16: .*x\.png"):
        read_label(tmp_path / "x.png")


@pytest.mark.parametrize(("name", "options"), [("x.jpg", {}), ("x.png", {"format": "JPEG"}), ("x.webp", {})])
def test_labels_compressed_with_loss_are_refused(tmp_path, name, options):
    Image.fromarray(PIXELS[:, :, 0]).save(tmp_path / name, **options)
    with pytest.raises(ValueError, match=rf"label without loss, as PNG, got (JPEG|WEBP), whose .*{name}"):
        read_label(tmp_path / name)
    assert read_header(tmp_path / name).lossy


@pytest.mark.parametrize("ending", ["png", "webp", "tif"])
def test_several_pictures_in_a_file_are_refused(tmp_path, ending):
    frames = [Image.fromarray(PIXELS), Image.fromarray(PIXELS[::-1].copy())]
    path = tmp_path / f"x.{ending}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match=rf"one picture in a file, got 2: .*x\.{ending}"):
        read_image(path)


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "bmp", "tif", "ppm"])
@pytest.mark.parametrize("damage", ["cut", "short", "empty", "text"])
def test_the_error_of_a_broken_file_names_it(tmp_path, ending, damage):
    path = tmp_path / f"x.{ending}"
    Image.fromarray(RANDOM.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    good = path.read_bytes()
    bad = {"cut": good[: len(good) // 2], "short": good[:-60], "empty": b"", "text": b"<html>not found"}
    path.write_bytes(bad[damage])
    for read in (read_image, read_header):
        with pytest.raises(ValueError, match=rf"cannot read the image .*x\.{ending}"):
            read(path)


@pytest.mark.parametrize(("name", "options"), WHOLE)
def test_a_whole_file_is_not_decoded_for_its_header(tmp_path, monkeypatch, name, options):
    Image.fromarray(PIXELS).save(tmp_path / name, **options)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)  # a call of it fails
    assert read_header(tmp_path / name).size == (4, 6)


def test_a_missing_file_stays_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"x\.png"):
        read_image(tmp_path / "x.png")
