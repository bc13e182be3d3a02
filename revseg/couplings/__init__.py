"""The couplings, by name: contract tests, models and benchmarks go through this table."""

from revseg.couplings.additive import AdditiveCoupling as AdditiveCoupling
from revseg.couplings.affine import AffineCoupling as AffineCoupling
from revseg.couplings.base import Coupling as Coupling
from revseg.couplings.one_sided import OneSidedCoupling as OneSidedCoupling

COUPLINGS: dict[str, type[Coupling]] = {
    "additive": AdditiveCoupling,
    "affine": AffineCoupling,
    "one_sided": OneSidedCoupling,
}
