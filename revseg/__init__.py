"""Training segmentation networks whose activations do not fit on the GPU.

The names below are loaded when first used, so that `revseg --help` need not wait for torch.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from revseg.convert import ResidualChain as ResidualChain
    from revseg.convert import reversible as reversible
    from revseg.couplings import AdditiveCoupling as AdditiveCoupling
    from revseg.couplings import AffineCoupling as AffineCoupling
    from revseg.couplings import Coupling as Coupling
    from revseg.couplings import OneSidedCoupling as OneSidedCoupling
    from revseg.couplings.downsample import HaarDownsample as HaarDownsample
    from revseg.couplings.downsample import Squeeze as Squeeze
    from revseg.engine.drift import InversionError as InversionError
    from revseg.inference.trained import load as load
    from revseg.layers.recompute import Recompute as Recompute
    from revseg.layers.stack import Stack as Stack
    from revseg.memory.fit import fit as fit
    from revseg.models import create_model as create_model
    from revseg.models import list_models as list_models
    from revseg.replay.call import is_recomputing as is_recomputing
    from revseg.sequence import ReversibleSequence as ReversibleSequence

# A checkout whose symlink revseg/kernels arrived as a text file (Windows) finds ../kernels.
_here = Path(__file__).parent
if not (_here / "kernels").is_dir() and (_here.parent / "kernels").is_dir():
    __path__.append(str(_here.parent))

_HOME = {
    "AdditiveCoupling": "revseg.couplings",
    "AffineCoupling": "revseg.couplings",
    "Coupling": "revseg.couplings",
    "HaarDownsample": "revseg.couplings.downsample",
    "InversionError": "revseg.engine.drift",
    "OneSidedCoupling": "revseg.couplings",
    "Recompute": "revseg.layers.recompute",
    "ResidualChain": "revseg.convert",
    "ReversibleSequence": "revseg.sequence",
    "Squeeze": "revseg.couplings.downsample",
    "Stack": "revseg.layers.stack",
    "create_model": "revseg.models",
    "fit": "revseg.memory.fit",
    "is_recomputing": "revseg.replay.call",
    "list_models": "revseg.models",
    "load": "revseg.inference.trained",
    "reversible": "revseg.convert",
}

__all__ = list(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'revseg' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
