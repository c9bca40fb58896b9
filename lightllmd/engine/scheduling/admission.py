"""The documented admission rule: which of those in line may join the running batch now.

All sequences are taken to run on in lockstep until done. With the estimates (a, b) (see Sequence.estimate) sorted by b
descending, the i longest are still running when the i-th ends, so the most slots ever held at once are
``max_i(i * b_i + a_1 + … + a_i)``. A candidate is admitted while that peak stays below the number of slots.

Some fall behind the others: a prompt that is fed in blocks beside them, or beams, whose every step waits for the tokens
before. They take n >= b steps for their b tokens, and hold at most ``a + min(b, t)`` after t of them. So the peak is
the maximum over all ends T = n_j of the sum of ``a_i + min(b_i, T)`` over those with n_i >= T; where n = b for all,
that is the formula above.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from typing import NamedTuple

from lightllmd.config.bounds import least_prefill_budget
from lightllmd.config.plan import Plan
from lightllmd.engine.scheduling.sequence import Sequence, State


class SchedulerLimits(NamedTuple):
    """The parameters of the same names; `eos_ids` is `eos_id`, `max_queue` counts branches."""

    max_total_token_num: int
    batch_max_tokens: int
    running_max_req_size: int
    router_token_ratio: float
    router_max_new_token_len: int
    router_max_wait_tokens: int
    eos_ids: frozenset[int]
    max_queue: int
    queue_timeout: float = 0.0  # seconds; 0: none
    use_dynamic_prompt_cache: bool = False
    splitfuse_block_size: int = 0  # 0: without splitfuse_mode
    beam_mode: bool = False
    diverse_mode: bool = False
    priority_ageing: float = 0.0
    generates: bool = True  # False: all requests end with their prompts, and results are vectors
    whole_images: bool = False  # the tokens of an image see each other in both directions, so they are fed together

    @classmethod
    def of(cls, plan: Plan) -> SchedulerLimits:
        """Those of a plan, with the modes that are off at their neutral values."""
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
            queue_timeout=plan.config.http.queue_timeout,
            priority_ageing=plan.config.http.priority_ageing,
            use_dynamic_prompt_cache=params.use_dynamic_prompt_cache,
            splitfuse_block_size=params.splitfuse_block_size if params.splitfuse_mode else 0,
            beam_mode=params.beam_mode,
            diverse_mode=params.diverse_mode,
            generates=plan.generates,
            whole_images=plan.sees_both_ways,
        )

    @property
    def shares(self) -> bool:
        """Slots may have several users."""
        return self.use_dynamic_prompt_cache or self.beam_mode or self.diverse_mode


class _Estimate(NamedTuple):
    held: int  # a
    to_come: int  # b
    steps: int  # n


class _Future:
    """The estimates of those that are counted in, and the most slots that they ever hold at once."""

    def __init__(self, estimates: Iterable[_Estimate]) -> None:
        self._ends: list[tuple[int, int]] = []  # (-n, a + b), ascending
        self._to_come: list[int] = []  # -b, ascending
        self._whole = 0  # the sum of all a + b, which the peak never exceeds
        for held, to_come, steps in estimates:
            self._ends.append((-steps, held + to_come))
            self._to_come.append(-to_come)
            self._whole += held + to_come
        self._ends.sort()
        self._to_come.sort()

    def with_(self, estimates: Iterable[_Estimate]) -> _Future:
        more = _Future(())
        more._ends, more._to_come, more._whole = self._ends.copy(), self._to_come.copy(), self._whole
        for held, to_come, steps in estimates:
            insort(more._ends, (-steps, held + to_come))
            insort(more._to_come, -to_come)
            more._whole += held + to_come
        return more

    def stays_below(self, slots: int) -> bool:
        return self._whole < slots or self.peak < slots  # the former is quick to know

    @property
    def peak(self) -> int:
        """Until step T those whose b is less have got all their tokens, the others T."""
        worst = whole = 0
        growing = beyond = 0  # those with b >= T, and the sum of their b
        for negative_end, most in self._ends:
            whole += most
            while growing < len(self._to_come) and self._to_come[growing] <= negative_end:
                beyond -= self._to_come[growing]
                growing += 1
            worst = max(worst, whole - beyond - growing * negative_end)
        return worst


class Admission:
    """One attempt: asked about one candidate after the other, in line, until one doesn't fit.

    `used` slots are taken now. Where slots are shared there are two bounds on what will be, and one that holds is
    enough: each sequence by itself, as if nothing were shared; or those slots of the tree that are in use, together
    with what each sequence holds beside them.

    A lone request that validation let pass (prompt + max_new_tokens + 1 <= max_total_token_num) has a peak of at most
    prompt + max_new_tokens, so on an empty server the strict comparison always admits it.
    """

    def __init__(self, limits: SchedulerLimits, running: Iterable[Sequence], used: int, locked: int = 0) -> None:
        self._limits = limits
        # Ratio 0: always worst case, so the reservation holds and nothing is ever paused.
        self._worst_case = used / limits.max_total_token_num >= limits.router_token_ratio
        running = list(running)
        self._rows = len(running)
        self._blocks = 0  # steps until all prompts so far are fed beside others; without splitfuse others stand still
        estimates = [self._estimate(sequence, sequence.target - sequence.fed) for sequence in running]
        self._apart = _Future(estimates)
        self._shared = None
        if limits.shares:
            known = dict(zip(running, estimates, strict=True))
            self._shared = _Future(self._own(sequence, known) for sequence in running)
        self._locked = locked
        # What is left of a batch that waits for a prompt in common; blocks are bounded where they are fed.
        self._fed = 0
        if not limits.splitfuse_block_size:
            self._fed = sum(sequence.target - sequence.fed for sequence in running if sequence.feeds)

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
        blocks = self._blocks
        estimates = [self._estimate(sequence, sequence.length - sequence.common) for sequence in party]
        apart = self._apart.with_(estimates)
        fits = apart.stays_below(limits.max_total_token_num)
        shared = None
        if self._shared is not None:
            known = dict(zip(party, estimates, strict=True))
            shared = self._shared.with_(self._own(sequence, known) for sequence in party)
            fits = fits or shared.stays_below(limits.max_total_token_num - locked)
        if not fits:
            self._blocks = blocks
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

    def _estimate(self, sequence: Sequence, feeds: int) -> _Estimate:
        """`feeds`: tokens of its prompt that are still to be fed, or to be followed."""
        held, to_come = sequence.estimate(self._worst_case, self._limits.router_max_new_token_len)
        # A step with a token, one that waits for it; one more for each end.
        steps = 2 * (to_come + 2) if sequence.beam else to_come
        block = least_prefill_budget(self._limits.splitfuse_block_size)
        if block and (feeds or sequence.state is not State.RUNNING):
            if sequence.fork_lead in (None, sequence):
                self._blocks += -(-feeds // block)
                if sequence.images is not None and sequence.images.whole:
                    self._blocks += 2 * len(sequence.images.spans)  # a part ends before each, and another with it
            steps += self._blocks
        return _Estimate(held, to_come, steps)

    @staticmethod
    def _own(sequence: Sequence, known: dict[Sequence, _Estimate]) -> _Estimate:
        """What is charged to it where slots are shared. The prompt of a fork stays as long as any of its members."""
        held, to_come, steps = known[sequence]
        if sequence.fork is not None and sequence is sequence.fork_lead:
            steps = max(known[member].steps for member in sequence.fork.members)
        return _Estimate(held - sequence.common, to_come, steps)
