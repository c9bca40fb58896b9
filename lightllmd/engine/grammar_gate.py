"""Where requests wait until their grammars are compiled, and have been led through what the requests have emitted
before a replay, so that no step waits for either. What is compiled here was compiled by the api worker's helper process
before: its time and its memory are known to be bounded."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from lightllmd.engine.scheduling.grammar_rows import CompiledGrammars, GrammarRow
from lightllmd.engine.scheduling.sequence import Owner
from lightllmd.errors import LightllmdError
from lightllmd.grammar.compiler import GrammarCompiler
from lightllmd.ipc.messages import Grammar, SamplingParams, Submit

log = logging.getLogger(__name__)

_NICE = 10
AT_ONCE = 16  # emitted tokens of a request, behind which a step may lead the grammar itself: 0.2 ms


class Waiting(NamedTuple):
    """A request, and the monotonic seconds at which it came. `rows`: of its grammar, behind what it has emitted, one
    for each of its branches; None: they are made when it runs."""

    message: Submit
    since: float
    rows: list[GrammarRow] | None = None


class Refused(NamedTuple):
    """A request whose grammar can't be compiled after all, and why."""

    message: Submit
    why: str


class _Replayed(NamedTuple):
    """A request that has emitted much, and its grammar's row for each of its branches."""

    waiting: Waiting
    rows: dict[int, GrammarRow]
    emitted: dict[int, list[int]]


class GrammarGate:
    """All calls come from the engine's loop; a thread compiles, one grammar after the other, and another one leads rows
    through emitted tokens. They let go of the interpreter's lock as long as they compile, and with each token. They
    start with the first grammar, and with the first replay."""

    def __init__(self, grammars: CompiledGrammars, compiler: Callable[[], GrammarCompiler]) -> None:
        """`compiler` is called in the thread, for the first grammar. Raises what that raises nowhere: the requests that
        wait are refused."""
        self._grammars, self._make = grammars, compiler
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread: threading.Thread | None = None
        self._leader: threading.Thread | None = None
        self._orders: queue.SimpleQueue[Grammar] = queue.SimpleQueue()
        self._to_lead: queue.SimpleQueue[_Replayed] = queue.SimpleQueue()
        self._done: deque[tuple[Grammar, Any, str] | _Replayed] = deque()  # compiled, or why not
        self._waiting: dict[Grammar, list[Waiting]] = {}
        self._replayed: dict[int, _Replayed] = {}  # by request
        self.compiled, self.seconds = 0, 0.0  # grammars, and what that took

    def fileno(self) -> int:
        """Readable when `take` has something."""
        return self._event

    def __len__(self) -> int:
        """Requests that wait."""
        return sum(map(len, self._waiting.values())) + len(self._replayed)

    def holds(self, message: Submit, now: float) -> bool:
        """Whether the request waits here now. `now`: monotonic seconds."""
        params = message.params
        if not isinstance(params, SamplingParams) or params.grammar is None:
            return False
        if self._grammars.has(params.grammar):
            return self._leads(Waiting(message, now))
        if params.grammar not in self._waiting:
            self._waiting[params.grammar] = []
            self._orders.put(params.grammar)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="grammars", daemon=True)
                self._thread.start()
        self._waiting[params.grammar].append(Waiting(message, now))
        return True

    def _leads(self, one: Waiting) -> bool:
        """Whether the thread leads the rows of the request, whose grammar is compiled, through what it has emitted."""
        message = one.message
        if sum(map(len, message.emitted)) <= AT_ONCE:
            return False
        assert isinstance(message.params, SamplingParams)
        row = self._grammars.row(message.params)
        emitted = dict(zip(message.branches, message.emitted, strict=True))
        replayed = _Replayed(one, {branch: row.fork(beam=False) for branch in emitted}, emitted)
        self._replayed[message.request] = replayed
        self._to_lead.put(replayed)
        if self._leader is None:
            self._leader = threading.Thread(target=self._lead, name="replays", daemon=True)
            self._leader.start()
        return True

    def take(self) -> list[Waiting | Refused]:
        """Requests that waited and need not any more, in the order of their arrival for each grammar."""
        try:
            os.eventfd_read(self._event)
        except BlockingIOError:
            return []
        taken: list[Waiting | Refused] = []
        while self._done:
            done = self._done.popleft()
            if isinstance(done, _Replayed):
                message, since, _ = done.waiting
                if self._replayed.get(message.request) is done:
                    del self._replayed[message.request]
                    taken.append(Waiting(message, since, [done.rows[branch] for branch in message.branches]))
                continue
            grammar, compiled, why = done
            waiting = self._waiting.pop(grammar, [])
            if compiled is None:
                taken += [Refused(one.message, why) for one in waiting]
            elif waiting:
                self._grammars.add(grammar, compiled)
                taken += [one for one in waiting if not self._leads(one)]
        return taken

    def abort(self, request: int, branches: list[int] | None) -> None:
        """As `Scheduler.abort`, of one that waits here."""
        held = [*(one for waiting in self._waiting.values() for one in waiting)]
        held += [replayed.waiting for replayed in self._replayed.values()]
        for message in [one.message for one in held]:
            if message.request == request:
                gone = message.branches if branches is None else branches
                left = [at for at, branch in enumerate(message.branches) if branch not in gone]
                message.emitted = [message.emitted[at] for at in left]
                message.branches = [message.branches[at] for at in left]
        self._keep(lambda message: bool(message.branches))

    def api_gone(self, owner: Owner) -> None:
        """As `Scheduler.api_gone`."""
        self._keep(lambda message: (message.api, message.epoch) != owner)

    def clear(self) -> None:
        """None of them waits any more."""
        self._keep(lambda _: False)

    def _keep(self, wanted: Callable[[Submit], bool]) -> None:
        """What is being compiled is compiled, though no request may wait for it any more."""
        for grammar, waiting in self._waiting.items():
            self._waiting[grammar] = [one for one in waiting if wanted(one.message)]
        self._replayed = {
            request: replayed for request, replayed in self._replayed.items() if wanted(replayed.waiting.message)
        }

    def _work(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        while True:
            grammar = self._orders.get()
            begun, compiled, why = time.monotonic(), None, ""
            try:
                if not self._grammars.ready:
                    self._grammars.use(self._make())
                compiled = self._grammars.compile(grammar)
            except LightllmdError as failure:
                why = failure.message
            except Exception:
                log.exception("a grammar can't be compiled")
                why = "the grammar can't be compiled"
            self.compiled += 1
            self.seconds += time.monotonic() - begun
            self._done.append((grammar, compiled, why))
            os.eventfd_write(self._event, 1)

    def _lead(self) -> None:
        """Not as nice as the other thread: the loop would wait for one that is held up with the interpreter's lock."""
        while True:
            replayed = self._to_lead.get()
            for branch, emitted in replayed.emitted.items():
                for behind in range(AT_ONCE, len(emitted) + AT_ONCE, AT_ONCE):
                    if self._replayed.get(replayed.waiting.message.request) is replayed:  # it was not aborted
                        replayed.rows[branch].advance(emitted[:behind])
            self._done.append(replayed)
            os.eventfd_write(self._event, 1)
