"""The activation-free backward engine. It knows no layer and no coupling by name.

To be read in this order: `steps`, what a network of two streams is made of; `chain`, the autograd functions of a chain of
steps; `update`, one step in one pass; `function`, how its function runs, runs again and is differentiated.
`replay` runs a function again as it ran, with `context`, `buffers` and `memo`, what surrounded it, what it changed and what its
second run takes from the first; `reach` finds the modules that it uses. `gradients` finds the gradients,
`drift` asks whether the inversion arrived where the forward pass began, `exact` makes it arrive there to the bit,
by a `grid` or a `residue`, under the same `conditions`. `memory_format`, `tracing` and `tensors` know how
streams lie in memory, who watches, and what a tensor is made of.
"""
