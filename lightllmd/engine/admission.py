"""The documented admission rule: which of those in line may join the running batch now.

Everybody is taken to run on in lockstep until done. With the estimates (a, b) (see Sequence.estimate) sorted by b
descending, the i longest are still running when the i-th ends, so the most slots ever held at once are
``max_i(i * b_i + a_1 + … + a_i)``. A candidate is admitted while that peak stays below the number of slots.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from typing import NamedTuple

from lightllmd.config.plan import Plan
from lightllmd.engine.request import Sequence


class Limits(NamedTuple):
    """The parameters of the same names; `eos_ids` is `eos_id`, `max_queue` counts branches."""

    max_total_token_num: int
    batch_max_tokens: int
    running_max_req_size: int
    router_token_ratio: float
    router_max_new_token_len: int
    router_max_wait_tokens: int
    eos_ids: frozenset[int]
    max_queue: int

    @classmethod
    def of(cls, plan: Plan) -> Limits:
        params = plan.config.params
        return cls(
            max_total_token_num=plan.max_total_token_num,
            batch_max_tokens=plan.batch_max_tokens,
            running_max_req_size=params.running_max_req_size,
            router_token_ratio=params.router_token_ratio,
            router_max_new_token_len=params.router_max_new_token_len,
            router_max_wait_tokens=params.router_max_wait_tokens,
            eos_ids=frozenset(plan.eos_id),
            max_queue=plan.config.http.max_queue,
        )


def peak(estimates: Iterable[tuple[int, int]]) -> int:
    """The most slots held at once; `estimates` are (-b, a), ascending. At most the sum of all a + b."""
    held, worst = 0, 0
    for i, (negative_b, a) in enumerate(estimates, 1):
        held += a
        worst = max(worst, held - i * negative_b)
    return worst


class Admission:
    """One attempt: asked about one candidate after the other, in line, until one doesn't fit.

    `used` slots are taken now.

    A lone request that validation let pass (prompt + max_new_tokens + 1 <= max_total_token_num) has a peak of at most
    prompt + max_new_tokens, so on an empty server the strict comparison always admits it.
    """

    def __init__(self, limits: Limits, running: Iterable[Sequence], used: int) -> None:
        self._limits = limits
        # Ratio 0: always worst case, so the reservation holds and nothing is ever paused.
        self._worst_case = used / limits.max_total_token_num >= limits.router_token_ratio
        self._estimates = sorted(self._estimate(sequence) for sequence in running)
        self._whole = sum(held - negative_b for negative_b, held in self._estimates)
        self._fed = 0

    @property
    def peak(self) -> int:
        """Of all that are counted in."""
        return peak(self._estimates)

    def fits(self, candidate: Sequence) -> bool:
        """Whether it may join those running and those that fitted before; if so it is counted in.

        What feeds more than batch_max_tokens alone still goes, as the only one of its batch.
        """
        if len(self._estimates) >= self._limits.running_max_req_size:
            return False
        if self._fed and self._fed + candidate.length > self._limits.batch_max_tokens:
            return False
        estimate = self._estimate(candidate)
        whole = self._whole + estimate[1] - estimate[0]
        estimates = self._estimates.copy()
        insort(estimates, estimate)
        # The peak is at most what all need together, which is quick to know.
        if whole >= self._limits.max_total_token_num <= peak(estimates):
            return False
        self._estimates, self._whole = estimates, whole
        self._fed += candidate.length
        return True

    def _estimate(self, sequence: Sequence) -> tuple[int, int]:
        held, to_come = sequence.estimate(self._worst_case, self._limits.router_max_new_token_len)
        return -to_come, held
