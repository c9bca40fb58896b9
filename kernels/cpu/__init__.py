"""Linears of 4 and 8 bits by torch's and oneDNN's kernels of a CPU."""
