"""Grammars of clients, compiled once in helper processes to see that an engine can: xgrammar is native code that reads
what a client wrote, so that its time, its memory and its crashes have to be those of a process that nothing needs."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from hashlib import blake2b

from lightllmd.api.helpers.pool import Helpers
from lightllmd.grammar.check import SECONDS, refuse_long
from lightllmd.ipc.messages import Grammar
from lightllmd.requests.limits import RequestLimits
from lightllmd.requests.text_work import grammar_check
from lightllmd.text.interface import Tokenizer

_KEPT = 4096  # grammars that are known to be good, by content
_KEPT_SIZE = 32 << 20  # characters of these
_PROCESSES = 2


class CheckedGrammars:
    """Of one revision. All calls come from the thread of the event loop."""

    def __init__(self, tokenizer: Tokenizer, limits: RequestLimits) -> None:
        check = grammar_check(lambda: tokenizer, limits)
        self._processes = Helpers({"grammar": check.check}, light=_PROCESSES)
        self._good: OrderedDict[bytes, Grammar] = OrderedDict()  # as the engine gets them, by what a client wrote
        self._size = 0  # characters of them
        self._checking: dict[tuple[bytes, str], asyncio.Task[Grammar]] = {}  # by content and field

    def stop(self) -> None:
        """Ends all processes, for good."""
        self._processes.stop()

    async def check(self, grammar: Grammar, field: str) -> Grammar:
        """What the engine gets of it. Raises InvalidRequest, which names the field, and what `Helpers.run` raises. One
        of the same content that is being checked is waited for."""
        refuse_long(grammar, field)
        text = f"{grammar.kind} {grammar.whitespace!r} {grammar.text}".encode("utf-8", "surrogatepass")
        key = blake2b(text, digest_size=16).digest()
        if key in self._good:
            self._good.move_to_end(key)
            return self._good[key]
        task = self._checking.get((key, field))
        if task is None:
            task = self._checking[key, field] = asyncio.create_task(self._compile(grammar, field))
            task.add_done_callback(lambda done: self._checked(key, field, done))
        return await asyncio.shield(task)  # a client that leaves doesn't end it

    async def _compile(self, grammar: Grammar, field: str) -> Grammar:
        subject = f"{field}: compiling this {grammar.kind} of {len(grammar.text)} characters"
        checked: Grammar = await self._processes.run(
            "grammar", grammar, field, heavy=False, seconds=SECONDS, subject=subject
        )
        return checked

    def _checked(self, key: bytes, field: str, task: asyncio.Task[Grammar]) -> None:
        del self._checking[key, field]
        if not task.cancelled() and task.exception() is None:
            self._good[key] = task.result()
            self._size += len(task.result().text)
            while len(self._good) > 1 and (len(self._good) > _KEPT or self._size > _KEPT_SIZE):
                _, gone = self._good.popitem(last=False)
                self._size -= len(gone.text)
