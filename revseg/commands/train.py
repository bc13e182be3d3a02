"""`revseg train`: a run of training from the command line."""

from revseg.training.run import train

__all__ = ["train"]
