"""Existing networks made reversible: `chain` says what becomes of a row of residual blocks, `search` which rows
there are, `network` puts the ones in the places of the others.
"""

from revseg.convert.chain import BlockCoupling as BlockCoupling
from revseg.convert.chain import ResidualChain as ResidualChain
from revseg.convert.network import reversible as reversible

__all__ = ["BlockCoupling", "ResidualChain", "reversible"]
