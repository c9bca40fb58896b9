"""The scheduling policy: what runs in the next step. Pure Python and numpy, deterministic, without a clock.

The scheduler owns the slots, the table rows and every sequence. `next_step` may be called while steps are out;
`complete` takes the result of the oldest of them. Steps run in the order in which they were made, so what a step frees
or a sequence gave back may be handed out anew at once: whatever the new owner does is ordered behind. `submit`, `abort`
and `api_gone` come at any time between those two.

Sequences wait in `Queues`. Right before a suspect runs, alone, the engine answers a request of its own, so that a death
tells of the suspect.

A running sequence is *prefilling* until the last part of its prompt is in a step. From then on it goes on by itself,
its newest token known to the runner alone, unless it is a beam: then each of its steps waits until the scheduler has
chosen the token before. Where the tokens before decide what the next may be, the step is launched without them, and its
mask follows when they are here (`late_masks`).
"""

from __future__ import annotations

from collections import Counter, deque
from typing import NamedTuple

from lightllmd.config.bounds import PREFILL_ROWS, prefill_budget
from lightllmd.engine.images.prompt_images import PromptImages
from lightllmd.engine.kv_cache.manager import KvCacheManager
from lightllmd.engine.scheduling import beam_sequences as beams
from lightllmd.engine.scheduling.admission import Admission, SchedulerLimits
from lightllmd.engine.scheduling.beam_sequences import BeamResult
from lightllmd.engine.scheduling.composer import Composer
from lightllmd.engine.scheduling.grammar_rows import MOST_SECONDS, GrammarRow
from lightllmd.engine.scheduling.hypothesis_text import HypothesisTexts
from lightllmd.engine.scheduling.outputs import Outputs, append_token, pooled
from lightllmd.engine.scheduling.queues import Queues, age
from lightllmd.engine.scheduling.restriction import Restrictions
from lightllmd.engine.scheduling.sequence import SELF, Fork, Owner, Sequence, State, sequences_of
from lightllmd.engine.scheduling.submissions import RETRY_AFTER, Submissions
from lightllmd.engine.step import Masks, Step, StepResult
from lightllmd.ipc.messages import (
    FINISH_ABORT,
    FINISH_LENGTH,
    FINISH_NONE,
    FINISH_STOP,
    Load,
    PoolingParams,
    PromptLogprobs,
    Rejected,
    RequestParams,
    SamplingParams,
    StepOutput,
    Submit,
)

_NEWEST = (1 << 63) - 1  # nanoseconds of arrival
# Tokens of a prompt that takes many times as long as one of few tokens, and how many times as many those are.
LONG, _MUCH = 512, 8


def _join(sequence: Sequence, lead: Sequence) -> None:
    """`sequence` follows `lead`: it draws from the same logits, and they share the prompt's slots."""
    if lead.fork is None:
        lead.fork = Fork([lead])
    lead.fork.members.append(sequence)
    sequence.fork = lead.fork


def _own_request(generates: bool) -> Submit:
    """One token, or vector, of one token, newer than any other suspect."""
    params: RequestParams = SamplingParams(max_new_tokens=1, ignore_eos=True, use_cache=False)
    if not generates:
        params = PoolingParams(use_cache=False)
    return Submit(0, *SELF, _NEWEST, [0], params, branches=[0], emitted=[[]], replay=True, suspect=1)


class _Sent(NamedTuple):
    """What a step that is out makes, in the order of its result."""

    sequences: list[Sequence]  # whose tokens
    targets: list[tuple[Sequence, int]]  # whose prompt's log-probabilities, from which token on
    pooled: list[tuple[Sequence, bool]]  # whose vectors, and whether those are the last
    late: list[tuple[int, Sequence]]  # table rows, and whose they were, whose masks come after the launch


