"""What answers requests with one revision: its plan, tokenizer, intake and ledger."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from lightllmd.api.helpers.texts import TextHelpers
from lightllmd.api.images.client import VisualClient
from lightllmd.api.inflight.accounts import Accounts
from lightllmd.api.inflight.entry import Entry
from lightllmd.api.inflight.ledger import Ledger
from lightllmd.api.inflight.pending import Pending, Signal
from lightllmd.api.web.tenants import Tenants
from lightllmd.config.plan import Plan
from lightllmd.dialogue.tools import Dialogue
from lightllmd.ipc.messages import PoolingParams, RequestParams, SamplingParams
from lightllmd.requests.asked import Chat, Prompt
from lightllmd.requests.branch import TextOptions, open_branches
from lightllmd.requests.intake import Intake, Job
from lightllmd.requests.limits import RequestLimits
from lightllmd.requests.urgency import Turn
from lightllmd.text.interface import Tokenizer

_PROBE = [0]  # any model has a token 0
_AT_ONCE = 64  # sequences that are entered before other requests have their turn: about 4 ms
_IDS = 1 << 14  # of prompts, which are sent to the engine in the time that a sequence takes besides


class Revision:
    """One of `Revisions`. All calls come from one event loop."""

    def __init__(
        self, plan: Plan, tokenizer: Tokenizer, ledger: Ledger, accounts: Accounts, sight: VisualClient | None = None
    ) -> None:
        """`sight`: None where the plan serves no images."""
        self.plan = plan
        self.tokenizer = tokenizer
        self.special_ids = tokenizer.special_ids
        self.ledger = ledger
        self.limits = RequestLimits.of(plan)
        self.texts = TextHelpers(tokenizer, self.limits)
        self.sight = sight
        self.intake = Intake(plan, lambda: tokenizer, self.texts, sight)
        self.http = plan.config.http
        self.tenants = Tenants(self.http)
        self.model_name = plan.config.http.served_model_name or plan.model_name
        self.entering = 0  # requests that are past the gate and not in the ledger yet; see Revisions.entered
        self.successor: Revision | None = None  # gets what is opened here
        self._accounts = accounts

    async def open(self, jobs: Sequence[Job], arrived_at: float, turn: Turn) -> Pending:
        """Enters every job of a body into the ledger, or none, whose images are released then. `arrived_at`: seconds
        of the ledger's clock. Raises NotReady, QueueFull, DeadlineExceeded.

        A body of many jobs is entered in parts, between which the event loop has its turn. Other bodies may be entered
        then, the engine may go or come, and the revision may be migrated; the client's leaving is noticed afterwards.
        """
        signal = Signal()
        entries: list[Entry] = []
        try:
            with let_go_if_refused(jobs):
                for part in _parts(jobs):
                    if entries:
                        await asyncio.sleep(0)
                        if any(entry.error is not None for entry in entries):
                            break  # the others would be for nothing; `Pending` has the error
                    self._last._enter(part, entries, signal, arrived_at, turn)
                let_go(jobs[len(entries) :])
        except BaseException:
            for entry in entries:
                entry.ledger.cancel(entry)
            raise
        return Pending(entries, signal)

    async def count_chat(self, chat: Chat, dialogue: Dialogue) -> int:
        """Tokens of the prompt that a conversation becomes. Raises InvalidRequest, and what `Sight.show` raises."""
        prepared = self.intake.conventions.prepare(chat.messages, chat.options, dialogue)
        chat = Chat(prepared.messages, prepared.options, chat.images)
        if chat.images:
            return len(await self.intake.ids(Prompt(chat, "messages", False)))
        return await self.texts.count(await self.texts.render(chat), add_special_tokens=False)

    @property
    def _last(self) -> Revision:
        """What this one was migrated to, or itself."""
        last = self
        while last.successor is not None:
            last = last.successor
        return last

    def _enter(
        self,
        jobs: Sequence[Job],
        entries: list[Entry],
        signal: Signal,
        arrived_at: float,
        turn: Turn,
    ) -> None:
        """Adds to `entries`, those of the same body so far."""
        for job in jobs:
            entry = self.ledger.open(
                job.prompt_ids,
                job.params,
                job.branches(self.tokenizer),
                signal.set,
                arrived_at=arrived_at,
                prompt_tokens=len(job.given_ids),
                batch=entries[0].request if entries else 0,
                turn=turn,
                images=job.images,
                seen=job.seen,
            )
            entries.append(entry)
            self._accounts.submitted(entry)

    def migrate(self, successor: Revision) -> None:
        """`successor` serves the same model: it goes on with what is in flight here, and gets what is on its way in."""
        if self.sight is not None and successor.sight is not None:
            self.sight.migrate(successor.sight)
        self.ledger.migrate(successor.ledger)
        self.successor = successor

    def stop(self) -> None:
        """What it has beside this process is let go of, for good."""
        self.texts.stop()
        if self.sight is not None:
            self.sight.close()

    @property
    def in_flight(self) -> int:
        """Requests that this revision has, or is about to."""
        return self.ledger.in_flight + self.entering

    async def probe(self, generation: int | None = None) -> None:
        """Has an engine, or that generation, make one token, or score, that no client asked for. Raises RequestError
        when it can't, or dies first."""
        signal = Signal()
        params: RequestParams
        if self.plan.generates:
            params = SamplingParams(max_new_tokens=1, ignore_eos=True)
            branches = open_branches(1, _PROBE, TextOptions(), self.tokenizer)
        else:
            params, branches = PoolingParams(), []
        entry = self.ledger.open(_PROBE, params, branches, signal.set, private=True, only=generation)
        while entry.outcome is None:
            await signal.wait()
        if entry.error is not None:
            raise entry.error


@contextmanager
def let_go_if_refused(jobs: Iterable[Job]) -> Iterator[None]:
    """Of their images, where they will not run."""
    try:
        yield
    except BaseException:
        let_go(jobs)
        raise


def let_go(jobs: Iterable[Job]) -> None:
    """Of their images, if any."""
    for job in jobs:
        if job.seen is not None:
            job.seen.release()


def _parts(jobs: Sequence[Job]) -> Iterator[Sequence[Job]]:
    """Of about the same size each, at least one job."""
    first, size = 0, 0.0
    for index, job in enumerate(jobs):
        own = job.params.n + len(job.prompt_ids) / _IDS
        if index > first and size + own > _AT_ONCE:
            yield jobs[first:index]
            first, size = index, 0.0
        size += own
    yield jobs[first:]
