"""What each rank notes for rank 0 in its words of the ring: their numbers."""

from __future__ import annotations

DONE, TOTAL = 0, 1  # as the progress of loading
STAGED, STAGED_OF = 2, 3  # as "staged_bytes" and "staged_total" of `Runner.memory_stats`
