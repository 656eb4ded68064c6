"""Embedding tables of mixed widths in one storage: layout, lookup, kernels, packed rows, row optimisers, drop-in modules."""
