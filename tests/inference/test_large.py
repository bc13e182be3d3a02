"""An image of 10,000 x 10,000 by windows: the whole command, in a process of its own, by what it has in memory at once.

Counted is resident memory beyond what there is after a small image, so that libraries, weights and compiled loops are no
part of it. Everything in the process counts: tensors, arrays, tiles, and what decoders and encoders hold.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from revseg.inference.tiff import write_rows

SIDE, STRIP = 10_000, 100  # pixels, of a side and rows written at once
WINDOW = 1024  # what `revseg predict` takes for large files
RUN = """
import sys
from pathlib import Path
import torch
from revseg.cli import main
from revseg.inference import tiff
from revseg.inference.folded import folded
from revseg.inference.trained import load

small, large, out = sys.argv[1:]

def resident(name):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith(name)) * 1024

def predict(path):
    assert main(["predict", "vnet-camvid", path, "--out", out, "--write", "overlay", "--device", "cpu", "--threads", "1"]) == 0

def highest(run):
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest that there was
    run()
    return resident("VmHWM") - before

model = load("vnet-camvid")
model.network = folded(model.network)
window = torch.randint(0, 256, (1, 3, WINDOW, WINDOW), dtype=torch.uint8)
threshold, tiff.LARGE = tiff.LARGE, 1
predict(small)  # loads and compiles what is loaded and compiled once
tiff.LARGE = threshold
with torch.no_grad():
    print(highest(lambda: model.scores(window)), highest(lambda: predict(large)))
""".replace("WINDOW", str(WINDOW))
PLACE = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 16),  # what is freed is given back, and does not stay resident
    "MALLOC_TRIM_THRESHOLD_": str(1 << 16),
}


def write(path, height, width):
    """A picture written strip by strip; every strip is a shade of the same noise."""
    noise = np.random.default_rng(0).integers(0, 64, (STRIP, width, 3), dtype=np.uint8)
    strips = (torch.from_numpy(noise[: height - top] + top % 192) for top in range(0, height, STRIP))
    write_rows(path, strips, height, width)


@pytest.mark.slow  # some minutes
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="resident memory is read as Linux says it"
)
def test_a_large_image_takes_at_most_twice_what_one_window_takes(tmp_path):
    write(tmp_path / "small.tif", WINDOW, WINDOW)
    write(tmp_path / "large.tif", SIDE, SIDE)
    command = [
        sys.executable,
        "-c",
        RUN,
        *(str(tmp_path / name) for name in ("small.tif", "large.tif", "out")),
    ]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, cwd=root, env=os.environ | PLACE, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, whole = map(int, done.stdout.splitlines()[-1].split())
    with tifffile.TiffFile(tmp_path / "out" / "overlay" / "large.tif") as file:
        assert file.pages[0].shape == (SIDE, SIDE, 3)
    assert whole <= 2 * one, f"{whole / 2**20:.1f} MiB against {one / 2**20:.1f} of one window"
