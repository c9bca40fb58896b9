"""The record of every request in flight of one revision. It outlives engine generations: what one lost, another of the
same revision goes on with, at once or when it is up; and where the next revision serves the same model, that revision's
ledger takes over what is in flight.

Pure logic: no HTTP, no sockets, no event loop. A `Link` carries messages to one generation; `notify` of an entry
tells its reader that something changed. All calls come from one thread.

A request is *held* while no generation can take it, *replayed* when it had been on another one, and *suspect* when an
engine died while the request had been admitted and had no token since: see `quarantine`. A suspect waits for the next
generation in the place of the one that died: where that dies of it too, the others' requests are not concerned.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence

from lightllmd.api.inflight.deadlines import Deadlines, late
from lightllmd.api.inflight.entry import Entry
from lightllmd.api.inflight.groups import EngineGroup, EngineGroups, Link
from lightllmd.api.inflight.quarantine import count_death
from lightllmd.api.inflight.tally import Tally
from lightllmd.errors import DeadlineExceeded, InvalidRequest, NotReady, QueueFull, RequestError, RequestFailed
from lightllmd.ipc.messages import FINISH_ABORT, Abort, ImageSpan, Load, Rejected, RequestParams, StepOutput, Submit
from lightllmd.requests.branch import Branch
from lightllmd.requests.seeing import SeenImages
from lightllmd.requests.urgency import ANY_TURN, Turn

log = logging.getLogger(__name__)

SUSPECT_PATIENCE = 15.0  # seconds that a suspect waits for its own group, while others are up


class Ledger:
    """`connect` opens the link to an endpoint; `on_end` is told of every entry that ended, for statistics; `cached`:
    engines keep prompts, which decides where the next one goes."""

    def __init__(
        self,
        tally: Tally,
        *,
        hold_timeout: float,
        max_held: int,
        connect: Callable[[str], Link],
        on_end: Callable[[Entry], None] = lambda entry: None,
        cached: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tally = tally
        self.hold_timeout = hold_timeout
        self.max_held = max_held
        self.groups = EngineGroups(cached)  # that are up
        self.refusal: str | None = None  # the reason while new requests are refused
        self._connect = connect
        self._on_end = on_end
        self._clock = clock
        self._entries: dict[int, Entry] = {}  # by number, which is arrival order
        self._deadlines = Deadlines()
        self._touched: set[Entry] = set()  # readers to notify once the messages at hand are all read

    # --- requests -------------------------------------------------------------------------------------------

    def open(
        self,
        prompt_ids: list[int],
        params: RequestParams,
        branches: list[Branch],
        notify: Callable[[], None],
        *,
        arrived_at: float | None = None,
        private: bool = False,
        prompt_tokens: int | None = None,
        batch: int = 0,
        turn: Turn = ANY_TURN,
        only: int | None = None,
        images: Sequence[ImageSpan] = (),
        seen: SeenImages | None = None,
    ) -> Entry:
        """Takes a request and sends it to an engine or holds it. `branches`: none of one with PoolingParams, whose
        result is `Entry.vectors`. `prompt_tokens`:
        the prompt's length as it was given; None: `prompt_ids` are all of it. `batch`: the number of the entry that was
        opened right before for the first prompt of the same body; 0: this is the first. `seen`: where the prompt's
        `images` are, released when the entry ends, and only then: not where this raises.

        Raises NotReady while refusing, DeadlineExceeded when its time is over already, QueueFull when `max_held`
        requests are held already, but not for the further prompts of a body. A `private` one goes to the generation
        `only`, or any where that is None; it is taken whenever that is there, and only then.
        """
        if private and (self.groups.of(only) is None if only is not None else not self.connected):
            raise NotReady("no engine is ready")
        if self.refusal is not None and not private:
            raise NotReady(self.refusal)
        if not self.connected and not batch and len(self._entries) >= self.max_held:
            raise QueueFull(f"{self.max_held} requests are waiting for the engine to be ready", retry_after=5.0)
        number = self.tally.next_number()
        now = self._clock()
        arrived_at = now if arrived_at is None else arrived_at
        prompt_tokens = len(prompt_ids) if prompt_tokens is None else prompt_tokens
        entry = Entry(
            self,
            number,
            prompt_ids,
            params,
            branches,
            notify,
            arrived_at,
            now,
            private,
            prompt_tokens,
            turn,
            images,
            seen,
        )
        entry.batch = batch or number
        if entry.deadline is not None and entry.deadline <= now:
            raise late(entry)
        self._place(entry, self.groups.of(only) if only is not None else None)
        self._entries[number] = entry  # not before: what can't be sent would stay for ever
        self._deadlines.add(entry)
        if seen is not None:
            seen.when_lost(lambda error: entry.ledger.lose_images(entry, error))
        return entry

    def cancel(self, entry: Entry) -> None:
        """The client is gone. Nothing happens to an entry that has ended."""
        if entry.outcome is None:
            self._abort(entry)
            self._end(entry, "cancelled")

    def fail(self, entry: Entry, error: RequestError) -> None:
        """Ends an entry with `error`, which its reader is told of. Nothing happens to one that has ended."""
        if entry.outcome is None:
            self._abort(entry)
            entry.error = error
            self._end(entry, "failed")
            entry.notify()

    def lose_images(self, entry: Entry, error: RequestError) -> None:
        """No engine will have them that has not had them yet: one that has, goes on with the request."""
        entry.unseen = error
        if not entry.proven:
            self.fail(entry, error)

    def refuse(self, reason: str | None) -> None:
        """From now on new requests are told `reason`; None takes them again."""
        self.refusal = reason

    def fail_all(self, error: RequestError) -> None:
        """As `fail`, all that is in flight."""
        for entry in list(self._entries.values()):
            self.fail(entry, error)

    def cut(self, reason: str) -> None:
        """What is in flight ends where it is: its branches finish with "abort", for a reader that has shown some of
        their text; the error is for the others."""
        for entry in self._entries.values():
            for branch in entry.branches:
                branch.abort()
        self.fail_all(NotReady(reason))

    def abandon(self, reason: str) -> None:
        """No engine will ever serve this ledger again."""
        self.refuse(reason)
        self.cut(reason)
        for group in list(self.groups):
            self._drop(group)

    def migrate(self, successor: Ledger) -> None:
        """Everything in flight goes on in `successor`, whose revision serves the same model: replayed there, or held
        until its engine is up. Lengths were checked by this revision's limits; what the successor's engine can't take,
        it rejects."""
        for group in list(self.groups):
            self._drop(group)
        moved, self._entries = self._entries, {}
        for entry in moved.values():
            entry.ledger, entry.suspect_at = successor, None
        successor._entries = dict(sorted((successor._entries | moved).items()))
        for entry in moved.values():
            successor._deadlines.add(entry)
        successor._resume(moved.values())

    def expire(self) -> None:
        """Ends what is past its deadline, or has been held longer than `hold_timeout`. Call a few times a second."""
        for entry in self._deadlines.passed(self._clock(), self._entries):
            self.fail(entry, late(entry))
        held = [entry for entry in self._entries.values() if entry.held_since is not None]
        if held and self.connected:
            self._resume(entry for entry in held if self._patience_over(entry))
            return
        limit = self._clock() - self.hold_timeout
        for entry in held:
            if entry.held_since is not None and entry.held_since <= limit:
                message = f"no engine became ready within the {self.hold_timeout:g} s that a request is held"
                self.fail(entry, DeadlineExceeded(message))

    # --- generations ------------------------------------------------------------------------------------------

    def engine_up(self, generation: int, endpoint: str, replica: int = 0) -> None:
        """Connects; what is held is replayed first, then what never ran, both in arrival order."""
        before = self.groups.at(replica)
        if before is not None:
            if generation == before.generation:
                return
            self._drop(before)
        self.groups.add(EngineGroup(replica, generation, self._connect(endpoint)))
        self._resume(self._entries.values())

    def _resume(self, entries: Iterable[Entry]) -> None:
        """Those of them that are held."""
        held = [entry for entry in entries if entry.group is None]
        for entry in sorted(held, key=lambda entry: not entry.submitted):  # stable
            if entry.outcome is None:
                self._place(entry)

    def engine_down(self, generation: int, unproven: Iterable[int], quarantined: int, outside: bool = False) -> None:
        """See messages.EngineDown. The socket is closed before anything else is decided, so nothing of the dead arrives
        afterwards."""
        group = self.groups.of(generation)
        if group is None:
            return
        lost = self._drop(group)
        suspects, now = set(unproven), self._clock()
        if outside or not suspects:  # engines die of something else, so that the strikes may be its doing, too
            for entry in self._entries.values():
                entry.strikes = 0
        if outside and self.connected:
            suspects = set()  # they go on elsewhere at once, together
        for entry in list(self._entries.values()):
            if entry.request not in suspects or entry.proven:
                continue
            error = count_death(entry, entry.request == quarantined, now, self.hold_timeout)
            if error is not None:
                self.fail(entry, error)
            else:
                entry.suspect_at = group.replica
        self._resume(lost)

    def _drop(self, group: EngineGroup) -> list[Entry]:
        """What was there is held now."""
        group.link.close()
        self.groups.remove(group)
        now = self._clock()
        lost = [entry for entry in self._entries.values() if entry.group is group]
        for entry in lost:
            entry.group, entry.held_since, entry.queued = None, now, 0
            if entry.private:
                self.fail(entry, NotReady("the engine went down"))
        return lost

    def _place(self, entry: Entry, group: EngineGroup | None = None) -> None:
        """Sends it to `group`, or where it is best; where it can go nowhere it is held."""
        if entry.unseen is not None:
            self.fail(entry, entry.unseen)
            return
        if group is None:
            group = self._suspects_group(entry) if entry.suspect else None
        if group is None and (not entry.suspect or self._patience_over(entry)):
            passed_over = () if entry.submitted else entry.refused_by  # what is replayed no queue turns away
            group = self.groups.route(entry.prompt_ids, entry.params, passed_over, bool(entry.suspect))
        if group is None:
            entry.held_since = self._clock() if entry.held_since is None else entry.held_since
            return
        if entry.submitted:
            self.tally.counts["resumed"] += 1
        self._submit(entry, group)

    def _suspects_group(self, entry: Entry) -> EngineGroup | None:
        return self.groups.at(entry.suspect_at) if entry.suspect_at is not None else None

    def _patience_over(self, entry: Entry) -> bool:
        """A suspect's: the group that died while it had it does not come back."""
        since = entry.held_since
        return entry.suspect_at is None or (since is not None and self._clock() - since >= SUSPECT_PATIENCE)

    def _submit(self, entry: Entry, group: EngineGroup) -> None:
        unfinished = [branch for branch in entry.branches if branch.finish is None]
        generates = bool(entry.branches)
        group.link.send(
            Submit(
                entry.request,
                self.tally.api,
                self.tally.epoch,
                entry.arrival_ns,
                entry.prompt_ids,
                entry.params,
                branches=[branch.index for branch in unfinished] if generates else [0],
                emitted=[branch.ids for branch in unfinished] if generates else [[]],
                batch=entry.batch,
                tenant=entry.turn.tenant,
                weight=entry.turn.weight,
                priority=entry.turn.urgency.priority or 0,
                replay=entry.submitted,
                suspect=entry.suspect,
                images=[*entry.images],
            )
        )
        entry.group, entry.queued = group, len(entry.prompt_ids) + sum(len(branch.ids) for branch in unfinished)
        group.sent(_width(entry), entry.queued, bool(entry.suspect))
        entry.submitted = True
        entry.proven = False
        entry.held_since = None

    # --- what the engine says -------------------------------------------------------------------------------

    def receive(self) -> None:
        """Reads all that is there; each reader is notified once however many tokens came."""
        for group in list(self.groups):
            for message in group.link.receive():
                if message.generation != group.generation:
                    continue
                if isinstance(message, StepOutput):
                    self._step(message, group)
                elif isinstance(message, Rejected):
                    self._rejected(message, group)
                else:
                    group.heard(message)
        touched, self._touched = self._touched, set()
        for entry in touched:
            entry.notify()

    def _step(self, output: StepOutput, group: EngineGroup) -> None:
        self._prompts(output)
        self._pooled(output)
        entries, touched, alternatives = self._entries, self._touched, output.alternatives
        rows = zip(
            output.requests,
            output.branches,
            output.positions,
            output.tokens,
            output.logprobs,
            output.finishes,
            alternatives if alternatives is not None else [None] * len(output.requests),
            strict=True,
        )
        for request, index, position, token, logprob, finish, others in rows:
            entry = entries.get(request)
            if entry is None or entry.group is not group:
                continue  # ended here while this step was on its way
            branch = entry.branches[index]
            if branch.finish is not None or position < len(branch.ids):
                continue
            if finish == FINISH_ABORT:
                self.fail(entry, RequestFailed("the model's logits for this request are not numbers (NaN)"))
                continue
            if position > len(branch.ids):
                # A gap: the engine is wrong; the client must not wait for ever.
                log.error("request %d: position %d where %d follows", request, position, len(branch.ids))
                self.fail(entry, RequestFailed("the engine broke off this request"))
                continue
            if not entry.proven and not self._prove(entry):
                continue
            try:
                stopped = branch.take(token, logprob, others, finish)
            except Exception:  # whatever a tokenizer may raise is this request's fault; others' tokens wait behind it
                log.exception("request %d: its text can't be made", request)
                self.fail(entry, RequestFailed("the tokens of this request could not be turned into text"))
                continue
            if branch.finish is not None:
                if stopped:
                    group.link.send(Abort(request, [index]))
                if all(other.finish is not None for other in entry.branches):
                    self._end(entry, "ok")
            touched.add(entry)

    def _prompts(self, output: StepOutput) -> None:
        """What it says of prompts, all of which comes before or with the first token. What an engine says that only
        goes on with a request doesn't count."""
        for request, tokens in output.cached:
            entry = self._entries.get(request)
            if entry is not None and entry.first_token_at is None:
                entry.cached = entry.cached or tokens
        for part in output.prompts:
            entry = self._entries.get(part.request)
            if entry is not None and not entry.prompt_log.take(part):
                log.error("request %d: a part of its prompt's log-probabilities is missing", part.request)
                self.fail(entry, RequestFailed("the engine broke off this request"))

    def _pooled(self, output: StepOutput) -> None:
        """Requests that generate nothing end with what they get; a second time there is none of that number."""
        for result in output.pooled:
            entry = self._entries.get(result.request)
            if entry is None:
                continue
            if result.vectors is None:
                self.fail(entry, RequestFailed("the model's vectors for this request are not numbers (NaN)"))
            elif entry.branches:
                log.error("request %d: vectors instead of tokens", entry.request)
                self.fail(entry, RequestFailed("the engine broke off this request"))
            else:
                self._prove(entry)
                entry.vectors = result.vectors
                self._end(entry, "ok")
                self._touched.add(entry)

    def _prove(self, entry: Entry) -> bool:
        """Its first token of this engine, or its result, is here. False: what had to come before it is not."""
        if entry.params.prompt_logprobs >= 0 and not entry.prompt_log.whole(entry.prompt_ids):
            log.error("request %d: its first token came before its prompt's log-probabilities", entry.request)
            self.fail(entry, RequestFailed("the engine broke off this request"))
            return False
        entry.proven = True
        if entry.group is not None:
            entry.group.began(entry.queued)
            entry.group.suspects -= bool(entry.suspect)
            entry.queued = 0
        entry.suspect = entry.strikes = 0
        entry.suspect_at = None
        if entry.first_token_at is None:
            entry.first_token_at = self._clock()
        return True

    def _rejected(self, message: Rejected, group: EngineGroup) -> None:
        """One that a full queue turns away is tried wherever else it can be before its client hears of that."""
        entry = self._entries.get(message.request)
        if entry is None or entry.group is not group:
            return
        if message.reason == "queue_full":
            entry.refused_by[group.generation] = message.retry_after or 0.0
            if any(other.generation not in entry.refused_by for other in self.groups):
                self._take_back(entry)
                entry.submitted = False
                self._place(entry)
                return
            entry.error = QueueFull(message.message, retry_after=min(entry.refused_by.values()))
        elif message.reason == "queue_timeout":
            entry.error = DeadlineExceeded(message.message, retry_after=message.retry_after)
        else:
            entry.error = InvalidRequest(message.message)
        self._end(entry, "failed")
        entry.notify()

    # --- ends and counts ----------------------------------------------------------------------------------------

    def _abort(self, entry: Entry) -> None:
        if entry.group is not None:
            entry.group.link.send(Abort(entry.request))

    def _take_back(self, entry: Entry) -> None:
        """It is not where it was any more."""
        group, entry.group = entry.group, None
        if group is not None:
            group.began(entry.queued)
            group.left(_width(entry), bool(entry.suspect))
            entry.queued = 0

    def _end(self, entry: Entry, outcome: str) -> None:
        self._take_back(entry)
        entry.held_since = None
        entry.outcome = outcome
        entry.ended_at = self._clock()
        del self._entries[entry.request]
        if entry.seen is not None:
            entry.seen.release()
        if not entry.private:
            self.tally.counts[outcome] += 1
            self._on_end(entry)

    @property
    def connected(self) -> bool:
        """To an engine."""
        return len(self.groups) > 0

    @property
    def load(self) -> Load | None:
        """The schedulers' last word; None without an engine."""
        return self.groups.load

    @property
    def entries(self) -> Iterable[Entry]:
        """Those in flight, in arrival order."""
        return self._entries.values()

    @property
    def in_flight(self) -> int:
        """Requests that have not ended."""
        return len(self._entries)

    @property
    def held(self) -> int:
        """Those of them that wait for an engine."""
        return sum(entry.group is None for entry in self._entries.values())


def _width(entry: Entry) -> int:
    """Sequences that it is in an engine, finished ones included: one for each branch, one where there is none."""
    return max(1, len(entry.branches))
