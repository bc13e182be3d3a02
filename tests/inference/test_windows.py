"""Windows cover an image, blend, and give the labels of the whole where scores are local."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from revseg.inference import windows
from revseg.inference.windows import TensorRows, Windows, _starts, predict_rows
from revseg.ops import upsample_argmax

STRIDE = 4


def local_scores(image):
    """Scores [1, 5, h, w], whole numbers, of which each depends on its own 4 x 4 pixels alone."""
    mixed = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    return torch.einsum("dc,nchw->ndhw", mixed, F.avg_pool2d(image.float(), STRIDE)).round()


def small_image(height, width):
    return torch.randint(
        0, 256, (3, height, width), generator=torch.Generator().manual_seed(2), dtype=torch.uint8
    )


def by_windows(image, cut):
    return torch.cat(list(predict_rows(local_scores, TensorRows(image), STRIDE, cut)))


@pytest.mark.parametrize("overlap", [0, 0.25, 0.9])
@pytest.mark.parametrize("size", [(16, 16), (12, 40), (100, 8), (64, 24), (1000, 1000)])
def test_labels_are_those_of_the_whole_image(size, overlap):
    image = small_image(64, 48)
    whole = upsample_argmax(local_scores(image[None]), (64, 48))[0]
    assert torch.equal(by_windows(image, Windows(*size, overlap)), whole)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 70), (37, 5), (33, 49)])
def test_sizes_that_are_no_multiples_of_the_stride(height, width):
    image = small_image(height, width)
    filled = F.pad(image[None].float(), (0, -width % STRIDE, 0, -height % STRIDE), mode="replicate")
    size = filled.shape[2:]
    whole = upsample_argmax(local_scores(filled), size)[0][:height, :width]
    assert torch.equal(by_windows(image, Windows(16, 16)), whole)


def test_windows_are_read_from_the_top_one_by_one():
    seen = []

    class Watched(TensorRows):
        def read(self, rows, columns):
            seen.append((rows, columns))
            return super().read(rows, columns)

    strips = list(predict_rows(local_scores, Watched(small_image(200, 30)), STRIDE, Windows(40, 16, 0.5)))
    assert sum(map(len, strips)) == 200
    assert seen == sorted(seen)
    assert all(rows[1] - rows[0] <= 40 and columns[1] - columns[0] <= 16 for rows, columns in seen)
    assert len(strips) > 5


def test_strips_of_wide_images_have_few_rows(monkeypatch):
    """Labels are made and written in strips of so many pixels, whatever the windows."""
    image = small_image(60, 48)
    whole = by_windows(image, Windows(40, 24))
    monkeypatch.setattr(windows, "STRIP", 2 * STRIDE * 48)
    strips = list(predict_rows(local_scores, TensorRows(image), STRIDE, Windows(40, 24)))
    assert torch.equal(torch.cat(strips), whole)
    assert max(map(len, strips)) <= 3 * STRIDE


def test_scores_that_disagree_are_blended_towards_the_nearer_window():
    values = iter([0.0, 1.0])

    def scores(window):  # the left window says class 0, the right one class 1
        right = next(values)
        maps = torch.tensor([1 - right, right]).view(1, 2, 1, 1)
        return maps.expand(1, 2, window.shape[2] // STRIDE, window.shape[3] // STRIDE)

    (labels,) = predict_rows(
        scores, TensorRows(small_image(4, 24 * STRIDE)), STRIDE, Windows(4, 16 * STRIDE, 0.5)
    )
    row = labels[0].tolist()
    assert row == sorted(row)
    assert row.index(1) == 12 * STRIDE


def test_scores_of_another_stride_are_an_error():
    with pytest.raises(ValueError, match="expected scores at stride 2, 8 x 8, got \\[4, 4\\]"):
        list(predict_rows(local_scores, TensorRows(small_image(16, 16)), 2, Windows(16, 16)))


@pytest.mark.parametrize("arguments", [(0, 5), (5, 5, 0.95), (5, 5, -0.1)])
def test_windows_that_cannot_be_are_refused(arguments):
    with pytest.raises(ValueError, match="expected"):
        Windows(*arguments)


@pytest.mark.parametrize(
    ("length", "window", "overlap"), [(10, 3, 0), (7, 7, 0.5), (100, 9, 0.9), (5, 2, 0.25)]
)
def test_windows_cover_an_axis(length, window, overlap):
    starts = _starts(length, window, overlap)
    assert starts[0][0] == 0
    assert starts[-1][1] == length
    assert all(after[0] <= before[1] for before, after in itertools.pairwise(starts))
