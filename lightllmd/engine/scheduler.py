"""The scheduling policy: what runs in the next step. Pure Python, deterministic, without a clock.

Three lines wait, and the first that is not empty is served from its head without overtaking:

* `paused`, oldest first: sequences that ran before, in this generation or in one that died;
* `suspects`, newest request first, one sequence at a time: they had no token yet when an engine died, so nothing
  else may be out together with the step that could die of them;
* `waiting`, in order of arrival: new ones. They also follow right behind the paused while there is no suspect.

The scheduler owns the slots, the table rows and every sequence. `next_step` may be called while steps are out;
`complete` takes the result of the oldest of them. Steps run in the order in which they were made, so what a step frees
or a sequence gave back may be handed out anew at once: whatever the new owner does is ordered behind. `submit`, `abort`
and `api_gone` come at any time between those two.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterable
from itertools import chain

from lightllmd.engine.admission import Admission, Limits
from lightllmd.engine.batch import DecodeRows, Row, SamplingRow, Step, StepResult, no_decode
from lightllmd.engine.request import Owner, Sequence, State, sequences_of
from lightllmd.engine.slots import Slots
from lightllmd.ipc.messages import (
    FINISH_ABORT,
    FINISH_LENGTH,
    FINISH_NONE,
    FINISH_STOP,
    Load,
    Rejected,
    StepOutput,
    Submit,
)

RETRY_AFTER = 1.0  # seconds; told to those whom a full queue turns away


def _age(sequence: Sequence) -> tuple[int, int, int]:
    """Older is smaller."""
    return sequence.order


class Scheduler:
    def __init__(self, limits: Limits, generation: int) -> None:
        self.limits = limits
        self.generation = generation
        self.slots = Slots(limits.max_total_token_num)
        self.running: list[Sequence] = []  # in order of admission
        self.paused: list[Sequence] = []  # ascending by order; no suspects
        self.suspects: list[Sequence] = []  # ascending by order
        self.waiting: deque[Sequence] = deque()  # in order of arrival here
        self.first_admitted: list[int] = []  # arrival_ns of those that the newest prefill admitted for the first time
        self._requests: dict[int, dict[int, Sequence]] = {}  # request -> branch -> what has not ended
        self._gone: dict[int, int] = {}  # api worker -> its newest epoch that is dead
        self._rows = list(range(limits.running_max_req_size - 1, -1, -1))  # free table rows, lowest last
        self._freed: list[int] = []  # rows released since the last step
        self._out: deque[list[Sequence]] = deque()  # of each step that is out: whose tokens it makes, in their order
        self._on_trial = False  # the step that is out is a suspect's
        self._tickets = 0  # entries into a line so far
        self._admitting = 0  # the newest ticket that the admission round which goes on is for; 0: none does
        self._decoded = 0  # decode steps since the last admission round began
        self._steps = 0

    # --- policy -----------------------------------------------------------------------------------------------
    def next_step(self) -> Step | None:
        """What to launch now; None when nobody can run, or not until a step that is out completes.

        An admission round goes before decode: as many prefills as it takes for those that are in line when it begins.
        """
        if self._on_trial or (self._trial_is_next and self._out):
            return None
        if self._round_is_due():
            self._admitting, self._decoded = self._tickets, 0
        batch = self._admit() if self._admitting else []
        if batch:
            return self._prefill(batch)
        self._admitting = 0
        if not self.running:
            return None
        while self.slots.free < len(self.running):
            self._pause(max(self.running, key=_age))
        return self._decode()

    def _round_is_due(self) -> bool:
        """Always while nothing runs, else every `router_max_wait_tokens` decode steps, which count with and without
        anyone in line. Trials of suspects don't wait for that, or a long line of them would hold up everybody.
        Those who come during a round wait for the next, so rounds end however many come."""
        if not (self.paused or self.suspects or self.waiting):
            return False
        if not self.running or self._trial_is_next:
            return True
        return not self._admitting and self._decoded >= self.limits.router_max_wait_tokens

    @property
    def _trial_is_next(self) -> bool:
        return bool(self.suspects) and not self.paused

    def _line(self) -> Iterable[Sequence]:
        """Those who may be admitted together, in their order."""
        if not self.suspects:
            return chain(self.paused, self.waiting)
        if self.paused:
            return self.paused
        newest = self.suspects[-1].request
        return [next(sequence for sequence in self.suspects if sequence.request == newest)]

    def _admit(self) -> list[Sequence]:
        """The round's next prefill. First come, first served: stops at the first that can't go, so nobody is overtaken
        for ever. One whose token is still to come can't: it would be fed without it."""
        admission = Admission(self.limits, self.running, self.slots.used)
        batch: list[Sequence] = []
        for sequence in self._line():
            if sequence.ticket > self._admitting or sequence.pending or not admission.fits(sequence):
                break
            batch.append(sequence)
        for sequence in batch:
            self._leave_line(sequence)
        return batch

    def _pause(self, sequence: Sequence) -> None:
        """Takes its slots; it comes back by a prefill over prompt and emitted tokens."""
        self._decoded = 0
        self.running.remove(sequence)
        self._release(sequence)
        sequence.state = State.PAUSED
        self._enter_line(sequence)

    # --- steps ------------------------------------------------------------------------------------------------
    def _prefill(self, batch: list[Sequence]) -> Step:
        rows = []
        self.first_admitted = [sequence.arrival_ns for sequence in batch if sequence.state is State.WAITING]
        self._on_trial = any(sequence.suspect for sequence in batch)
        for sequence in batch:
            params, emitted = sequence.params, sequence.emitted
            tokens = sequence.prompt_ids + emitted
            sequence.state = State.RUNNING
            sequence.table_row = self._rows.pop()
            sequence.slots = self.slots.take(len(tokens), len(sequence.prompt_ids) + params.max_new_tokens - 1)
            prompt_ids = sequence.prompt_ids if params.input_penalty else []
            sampling = SamplingRow(params, prompt_ids, list(emitted))
            rows.append(
                Row(
                    table_row=sequence.table_row,
                    request=sequence.request,
                    branch=sequence.branch,
                    start=0,
                    tokens=tokens,
                    slots=list(sequence.slots),
                    sample=True,
                    position=len(emitted),
                    sampling=sampling,
                )
            )
        self.running += batch
        return self._step(no_decode(), rows, batch)

    def _decode(self) -> Step:
        running = self.running
        held = [sequence.slots for sequence in running]
        decode = DecodeRows(
            table_rows=[sequence.table_row for sequence in running],
            starts=[len(slots) for slots in held],  # before they grow
            slots=self.slots.grow(held),
            positions=[len(sequence.emitted) + sequence.pending for sequence in running],
        )
        self._decoded += 1
        return self._step(decode, [], list(running))

    def _step(self, decode: DecodeRows, rows: list[Row], sequences: list[Sequence]) -> Step:
        """`sequences`: whose tokens the step makes, in the order of its result."""
        self._steps += 1
        freed, self._freed = self._freed, []
        self._out.append(sequences)
        last = []
        for sequence in sequences:
            sequence.pending += 1
            if len(sequence.emitted) + sequence.pending >= sequence.params.max_new_tokens:
                last.append(sequence)
        for sequence in last:
            self._release(sequence)
            sequence.state = State.ENDING
        if last:
            self.running = [sequence for sequence in self.running if sequence.state is State.RUNNING]
        return Step(self._steps, "prefill" if rows else "decode", decode, rows, freed)

    def complete(self, result: StepResult) -> dict[Owner, StepOutput]:
        """Takes what the runner made of the oldest step that is out; what each api worker is to be told.

        The token of a sequence that ended since the step was made is dropped; that of a paused one counts.
        """
        outputs: dict[Owner, StepOutput] = {}
        ended: list[Sequence] = []
        eos_ids, gone = self.limits.eos_ids, State.ENDED
        self._on_trial = False  # a trial's step is out alone
        for sequence, token, logprob, alternatives in zip(
            self._out.popleft(), result.tokens, result.logprobs, result.alternatives, strict=True
        ):
            sequence.pending -= 1
            if sequence.state is gone:
                continue
            params, emitted = sequence.params, sequence.emitted
            position = len(emitted)
            emitted.append(token)
            finish = FINISH_NONE
            if logprob != logprob:  # NaN: the model can't go on from here, whatever the token is
                finish = FINISH_ABORT
            elif token in eos_ids and not params.ignore_eos and position + 1 >= params.min_new_tokens:
                finish = FINISH_STOP
            elif position + 1 >= params.max_new_tokens:
                finish = FINISH_LENGTH
            if finish:
                ended.append(sequence)
            if sequence.suspect:
                self._acquit(sequence.request)
            output = outputs.get(sequence.owner)
            if output is None:
                output = outputs[sequence.owner] = StepOutput(self.generation, [], [], [], [], [], [])
            output.requests.append(sequence.request)
            output.branches.append(sequence.branch)
            output.positions.append(position)
            output.tokens.append(token)
            output.logprobs.append(logprob)
            output.finishes.append(finish)
            if alternatives is not None and output.alternatives is None:
                output.alternatives = [None] * (len(output.tokens) - 1)
            if output.alternatives is not None:
                output.alternatives.append(alternatives)
        for sequence in ended:
            self._end(sequence)
        return outputs

    # --- coming and going -------------------------------------------------------------------------------------
    def submit(self, message: Submit) -> Rejected | None:
        """Puts a request in line. A replayed one is never turned away for want of room in the queue.

        A request that is already here, or whose api worker is dead, is ignored.
        """
        if message.request in self._requests or message.epoch <= self._gone.get(message.api, -1):
            return None
        problem = self._never_fits(message)
        if problem:
            return Rejected(self.generation, message.request, "invalid", problem)
        branches = len(message.branches)
        # An empty queue takes a request of any width, or one with more branches than the bound would never run.
        if not message.replay and self.waiting and len(self.waiting) + branches > self.limits.max_queue:
            text = f"the queue is full: {len(self.waiting)} of {self.limits.max_queue} places are taken"
            return Rejected(self.generation, message.request, "queue_full", text, RETRY_AFTER)
        sequences = sequences_of(message)
        self._requests[message.request] = {sequence.branch: sequence for sequence in sequences}
        for sequence in sequences:
            self._enter_line(sequence)
        return None

    def abort(self, request: int, branches: list[int] | None = None) -> None:
        """Ends branches in whatever state they are; those that are unknown have ended already."""
        here = self._requests.get(request, {})
        for branch in list(here) if branches is None else branches:
            if branch in here:
                self._end(here[branch])

    def api_gone(self, api: int, epoch: int) -> None:
        """Ends all requests of an api worker's epoch, and those of it that are still to arrive."""
        self._gone[api] = max(epoch, self._gone.get(api, -1))
        for request, branches in list(self._requests.items()):
            if next(iter(branches.values())).owner == (api, epoch):
                self.abort(request)

    def clear(self) -> None:
        """Ends all requests; the tokens of steps that are out are dropped."""
        for request in list(self._requests):
            self.abort(request)

    def _never_fits(self, message: Submit) -> str | None:
        prompt, params = len(message.prompt_ids), message.params
        if not prompt or not message.branches or len(message.branches) != len(message.emitted):
            return "a request needs a prompt and at least one unfinished branch"
        if any(len(emitted) >= params.max_new_tokens for emitted in message.emitted):
            return f"a branch has its {params.max_new_tokens} tokens already"
        if prompt + params.max_new_tokens + 1 > self.limits.max_total_token_num:
            return (
                f"{prompt} prompt tokens + {params.max_new_tokens} max_new_tokens + 1 "
                f"exceed max_total_token_num {self.limits.max_total_token_num}"
            )
        return None

    def _acquit(self, request: int) -> None:
        """One branch produced a token: the whole request is a normal one again."""
        for sequence in self._requests[request].values():
            sequence.suspect = False
            if sequence.state is State.PAUSED:
                self.suspects.remove(sequence)
                insort(self.paused, sequence, key=_age)

    def _end(self, sequence: Sequence) -> None:
        if sequence.state is State.RUNNING:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence.state is not State.ENDING:
            self._leave_line(sequence)
        sequence.state = State.ENDED
        branches = self._requests[sequence.request]
        del branches[sequence.branch]
        if not branches:
            del self._requests[sequence.request]

    def _release(self, sequence: Sequence) -> None:
        """Takes back the slots and the row of one that leaves the running batch."""
        self.slots.release(sequence.slots)
        sequence.slots = []
        self._rows.append(sequence.table_row)
        self._freed.append(sequence.table_row)
        sequence.table_row = -1

    def _enter_line(self, sequence: Sequence) -> None:
        self._tickets += 1
        sequence.ticket = self._tickets
        if sequence.state is State.WAITING:
            self.waiting.append(sequence)
        else:
            insort(self.suspects if sequence.suspect else self.paused, sequence, key=_age)

    def _leave_line(self, sequence: Sequence) -> None:
        if sequence.state is State.WAITING:
            self.waiting.remove(sequence)
        else:
            (self.suspects if sequence.suspect else self.paused).remove(sequence)

    # --- state, told ------------------------------------------------------------------------------------------
    @property
    def busy(self) -> bool:
        """Somebody runs or is in line. Those in line are then admitted sooner or later."""
        return bool(self._requests)

    def load(self) -> Load:
        worst_case = Admission(self.limits, self.running, used=self.slots.total)
        return Load(
            generation=self.generation,
            slots_total=self.slots.total,
            slots_used=self.slots.used,
            running=len(self.running),
            waiting=len(self.waiting),
            paused=len(self.paused) + len(self.suspects),
            estimated_peak=worst_case.peak / self.slots.total,
        )

    def check(self) -> None:
        """Raises RuntimeError unless every slot and row is free or has exactly one owner."""
        self.slots.check()
        slots = [slot for sequence in self.running for slot in sequence.slots]
        rows = [sequence.table_row for sequence in self.running]
        if len(set(slots)) != len(slots) or len(slots) != self.slots.used:
            raise RuntimeError(f"{len(slots)} slots held, {len(set(slots))} different, {self.slots.used} counted used")
        if sorted(rows + self._rows) != list(range(self.limits.running_max_req_size)):
            raise RuntimeError("a table row is lost or has two owners")
