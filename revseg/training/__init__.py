"""The training program: settings, data and network, an epoch, and a run that can be continued.

    from revseg.training import TrainSettings, train

Names are loaded when first used: settings need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from revseg.training.config import read_settings as read_settings
    from revseg.training.run import train as train
    from revseg.training.settings import TrainSettings as TrainSettings

_HOME = {
    "TrainSettings": "revseg.training.settings",
    "read_settings": "revseg.training.config",
    "train": "revseg.training.run",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'revseg.training' has no attribute {name!r}")