class Scheduler:
    """Owns the running sequences and all that wait. Nothing here computes."""

    def __init__(
        self,
        limits: SchedulerLimits,
        generation: int,
        restrictions: Restrictions | None = None,
        readings: HypothesisTexts | None = None,
    ) -> None:
        """`restrictions` None: what requests restrict is not heeded. `readings` None: no stop ends a hypothesis."""
        self.limits = limits
        self.generation = generation
        self.keys = KvCacheManager(
            limits.max_total_token_num, limits.use_dynamic_prompt_cache, limits.beam_mode or limits.diverse_mode
        )
        self.running: list[Sequence] = []  # in order of admission
        self.queues = Queues()
        self.submissions = Submissions(limits, generation, self.queues)
        self.first_admitted: list[int] = []  # arrival_ns of those that the newest step admitted for the first time
        self._restrictions, self._readings = restrictions, readings
        self._requests: dict[int, dict[int, Sequence]] = {}  # request -> branch -> what has not ended
        self._rows = list(range(limits.running_max_req_size - 1, -1, -1))  # free table rows, lowest last
        self._freed: list[int] = []  # rows released since the last step
        self._out: deque[_Sent] = deque()  # the steps that are out
        self._quarantine: list[Sequence] = []  # suspects that run and have no token yet
        self._answered = False  # the newest step that completed answered a request of the engine's own
        self._admitting = -1  # sequences that the admission round which goes on may still admit; -1: none goes on
        self._decoded = 0  # decode steps since the last admission round began
        self._steps = 0
        self._refused: list[tuple[Owner, Rejected]] = []

    # --- policy -----------------------------------------------------------------------------------------------
    def next_step(self) -> Step | None:
        """What to launch now; None when no sequence can run, or not until a step that is out completes.

        An admission round goes before decode: as many prefills as it takes for as many as are in line when it begins,
        so it ends however many come meanwhile. Under splitfuse they go beside it, in blocks.
        """
        self.first_admitted = []
        if self._out and (self._quarantine or self.queues.suspect_is_next):
            return None
        self._quarantine = [sequence for sequence in self._quarantine if sequence.feeds]
        if not self._quarantine:
            if self._round_is_due():
                self._admitting, self._decoded = len(self.queues), 0
            if self._admitting >= 0 and not (self._admit() or any(sequence.feeds for sequence in self.running)):
                self._admitting = -1
        block = self.limits.splitfuse_block_size
        composer = Composer(self._steps + 1, self.keys)
        going_on: list[Sequence] = []
        if not self._quarantine and (block or not any(sequence.feeds for sequence in self.running)):
            going_on = self._go_on(composer)
        decodes = bool(going_on or composer.named)
        if not block:
            self._feed(composer)
        # A sequence that waits for its own token is a decode row of the next step, if not of this one.
        elif self._quarantine or all(sequence.prefilling for sequence in self.running):
            self._feed(composer, max(block, self.limits.batch_max_tokens))
        else:
            self._feed(composer, prefill_budget(block, len(going_on) + len(composer.named)), PREFILL_ROWS)
        if not (going_on or composer.rows):
            return None
        if decodes:
            self._decoded += 1
        return self._send(composer, going_on)

    def _go_on(self, composer: Composer) -> list[Sequence]:
        """Those that feed their newest token, which the runner knows; the others that feed theirs are in the composer
        then. The newest are paused until there are slots for the rest."""
        while True:
            going_on, chosen = [], []
            for sequence in self.running:
                if sequence.fed < sequence.target:
                    continue
                if not sequence.beam:
                    going_on.append(sequence)
                elif not sequence.pending:
                    chosen.append(sequence)
            if len(going_on) + len(chosen) <= self.keys.available:
                break
            self._admitting, self._decoded = -1, 0
            self._pause(self._party(max(self.running, key=age)))
        self.keys.grow(going_on + chosen)
        for sequence in chosen:
            composer.choose(sequence)
        return going_on

    def _feed(self, composer: Composer, most: int | None = None, rows: int | None = None) -> None:
        """Prompts, in the order of their admission, up to `most` tokens of at most `rows` of them; None: of all, and
        whole ones."""
        for sequence in self._quarantine or self.running:
            if sequence.feeds:
                left = sequence.target if most is None else most - composer.fed
                if left <= 0 or composer.prompts == rows:
                    break
                composer.feed(sequence, left)

    def _round_is_due(self) -> bool:
        """Always while nothing runs, or nothing that runs has further tokens to wait for; else every
        `router_max_wait_tokens` decode steps, which count with and without anyone in line. Suspects don't wait for
        that, or a long line of them would hold up all others."""
        if not self.queues:
            return False
        if not self.limits.generates or not self.running or self.queues.suspect_is_next:
            return True
        return self._admitting < 0 and self._decoded >= self.limits.router_max_wait_tokens

    def _admit(self) -> bool:
        """Those of the line who may run now; whether there are any. Stops at the first that can't go, so nothing is
        overtaken for ever. One whose token is still to come can't: it would be fed without it."""
        admission = Admission(self.limits, self.running, self.keys.used, self.keys.locked)
        if self.queues.waiting.contested:
            self._charge()
        admitted: list[Sequence] = []
        while self._admitting > 0 and (sequence := self.queues.next(admitted)) is not None:
            party = list(sequence.fork.members) if sequence.fork is not None and sequence.beam else [sequence]
            if any(one.pending for one in party) or self._holds_up(sequence, admitted):
                break
            leads = self._find(sequence, admitted)
            for follower in party[1:]:
                follower.common = len(follower.prompt_ids)
            if not admission.fits(party, self.keys.locked):
                self.keys.cancel(sequence)
                break
            if sequence.suspect and sequence.owner != SELF and not self._answered:
                self.keys.cancel(sequence)
                self.submit(_own_request(self.limits.generates))  # needs no more room, and is the next of the suspects
                return self._admit()
            if leads is not None:
                _join(sequence, leads)
            for one in party:
                self.queues.admit(one)
            self._admitting = max(0, self._admitting - len(party))
            admitted += party
        for sequence in admitted:
            self._enter(sequence)
        return bool(admitted)

    def _holds_up(self, sequence: Sequence, admitted: list[Sequence]) -> bool:
        """A long prompt in one step with much shorter ones of another tenant would make those wait for it."""
        if sequence.length <= LONG or not admitted or self.limits.splitfuse_block_size:
            return False
        if sequence.tenant == admitted[-1].tenant:
            return False
        return sequence.length > _MUCH * sum(one.length - one.common for one in admitted)

    def _charge(self) -> None:
        """Tenants that wait for more are charged what those of them that run were given."""
        tokens: Counter[int] = Counter()
        for sequence in self.running:
            given = len(sequence.emitted) + sequence.pending
            tokens[sequence.tenant] += given - sequence.charged
            sequence.charged = given
        self.queues.waiting.charge(tokens)

    def _find(self, sequence: Sequence, admitted: list[Sequence]) -> Sequence | None:
        """Looks for a past that it need not compute: what the cache has, or the prompt of another branch that is
        admitted with it, which is returned."""
        if sequence.forks and not sequence.beam and not sequence.emitted:
            for other in admitted:
                if other.request == sequence.request and not other.emitted and other.fork_lead in (None, other):
                    sequence.common = len(sequence.prompt_ids)
                    return other
        self.keys.find(sequence, self._steps + 1)
        return None

    def _enter(self, sequence: Sequence) -> None:
        if sequence.submission is not None:
            sequence.submission.started = True
        if sequence.state is State.WAITING:
            self.first_admitted.append(sequence.arrival_ns)
        if sequence.suspect:
            self._quarantine.append(sequence)
        sequence.state = State.RUNNING
        sequence.table_row = self._rows.pop()
        if sequence.fork_lead in (None, sequence):
            self.keys.enter(sequence)
        else:
            sequence.fed, sequence.target = 0, 1  # until the first of the fork has fed the prompt
        self.running.append(sequence)

    @staticmethod
    def _party(sequence: Sequence) -> list[Sequence]:
        """Those who are paused together: beams, and who follow one that feeds its prompt."""
        if sequence.fork is not None and (sequence.beam or sequence.prefilling):
            return list(sequence.fork.members)
        return [sequence]

    def _pause(self, party: list[Sequence]) -> None:
        """Takes their slots; they come back by a prefill over prompt and emitted tokens. Beams begin anew."""
        for sequence in party:
            self.running.remove(sequence)
            self._release(sequence)
            sequence.state = State.PAUSED
            self.queues.add(sequence)
        if party and party[0].fork is not None and party[0].beam:
            beams.begin(party[0].fork)

    # --- steps ------------------------------------------------------------------------------------------------
    def _send(self, composer: Composer, going_on: list[Sequence]) -> Step:
        self._steps += 1
        self._answered = False
        freed, self._freed = self._freed, []
        step = composer.step(going_on, freed)
        sequences = going_on + composer.named
        self._out.append(_Sent(sequences, composer.targets, composer.pooled, composer.late))
        last = [sequence for sequence, ends in composer.pooled if ends]
        for sequence in sequences:
            sequence.pending += 1
            if len(sequence.emitted) + sequence.pending >= sequence.params.max_new_tokens and not sequence.beam:
                last.append(sequence)
        for sequence in last:
            self._release(sequence)
            sequence.state = State.ENDING
        if last:
            self.running = [sequence for sequence in self.running if sequence.state is State.RUNNING]
        return step

    @property
    def masks_late(self) -> bool:
        """The newest step needs `late_masks`."""
        return bool(self._out) and bool(self._out[-1].late)

    def late_masks(self) -> Masks:
        """Of the newest step, when the ones before it are completed. The token of a sequence that ended with those is
        dropped, whatever it is."""
        return {row: sequence.next_mask() for row, sequence in self._out[-1].late if sequence.state is not State.ENDED}

    def complete(self, result: StepResult) -> dict[Owner, StepOutput]:
        """Takes what the runner made of the oldest step that is out; what each api worker is to be told.

        The token of a sequence that ended since the step was made is dropped; that of a paused one counts.
        """
        outputs = Outputs(self.generation)
        ended: list[Sequence] = []
        searched: dict[int, list[BeamResult]] = {}
        sent = self._out.popleft()
        eos_ids, gone = self.limits.eos_ids, State.ENDED
        for (sequence, first), told in zip(sent.targets, result.targets, strict=True):
            if sequence.state is not gone:
                part = PromptLogprobs(sequence.request, first, told.logprobs, told.alternatives)
                outputs[sequence.owner].prompts.append(part)
        for (sequence, ends), vectors in zip(sent.pooled, result.pooled, strict=True):
            if sequence.state is not gone:
                sequence.take_vectors(vectors)
                if ends:
                    self._answer(sequence, outputs)
        for sequence, token, logprob, alternatives, candidates in zip(
            sent.sequences, result.tokens, result.logprobs, result.alternatives, result.candidates, strict=True
        ):
            sequence.pending -= 1
            if sequence.state is gone:
                continue
            if sequence.suspect:
                self._clear_suspect(sequence)
            if sequence.restriction is not None and sequence.restriction.overdue:
                searched.pop(sequence.request, None)
                self._refuse(sequence)
                continue
            if sequence.beam:
                if sequence.state is State.RUNNING:  # else they begin anew
                    found = (sequence, logprob, candidates or [], alternatives)
                    searched.setdefault(sequence.request, []).append(found)
                continue
            params, emitted = sequence.params, sequence.emitted
            position = len(emitted)
            emitted.append(token)
            finish = FINISH_NONE
            if logprob != logprob:  # NaN: the model can't go on from here, whatever the token is
                finish = FINISH_ABORT
            elif token in eos_ids and (
                # A grammar that has to go on for that allows no end, if it can.
                params.grammar is not None or (not params.ignore_eos and position + 1 >= params.min_new_tokens)
            ):
                finish = FINISH_STOP
            elif position + 1 >= params.max_new_tokens:
                finish = FINISH_LENGTH
            if finish:
                ended.append(sequence)
            output = outputs[sequence.owner]
            if sequence.cached:
                self._tell_cached(sequence, output)
            append_token(output, sequence, position, token, logprob, alternatives, finish)
        for results in searched.values():
            self._search(results, outputs)
        for sequence in ended:
            self._end(sequence)
        return outputs

    def _refuse(self, sequence: Sequence) -> None:
        """Ends the request whose grammar holds the others up."""
        text = f"matching the grammar takes more than {MOST_SECONDS:g} s of CPU time for one token"
        self._refused.append((sequence.owner, Rejected(self.generation, sequence.request, "invalid", text)))
        self.abort(sequence.request)

    def take_refused(self) -> list[tuple[Owner, Rejected]]:
        """Requests that were ended since the last call because of what they ask, perhaps after some of their tokens:
        the owners and what each is told."""
        refused, self._refused = self._refused, []
        return refused

    @staticmethod
    def _tell_cached(sequence: Sequence, output: StepOutput) -> None:
        output.cached.append((sequence.request, sequence.cached))
        sequence.cached = 0

    def _answer(self, sequence: Sequence, outputs: Outputs) -> None:
        """One that ends with its prompt has all its vectors."""
        if sequence.suspect:
            self._clear_suspect(sequence)
        output = outputs[sequence.owner]
        if sequence.cached:
            self._tell_cached(sequence, output)
        output.pooled.append(pooled(sequence))
        self._end(sequence)

    def _search(self, results: list[BeamResult], outputs: Outputs) -> None:
        """A step of one request's beams."""
        lead = results[0][0]
        fork = lead.fork
        assert fork is not None
        members = list(fork.members)
        if beams.advance(fork, results, self.keys):
            return
        beams.tell(fork, results, outputs[lead.owner])
        for member in members:
            self._end(member)

    # --- coming and going -------------------------------------------------------------------------------------
    def submit(
        self,
        message: Submit,
        now: float = 0.0,
        rows: list[GrammarRow] | None = None,
        images: PromptImages | None = None,
    ) -> Rejected | None:
        """Puts a request in line, if there is room for it or it is replayed. `now`: seconds of any clock, for `expire`.
        `rows`: its grammar's, one for each branch, where they have been advanced by what is emitted. `images`: those of
        the message's spans, which it holds on to until the request ends.

        A request that is already here, or whose api worker's process is dead, is ignored: no answer has a reader.
        """
        if message.request in self._requests or self.submissions.is_gone((message.api, message.epoch)):
            return None
        submission = self.submissions.take(message)
        if isinstance(submission, Rejected):
            return submission
        sequences = sequences_of(message, self.limits.priority_ageing)
        if self._restrictions is not None and isinstance(message.params, SamplingParams):
            beam = self.limits.beam_mode and message.params.n > 1
            each = self._restrictions.each(message.params, len(sequences), beam, rows)
            for sequence, restriction in zip(sequences, each, strict=True):
                sequence.restriction = restriction
        if images is not None:
            key = self.keys.images.key_of(message.prompt_ids, images.spans)
            for sequence in sequences:
                sequence.images, sequence.prompt_key = images, key
        for sequence in sequences:
            sequence.submission, sequence.since = submission, now
        if isinstance(message.params, SamplingParams) and message.params.n > 1:
            for sequence in sequences:
                sequence.forks = self.limits.beam_mode or self.limits.diverse_mode
            if self.limits.beam_mode:
                reading = None
                if self._readings is not None:
                    reading = self._readings.open(message.prompt_ids, message.params)
                beams.fork(sequences, self.limits.eos_ids, reading)
        self._requests[message.request] = {sequence.branch: sequence for sequence in sequences}
        for sequence in sequences:
            self.queues.add(sequence)
        return None

    def expire(self, now: float) -> list[tuple[Owner, Rejected]]:
        """Ends requests that have waited for `queue_timeout` seconds, unless a part of their body has been admitted.
        Returns the owners and what each is told. Call it from time to time."""
        timeout = self.limits.queue_timeout
        late = {
            sequence.request: sequence.owner
            for sequence in self.queues.waiting
            if 0 < timeout <= now - sequence.since and not (sequence.submission and sequence.submission.started)
        }
        text = (
            f"the request waited {timeout:g} s (http.queue_timeout) for its turn: {len(self.running)} sequences run, "
            f"{len(self.queues.waiting)} wait"
        )
        for request in late:
            self.abort(request)
        return [
            (owner, Rejected(self.generation, request, "queue_timeout", text, RETRY_AFTER))
            for request, owner in late.items()
        ]

    def abort(self, request: int, branches: list[int] | None = None) -> None:
        """Ends branches in whatever state they are; those that are unknown have ended already. Beams end together."""
        here = self._requests.get(request, {})
        if branches is not None and any(sequence.beam for sequence in here.values()):
            branches = None
        for branch in list(here) if branches is None else branches:
            if branch in here:
                self._end(here[branch])

    def api_gone(self, api: int, epoch: int) -> None:
        """Ends all requests of an api worker's epoch, and those of it that are still to arrive."""
        self.submissions.forget((api, epoch))
        for request, branches in list(self._requests.items()):
            if next(iter(branches.values())).owner == (api, epoch):
                self.abort(request)

    def clear(self) -> None:
        """Ends all requests and empties the prompt cache; the tokens of steps that are out are dropped."""
        for request in list(self._requests):
            self.abort(request)
        self.keys.flush()

    def flush_cache(self) -> int:
        """Empties the prompt cache but for what is in use; returns how many tokens that were."""
        return self.keys.flush()

    def cache_stats(self) -> dict[str, float]:
        """Gauges and counters of the prompt cache in tokens; empty without one."""
        return self.keys.stats()

    def _clear_suspect(self, suspect: Sequence) -> None:
        """One branch has a token, or all that was asked of it: the whole request is a normal one again."""
        for sequence in self._requests[suspect.request].values():
            self.queues.clear_suspect(sequence)
        self._answered = suspect.owner == SELF

    def _end(self, sequence: Sequence) -> None:
        if sequence.state is State.RUNNING:
            if sequence.feeds and sequence.fork is not None and not sequence.beam:
                # Those who wait for the prompt that it feeds feed it themselves.
                self._pause(sequence.fork.members[1:])
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence.state is not State.ENDING:
            self.queues.remove(sequence)
        sequence.state, sequence.images = State.ENDED, None
        branches = self._requests[sequence.request]
        del branches[sequence.branch]
        if not branches:
            del self._requests[sequence.request]

    def _release(self, sequence: Sequence) -> None:
        """Takes back the slots and the row of one that leaves the running batch."""
        self.keys.release(sequence)
        self._rows.append(sequence.table_row)
        if sequence.entered:
            self._freed.append(sequence.table_row)
        sequence.table_row, sequence.fed, sequence.target = -1, 0, 0
        sequence.entered = sequence.stale = False

    @property
    def quarantined(self) -> int:
        """The suspect that runs alone in the newest step; 0: none."""
        return self._quarantine[0].request if self._quarantine else 0

    # --- state, told ------------------------------------------------------------------------------------------
    @property
    def busy(self) -> bool:
        """A sequence runs or is in line. Those in line are then admitted sooner or later."""
        return bool(self._requests)

    def load(self) -> Load:
        """How busy the engine is; `estimated_peak`: share of the slots that the running sequences will ever hold."""
        total = self.limits.max_total_token_num
        worst_case = Admission(self.limits, self.running, used=total, locked=self.keys.locked)
        in_line = (*self.queues.paused, *self.queues.suspects, *self.queues.waiting)
        queued = {sequence.request: sequence.length for sequence in in_line}  # those of one request share its prompt
        return Load(
            generation=self.generation,
            slots_total=total,
            slots_used=self.keys.used,
            running=len(self.running),
            waiting=len(self.queues.waiting),
            paused=len(self.queues.paused) + len(self.queues.suspects),
            estimated_peak=worst_case.peak / total,
            queued_tokens=sum(queued.values())
            + sum(sequence.target - sequence.fed for sequence in self.running if sequence.feeds),
        )

    def check(self) -> None:
        """Raises RuntimeError unless every slot and row is free or has its owners."""
        self.keys.check(self.running)
        rows = [sequence.table_row for sequence in self.running]
        if sorted(rows + self._rows) != list(range(self.limits.running_max_req_size)):
            raise RuntimeError("a table row is lost or has two owners")
