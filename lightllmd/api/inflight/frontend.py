"""What answers requests with one revision: its plan, tokenizer, limits and ledger."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import msgspec
from starlette.types import Scope

from lightllmd.api.dialects.token_views import TokenViews
from lightllmd.api.helpers.pool import Helpers
from lightllmd.api.helpers.process import Task
from lightllmd.api.inflight.accounts import Accounts
from lightllmd.api.inflight.entry import Entry
from lightllmd.api.inflight.ledger import Ledger
from lightllmd.api.inflight.reply import Pending, Signal
from lightllmd.api.web import bodies
from lightllmd.api.web.bodies import Body
from lightllmd.api.web.tenants import Tenants
from lightllmd.config.plan import Plan
from lightllmd.ipc.messages import SamplingParams
from lightllmd.requests.bad_words import bad_word_ids
from lightllmd.requests.branch import TextOptions, open_branches
from lightllmd.requests.encoding import Encoder
from lightllmd.requests.intake import Intake, Job
from lightllmd.text.interface import Tokenizer

_INLINE = 16 << 10  # characters or numbers; done with in a few milliseconds
_SHORT = 1 << 10  # characters; tokenised in well under a millisecond
_LONG = 64 << 10  # characters; what is longer waits its turn among others of its kind
_RENDERING = 5.0  # seconds of CPU time for the messages of a long chat
STOP_COST = 16  # characters that are tokenised in the time that an automaton takes for one of a stop
_BAD_WORD_COST = 16  # the same of a bad word, which is tokenised in several ways
_PROBE = [0]  # any model has a token 0
_MANY_MESSAGES = 256
Result = TypeVar("Result")


async def off_loop(size: int, work: Callable[..., Result], *arguments: Any) -> Result:
    """Work on `size` characters or numbers: here when they are few, in a thread when they are many, so that streams go
    on."""
    if size <= _INLINE:
        return work(*arguments)
    return await asyncio.get_running_loop().run_in_executor(None, work, *arguments)


def _lists(arrays: list[array[int]]) -> list[list[int]]:
    return [ids.tolist() for ids in arrays]


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
        self._tenants = Tenants(self.http)
        self.model_name = plan.config.http.served_model_name or plan.model_name
        self.entering = 0  # requests that are past the gate and not in the ledger yet; see Revisions.entered
        self.heir: FrontEnd | None = None  # gets what is opened here
        self.helpers = Helpers(self._tasks())

    # --- text -----------------------------------------------------------------------------------------------------

    def _tasks(self) -> dict[str, Task]:
        """What helper processes do for this front."""
        encoder, views = Encoder(self.tokenizer, self.limits), TokenViews(self.tokenizer, self.limits)
        return {
            "decode": bodies.decode_noting,
            "encode": encoder.encode,
            "encode_chat": encoder.encode_chat,
            "render": encoder.render,
            "count": encoder.count,
            "tokenize": views.tokenize,
            "detokenize": views.detokenize,
            "bad_words": partial(bad_word_ids, tokenizer=self.tokenizer),
        }

    async def decode(self, raw: bytes, model: type[Body], noting: bool) -> tuple[Body, set[str]]:
        """`bodies.decode_noting` of a large body."""
        return await self.helpers.run("decode", raw, model, noting, heavy=len(raw) > _LONG)

    async def encode(
        self, texts: list[str], fields: list[str], *, add_special_tokens: bool = True, cut: bool = False
    ) -> list[list[int]]:
        """Raises InvalidRequest, naming one of the `fields`, for text that is no valid Unicode or too long. `cut`: the
        caller cuts what is too long, of which the middle may be missing."""
        size = sum(map(len, texts))
        if size <= _SHORT:
            return [self.tokenizer.encode(text, add_special_tokens) for text in texts]
        ids = await self.helpers.run("encode", texts, fields, add_special_tokens, cut, heavy=size > _LONG)
        return await off_loop(sum(map(len, ids)), _lists, ids)

    async def encode_chat(
        self, messages: list[dict[str, Any]], options: dict[str, Any], *, cut: bool = False
    ) -> list[int]:
        """Raises InvalidRequest when the model has no chat template or its template refuses the messages, and as
        `encode`. `options` as `ChatTemplate.render`.

        The template runs in a helper process, however short they are: its loops are its own."""
        size = sum(len(message.get("content") or "") for message in messages)
        if options.get("variables"):
            size += len(msgspec.json.encode(options))
        if size <= _LONG and len(messages) <= _MANY_MESSAGES:
            return (await self.helpers.run("encode_chat", messages, options, cut, heavy=False)).tolist()
        text = await self.render(messages, options)
        (ids,) = await self.encode([text], ["messages"], add_special_tokens=False, cut=cut)
        return ids

    async def render(self, messages: list[dict[str, Any]], options: dict[str, Any]) -> str:
        return await self.helpers.run("render", messages, options, heavy=True, seconds=_RENDERING)

    async def count(self, text: str, *, add_special_tokens: bool = True) -> int:
        """Tokens of a text of any length."""
        if len(text) <= _SHORT:
            return len(self.tokenizer.encode(text, add_special_tokens))
        return await self.helpers.run("count", text, add_special_tokens, heavy=len(text) > _LONG)

    async def tokenized(self, text: str, *, add_special_tokens: bool, strings: bool) -> bytes:
        """See TokenViews."""
        return await self.helpers.run("tokenize", text, add_special_tokens, strings, heavy=len(text) > _LONG)

    async def detokenized(self, ids: array[int]) -> bytes:
        return await self.helpers.run("detokenize", ids, heavy=len(ids) > _LONG)

    async def bad_words(self, words: list[str], field: str) -> list[list[int]]:
        """The token sequences that write them. Raises InvalidRequest."""
        size = sum(map(len, words)) * _BAD_WORD_COST
        if size <= _SHORT:
            return bad_word_ids(words, field, self.tokenizer)
        return await self.helpers.run("bad_words", words, field, heavy=size > _LONG)

    # --- requests -------------------------------------------------------------------------------------------------

    def open(self, jobs: list[Job], arrived_at: float, scope: Scope) -> Pending:
        """Enters every job into the ledger, or none; `scope` is the request's. Raises NotReady, QueueFull."""
        if self.heir is not None:
            return self.heir.open(jobs, arrived_at, scope)
        tenant = self._tenants.of(scope)
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
                    tenant=tenant,
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
