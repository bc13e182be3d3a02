"""Transforms move image and label together: checked on images whose pixels say what their label is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from revseg.data import Compose, PhotometricJitter, RandomHorizontalFlip, RandomScaleCrop, Resize


def pair(height, width):
    """A label with every value of [0, 200) about equally, and an image that shows it in each channel."""
    label = (torch.arange(height * width) % 200).to(torch.uint8).view(height, width)
    return label.expand(3, -1, -1).clone(), label


sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))


@settings(deadline=None, max_examples=40)
@given(sizes, sizes)
def test_resize_keeps_bytes_and_labels(old, new):
    image, label = pair(*old)
    resized, relabelled = Resize(new)(image, label)
    assert resized.shape == (3, *new)
    assert relabelled.shape == new
    assert resized.dtype == relabelled.dtype == torch.uint8
    assert set(relabelled.flatten().tolist()) <= set(label.flatten().tolist())
    if old == new:
        assert torch.equal(resized, image)


def test_resize_takes_centres_and_averages():
    label = torch.tensor([[0, 1, 2, 3, 4, 5]], dtype=torch.uint8).repeat(6, 1)
    assert Resize((2, 2))(label.expand(3, -1, -1), label)[1].tolist() == [[1, 4], [1, 4]]
    stripes = torch.tensor([0, 100] * 8, dtype=torch.uint8).expand(3, 16, 16)
    smooth, _ = Resize((4, 4))(stripes, stripes[0])
    assert int(smooth.min()) > 35  # without antialiasing the stripes would come back as 0 or 100
    assert int(smooth.max()) < 65


def test_flip():
    image, label = pair(4, 7)
    flipped, relabelled = RandomHorizontalFlip(1.0)(image, label)
    assert torch.equal(flipped, image.flip(2))
    assert torch.equal(relabelled, label.flip(1))
    kept, _ = RandomHorizontalFlip(0.0)(image, label)
    assert torch.equal(kept, image)
    torch.manual_seed(0)
    flips = sum(not torch.equal(RandomHorizontalFlip()(image, label)[0], image) for _ in range(400))
    assert 150 < flips < 250


@settings(deadline=None, max_examples=60)
@given(sizes, sizes, st.integers(0, 1000))
def test_crop_without_scaling_is_a_window_of_both(old, window, seed):
    torch.manual_seed(seed)
    image, label = pair(*old)
    cropped, relabelled = RandomScaleCrop(window, scales=(1.0, 1.0))(image, label)
    assert cropped.shape == (3, *window)
    assert relabelled.shape == window
    inside = relabelled != 255
    assert int(inside.sum()) == min(old[0], window[0]) * min(old[1], window[1])
    for channel in cropped:
        assert torch.equal(channel[inside], relabelled[inside])
    assert not cropped[:, ~inside].any()


def test_crops_reach_every_corner():
    torch.manual_seed(0)
    image, label = pair(4, 5)
    crop = RandomScaleCrop((3, 3), scales=(1.0, 1.0))
    starts = {int(crop(image, label)[1][0, 0]) for _ in range(300)}
    assert starts == {0, 1, 2, 5, 6, 7}


def test_scales_are_those_asked_for():
    torch.manual_seed(0)
    image, label = pair(20, 20)
    kept = [
        int((RandomScaleCrop((60, 60), (0.5, 2.0))(image, label)[1] != 255).sum()) ** 0.5 for _ in range(200)
    ]
    assert 10 <= min(kept) < 11.5
    assert 37 < max(kept) <= 40


def test_jitter_is_a_table_of_levels():
    torch.manual_seed(0)
    image = torch.arange(256, dtype=torch.uint8).expand(3, 2, 256).contiguous()
    label = image[0]
    tables = []
    for _ in range(20):
        jittered, kept = PhotometricJitter()(image, label)
        assert torch.equal(kept, label)
        assert jittered.dtype == torch.uint8
        assert torch.equal(jittered[:, 0], jittered[:, 1])
        assert bool((jittered[:, 0].int().diff() >= 0).all())  # brighter stays brighter
        tables.append(tuple(jittered[0, 0].tolist()))
    assert len(set(tables)) == 20
    same, _ = PhotometricJitter(0, 0, 0, 0)(image, label)
    assert torch.equal(same, image)


def test_compose_and_seeds():
    image, label = pair(30, 40)
    both = Compose([RandomHorizontalFlip(), RandomScaleCrop((16, 24)), PhotometricJitter()])
    torch.manual_seed(3)
    first = both(image, label)
    torch.manual_seed(3)
    again = both(image, label)
    other = both(image, label)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Resize((0, 4)), r"got \(0, 4\)"),
        (lambda: RandomHorizontalFlip(1.5), r"\[0, 1\], got 1\.5"),
        (lambda: RandomScaleCrop((4, 4), (2.0, 1.0)), r"got \(2\.0, 1\.0\)"),
        (lambda: RandomScaleCrop((4, -4)), r"got \(4, -4\)"),
        (lambda: PhotometricJitter(gamma=1.0), r"gamma change in \[0, 1\), got 1\.0"),
        (lambda: PhotometricJitter(brightness=-1), "got -1"),
    ],
)
def test_settings_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()
