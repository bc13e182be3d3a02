"""Run a function again as it ran: what the engine, `Recompute` and `Stack` have in common.

To be read in this order: `call`, one use of a function, and its second run; `context` and `buffers`, what surrounded it
and what it changed; `memo`, what its second run takes from the first; `reach`, the modules that it uses.
"""
