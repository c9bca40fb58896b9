"""The engine of one revision: one generation at a time, and the next when it dies."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from lightllmd.config.plan import Facts, Plan, encode_plan
from lightllmd.ipc import flight_record
from lightllmd.ipc.messages import ApiGone, Down, EngineConfigure, EngineDown, EngineUp, Sleep, Stage, Wake
from lightllmd.supervisor.children.child import Child
from lightllmd.supervisor.children.exits import Ending
from lightllmd.supervisor.children.worker import Worker
from lightllmd.supervisor.context import Context
from lightllmd.supervisor.workers.memory_gate import MemoryGate
from lightllmd.supervisor.workers.spare import EngineProcess, Spare


class EngineGeneration:
    """One engine process for each rank, the endpoint of the one that leads, and the record of what that was doing."""

    def __init__(self, context: Context, worker: str, number: int, plan: bytes, ranks: Sequence[EngineProcess]) -> None:
        self.ranks = list(ranks)  # by rank
        self.number = number
        self._path = context.runtime.endpoint_path(number)
        self.endpoint = f"ipc://{self._path}"
        for rank, process in enumerate(self.ranks):
            metrics_id = context.runtime.take_metrics_id("engine")
            first = EngineConfigure(
                plan=plan,
                generation=number,
                rank=rank,
                endpoint=self.endpoint,
                metrics_dir=str(context.runtime.metrics),
                metrics_id=metrics_id,
                ranks=len(self.ranks),
            )
            process.child.configure(rank_name(worker, rank), number, metrics_id, first)

    @property
    def leader(self) -> Child:
        """Rank 0: its word is the generation's, and what the generation is told it passes on."""
        return self.ranks[0].child

    @property
    def children(self) -> list[Child]:
        """The processes of all ranks."""
        return [process.child for process in self.ranks]

    def rename(self, worker: str) -> None:
        """What its worker is called from now on."""
        for rank, child in enumerate(self.children):
            child.worker = rank_name(worker, rank)

    def flight(self) -> flight_record.Flight:
        """What it was doing when it died."""
        try:
            return flight_record.read(self.ranks[0].flight)
        except (msgspec.MsgspecError, OSError):
            return flight_record.Flight()  # it scribbled over its own record: nothing is known of its last step

    def dispose(self) -> None:
        """After its death: lets go of the processes' descriptors, removes the endpoint."""
        for process in self.ranks:
            process.dispose()
        self._path.unlink(missing_ok=True)


def rank_name(worker: str, rank: int) -> str:
    """Of one rank's process: "engine-0" leads "engine-0.1", "engine-0.2", …"""
    return f"{worker}.{rank}" if rank else worker


class Engine:
    """Keeps one generation of a revision in service. `tell_apis` sends a message to every api worker."""

    def __init__(
        self,
        context: Context,
        revision: int,
        replica: int,
        name: str,
        spare: Spare,
        tell_apis: Callable[[Down], None],
    ) -> None:
        self._context = context
        self._tell_apis = tell_apis
        self._spare = spare
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
        self.memory.plan_for(plan)

    def rename(self, name: str) -> None:
        """What its worker is called from now on, in status and log."""
        self.worker.name = name
        if self.generation is not None:
            self.generation.rename(name)

    def _launch(self, number: int) -> Child:
        assert self.plan is not None
        process = self._spare.take(self.plan) or EngineProcess(self._context, self.worker.name)
        self.generation = EngineGeneration(self._context, self.worker.name, number, self.encoded, [process])
        return self.generation.leader

    @property
    def child(self) -> Child | None:
        """The process that leads its generation, if one lives."""
        return self.generation.leader if self.generation else None

    @property
    def children(self) -> list[Child]:
        """The processes of all ranks of its generation, if one lives."""
        return self.generation.children if self.generation else []

    @property
    def ready(self) -> bool:
        """It has taken all the memory that it will."""
        return self.child is not None and self.child.ready

    @property
    def restarts(self) -> bool:
        """A generation that dies, or has died, is followed by another."""
        return self.wanted and self.worker.fatal is None

    @property
    def asleep(self) -> bool:
        """Its weights are in host memory, the device's memory is free."""
        return self.child is not None and self.child.vitals.phase == "asleep"

    @property
    def permanently_failed(self) -> bool:
        """No generation of it will ever finish what is held for it, unless an operator steps in."""
        return self.child is None and (self.worker.fatal is not None or self.worker.changed)

    def up(self) -> EngineUp | None:
        """What a new api worker has to be told; None while no generation is in service."""
        if self.generation is None or self._rest or not self.generation.leader.ready:
            return None
        return EngineUp(self.generation.number, self.generation.endpoint, self.revision, self.replica)

    def became_ready(self) -> None:
        """Its generation is in service, for the first time or after sleep: the api workers are told."""
        self.worker.became_ready()
        if self._rest == "wake":
            self._rest = ""
        if up := self.up():
            self._tell_apis(up)

    def died(self, child: Child, ending: Ending, again: bool) -> None:
        """The api workers hear of it before anything else is done."""
        generation, self.generation, self._rest = self.generation, None, ""
        assert generation is not None
        asked, flight = child.asked is not None, generation.flight()
        self._tell_apis(
            EngineDown(
                generation=generation.number,
                cause=ending.cause,
                unproven=[] if asked else flight.unproven,
                quarantined=0 if ending.outside else flight.quarantined,
                outside=ending.outside,
                revision=self.revision,
            )
        )
        generation.dispose()
        self._context.runtime.release_metrics_id(child.metrics_id)
        if flight.step and not asked:
            self._context.log.own(
                "warning",
                f"generation {generation.number} died in step {flight.step}: {flight.kind}, {flight.rows} rows, "
                f"{flight.tokens} tokens, requests without a token yet: {len(flight.unproven)}",
            )
        self.worker.died(ending, again and self.wanted and not self.on_trial)
        if again and not self.on_trial:
            self.tick()

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
        if self.child is None or self.child.asked is not None:
            return
        if now:
            self.child.kill(why)
        else:
            self.child.stop(why)

    def api_gone(self, api: int, epoch: int) -> None:
        """That process of that api worker is dead: its requests are to be aborted."""
        if self.generation is not None:
            self.generation.leader.send(ApiGone(api, epoch))

    def restart(self) -> None:
        """Ends the generation, if one lives; another follows."""
        self.worker.reset_failures()
        if self.generation is not None:
            self.generation.leader.terminate("restart requested")

    def tick(self) -> None:
        """Starts the next generation when it is due and the bytes of its plan are free."""
        self._wake_if_free()
        now = self._context.clock.now
        if self.worker.due is None or now < self.worker.due or not self._free:
            return
        if self.memory.opens(self.worker.name):
            self.worker.start()
