"""The activation-free backward engine. It knows no layer and no coupling by name.

To be read in this order: `steps`, what a network of two streams is made of; `chain`, the autograd functions of a chain of
steps; `update`, one step in one pass; `function`, how its function runs, runs again and is differentiated.
`gradients` finds the gradients, `drift` asks whether the inversion arrived where the forward pass began, `exactness` is
the door for ways to make it arrive there to the bit. `memory_format` and `tracing` know how streams lie in memory, and who
watches. What runs a function again as it ran is `revseg.replay`.
"""
