"""The colours and habits of a city, which its streets share."""

from dataclasses import dataclass

from revseg.data.synthetic.dice import Colour, Dice

PLASTER: tuple[Colour, ...] = (
    (176, 160, 132), (150, 144, 136), (190, 178, 160), (142, 96, 78), (120, 122, 128),
    (166, 134, 108), (104, 92, 84), (188, 168, 118), (132, 142, 148), (160, 112, 96),
)  # fmt: skip
STONE: tuple[Colour, ...] = ((124, 122, 118), (136, 128, 120), (112, 114, 118), (146, 142, 134))
LEAVES: tuple[Colour, ...] = ((70, 88, 46), (58, 80, 52), (86, 92, 42), (94, 86, 44), (52, 70, 40))
GRASS: tuple[Colour, ...] = ((108, 122, 62), (126, 124, 72), (92, 112, 66), (132, 120, 84))
PAINTS: tuple[Colour, ...] = (
    (40, 42, 46), (172, 174, 176), (226, 226, 222), (92, 96, 102), (150, 32, 34), (34, 56, 112),
    (196, 182, 150), (216, 170, 40), (36, 94, 74), (110, 82, 60),
)  # fmt: skip
SKIES: tuple[tuple[Colour, Colour], ...] = (  # at the top and at the horizon
    ((92, 138, 200), (190, 208, 224)),
    ((176, 182, 190), (214, 216, 218)),
    ((124, 156, 198), (224, 218, 204)),
    ((206, 208, 208), (230, 228, 224)),
    ((112, 128, 148), (172, 178, 184)),
)


@dataclass(frozen=True)
class City:
    """What the streets of a city have in common.

    Attributes:
        facades: The colours of its houses.
        roofs: The colours of their roofs.
        asphalt: The road.
        slabs: The sidewalk.
        marking: The lines on the road.
        leaves: Trees and bushes.
        grass: Open ground.
        walls: Garden walls.
        fences: Railings.
        paints: The vehicles.
        sky: Its colour at the top and at the horizon.
        visibility: The distance in metres at which things are half hidden by haze.
        greenery: How likely trees are along a street.
    """

    facades: tuple[Colour, ...]
    roofs: tuple[Colour, ...]
    asphalt: Colour
    slabs: Colour
    marking: Colour
    leaves: tuple[Colour, ...]
    grass: Colour
    walls: tuple[Colour, ...]
    fences: tuple[Colour, ...]
    paints: tuple[Colour, ...]
    sky: tuple[Colour, Colour]
    visibility: float
    greenery: float


def found_city(dice: Dice) -> City:
    """A city by chance."""
    top, bottom = dice.choice(SKIES)
    return City(
        facades=tuple(dice.tint(dice.choice(PLASTER), 26) for _ in range(5)),
        roofs=tuple(
            dice.tint(dice.choice(((122, 66, 52), (70, 68, 72), (96, 84, 78))), 18) for _ in range(3)
        ),
        asphalt=dice.tint(dice.choice(((92, 92, 96), (110, 106, 104), (78, 80, 86), (126, 124, 122))), 14),
        slabs=dice.tint(dice.choice(STONE), 26),
        marking=dice.tint(dice.choice(((216, 216, 212), (216, 216, 212), (206, 180, 90))), 12),
        leaves=tuple(dice.tint(dice.choice(LEAVES), 14) for _ in range(3)),
        grass=dice.tint(dice.choice(GRASS), 16),
        walls=tuple(dice.tint(dice.choice((*STONE, *PLASTER)), 22) for _ in range(3)),
        fences=tuple(dice.tint(dice.choice((*STONE, (54, 60, 56), (104, 82, 64))), 20) for _ in range(2)),
        paints=tuple(dice.tint(dice.choice(PAINTS), 16) for _ in range(6)),
        sky=(dice.tint(top, 14), dice.tint(bottom, 10)),
        visibility=dice.uniform(260, 1100),
        greenery=dice.uniform(0.35, 0.95),
    )
