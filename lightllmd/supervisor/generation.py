"""The engine side: one generation at a time, and the next when it dies."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from lightllmd.config.plan import Plan
from lightllmd.ipc import flight_record
from lightllmd.ipc.messages import ApiGone, Down, EngineConfigure, EngineDown, EngineUp
from lightllmd.supervisor.child import Child
from lightllmd.supervisor.context import Context
from lightllmd.supervisor.exits import Ending
from lightllmd.supervisor.memory import MemoryGate
from lightllmd.supervisor.spare import EngineProcess, Spare
from lightllmd.supervisor.worker import Worker


class Generation:
    """One engine process, its endpoint, and the record of what it was doing."""

    def __init__(self, context: Context, worker: str, number: int, process: EngineProcess) -> None:
        self.child, self._process = process.child, process
        self.number = number
        self._path = context.runtime.endpoint_path(number)
        self.endpoint = f"ipc://{self._path}"
        seat = context.runtime.take_seat("engine")
        first = EngineConfigure(
            plan=context.plan,
            generation=number,
            rank=0,
            endpoint=self.endpoint,
            metrics_dir=str(context.runtime.metrics),
            metrics_seat=seat,
        )
        self.child.configure(worker, number, seat, first)

    def flight(self) -> flight_record.Flight:
        """What it was doing when it died."""
        try:
            return flight_record.read(self._process.flight)
        except (msgspec.MsgspecError, OSError):
            return flight_record.Flight()  # it scribbled over its own record: nothing is known of its last step

    def dispose(self) -> None:
        self._process.dispose()
        self._path.unlink(missing_ok=True)


class Engine:
    """Keeps one generation in service. `tell_apis` sends a message to every api worker."""

    def __init__(self, context: Context, tell_apis: Callable[[Down], None]) -> None:
        self._context = context
        self._tell_apis = tell_apis
        self.worker = Worker(context, "engine", 0, self._launch)
        self.generation: Generation | None = None
        self.memory = MemoryGate(context)
        self.spare = Spare(context)

    def plan_for(self, plan: Plan) -> None:
        self.memory.plan_for(plan)
        self.spare.plan_for(plan)

    def _launch(self, number: int) -> Child:
        process = self.spare.take() or EngineProcess(self._context, self.worker.name)
        self.generation = Generation(self._context, self.worker.name, number, process)
        return self.generation.child

    def children(self) -> list[Child]:
        present = [self.generation.child if self.generation else None, self.spare.child]
        return [child for child in present if child is not None]

    def owns(self, child: Child) -> bool:
        return self.generation is not None and self.generation.child is child

    def up(self) -> EngineUp | None:
        """What a new api worker has to be told; None while no generation is ready."""
        if self.generation is None or not self.generation.child.ready:
            return None
        return EngineUp(self.generation.number, self.generation.endpoint)

    def became_ready(self) -> None:
        self.worker.became_ready()
        if up := self.up():
            self._tell_apis(up)
        self.spare.keep()

    def died(self, child: Child, ending: Ending, again: bool) -> None:
        """The api workers hear of it before anything else is done."""
        generation, self.generation = self.generation, None
        assert generation is not None
        asked, flight = child.asked is not None, generation.flight()
        self._tell_apis(
            EngineDown(
                generation=generation.number,
                cause=ending.cause,
                unproven=[] if asked else flight.unproven,
                self_inflicted=ending.self_inflicted,
            )
        )
        generation.dispose()
        self._context.runtime.leave_seat(child.seat)
        if flight.step and not asked:
            self._context.log.own(
                "warning",
                f"generation {generation.number} died in step {flight.step}: {flight.kind}, {flight.rows} rows, "
                f"{flight.tokens} tokens, requests without a token yet: {len(flight.unproven)}",
            )
        self.worker.died(ending, again)
        self.tick()

    def api_gone(self, api: int, epoch: int) -> None:
        if self.generation is not None:
            self.generation.child.send(ApiGone(api, epoch))

    def restart(self) -> int:
        """Ends the generation, if one lives; the number of the one that follows."""
        self.worker.forgive()
        if self.generation is not None:
            self.generation.child.terminate("restart requested")
        return self.worker.number + 1

    def tick(self) -> None:
        """Starts the next generation when it is due and the bytes of its plan are free."""
        now = self._context.clock.now
        if self.worker.due is None or now < self.worker.due:
            return
        if self.memory.opens(self.worker.name):
            self.worker.start()
