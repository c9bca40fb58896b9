"""health_monitor: a one-token request of our own through every api worker, ledger and engine, from time to time.

Deaths, silence and work that stands still are found without it (`health`). This finds what looks alive and gives no
answer: a lost connection between api worker and engine, a request that is never scheduled, an answer that never comes.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from lightllmd.ipc.messages import Probe, Probed
from lightllmd.supervisor.children.child import Child
from lightllmd.supervisor.context import Context
from lightllmd.supervisor.workers.api_workers import ApiWorkers
from lightllmd.supervisor.workers.engines import Engines

ERRORS_IN_A_ROW = 2  # probes of an api worker that have to fail with an error before anything is done
STANDS_STILL = 5.0  # seconds without progress after which an engine doesn't count as working
LONG_STEP = 1.0  # seconds without a token after which a working engine is in the middle of a long step

Who = TypeVar("Who", bound=Hashable)  # an api worker


@dataclass(frozen=True)
class Look:
    """The engine by its heartbeats."""

    moved: float  # running clock: its last progress
    tokens_out: float
    running: float  # branches in the running batch
    queued: float  # branches waiting for admission or paused


class Work:
    """Whether an engine may be excused for not having answered yet: it works, and the probe's turn may not have come.

    A request that was sent is answered by the first or second step once nothing is queued, so there is no excuse while
    tokens come and the queue is empty. When none come although it works on some, it is in the middle of a long step,
    which the probe may be part of or has to wait for.
    """

    def __init__(self, now: float, look: Look) -> None:
        self._tokens_out, self._gave = look.tokens_out, now - LONG_STEP  # running clock: when that last changed

    def excuses(self, now: float, look: Look) -> bool:
        """Whether it is excused at `now` (running clock). Called at each tick of a round."""
        if look.tokens_out != self._tokens_out:
            self._tokens_out, self._gave = look.tokens_out, now
        in_long_step = look.running > 0 and now - self._gave >= LONG_STEP
        return now - look.moved < STANDS_STILL and (look.queued > 0 or in_long_step)


@dataclass(frozen=True)
class Verdict(Generic[Who]):
    """What is to be replaced, and why. Empty: all is well, or not bad enough yet."""

    engine: str = ""
    apis: Mapping[Who, str] = field(default_factory=dict)


def judge(
    answers: Mapping[Who, str | None],
    *,
    late: bool,
    errors_before: Mapping[Who, int],
    engine_tried: bool,
    timeout: float,
) -> Verdict[Who] | None:
    """What follows from one round of probes; None: wait for the rest.

    `answers`: None: not yet; "": well; else the error. `late`: `timeout` seconds without an excuse are over.
    `errors_before`: rounds in a row before this one that ended with an error.
    `engine_tried`: the engine was restarted for such a verdict, and no probe has been answered well since.

    An api worker that fails alone is replaced. Where none is answered well the engine is restarted; if that didn't
    help it was not the engine, and the api workers are replaced.
    """
    if not late and None in answers.values():
        return None
    failed = {}
    for who, error in answers.items():
        if error is None:
            failed[who] = f"no answer for {timeout:g} s"
        elif error and errors_before.get(who, 0) + 1 >= ERRORS_IN_A_ROW:
            failed[who] = error
    if not failed:
        return Verdict()
    if engine_tried or "" in answers.values():
        return Verdict(apis=failed)
    return Verdict(engine=next(iter(failed.values())))


@dataclass
class Round:
    """One probe of each api worker that was ready."""

    number: int
    generation: int  # of the engine that it goes to
    work: Work
    ticked: float  # running clock: the last tick
    answers: dict[Child, str | None]
    waited: float = 0.0  # seconds without an excuse


class Monitor:
    """Belongs to the single-writer loop; `tick` is called at each of its ticks. Each of several engines in force has
    rounds of its own."""

    def __init__(self, context: Context, engines: Engines, front: ApiWorkers) -> None:
        self._context, self._engines, self._front = context, engines, front
        self._numbers = itertools.count(1)
        self._watches: list[_Watch] = []  # by replica

    @property
    def trouble(self) -> str:
        """What the last rounds found; empty: all well, or health_monitor is off."""
        return next((watch.trouble for watch in self._watches if watch.trouble), "")

    def tick(self, steady: bool) -> None:
        """`steady`: requests are served and no job changes which workers do."""
        answers = [(child, answer) for child in self._front.children() for answer in _take_answers(child)]
        children = [engine.child for engine in self._engines.serving.engines]
        self._watches += [
            _Watch(self._context, self._front, self._numbers) for _ in range(len(self._watches), len(children))
        ]
        del self._watches[len(children) :]
        for watch, child in zip(self._watches, children, strict=True):
            watch.tick(child, answers, steady)


class _Watch:
    """Over the generations of one engine."""

    def __init__(self, context: Context, front: ApiWorkers, numbers: Iterator[int]) -> None:
        self._context, self._front = context, front
        self._numbers = numbers
        self._round: Round | None = None
        self._due = 0.0  # running clock: when the next round begins
        self._errors: dict[Child, int] = {}  # rounds in a row that ended with an error
        self._engine_tried = False
        self.trouble = ""  # what the last round found; empty: all well, or health_monitor is off

    def tick(self, engine: Child | None, answers: list[tuple[Child, Probed]], steady: bool) -> None:
        if not self._context.config.params.health_monitor:
            self._round, self.trouble, self._engine_tried = None, "", False
            self._errors.clear()
        elif engine is None or not engine.ready or not steady:
            self._round = None
        elif self._round is None or self._round.generation != engine.number:
            self._round = None
            if self._context.clock.now >= self._due:
                self._begin(engine)
        else:
            self._go_on(self._round, engine, answers)

    def _begin(self, engine: Child) -> None:
        now = self._context.clock.now
        asked = [api.worker.child for api in self._front.apis if api.worker.ready and not api.rolling]
        answers: dict[Child, str | None] = {child: None for child in asked if child is not None}
        if not answers:
            return
        self._errors = {child: count for child, count in self._errors.items() if child in answers}
        self._round = Round(next(self._numbers), engine.number, Work(now, _look(engine)), now, answers)
        for child in answers:
            child.send(Probe(self._round.number, engine.number))

    def _go_on(self, running: Round, engine: Child, answers: list[tuple[Child, Probed]]) -> None:
        now, timeout = self._context.clock.now, self._context.config.supervisor.health_timeout
        excused = running.work.excuses(now, _look(engine))
        for child, answer in answers:
            if answer.number != running.number or child not in running.answers:
                continue
            if answer.error and excused:
                del running.answers[child]  # refused for the queue's length, say: neither well nor ill
            else:
                running.answers[child] = answer.error
        for child in [child for child in running.answers if not child.ready]:
            del running.answers[child]
        if not excused or "" in running.answers.values():
            # Where another's probe was answered, all had their turn.
            running.waited += now - running.ticked
        running.ticked = now
        verdict = judge(
            running.answers,
            late=running.waited >= timeout,
            errors_before=self._errors,
            engine_tried=self._engine_tried,
            timeout=timeout,
        )
        if verdict is not None:
            self._end(running, verdict, engine)

    def _end(self, ended: Round, verdict: Verdict[Child], engine: Child) -> None:
        self._round = None
        self._due = self._context.clock.now + self._context.config.supervisor.health_interval
        for child, error in ended.answers.items():
            self._errors[child] = self._errors.get(child, 0) + 1 if error else 0
        bad = next((error for error in ended.answers.values() if error != ""), "")
        self.trouble = "" if bad == "" else f"health probe failed: {bad or 'no answer'}"
        if "" in ended.answers.values() or verdict.apis:
            self._engine_tried = False
        for child, why in verdict.apis.items():
            self._context.events.add("health", f"health probe: {why}; it is replaced", child.worker, "error")
            api = self._front.owner(child)
            if api is not None:
                api.roll()
        if verdict.engine:
            self._engine_tried = True
            self._due = 0.0  # at once when the next generation is ready
            engine.abort(f"health probe: {verdict.engine}", held=True)


def _take_answers(child: Child) -> list[Probed]:
    answers = [said for said in child.said if isinstance(said, Probed)]
    if answers:
        child.said = [said for said in child.said if not isinstance(said, Probed)]
    return answers


def _look(engine: Child) -> Look:
    stats = engine.stats
    queued = stats.get("waiting", 0) + stats.get("paused", 0)
    return Look(engine.vitals.moved, stats.get("tokens_out", 0), stats.get("running", 0), queued)
