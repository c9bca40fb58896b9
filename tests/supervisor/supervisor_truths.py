"""What must hold of the supervisor after every event, told from outside: what children were told, what they do, what
operators are shown."""

from __future__ import annotations

from collections.abc import Iterator

from lightllmd.config.diff import diff
from lightllmd.config.plan import decode_plan
from lightllmd.ipc import messages
from lightllmd.supervisor.children.child import Child
from lightllmd.supervisor.control import status
from lightllmd.supervisor.control.jobs import RunningJob
from lightllmd.supervisor.snapshot import JobStatus
from supervisor.simulated_api import Api
from supervisor.simulation import Simulation


class Truths:
    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        self.ended: dict[int, JobStatus] = {}
        self.begun: dict[int, tuple[int, bytes]] = {}  # job -> revision and plan in force when it began

    def broken(self) -> list[str]:
        """What does not hold. Nothing is looked at once the daemon has ended."""
        found, self.simulation.violations = self.simulation.violations, []
        if not self.simulation.task.done():
            for look in (
                self._jobs,
                self._engines,
                self._processes,
                self._told,
                self._told_to_push,
                self._requests,
                self._shown,
                self._heard,
            ):
                found += look()
        return found

    # --- jobs ----------------------------------------------------------------------------------------------------
    def _jobs(self) -> Iterator[str]:
        supervisor = self.simulation.supervisor
        changing = [job for job in supervisor.verbs.jobs.running() if job.snapshot.verb != "stop"]
        if len(changing) > 1 and {job.snapshot.verb for job in changing} - {"drain", "restart", "reset-failed"}:
            yield f"several jobs change the daemon at once: {changing}"
        for number, end in self.ended.items():
            if supervisor.verbs.jobs.get(number).snapshot != end:
                yield f"job {number} had ended as {end.outcome} and changed"
        for job in supervisor.verbs.jobs._jobs.values():
            number = job.snapshot.id
            self.begun.setdefault(number, self._in_force())
            if job.finished and number not in self.ended:
                self.ended[number] = job.snapshot
                yield from self._outcome(job)
        if not supervisor.verbs.jobs.running("swap", "reload"):
            yield from self._unswitched()

    def _in_force(self) -> tuple[int, bytes]:
        return self.simulation.context.revision, self.simulation.context.plan

    def _outcome(self, job: RunningJob) -> Iterator[str]:
        told, plan = job.snapshot, self.simulation.supervisor.plan
        unchanged = self.begun.pop(told.id) == self._in_force()
        if told.verb not in ("swap", "reload"):
            return
        if told.outcome == "rolled-back" and (told.error is None or told.error["error"] != "RolledBack"):
            yield f"job {told.id} was rolled back with the error {told.error}"
        if told.outcome in ("failed", "rolled-back") and told.error is None:
            yield f"job {told.id} {told.outcome} without a cause"
        if told.outcome in ("failed", "rolled-back") and not unchanged:
            yield f"job {told.id} {told.outcome} ({told.message}), but what is in force changed"
        if told.verb == "swap" and told.outcome == "done" and "nothing was done" not in told.message:
            served = plan.config.params.model_dir if plan else None
            entry = plan.config.models.get(told.target, {}) if plan else {}
            if unchanged or served != entry.get("model_dir", told.target):
                yield f"job {told.id} says that {told.target} is in force"

    def _unswitched(self) -> Iterator[str]:
        """Nothing of a switch outlasts its job."""
        supervisor, context = self.simulation.supervisor, self.simulation.context
        engines, serving = supervisor.engines, supervisor.engines.serving
        if engines.candidate is not None:
            yield "a candidate without a job"
        if supervisor.verbs.ending:
            return
        if supervisor.front.holding:
            yield "requests are held without a job"
        if not serving.wanted:
            yield "the engine in force was put to sleep without a job"
        if serving.plan is None or supervisor.verbs.stopping is not None:
            return
        if changes := diff(context.config, self.simulation.settings.effective):
            yield f"what is in force is not what the settings say: {changes}"
        if changes := diff(serving.plan.config, context.config):
            yield f"the plan is of another configuration: {changes}"
        listeners = [listener for listener in self.simulation.listeners if not listener.closed]
        if listeners != context.listeners:
            yield f"{len(listeners)} listeners are open, {len(context.listeners)} in use"
        if sorted(self.simulation.systemd.stored.values()) != sorted(listener.fileno() for listener in listeners):
            yield f"systemd keeps other listeners: {self.simulation.systemd.stored}"
        for api in supervisor.front.apis:
            if api.worker.child is not None and api.worker.child.asked is None and api.outdated is None:
                yield from self._front_end_as_configured(api.worker.child)
        if len(supervisor.front.apis) != context.config.http.workers:
            yield f"{len(supervisor.front.apis)} api workers instead of {context.config.http.workers}"

    def _front_end_as_configured(self, child: Child) -> Iterator[str]:
        program = self.simulation.program(child)
        assert isinstance(program, Api)
        configured = next((m for m in child.process.ledger if isinstance(m, messages.ApiConfigure)), None)  # type: ignore[attr-defined]
        if configured is None:
            return
        changes = diff(decode_plan(configured.plan).config, self.simulation.context.config)
        # The name comes with the plan of the revision.
        changes = [c for c in changes if c.reload == "front end" and c.key != "http.served_model_name"]
        if changes:
            yield f"{child.worker} runs with another front end: {changes}"

    # --- engines and processes --------------------------------------------------------------------------------------
    def _engines(self) -> Iterator[str]:
        supervisor = self.simulation.supervisor
        numbers = [replicas.revision for replicas in supervisor.engines.revisions]
        if len(set(numbers)) < len(numbers):
            yield f"revisions {numbers}"
        serving = supervisor.engines.serving
        if serving.plan is not None and len(serving.engines) != serving.plan.replicas:
            yield f"{len(serving.engines)} engines, planned are {serving.plan.replicas}"
        if supervisor.plan is not None and supervisor.engines.serving.revision != self.simulation.context.revision:
            yield "two revisions are said to be in force"

    def _processes(self) -> Iterator[str]:
        simulation, supervisor = self.simulation, self.simulation.supervisor
        owned = [child.process for child in supervisor.children()]
        if len(set(owned)) < len(owned):
            yield f"owned twice: {owned}"
        short_lived = [
            getattr(one, "process", None) or getattr(one, "_process", None) for one in simulation.context.short_lived
        ]
        for process in simulation.processes:
            if process.returncode is None and process not in owned and process not in short_lived:
                yield f"nobody owns {process}"

    # --- what api workers were told ------------------------------------------------------------------------------
    def _told(self) -> Iterator[str]:
        supervisor = self.simulation.supervisor
        for child in supervisor.front.children():
            if child.channel.their_end:  # type: ignore[attr-defined]
                yield from self._told_one(child)

    def _told_to_push(self) -> Iterator[str]:
        """What pushes knows of the settings in force, and of no others."""
        params = self.simulation.context.config.params
        for child in self.simulation.supervisor.pusher.children():
            ledger = child.process.ledger  # type: ignore[attr-defined]
            told = [m.target if isinstance(m, messages.PushConfigure) else m for m in ledger]
            targets = [m for m in told if isinstance(m, messages.PushTarget)]
            if child.asked is not None or not child.channel.their_end:  # type: ignore[attr-defined]
                continue
            if (targets[-1].gateway, targets[-1].job) != (params.metric_gateway, params.job_name):
                yield f"{child.worker} was told {targets[-1]}, in force are {params}"

    def _told_one(self, child: Child) -> Iterator[str]:
        supervisor = self.simulation.supervisor
        view = ToldView(child.process.ledger)  # type: ignore[attr-defined]
        name = f"{child.worker} ({child.pid})"
        if not view.configured:
            return
        if view.revision != supervisor.engines.serving.revision:
            yield f"{name} has revision {view.revision} in force, not {supervisor.engines.serving.revision}"
        if view.held != supervisor.front.holding:
            yield f"{name}: holds {view.held}, is to hold {supervisor.front.holding}"
        if view.drains != supervisor.verbs.draining:
            yield f"{name}: drains {view.drains}, is to drain {supervisor.verbs.draining}"
        if view.health is None or (view.health.ready, view.health.reason) != supervisor.health:
            yield f"{name} was told {view.health}, it is {supervisor.health}"
        if view.names != list(self.simulation.context.config.models):
            yield f"{name} knows of models {view.names}"
        for engine in supervisor.engines:
            if engine.revision not in view.known:
                continue
            up = engine.up()
            should = up.generation if up is not None else None
            dying = engine.ending or any(child.asked is not None for child in engine.children)
            if view.known[engine.revision].get(engine.replica) != should and not dying:
                yield f"{name}: generation of revision {engine.revision} is {should}, told {view.known}"
        if strange := set(view.known) - {engine.revision for engine in supervisor.engines}:
            yield f"{name} still has revisions {strange}"

    def _requests(self) -> Iterator[str]:
        known = {engine.revision for engine in self.simulation.supervisor.engines}
        for process in self.simulation.apis():
            program = process.program
            if not isinstance(program, Api) or process.link is None or self.simulation.stopping:
                continue
            told = {m.revision for m in process.link.down if isinstance(m, messages.Forget | messages.Commit)}
            for number, front in program.fronts.items():
                if front.in_flight and number not in known and number not in told:
                    yield f"{process}: requests of revision {number}, which nobody serves"

    # --- what operators are shown ---------------------------------------------------------------------------------
    def _shown(self) -> Iterator[str]:
        supervisor = self.simulation.supervisor
        ready, reason = status.health(supervisor)
        up = any(engine.ready for engine in supervisor.engines.serving.engines)
        able = up and not supervisor.verbs.draining and not supervisor.front.holding
        if ready != able:
            yield f"health says {ready} ({reason}), it is {able}"
        shown = status.build(supervisor)
        status.sentence(supervisor)
        if shown.ready != (able and any(api.worker.ready for api in supervisor.front.apis)):
            yield f"the status says ready {shown.ready}"

    def _heard(self) -> Iterator[str]:
        """Of systemd; and the truth behind readiness, once the supervisor has heard all that there is to hear."""
        simulation, supervisor = self.simulation, self.simulation.supervisor
        said = simulation.systemd.said
        if ("READY" in said) != (supervisor.served_since is not None):
            yield f"it serves since {supervisor.served_since}, systemd was told {said}"
        if simulation.systemd.reloading and not supervisor.verbs.jobs.running("reload"):
            yield "systemd waits for a reload to end"
        if ("STOPPING" in said) != (supervisor.verbs.stopping is not None):
            yield f"a stop: {supervisor.verbs.stopping}, systemd was told {said}"
        if status.health(supervisor)[0] and not simulation.moves():
            for engine in supervisor.engines.serving.engines:
                programs = [simulation.program(one) for one in engine.children]
                if engine.ready and any(one.phase != "ready" or not one.process.alive for one in programs):
                    yield f"it says that {engine.worker.name} is ready, its ranks are {programs}"


class ToldView:
    """How things stand for an api worker that has read all that it was told."""

    def __init__(self, ledger: list[object]) -> None:
        self.configured = False
        self.revision = 0
        self.known: dict[int, dict[int, int]] = {}  # revision -> replica -> generation that it is connected to
        self.held = self.drains = False
        self.health: messages.Health | None = None
        self.names: list[str] = []
        for message in ledger:
            match message:
                case messages.ApiConfigure():
                    self.configured, self.revision = True, message.revision
                    self.known[message.revision] = {}
                case messages.Prepare():
                    self.known.setdefault(message.revision, {})
                case messages.Commit():
                    self.revision = message.revision
                case messages.Forget():
                    self.known.pop(message.revision, None)
                case messages.EngineUp() if message.revision in self.known:
                    self.known[message.revision][message.replica] = message.generation
                case messages.EngineDown() if message.revision in self.known:
                    known = self.known[message.revision]
                    self.known[message.revision] = {k: one for k, one in known.items() if one != message.generation}
                case messages.Hold():
                    self.held = True
                case messages.Release():
                    self.held = False
                case messages.Drain():
                    self.drains = True
                case messages.Resume():
                    self.drains = False
                case messages.Health():
                    self.health = message
                case messages.Models():
                    self.names = message.names
