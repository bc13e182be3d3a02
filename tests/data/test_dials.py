"""The dials of generated scenes do what their names say, and nothing else."""

import hashlib
from functools import cache

import pytest
import torch

from revseg.data import CITYSCAPES, create_dataset
from revseg.data.transforms import IGNORE

SIZE = (256, 512)
ID = {name: i for i, name in enumerate(CITYSCAPES.names)}
TINY = ("pole", "fence", "traffic light", "traffic sign", "rider", "motorcycle", "bicycle", "train")


def scenes(size=SIZE, samples=5, **dials):
    return create_dataset("synthetic", "train", size=size, samples=samples, **dials)


@cache
def labels(**dials):
    return [label for _, label in scenes(**dials)]


def shares(**dials):
    counts = sum(torch.bincount(label.flatten().int(), minlength=256) for label in labels(**dials))[:19]
    return dict(zip(CITYSCAPES.names, (counts / counts.sum()).tolist(), strict=True))


def after_shrinking(label, factor, c):
    """IoU of a class with itself after nearest down- and up-sampling: what any network could reach there."""
    small = label[factor // 2 :: factor, factor // 2 :: factor]
    back = small.repeat_interleave(factor, 0).repeat_interleave(factor, 1)[: label.shape[0], : label.shape[1]]
    return int(((back == c) & (label == c)).sum()), int(((back == c) | (label == c)).sum())


def ceiling(name, factor=4, **dials):
    pairs = [after_shrinking(label, factor, ID[name]) for label in labels(**dials)]
    return sum(both for both, _ in pairs) / max(1, sum(either for _, either in pairs))


def test_off_there_is_nothing_small():
    control = shares(thin=0)
    assert all(control[name] == 0 for name in TINY)
    assert control["road"] > 0.2
    large = [name for name, share in control.items() if share > 0.03]
    assert len(large) >= 5
    assert all(ceiling(name, thin=0) > 0.9 for name in ("road", "building", "car"))


def test_thin():
    on = shares(thin=1)
    assert on["pole"] > 0.005
    assert on["traffic sign"] == 0
    assert ceiling("pole", thin=1) < 0.75
    assert shares(thin=0.3)["pole"] < on["pole"]


def test_small():
    on = shares(small=1)
    assert on["traffic sign"] > 3e-4
    assert on["traffic light"] > 3e-4
    assert on["pole"] == 0
    assert ceiling("traffic light", small=1) < 0.8


def test_context():
    on = scenes(context=1, samples=8)
    right = []
    for index, (image, label) in enumerate(on):
        top, left, bottom, right_edge = on.cue(index)
        assert 0 <= left < right_edge <= SIZE[1]
        assert SIZE[0] // 2 < top < bottom <= SIZE[0]
        arrow = image[:, top:bottom, left:right_edge].float().mean(0)
        bright = (arrow > 0.8 * arrow.max()).float()
        columns = torch.arange(bright.shape[1])
        # the head of an arrow is its heavier end
        points_right = float((bright.sum(0) * columns).sum() / bright.sum()) > (bright.shape[1] - 1) / 2
        place = {name: (label == ID[name]).nonzero()[:, 1].float().mean() for name in ("sidewalk", "terrain")}
        assert points_right == bool(place["sidewalk"] > place["terrain"])
        right.append(points_right)
    assert 1 <= sum(right) <= 7
    assert scenes(thin=1).cue(0) is None


def test_ground_of_a_context_scene_looks_alike():
    image, label = scenes(context=1)[1]
    means = [image[:, label == ID[name]].float().mean(1) for name in ("road", "sidewalk", "terrain")]
    assert max(float((a - b).abs().max()) for a in means for b in means) < 25
    control, label = scenes(thin=0)[1]
    apart = [control[:, label == ID[name]].float().mean(1) for name in ("road", "sidewalk")]
    assert float((apart[0] - apart[1]).abs().max()) > 30


def test_the_street_is_the_same_whatever_the_dials_say():
    for dials in ({"thin": 1}, {"small": 1}):
        for ours, theirs in zip(labels(thin=0), labels(**dials), strict=True):
            changed = ours != theirs
            assert 0 < float(changed.float().mean()) < 0.2
            added = set(theirs[changed].tolist()) - {ID["building"]}
            assert added <= {ID[name] for name in ("pole", "fence", "traffic sign", "traffic light")}
            assert torch.equal(ours == IGNORE, theirs == IGNORE)


def test_scenes_with_dials_do_not_change():
    image, label = scenes((96, 160), thin=1, small=1, context=1)[3]
    digest = hashlib.sha256(image.numpy().tobytes() + label.numpy().tobytes()).hexdigest()
    assert digest[:16] == "1f8b6101b476443d"


@pytest.mark.parametrize("dial", ["thin", "small", "context"])
def test_dials_are_checked(dial):
    with pytest.raises(ValueError, match=rf"the dial {dial} in \[0, 1\], got 1\.5"):
        scenes(**{dial: 1.5})
    with pytest.raises(ValueError, match=rf"the dial {dial} in \[0, 1\], got 'much'"):
        scenes(**{dial: "much"})
