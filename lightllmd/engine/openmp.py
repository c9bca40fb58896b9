"""How torch's CPU threads wait for each other. Imports no torch: the setting must be there before torch is."""

from __future__ import annotations

import os

# Turns that an OpenMP thread spins at the end of a parallel region before it sleeps. libgomp's own default (300,000)
# spins for milliseconds, as if no other process used the cores. Median decode step of SmolLM2 in bf16, 2 threads on 2
# cores, almost alone: default 12 ms, 1000 14 ms, 0 20 ms; on the same cores while other work kept the load average
# between 5 and 9: default 470 ms, 10,000 99 ms, 1000 40 ms, 0 26 ms (one run each, the other work varied). The api
# worker alone is another process. libgomp takes 1000 itself when it has more threads than cores.
SPINS = "1000"


def settle() -> bool:
    """Before the first import of torch; leaves alone what the environment says. True: it was changed."""
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        return False
    os.environ["GOMP_SPINCOUNT"] = SPINS
    return True
