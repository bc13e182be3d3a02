"""The plan of a street: what lies where across it and along it.

From the middle outwards a street has lanes, sometimes a strip of parked cars, a kerb, a
sidewalk, sometimes grass, and then houses or gardens.
"""

from dataclasses import dataclass

from revseg.data.synthetic.city import City
from revseg.data.synthetic.dice import Dice


@dataclass(frozen=True)
class Side:
    """One side of the street: -1 is left. All places are metres from the middle of our lane."""

    sign: int
    kerb: float
    parking: bool
    walk: float  # where the sidewalk ends
    front: float  # where the houses begin
    trees: bool

    def at(self, distance: float) -> float:
        return self.sign * distance


@dataclass(frozen=True)
class Street:
    """The street: its sides, the lanes to the left of ours, and where it ends."""

    sides: tuple[Side, Side]
    lane: float
    lanes_left: int
    end: float
    crossing: float | None  # the distance of a cross street
    tram: bool


def planned_street(dice: Dice, city: City) -> Street:
    """A street by chance, for a city."""
    lane = dice.uniform(3.0, 3.7)
    lanes_left = dice.choice((1, 1, 1, 2))
    sides = []
    for sign in (-1, 1):
        parking = dice.chance(0.6)
        edge = lane * (0.5 + (lanes_left if sign < 0 else 0)) + 0.3
        kerb = edge + (2.2 if parking else 0.0)
        walk = kerb + dice.uniform(1.6, 4.2)
        front = walk + (dice.uniform(1.5, 7.0) if dice.chance(0.4) else 0.0)
        sides.append(Side(sign, kerb, parking, walk, front, dice.chance(city.greenery)))
    crossing = dice.uniform(12, 55) if dice.chance(0.55) else None
    tram = dice.chance(0.3)
    return Street((sides[0], sides[1]), lane, lanes_left, dice.uniform(70, 180), crossing, tram)
