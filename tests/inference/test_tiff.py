"""Large TIFF files by rows: what is read is what is there, and no file is ever in memory as a whole."""

import tracemalloc

import numpy as np
import pytest
import tifffile
import torch

from revseg.commands.predict import predict_large
from revseg.inference import tiff, windows
from revseg.inference.folded import folded
from revseg.inference.tiff import TiffRows, is_large_tiff, write_rows
from revseg.inference.trained import load
from revseg.inference.windows import Windows
from revseg.memory import peak_bytes

LAYOUTS = {
    "tiles": {"tile": (64, 48), "compression": "zlib"},
    "strips": {"rowsperstrip": 7, "compression": "zlib"},
    "as it is": {"rowsperstrip": 7},
    "one strip": {"rowsperstrip": 201, "compression": "zlib", "predictor": True},
}


def picture(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_any_rows_of_any_layout(layout, channels, tmp_path):
    pixels = picture(201, 133, channels) if channels > 1 else picture(201, 133)
    photometric = "rgb" if channels > 1 else "minisblack"
    tifffile.imwrite(tmp_path / "x.tif", pixels, photometric=photometric, **LAYOUTS[layout])
    rows = TiffRows(tmp_path / "x.tif")
    assert (rows.height, rows.width) == (201, 133)
    expected = pixels[..., :3] if channels > 1 else np.stack([pixels] * 3, -1)
    for down in [(0, 1), (0, 201), (63, 65), (100, 201), (200, 201), (5, 90)]:
        for across in [(0, 133), (40, 90), (132, 133)]:
            found = rows.read(down, across).permute(1, 2, 0).numpy()
            assert np.array_equal(found, expected[slice(*down), slice(*across)])


@pytest.mark.parametrize("depth", [1, 100, 300, 1000])
def test_strips_of_any_height_are_written(depth, tmp_path):
    pixels = torch.from_numpy(picture(601, 300, 3))
    for x, name in ((pixels, "rgb.tif"), (pixels[..., 0], "grey.tif")):
        write_rows(tmp_path / name, iter(torch.split(x, depth)), 601, 300)
        assert np.array_equal(tifffile.imread(tmp_path / name), x.numpy())


def test_a_file_is_large_by_its_header(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "x.tif", picture(20, 30))
    assert not is_large_tiff(tmp_path / "x.tif")
    monkeypatch.setattr(tiff, "LARGE", 600)
    assert is_large_tiff(tmp_path / "x.tif")
    assert not is_large_tiff(tmp_path / "x.png")


def test_what_cannot_be_read_is_named(tmp_path):
    tifffile.imwrite(tmp_path / "wide.tif", picture(20, 30).astype(np.uint16))
    with pytest.raises(ValueError, match=r"expected 8 bits a channel.*wide\.tif"):
        TiffRows(tmp_path / "wide.tif")
    tifffile.imwrite(tmp_path / "cut.tif", picture(200, 300), compression="zlib", rowsperstrip=10)
    content = (tmp_path / "cut.tif").read_bytes()
    rows = TiffRows(tmp_path / "cut.tif")
    place = rows.page.dataoffsets[5]
    (tmp_path / "cut.tif").write_bytes(content[:place] + b"\0" * 40 + content[place + 40 :])
    rows = TiffRows(tmp_path / "cut.tif")
    rows.read((0, 40), (0, 300))
    with pytest.raises(ValueError, match=r"cannot read rows 50 and on of .*cut\.tif"):
        rows.read((45, 55), (0, 300))


@pytest.mark.slow  # half a minute
def test_prediction_takes_at_most_twice_what_the_network_takes_of_one_window(tmp_path, monkeypatch):
    """10,000 x 10,000 by windows of 1024, half as large: rows as high as a window are never whole in memory; numpy's arrays count."""
    for module, name, factor in ((tiff, "TILE", 2), (tiff, "KEPT", 4), (windows, "STRIP", 4)):
        monkeypatch.setattr(module, name, getattr(module, name) // factor)
    size, wide = 512, 5000
    pixels = picture(size + 64, wide, 3) // 64 * 64
    tifffile.imwrite(tmp_path / "x.tif", pixels, photometric="rgb", tile=(64, 64), compression="zlib")
    model = load("vnet-camvid").eval()
    model.network = folded(model.network)
    window = torch.zeros(1, 3, size, size, dtype=torch.uint8)

    def one():
        model.scores(window)

    def whole(of=model):
        rows = TiffRows(tmp_path / "x.tif")
        predict_large(of, rows, "colour", tmp_path / "out.tif", Windows(size, size, 0.25), None)

    with torch.no_grad():
        network = peak_bytes(one)
        found = peak_bytes(whole)
        stride = model.stride
        model.scores = lambda x, augmentation=None: torch.zeros(
            1, 11, x.shape[2] // stride, x.shape[3] // stride
        )
        tracemalloc.start()
        whole()
        arrays = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert tifffile.imread(tmp_path / "out.tif").shape == pixels.shape
    assert found + arrays <= 2 * network
