"""What computes steps: the runners of CPU and GPU, and the fake one."""
