"""What answers requests with one revision: its plan, tokenizer, limits and ledger."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import msgspec

from lightllmd.api.accounts import Accounts
from lightllmd.api.bad_words import bad_word_ids
from lightllmd.api.branch import TextOptions, open_branches
from lightllmd.api.entry import Entry
from lightllmd.api.intake import Intake, Job
from lightllmd.api.ledger import Ledger
from lightllmd.api.reply import Pending, Signal
from lightllmd.config.plan import Plan
from lightllmd.ipc.messages import SamplingParams
from lightllmd.text.interface import Tokenizer

_INLINE = 16 << 10  # characters; tokenised in a few milliseconds
STOP_COST = 16  # characters that are tokenised in the time that an automaton takes for one of a stop
_BAD_WORD_COST = 16  # the same of a bad word, which is tokenised in several ways
_PROBE = [0]  # any model has a token 0
Result = TypeVar("Result")


async def off_loop(size: int, work: Callable[..., Result], *arguments: Any) -> Result:
    """Work on `size` characters or numbers: here when they are few, in a thread when they are many, so that streams go
    on."""
    if size <= _INLINE:
        return work(*arguments)
    return await asyncio.get_running_loop().run_in_executor(None, work, *arguments)


class FrontEnd:
    def __init__(self, plan: Plan, tokenizer: Tokenizer, ledger: Ledger, accounts: Accounts) -> None:
        self.plan = plan
        self.tokenizer = tokenizer
        self.special_ids = tokenizer.special_ids
        self.ledger = ledger
        self.accounts = accounts
        self.intake = Intake(plan, lambda: tokenizer)
        self.limits = self.intake.limits
        self.http = plan.config.http
        self.model_name = plan.config.http.served_model_name or plan.model_name
        self.entering = 0  # requests that are past the gate and not in the ledger yet; see Revisions.entered
        self.heir: FrontEnd | None = None  # gets what is opened here

    # --- text -----------------------------------------------------------------------------------------------------

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Raises InvalidRequest for text that is no valid Unicode."""
        return await off_loop(len(text), self.tokenizer.encode, text, add_special_tokens)

    async def encode_batch(self, texts: list[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        return await off_loop(sum(map(len, texts)), self.tokenizer.encode_batch, texts, add_special_tokens)

    async def encode_chat(self, messages: list[dict[str, Any]], **options: Any) -> list[int]:
        """Raises InvalidRequest when the model has no chat template or its template refuses the messages."""
        encode = partial(self.tokenizer.encode_chat, **options)
        return await off_loop(len(msgspec.json.encode(messages)), encode, messages)

    async def bad_words(self, words: list[str], field: str) -> list[list[int]]:
        """The token sequences that write them. Raises InvalidRequest."""
        size = sum(map(len, words)) * _BAD_WORD_COST
        return await off_loop(size, bad_word_ids, words, self.tokenizer, field)

    # --- requests -------------------------------------------------------------------------------------------------

    def open(self, jobs: list[Job], arrived_at: float) -> Pending:
        """Enters every job into the ledger, or none. Raises NotReady, QueueFull."""
        if self.heir is not None:
            return self.heir.open(jobs, arrived_at)
        signal = Signal()
        entries: list[Entry] = []
        try:
            for job in jobs:
                params = job.params
                branches = open_branches(params.n, job.prompt_ids, job.text, self.tokenizer, params.healing)
                entry = self.ledger.open(
                    job.prompt_ids,
                    params,
                    branches,
                    signal.set,
                    seed=job.seed,
                    arrived_at=arrived_at,
                    prompt_tokens=len(job.given_ids),
                    batch=entries[0].request if entries else 0,
                )
                entries.append(entry)
                self.accounts.submitted(entry)
        except BaseException:
            for entry in entries:
                self.ledger.cancel(entry)
            raise
        return Pending(entries, signal)

    def bequeath(self, heir: FrontEnd) -> None:
        """`heir` serves the same model: it goes on with what is in flight here, and gets what is on its way in."""
        self.ledger.hand_over(heir.ledger)
        self.heir = heir

    @property
    def in_flight(self) -> int:
        return self.ledger.in_flight + self.entering

    async def probe(self) -> None:
        """Has the engine make one token, for nobody. Raises RequestError when it can't, or dies first."""
        signal = Signal()
        branches = open_branches(1, _PROBE, TextOptions(), self.tokenizer)
        params = SamplingParams(max_new_tokens=1, ignore_eos=True)
        entry = self.ledger.open(_PROBE, params, branches, signal.set, private=True)
        while entry.outcome is None:
            await signal.wait()
        if entry.error is not None:
            raise entry.error
