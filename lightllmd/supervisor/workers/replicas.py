"""The engines of one revision that serve side by side, as many as its plan says: each has generations, restarts and a
place of its own, and the api workers share requests out among those that are up."""

from __future__ import annotations

from collections.abc import Callable

from lightllmd.config.plan import Facts, Plan, encode_plan
from lightllmd.ipc.messages import Down
from lightllmd.supervisor.children.worker import Worker
from lightllmd.supervisor.context import Context
from lightllmd.supervisor.workers.generation import Engine
from lightllmd.supervisor.workers.spare import Spares

SERVING, CANDIDATE, LEAVING = "engine", "candidate", "leaving"  # what their workers are called


class Replicas:
    """There is one engine until the plan is made. `tell_apis` sends a message to every api worker."""

    def __init__(
        self, context: Context, revision: int, role: str, spares: Spares, tell_apis: Callable[[Down], None]
    ) -> None:
        self._context, self._spares, self._tell_apis = context, spares, tell_apis
        self._role = role
        self.revision = revision
        self.plan: Plan | None = None  # None: not made yet
        self.facts: Facts | None = None  # what it was made from
        self.encoded = b""  # the plan
        self.engines = [self._engine(0)]  # by number
        self.dismissed: list[Engine] = []  # that there are too many of; they end
        self.visual: Worker | None = None  # of a plan with images, once there is one

    def _engine(self, replica: int) -> Engine:
        return Engine(self._context, self.revision, replica, self._name(replica), self._spares, self._tell_apis)

    def _name(self, replica: int) -> str:
        alone = self.plan is None or self.plan.replicas == 1
        return self._role if alone and self._role != SERVING else f"{self._role}-{replica}"

    # --- plan ----------------------------------------------------------------------------------------------------
    def plan_for(self, plan: Plan, facts: Facts) -> None:
        """Of the next generations; the present ones go on as they are. Engines that come are not started; what those
        that go have in flight moves to the others."""
        self.plan, self.facts, self.encoded = plan, facts, encode_plan(plan)
        while len(self.engines) < plan.replicas:
            self.engines.append(self._engine(len(self.engines)))
        while len(self.engines) > plan.replicas:
            self.dismissed.append(self.engines.pop())
            self.dismissed[-1].dismiss("not wanted any more")
        for engine in self.engines:
            engine.plan_for(plan, facts)
        self.rename(self._role)

    def rename(self, role: str) -> None:
        """What their workers are called from now on, in status and log."""
        self._role = role
        for engine in self.engines:
            engine.rename(self._name(engine.replica))

    def succeed(self, before: Replicas) -> None:
        """Their workers take the places of those, and go on with their counts."""
        for engine, old in zip(self.engines, before.engines, strict=False):
            engine.worker.succeed(old.worker)

    # --- how they are --------------------------------------------------------------------------------------------
    @property
    def all(self) -> list[Engine]:
        """Those that end, too."""
        return [*self.engines, *self.dismissed]

    @property
    def up(self) -> list[Engine]:
        """Those in service."""
        return [engine for engine in self.engines if engine.up() is not None]

    @property
    def ready(self) -> bool:
        """Whether any is: requests are answered."""
        return any(engine.ready for engine in self.engines)

    @property
    def down(self) -> list[Engine]:
        """Those that should serve and don't."""
        return [engine for engine in self.engines if not engine.ready]

    @property
    def wanted(self) -> bool:
        """Some generation that dies is followed by another."""
        return any(engine.wanted for engine in self.engines)

    @property
    def given_up(self) -> bool:
        """None will come up soon by itself."""
        return all(engine.worker.fatal is not None or engine.worker.limited for engine in self.engines)

    @property
    def permanently_failed(self) -> bool:
        """No generation will ever finish what is held for them, unless an operator steps in."""
        return all(engine.permanently_failed for engine in self.engines)

    @property
    def number(self) -> int:
        """The newest generation's."""
        return max(engine.worker.number for engine in self.engines)

    @property
    def first(self) -> Engine:
        """The first that is ready, or the first."""
        return next((engine for engine in self.engines if engine.ready), self.engines[0])

    def stat(self, name: str) -> float:
        """The sum of this count over the last heartbeats of those that live."""
        return sum(engine.child.stats.get(name, 0) for engine in self.engines if engine.child is not None)

    # --- acts ----------------------------------------------------------------------------------------------------
    def start(self) -> None:
        """Those that were never started are."""
        for engine in self.engines:
            if not engine.worker.starts:
                engine.worker.start()

    def stage(self) -> None:
        """Their weights are copied to host memory, beside what they do."""
        for engine in self.engines:
            engine.stage()

    def unstage(self) -> None:
        """The copies in host memory are dropped."""
        for engine in self.engines:
            engine.unstage()

    def wake(self, after: Replicas) -> None:
        """Back into service, each as soon as the one of `after` in its place has let go of the device's memory."""
        for engine in self.engines:
            engine.wake(after.engines[min(engine.replica, len(after.engines) - 1)])

    def end(self, why: str, now: bool = False) -> None:
        """For good."""
        for engine in self.all:
            engine.end(why, now)

    @property
    def gone(self) -> bool:
        """Nothing of them lives or will."""
        return not any(engine.wanted or engine.generation is not None for engine in self.all)

    def forget_dismissed(self) -> None:
        """Lets go of those that have ended."""
        self.dismissed = [engine for engine in self.dismissed if engine.generation is not None]
