"""Fixed lights: the same image changed in the same way each time."""

import pytest
import torch

from revseg.data.lights import LIGHTS, light_of

IMAGE = torch.randint(0, 256, (3, 24, 31), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("image", [IMAGE, torch.randn(3, 4, 5), torch.zeros(5, 4, 5, dtype=torch.uint8)])
def test_day_leaves_images_as_they_are(image):
    assert light_of("day")(image) is image


@pytest.mark.parametrize("image", [torch.randn(3, 4, 5), torch.zeros(5, 4, 5, dtype=torch.uint8)])
def test_other_images_have_no_other_light(image):
    with pytest.raises(
        ValueError, match=r"expected an image \[3, H, W\], uint8, to change its light, got \["
    ):
        light_of("dusk")(image)


@pytest.mark.parametrize("name", LIGHTS)
def test_a_light_is_the_same_each_time(name):
    before = IMAGE.clone()
    assert torch.equal(light_of(name)(IMAGE), light_of(name)(IMAGE))
    assert torch.equal(IMAGE, before)


def test_dusk_is_dark_and_warm_shade_dark_and_cold_glare_bright():
    def mean(name):
        return light_of(name)(IMAGE).float().mean((1, 2))

    day, dusk, shade, glare = map(mean, ("day", "dusk", "shade", "glare"))
    assert (dusk < 0.65 * day).all()
    assert (shade < 0.65 * day).all()
    assert dusk[0] > dusk[2]
    assert shade[0] < shade[2]
    assert (glare > day).all()


def test_levels_follow_from_the_formula():
    """2**stops * (1 + warmth) * level ** gamma, rounded."""
    value = torch.full((3, 1, 1), 128, dtype=torch.uint8)
    red = 0.5 * 1.2 * (128 / 255) ** 1.2 * 255
    assert light_of("dusk")(value)[0].item() == round(red)


def test_there_is_no_other_light():
    with pytest.raises(ValueError, match="unknown light 'night'; choose one of day, dusk"):
        light_of("night")
