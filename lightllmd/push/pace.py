"""When the next push is due, and what the log is told of those that failed. Pure; seconds are of one clock."""

from __future__ import annotations

from dataclasses import dataclass

LONGEST_WAIT = 60.0  # seconds between two tries at most, where push_interval is not longer


@dataclass
class PushPace:
    """An outage begins with the first push that fails and ends with the next one that does not."""

    interval: float
    failures: int = 0  # of this outage
    since: float = 0.0  # when the outage began

    def failed(self, now: float) -> bool:
        """A push failed; True where that begins an outage."""
        self.failures += 1
        if self.failures > 1:
            return False
        self.since = now
        return True

    def succeeded(self, now: float) -> tuple[int, float] | None:
        """A push was taken; failures and seconds of the outage that this ends, if there was one."""
        ended = (self.failures, now - self.since) if self.failures else None
        self.failures = 0
        return ended

    def wait(self, jitter: float) -> float:
        """Seconds from the begin of one push to the next. In an outage it doubles with each failure after the first, up
        to LONGEST_WAIT, less a quarter of that at most by `jitter` (0 … 1), so that the daemons which lost one gateway
        don't come back to it all at once; never less than the interval."""
        if self.failures < 2:
            return self.interval
        longest = min(self.interval * 2.0 ** min(self.failures - 1, 16), LONGEST_WAIT)
        return max(self.interval, longest * (1 - 0.25 * jitter))
