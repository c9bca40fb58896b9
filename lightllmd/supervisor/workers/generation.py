"""The engine of one revision: one generation at a time, and the next when it dies."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from lightllmd.config.plan import Facts, Plan, encode_plan
from lightllmd.errors import SystemFailure
from lightllmd.ipc.messages import ApiGone, Down, EngineDown, EngineUp, Sleep, Stage, Wake
from lightllmd.supervisor import snapshot
from lightllmd.supervisor.children.child import Child
from lightllmd.supervisor.children.exits import Ending
from lightllmd.supervisor.children.worker import Worker
from lightllmd.supervisor.context import Context
from lightllmd.supervisor.workers.memory_gate import MemoryGate
from lightllmd.supervisor.workers.ranks import EngineGeneration, FirstEnd
from lightllmd.supervisor.workers.spare import EngineProcess, Spares, rank_name


class Engine:
    """Keeps one generation of a revision in service. `tell_apis` sends a message to every api worker."""

    def __init__(
        self,
        context: Context,
        revision: int,
        replica: int,
        name: str,
        spares: Spares,
        tell_apis: Callable[[Down], None],
    ) -> None:
        self._context = context
        self._tell_apis = tell_apis
        self._spares = spares
        self.revision = revision
        self.replica = replica  # its number among those of its revision
        self.worker = Worker(context, "engine", replica, self._launch, context.generations)
        self.worker.name = name
        self.generation: EngineGeneration | None = None
        self.memory = MemoryGate(context)
        self.plan: Plan | None = None  # None: not made yet
        self.facts: Facts | None = None  # what it was made from
        self.encoded = b""  # the plan
        self.wanted = True  # a generation that dies is followed by another
        self.on_trial = False  # ... but while this holds: one that dies has failed, and a switch decides what follows
        self._rest = ""  # what the generation was told last: "sleep", or "wake", which it is not ready again after
        self._after: Engine | None = None  # it is not woken, nor started, before that one has let go of the device

    def plan_for(self, plan: Plan, facts: Facts) -> None:
        """Of the next generation; the present one goes on as it is."""
        self.plan, self.facts, self.encoded = plan, facts, encode_plan(plan)
        self.memory.plan_for(plan, self.replica)

    def rename(self, name: str) -> None:
        """What its worker is called from now on, in status and log."""
        self.worker.name = name
        if self.generation is not None:
            self.generation.rename(name)

    def _launch(self, number: int) -> Child:
        """Raises SystemFailure where the host has no process for the first rank; where it has none for another, the
        generation ends at once."""
        assert self.plan is not None
        ranks: list[EngineProcess] = []
        refused = None
        for rank in range(self.plan.ranks):
            device = self.plan.device_of(self.replica, rank)
            try:
                name = rank_name(self.worker.name, rank)
                ranks.append(self._spares.take(self.plan, device) or EngineProcess(self._context, name, device))
            except SystemFailure as refusal:
                if not ranks:
                    raise
                refused = refusal
                break
        name = self.worker.name
        which = number, self.replica, self.revision
        self.generation = EngineGeneration(self._context, name, *which, self.encoded, ranks, refused)
        return self.generation.leader

    @property
    def child(self) -> Child | None:
        """The process that leads its generation, if one lives."""
        return self.generation.leader if self.generation else None

    @property
    def children(self) -> list[Child]:
        """The living processes of all ranks."""
        return self.generation.living if self.generation else []

    @property
    def ready(self) -> bool:
        """It has taken all the memory that it will."""
        return self.generation is not None and self.generation.ready

    @property
    def ending(self) -> bool:
        """Its generation is on its way out, of which not everything may be known yet."""
        return self.generation is not None and self.generation.ending

    @property
    def restarts(self) -> bool:
        """A generation that dies, or has died, is followed by another."""
        return self.wanted and self.worker.fatal is None

    @property
    def asleep(self) -> bool:
        """Its weights are in host memory, the device's memory is free."""
        generation = self.generation
        return generation is not None and not generation.ending and generation.leader.vitals.phase == "asleep"

    @property
    def permanently_failed(self) -> bool:
        """No generation of it will ever finish what is held for it, unless an operator steps in."""
        return self.child is None and (self.worker.fatal is not None or self.worker.changed)

    def snapshots(self) -> list[snapshot.WorkerStatus]:
        """Of each rank, as the control plane shows it; the first tells of the engine's own life."""
        followers = self.generation.children[1:] if self.generation else []
        rest = [self.worker.snapshot(rank, child) for rank, child in enumerate(followers, 1)]
        return [self.worker.snapshot(0), *(msgspec.structs.replace(one, restarts=0, last_exit=None) for one in rest)]

    def up(self) -> EngineUp | None:
        """What a new api worker has to be told; None while no generation is in service."""
        if self.generation is None or self._rest or not self.generation.ready:
            return None
        return EngineUp(self.generation.number, self.generation.endpoint, self.revision, self.replica)

    def became_ready(self) -> None:
        """Its generation is in service, for the first time or after sleep: the api workers are told."""
        self.worker.became_ready()
        if self._rest == "wake":
            self._rest = ""
        if up := self.up():
            self._tell_apis(up)

    def look(self) -> None:
        """After anything that happened to a rank: once it is known why the generation ends the api workers hear of
        that, before anything else is done."""
        generation = self.generation
        if generation is None or not generation.look():
            return
        first, self._rest = generation.first, ""
        assert first is not None
        ending, flight = first.ending, first.flight
        self._tell_apis(
            EngineDown(
                generation=generation.number,
                cause=ending.cause,
                unproven=[] if first.asked else flight.unproven,
                quarantined=0 if ending.outside else flight.quarantined,
                outside=ending.outside,
                revision=self.revision,
            )
        )
        if flight.step and not first.asked:
            self._context.log.own(
                "warning",
                f"generation {generation.number} died in step {flight.step}: {flight.kind}, {flight.rows} rows, "
                f"{flight.tokens} tokens, requests without a token yet: {len(flight.unproven)}",
            )

    def died(self, child: Child, ending: Ending, again: bool) -> FirstEnd | None:
        """The process of a rank is dead. `again`: policy may start another generation when this one is gone. What the
        generation ended by, once, when that process is dead."""
        generation = self.generation
        assert generation is not None
        again = again and not self.on_trial
        generation.died(child, ending)
        self.look()
        first = generation.first
        if generation.gone:
            assert first is not None
            self.generation = None
            generation.dispose()
            self.worker.died(first.ending, again and self.wanted, first.child, first.asked)
            if again:
                self.tick()
        return generation.take_first()

    def check_hang(self) -> None:
        """At every tick."""
        if self.generation is not None:
            self.generation.check_hang()
            self.look()

    def sleep(self) -> None:
        """Takes it out of service, what is in flight there is held, or moves to others of its revision; its device's
        memory is free when it is `asleep`."""
        self._leave("asleep")
        if self.generation is not None:
            self.generation.leader.send(Sleep())
            self._rest = "sleep"

    def dismiss(self, why: str) -> None:
        """As `sleep`, for good: its process ends."""
        self._leave(why)
        self.end(why)

    def _leave(self, why: str) -> None:
        self.wanted = False
        self.worker.due = self.worker.due_at = None
        if (up := self.up()) is not None:
            self._tell_apis(EngineDown(up.generation, why, [], revision=self.revision))

    def stage(self) -> None:
        """Its weights are copied to host memory, beside what it does."""
        if self.child is not None:
            self.child.send(Stage())

    def unstage(self) -> None:
        """The copy in host memory is dropped."""
        if self.child is not None and not self._rest:
            self.child.send(Wake())

    def wake(self, after: Engine) -> None:
        """Back into service, or the next generation starts, as soon as `after` has let go of the device's memory."""
        self.wanted, self._after = True, after
        if self.child is None:
            self.worker.reset_failures()
        self.unstage()
        self._wake_if_free()

    def _wake_if_free(self) -> None:
        """Called until it is done: a generation that is still on its way to sleep is woken when it sleeps."""
        if self._free and self.wanted and self._rest == "sleep" and self.asleep and self.child is not None:
            self.child.send(Wake())
            self._rest = "wake"

    @property
    def _free(self) -> bool:
        if self._after is not None and self._after.child is None:
            self._after = None
        return self._after is None

    def end(self, why: str, now: bool = False) -> None:
        """For good."""
        self.wanted = False
        self.worker.due = self.worker.due_at = None
        if now:
            self.kill(why)
            return
        for child in self.generation.to_end if self.generation else []:
            child.stop(why)

    def kill(self, why: str) -> None:
        """Its generation, at once; another follows if one is wanted."""
        for child in self.generation.to_end if self.generation else []:
            child.kill(why)

    def api_gone(self, api: int, epoch: int) -> None:
        """That process of that api worker is dead: its requests are to be aborted."""
        if self.generation is not None:
            self.generation.leader.send(ApiGone(api, epoch))

    def restart(self) -> None:
        """Ends the generation, if one lives; another follows."""
        self.worker.reset_failures()
        for child in self.generation.to_end if self.generation else []:
            child.terminate("restart requested")

    def tick(self) -> None:
        """Starts the next generation when it is due and the bytes of its plan are free."""
        self._wake_if_free()
        now = self._context.clock.now
        if self.worker.due is None or now < self.worker.due or not self._free:
            return
        if self.memory.opens(self.worker.name):
            self.worker.start()
