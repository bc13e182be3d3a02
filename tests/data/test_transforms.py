"""Transforms move image and label together: checked on images whose pixels say what their label is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from revseg.data import (
    Compose,
    PhotometricJitter,
    RandomHorizontalFlip,
    RandomScaleCrop,
    Resize,
    StrongPhotometric,
)


def pair(height, width):
    """A label with every value of [0, 200) about equally, and an image that shows it in each channel."""
    label = (torch.arange(height * width) % 200).to(torch.uint8).view(height, width)
    return label.expand(3, -1, -1).clone(), label


def drawing(seed=0):
    return torch.Generator().manual_seed(seed)


sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))


@settings(deadline=None, max_examples=40)
@given(sizes, sizes)
def test_resize_keeps_bytes_and_labels(old, new):
    image, label = pair(*old)
    resized, relabelled = Resize(new)(image, label, drawing())
    assert resized.shape == (3, *new)
    assert relabelled.shape == new
    assert resized.dtype == relabelled.dtype == torch.uint8
    assert set(relabelled.flatten().tolist()) <= set(label.flatten().tolist())
    if old == new:
        assert torch.equal(resized, image)


def test_resize_takes_centres_and_averages():
    label = torch.tensor([[0, 1, 2, 3, 4, 5]], dtype=torch.uint8).repeat(6, 1)
    assert Resize((2, 2))(label.expand(3, -1, -1), label, drawing())[1].tolist() == [[1, 4], [1, 4]]
    stripes = torch.tensor([0, 100] * 8, dtype=torch.uint8).expand(3, 16, 16)
    smooth, _ = Resize((4, 4))(stripes, stripes[0], drawing())
    assert int(smooth.min()) > 35  # without antialiasing the stripes would come back as 0 or 100
    assert int(smooth.max()) < 65


def test_flip():
    image, label = pair(4, 7)
    flipped, relabelled = RandomHorizontalFlip(1.0)(image, label, drawing())
    assert torch.equal(flipped, image.flip(2))
    assert torch.equal(relabelled, label.flip(1))
    kept, _ = RandomHorizontalFlip(0.0)(image, label, drawing())
    assert torch.equal(kept, image)
    drawn = drawing()
    flips = sum(not torch.equal(RandomHorizontalFlip()(image, label, drawn)[0], image) for _ in range(400))
    assert 150 < flips < 250


@settings(deadline=None, max_examples=60)
@given(sizes, sizes, st.integers(0, 1000))
def test_crop_without_scaling_is_a_window_of_both(old, window, seed):
    image, label = pair(*old)
    cropped, relabelled = RandomScaleCrop(window, scales=(1.0, 1.0))(image, label, drawing(seed))
    assert cropped.shape == (3, *window)
    assert relabelled.shape == window
    inside = relabelled != 255
    assert int(inside.sum()) == min(old[0], window[0]) * min(old[1], window[1])
    for channel in cropped:
        assert torch.equal(channel[inside], relabelled[inside])
    assert not cropped[:, ~inside].any()


def test_crops_reach_every_corner():
    drawn = drawing()
    image, label = pair(4, 5)
    crop = RandomScaleCrop((3, 3), scales=(1.0, 1.0))
    starts = {int(crop(image, label, drawn)[1][0, 0]) for _ in range(300)}
    assert starts == {0, 1, 2, 5, 6, 7}


def test_scales_are_those_asked_for():
    drawn = drawing()
    image, label = pair(20, 20)
    kept = [
        int((RandomScaleCrop((60, 60), (0.5, 2.0))(image, label, drawn)[1] != 255).sum()) ** 0.5
        for _ in range(200)
    ]
    assert 10 <= min(kept) < 11.5
    assert 37 < max(kept) <= 40


def test_jitter_is_a_table_of_levels():
    drawn = drawing()
    image = torch.arange(256, dtype=torch.uint8).expand(3, 2, 256).contiguous()
    label = image[0]
    tables = []
    for _ in range(20):
        jittered, kept = PhotometricJitter()(image, label, drawn)
        assert torch.equal(kept, label)
        assert jittered.dtype == torch.uint8
        assert torch.equal(jittered[:, 0], jittered[:, 1])
        assert bool((jittered[:, 0].int().diff() >= 0).all())  # brighter stays brighter
        tables.append(tuple(jittered[0, 0].tolist()))
    assert len(set(tables)) == 20
    same, _ = PhotometricJitter(0, 0, 0, 0)(image, label, drawn)
    assert torch.equal(same, image)


def test_windows_are_laid_around_rare_classes():
    label = torch.zeros(64, 96, dtype=torch.uint8)
    label[5, 80], label[60, 3] = 7, 9  # one pixel each
    image = label.expand(3, -1, -1)
    drawn = drawing()
    crop = RandomScaleCrop((16, 24), (1.0, 1.0), classes=(7, 9, 11), p=1.0)
    seen = [set(crop(image, label, drawn)[1].flatten().tolist()) for _ in range(60)]
    assert all(values & {7, 9} for values in seen)
    assert 10 < sum(7 in values for values in seen) < 50
    anywhere = RandomScaleCrop((16, 24), (1.0, 1.0), classes=(11,), p=1.0)(image, label, drawn)
    assert anywhere[1].shape == (16, 24)


def test_strong_changes_are_those_asked_for():
    image = torch.randint(60, 190, (3, 24, 32), dtype=torch.uint8, generator=drawing())
    label = image[0]
    still = dict.fromkeys(
        ("temperature", "saturation", "contrast", "gamma", "exposure", "noise", "blur", "hue"), 0.0
    )
    same, kept = StrongPhotometric(**still, p=1.0)(image, label, drawing())
    assert kept is label
    assert torch.equal(same, image)
    for name in still:
        strength = {**still, name: {"blur": 3.0, "hue": 0.2, "noise": 0.2}.get(name, 0.6)}
        changed = [StrongPhotometric(**strength, p=1.0)(image, label, drawing(seed))[0] for seed in range(4)]
        assert any(not torch.equal(each, image) for each in changed), name
        assert all(each.dtype == torch.uint8 and each.shape == image.shape for each in changed)
    assert torch.equal(StrongPhotometric(p=0.0)(image, label, drawing())[0], image)


def test_a_turn_of_the_hue_keeps_grey():
    grey = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    still = dict.fromkeys(("temperature", "contrast", "gamma", "exposure", "noise", "blur"), 0.0)
    turned, _ = StrongPhotometric(**still, hue=0.5, saturation=0.9, p=1.0)(grey, grey[0], drawing(1))
    assert int((turned.int() - grey.int()).abs().max()) <= 1


def test_bytes_do_not_depend_on_the_number_of_threads():
    image = torch.randint(0, 256, (3, 161, 207), dtype=torch.uint8, generator=drawing())
    label = image[0]
    both = Compose([RandomScaleCrop((150, 201), (1.1, 1.3)), StrongPhotometric(p=1.0)])
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            results.append([both(image, label, drawing(seed)) for seed in range(2)])
        finally:
            torch.set_num_threads(1)
    for other in results[1:]:
        for (a, b), (c, d) in zip(results[0], other, strict=True):
            assert torch.equal(a, c)
            assert torch.equal(b, d)


def test_compose_and_seeds():
    image, label = pair(30, 40)
    both = Compose([RandomHorizontalFlip(), RandomScaleCrop((16, 24)), PhotometricJitter()])
    before = torch.get_rng_state()
    first = both(image, label, drawing(3))
    again = both(image, label, drawing(3))
    other = both(image, label, drawing(4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Resize((0, 4)), r"got \(0, 4\)"),
        (lambda: RandomHorizontalFlip(1.5), r"\[0, 1\], got 1\.5"),
        (lambda: RandomScaleCrop((4, 4), (2.0, 1.0)), r"scales 0 < lowest <= highest, got \(2\.0, 1\.0\)"),
        (lambda: RandomScaleCrop((4, -4)), r"got \(4, -4\)"),
        (lambda: RandomScaleCrop((4, 4), classes=(255,)), r"classes in \[0, 255\), got \(255,\)"),
        (lambda: StrongPhotometric(hue=0.6), r"hue turn in \[0, 0\.5\], got 0\.6"),
        (lambda: StrongPhotometric(contrast=1), r"contrast change in \[0, 1\), got 1"),
        (lambda: StrongPhotometric(noise=-1), r"noise of at least 0, got -1"),
        (lambda: PhotometricJitter(gamma=1.0), r"gamma change in \[0, 1\), got 1\.0"),
        (lambda: PhotometricJitter(brightness=-1), "got -1"),
    ],
)
def test_settings_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()
