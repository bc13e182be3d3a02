"""Exact training by bands: a row of layers whose maps are never whole.

What is local can go through a network band by band, a band being some rows of some images. Batch norm in training
mode is not local, but all that it needs of a map are two sums, and its backward pass two more; the gradient of a
weight is a sum too. So a row of layers goes by bands in as many passes as it has norms, exactly. With instance norm each image
is a batch of its own, and goes through the whole row before the next one does.

In reading order: `window` (which rows of its input an output row follows from), `rows` (maps that exist in part),
`convolution` (a convolution of bands, and its gradients), `keeping` (which raw maps are kept when), `cut` (how maps are
cut), `walk` (raw maps made in order), `forward`, `backward`, `row` (both as the engine calls them), `module` (the wrapper
`ByBands`).
"""
