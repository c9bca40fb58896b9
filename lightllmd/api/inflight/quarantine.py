"""When a request that engines die of is given up.

A request is *suspect* when an engine died while the request had been admitted and had no token since. A suspect runs
alone, right after the engine has answered a request of its own (the scheduler's part). If the engine dies then, and not
certainly by a cause from outside, that is a *strike*; at three the request is given up, if in between it has no token
and no engine dies of anything else.
"""

from __future__ import annotations

from lightllmd.api.inflight.entry import Entry
from lightllmd.errors import DeadlineExceeded, RequestError, RequestFailed

STRIKES = 3
MOST_DEATHS = 10  # that a request may be in without a token and without evidence, once it is past its time to be held


def count_death(entry: Entry, strike: bool, now: float, hold_timeout: float) -> RequestError | None:
    """An engine died, perhaps of `entry`. Returns the error with which it is given up; None: it is tried again.
    `strike`: it ran alone. `now`, `hold_timeout`: seconds of the ledger's clock."""
    if not entry.suspect:
        entry.suspect_since = now
    entry.suspect += 1
    entry.strikes += strike
    if entry.strikes >= STRIKES:
        return RequestFailed(f"the engine died {STRIKES} times when it ran this request alone; it is not tried again")
    if entry.suspect >= MOST_DEATHS and now - entry.suspect_since >= hold_timeout:
        # What ends engines may come from outside, but this one keeps them from the others.
        return DeadlineExceeded(
            f"the engine died {entry.suspect} times, over {hold_timeout:g} s, before it had run this request"
        )
    return None
