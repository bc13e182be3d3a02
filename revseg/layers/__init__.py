"""Ordinary layers that keep less than PyTorch keeps: run again as a whole, or one raw map a convolution."""
