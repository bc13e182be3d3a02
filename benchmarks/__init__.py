"""Measurements of revseg: one question a script, the answers under `benchmarks/results`."""
