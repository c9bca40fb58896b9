"""Matmuls with weights and inputs of 8 bits on a GPU: how inputs are rounded, and the kernels for few and many rows."""
