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
    use_dynamic_prompt_cache: bool = False
    splitfuse_block_size: int = 0  # 0: without splitfuse_mode
    beam_mode: bool = False
    diverse_mode: bool = False

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
            use_dynamic_prompt_cache=params.use_dynamic_prompt_cache,
            splitfuse_block_size=params.splitfuse_block_size if params.splitfuse_mode else 0,
            beam_mode=params.beam_mode,
            diverse_mode=params.diverse_mode,
        )

    @property
    def shares(self) -> bool:
        """Slots may have several users."""
        return self.use_dynamic_prompt_cache or self.beam_mode or self.diverse_mode


def peak(estimates: Iterable[tuple[int, int]]) -> int:
    """The most slots held at once; `estimates` are (-b, a), ascending. At most the sum of all a + b."""
    held, worst = 0, 0
    for i, (negative_b, a) in enumerate(estimates, 1):
        held += a
        worst = max(worst, held - i * negative_b)
    return worst


class _Lockstep:
    """The estimates of those that are counted in, and the most slots that they ever hold at once."""

    def __init__(self, estimates: Iterable[tuple[int, int]]) -> None:
        self._estimates = sorted(estimates)
        self._whole = sum(held - negative_b for negative_b, held in self._estimates)

    def with_(self, estimates: Iterable[tuple[int, int]]) -> _Lockstep:
        more = _Lockstep(())
        more._estimates, more._whole = self._estimates.copy(), self._whole
        for estimate in estimates:
            insort(more._estimates, estimate)
            more._whole += estimate[1] - estimate[0]
        return more

    def stays_below(self, slots: int) -> bool:
        # The peak is at most what all need together, which is quick to know.
        return self._whole < slots or self.peak < slots

    @property
    def peak(self) -> int:
        return peak(self._estimates)


class Admission:
    """One attempt: asked about one candidate after the other, in line, until one doesn't fit.

    `used` slots are taken now. Where slots are shared there are two bounds on what will be, and one that holds is
    enough: each sequence by itself, as if nothing were shared; or those slots of the tree that are in use, together
    with what each sequence holds beside them.

    A lone request that validation let pass (prompt + max_new_tokens + 1 <= max_total_token_num) has a peak of at most
    prompt + max_new_tokens, so on an empty server the strict comparison always admits it.
    """

    def __init__(self, limits: Limits, running: Iterable[Sequence], used: int, locked: int = 0) -> None:
        self._limits = limits
        # Ratio 0: always worst case, so the reservation holds and nothing is ever paused.
        self._worst_case = used / limits.max_total_token_num >= limits.router_token_ratio
        running = list(running)
        self._rows = len(running)
        self._apart = _Lockstep(map(self._estimate, running))
        self._shared = _Lockstep(map(self._own, running)) if limits.shares else None
        self._locked = locked
        self._fed = 0

    @property
    def peak(self) -> int:
        """Of all that are counted in."""
        if self._shared is None:
            return self._apart.peak
        return min(self._apart.peak, self._locked + self._shared.peak)

    def fits(self, party: list[Sequence], locked: int = 0) -> bool:
        """Whether these, who enter together, may join those running and those that fitted before; if so they are
        counted in. `locked`: slots of the tree in use, theirs counted.

        What feeds more than batch_max_tokens alone still goes, as the only one of its batch.
        """
        limits = self._limits
        if self._rows + len(party) > limits.running_max_req_size:
            return False
        fed = sum(self._feeds(sequence) for sequence in party)
        if self._fed and self._fed + fed > limits.batch_max_tokens:
            return False
        apart = self._apart.with_(map(self._estimate, party))
        fits = apart.stays_below(limits.max_total_token_num)
        shared = None
        if self._shared is not None:
            shared = self._shared.with_(map(self._own, party))
            fits = fits or shared.stays_below(limits.max_total_token_num - locked)
        if not fits:
            return False
        self._apart, self._shared, self._locked = apart, shared, locked
        self._rows += len(party)
        self._fed += fed
        return True

    def _feeds(self, candidate: Sequence) -> int:
        """Tokens in its first step."""
        tokens = candidate.length - candidate.common
        block = self._limits.splitfuse_block_size
        return min(tokens, block) if block else tokens

    def _estimate(self, sequence: Sequence) -> tuple[int, int]:
        held, to_come = sequence.estimate(self._worst_case, self._limits.router_max_new_token_len)
        return -to_come, held

    def _own(self, sequence: Sequence) -> tuple[int, int]:
        negative_b, held = self._estimate(sequence)
        return negative_b, held - sequence.common
