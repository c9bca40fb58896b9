"""How soon a client wants its answer: in fields of the body that every dialect has, or in headers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, Field

from lightllmd.errors import InvalidRequest

MOST_PRIORITY = 100
MAX_TIMEOUT = 86_400.0  # seconds
PRIORITY_HEADER = "x-request-priority"
TIMEOUT_HEADER = "x-request-timeout"
_LONGEST_SHOWN = 32  # characters of a header


@dataclass(frozen=True)
class Urgency:
    """Of one request."""

    priority: int | None = None  # less is sooner, as in vLLM; None: not said, which is 0
    timeout: float | None = None  # seconds from its arrival until its answer is of no use any more; None: never

    def deadline(self, arrived_at: float) -> float | None:
        """On the clock that `arrived_at` is from, in seconds."""
        return None if self.timeout is None else arrived_at + self.timeout


UNHURRIED = Urgency()


@dataclass(frozen=True)
class Turn:
    """What a request's turn among those that wait depends on, beside its arrival; see `Submit` and `FairQueue`."""

    tenant: int = 0  # whose it is
    weight: float = 1.0  # the tenant's share, in units of the others'
    urgency: Urgency = UNHURRIED


ANY_TURN = Turn()


class UrgencyFields(BaseModel):
    """Of a body, or of the part of it that has the parameters."""

    priority: Annotated[int, Field(ge=-MOST_PRIORITY, le=MOST_PRIORITY)] | None = Field(
        default=None,
        description="whose turn comes first among requests that wait: less is sooner, 0 where it is absent. Each step "
        "of it is worth http.priority_ageing seconds of waiting",
    )
    timeout: Annotated[float, Field(gt=0, le=MAX_TIMEOUT)] | None = Field(
        default=None, description="seconds after which the request ends with 504, wherever it is then"
    )

    @property
    def urgency(self) -> Urgency:
        """As the fields say it."""
        return Urgency(self.priority, self.timeout)


def urgency_of(headers: Mapping[str, str], said: Urgency) -> Urgency:
    """What the headers say, but for what the body says itself. Raises InvalidRequest."""
    priority, timeout = said.priority, said.timeout
    if priority is None and (written := headers.get(PRIORITY_HEADER)) is not None:
        priority = _priority(written.strip())
    if timeout is None and (written := headers.get(TIMEOUT_HEADER)) is not None:
        timeout = _timeout(written.strip())
    return Urgency(priority, timeout)


def _priority(written: str) -> int:
    digits = written.removeprefix("-")
    if digits.isascii() and digits.isdecimal() and len(digits) <= 4 and abs(int(written)) <= MOST_PRIORITY:
        return int(written)
    raise _refused("X-Request-Priority", f"an integer from {-MOST_PRIORITY} to {MOST_PRIORITY}", written)


def _timeout(written: str) -> float:
    try:
        seconds = float(written) if len(written) <= _LONGEST_SHOWN else 0.0
    except ValueError:
        seconds = 0.0
    if 0 < seconds <= MAX_TIMEOUT:  # false for NaN, too
        return seconds
    raise _refused("X-Request-Timeout", f"seconds, more than 0 and at most {MAX_TIMEOUT:g}", written)


def _refused(header: str, wanted: str, written: str) -> InvalidRequest:
    return InvalidRequest(f"{header}: should be {wanted}; got {written[:_LONGEST_SHOWN]!r}", param=header)
