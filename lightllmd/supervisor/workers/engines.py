"""All engines: those of the revision in force, the candidates to replace them, and those that finish what they have."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from lightllmd.config.plan import Facts, Plan
from lightllmd.ipc.messages import Down
from lightllmd.supervisor.children.child import Child
from lightllmd.supervisor.children.exits import Ending
from lightllmd.supervisor.context import Context
from lightllmd.supervisor.workers.generation import Engine
from lightllmd.supervisor.workers.ranks import EngineGeneration, FirstEnd
from lightllmd.supervisor.workers.replicas import CANDIDATE, LEAVING, SERVING, Replicas
from lightllmd.supervisor.workers.spare import Spares


class Engines:
    """`tell_apis` sends a message to every api worker."""

    def __init__(self, context: Context, tell_apis: Callable[[Down], None]) -> None:
        self._context = context
        self._tell_apis = tell_apis
        self._revisions = itertools.count(1)
        self.spares = Spares(context)
        self.serving = self._replicas(SERVING)
        self.candidate: Replicas | None = None
        self.leaving: list[Replicas] = []

    def _replicas(self, role: str) -> Replicas:
        return Replicas(self._context, next(self._revisions), role, self.spares, self._tell_apis)

    @property
    def revisions(self) -> Iterator[Replicas]:
        """The one in force first."""
        yield self.serving
        if self.candidate is not None:
            yield self.candidate
        yield from self.leaving

    def __iter__(self) -> Iterator[Engine]:
        for replicas in self.revisions:
            yield from replicas.all

    # --- revisions -----------------------------------------------------------------------------------------------
    def propose(self, plan: Plan, facts: Facts) -> Replicas:
        """A new candidate; it is not started."""
        assert self.candidate is None
        self.candidate = self._replicas(CANDIDATE)
        self.candidate.plan_for(plan, facts)
        for engine in self.candidate.engines:
            engine.on_trial = True
        return self.candidate

    def commit(self) -> Replicas:
        """Puts the candidate in force; the engines that were, which are leaving now."""
        old = self.exchange()
        for engine in self.serving.engines:
            engine.on_trial = False
        self.dismiss_candidate()
        return old

    def exchange(self) -> Replicas:
        """Puts the candidate in force as far as it is up; what was is kept in its place, and may come back."""
        assert self.candidate is not None
        old, self.serving, self.candidate = self.serving, self.candidate, self.serving
        old.rename(LEAVING)
        self.serving.rename(SERVING)
        self.serving.succeed(old)
        for engine in self.serving.engines:
            engine.on_trial = engine.on_trial and not engine.ready
        self.in_force()
        self._plan_spare()
        return old

    def dismiss_candidate(self) -> None:
        """It is none any more: it finishes what it has."""
        if self.candidate is not None:
            self.leaving.append(self.candidate)
            self.candidate = None

    def in_force(self) -> None:
        """Everything that starts from now on gets the plan of those that serve."""
        assert self.serving.plan is not None
        self._context.plan, self._context.revision = self.serving.encoded, self.serving.revision

    def _plan_spare(self) -> None:
        """Not at a mere change of settings: the memory is divided as the plan said that the engine started with."""
        assert self.serving.plan is not None
        self.spares.plan_for(self.serving.plan)

    def drop_candidate(self, why: str) -> None:
        """Given up; it is no candidate any more and ends at once."""
        if self.candidate is not None:
            self.candidate.rename(LEAVING)
            self.candidate.end(why, now=True)
            self.dismiss_candidate()

    def forget_ended(self) -> None:
        """Lets go of those that left: nothing of them lives or will."""
        self.leaving = [replicas for replicas in self.leaving if not replicas.gone]
        for replicas in self.revisions:
            replicas.forget_dismissed()

    # --- processes -----------------------------------------------------------------------------------------------
    def children(self) -> list[Child]:
        """The living processes of all engines, and the spare ones."""
        return [*(child for engine in self for child in engine.children), *self.spares.children()]

    @property
    def holders(self) -> list[tuple[Child | None, bool]]:
        """What holds memory of the device, and whether that is all they will: it changes with what is free there."""
        held: list[tuple[Child | None, bool]] = self.spares.holders
        for engine in self:
            held += [(child, engine.ready) for child in engine.children] or [(None, False)]
        return held

    @property
    def unsettled(self) -> list[EngineGeneration]:
        """They are starting or dying: what they hold of the device at this moment can't be told."""
        return [engine.generation for engine in self if engine.generation is not None and not engine.ready]

    def owner(self, child: Child) -> Engine | None:
        """The engine in whose generation `child` is a rank."""
        return next((one for one in self if one.generation is not None and child in one.generation.children), None)

    def heard(self, engine: Engine, child: Child, became_ready: bool) -> None:
        """A rank of its generation said something, or closed its channel."""
        if became_ready and child is engine.child and engine.ready:
            self.became_ready(engine)
        engine.look()

    def check_hang(self) -> None:
        """At every tick."""
        for engine in self:
            engine.check_hang()

    def became_ready(self, engine: Engine) -> None:
        """Its generation is in service; behind the engines in force a spare is kept. A candidate's plan isn't in force
        yet: the commit follows, and asks for a spare."""
        engine.became_ready()
        if engine in self.serving.engines:
            self._plan_spare()
            self.spares.keep()

    def died(self, engine: Engine, child: Child, ending: Ending, again: bool) -> FirstEnd | None:
        """The process of a rank of its generation is dead. `again`: policy may start another. As `Engine.died`."""
        first = engine.died(child, ending, again)
        if again:
            for waiting in self.serving.engines:
                if not waiting.on_trial:
                    waiting.tick()  # it may have waited for this one's memory
        return first

    def api_gone(self, api: int, epoch: int) -> None:
        """Tells all engines that this process of that api worker is dead."""
        for engine in self:
            engine.api_gone(api, epoch)

    def tick(self) -> None:
        """Starts the generations that are due."""
        for engine in self:
            if not engine.on_trial:
                engine.tick()
        self.forget_ended()

    def stop(self, why: str) -> None:
        """All of them, for good."""
        for engine in self:
            engine.end(why)
        self.spares.end(why)
