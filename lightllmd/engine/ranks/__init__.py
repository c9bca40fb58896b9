"""The ranks of a tensor-parallel group: rank 0 leads, and the others do what it does, each on a device of its own."""
