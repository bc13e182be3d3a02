"""Everything that only a GPU can say, by one command: `python -m benchmarks.gpu`."""
