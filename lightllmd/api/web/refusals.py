"""What API keys refused: counted for the metrics, and logged at a bounded rate. No key, nor a part of one, is ever in a
line; who it was is told by the client's address."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable

from starlette.types import Scope

from lightllmd.errors import RequestError
from lightllmd.requests.faults import shown

log = logging.getLogger(__name__)

EVERY = 10.0  # seconds between two lines about the same status


class Refusals:
    """Of one api worker."""

    def __init__(
        self,
        address: Callable[[Scope], str],
        count: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`address`: the client's, for the log. `count`: is told the reason of each, see `KEY_REFUSALS`."""
        self._address = address
        self._count = count
        self._clock = clock
        self._unsaid: Counter[int] = Counter()  # since the last line, by status
        self._next: dict[int, float] = {}  # when the next line may be written, by status

    def note(self, scope: Scope, refusal: RequestError) -> None:
        """A request was refused."""
        status = type(refusal).status
        limit = str(refusal.parameters.get("limit", ""))
        self._count(limit or refusal.name.lower())
        self._unsaid[status] += 1
        now = self._clock()
        if now < self._next.get(status, float("-inf")):
            return
        self._next[status] = now + EVERY
        count = self._unsaid.pop(status)
        more = f"; {count - 1} more since the line before" if count > 1 else ""
        why = refusal.parameters.get("why", "not permitted")
        log.warning("%d to %s for %s: API key %s%s", status, self._address(scope), shown(scope["path"]), why, more)
