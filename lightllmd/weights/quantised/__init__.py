"""Checkpoints whose matrices are quantised already, each format a module: what its settings say (`read`), and which
tensors it stores a matrix in (a `Form`). `unpack` alone imports torch: it makes a `QuantisedMatrix` of them."""
