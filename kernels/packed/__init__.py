"""Matmuls with weights of 4 or 8 bits and inputs of 16 on a GPU: how a weight is packed, and what reads it."""
