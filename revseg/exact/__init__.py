"""Inversion to the bit. `modes` says how, by a `grid` or by a `residue`, and under which `conditions`."""
