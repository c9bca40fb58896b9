"""The supervisor as a state machine, in a simulated world: no deadlock, no lost job, no lost request; what is wanted is
reached, or it is told why not.

Hypothesis draws what befalls it: kills, hangs, failures in each phase, slow children, signals, every verb, changed
files, and the order in which it hears of each of these. `Truths` must hold after each step. At the end faults cease and
time passes: then it serves, or says why not, and it stops cleanly.
"""

from __future__ import annotations

import random
import signal
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lightllmd.config.parameters import Config
from lightllmd.errors import LightllmdError
from lightllmd.supervisor.change.handover import Terms
from lightllmd.supervisor.control import status
from lightllmd.supervisor.control.jobs import RunningJob
from lightllmd.supervisor.control.verbs import Caller
from long_run import LONG
from supervisor.simulated_api import Api
from supervisor.simulated_children import Fate, SimulatedProcess
from supervisor.simulated_models import BAD, GOOD, UNPLANNABLE, configuration
from supervisor.simulation import TICK, Simulation
from supervisor.supervisor_truths import Truths

pytestmark = pytest.mark.timeout(3600 if LONG else 900)
PATIENCE = round(200 / TICK)  # ticks; more than every time-out of the configuration in a row
_ENDS = ("config", "exit", "fault", "hang", "slow", "stall")
ENGINE_FATES = [
    ("engine", Fate(phase, what))
    for phase in ("boot", "load", "warmup", "ready", "sleep", "asleep")
    for what in (*_ENDS, "weights", "memory", "device")
]
API_FATES = [("api", Fate(phase, what)) for phase in ("boot", "prepare") for what in _ENDS]
PROBE_FATES = [("probe", Fate("probe", what)) for what in (*_ENDS, "device")]
PUSH_FATES = [("push", Fate("boot", what)) for what in ("exit", "fault", "hang", "stall")]
FATES = st.sampled_from([*ENGINE_FATES, *API_FATES * 2, *PROBE_FATES, *PUSH_FATES])
ORDERS = st.integers(0, 1 << 16)
RARELY = st.integers(0, 15).map(lambda n: n == 7)  # what ends a run


def edited(config: Config, table: str, **changes: Any) -> Config:
    part = msgspec.structs.replace(getattr(config, table), **changes)
    return msgspec.structs.replace(config, **{table: part})


EDITS = {
    "nothing": lambda config: config,
    "live": lambda config: edited(config, "supervisor", retry_interval=config.supervisor.retry_interval + 1),
    "level": lambda config: edited(config, "log", level="info" if config.log.level == "debug" else "debug"),
    "swap": lambda config: edited(
        config, "supervisor", swap={"auto": "after", "after": "beside", "beside": "auto"}[config.supervisor.swap]
    ),
    "spare": lambda config: edited(config, "supervisor", spare_engine=not config.supervisor.spare_engine),
    "monitor": lambda config: edited(config, "params", health_monitor=not config.params.health_monitor),
    "gateway": lambda config: edited(
        config, "params", metric_gateway=None if config.params.metric_gateway else "gateway:9091"
    ),
    "job": lambda config: edited(config, "params", job_name=config.params.job_name[-9:] + "m"),
    "cors": lambda config: edited(config, "http", cors_origins=[*config.http.cors_origins, "*"][:3]),
    "more workers": lambda config: edited(config, "http", workers=min(config.http.workers + 1, 3)),
    "fewer workers": lambda config: edited(config, "http", workers=max(config.http.workers - 1, 1)),
    "port": lambda config: edited(
        config, "params", port=config.params.port % 8003 + 1 if config.params.port >= 8003 else config.params.port + 1
    ),
    "engine": lambda config: edited(
        config, "params", running_max_req_size=16 if config.params.running_max_req_size == 8 else 8
    ),
    "slots": lambda config: edited(
        config, "params", max_total_token_num="auto" if config.params.max_total_token_num == 8192 else 8192
    ),
    "ranks": lambda config: edited(config, "params", tp=config.params.tp % 3 + 1),
    "mode": lambda config: edited(config, "params", mode=[] if config.params.mode else ["triton_w8a16"]),
    "model": lambda config: edited(
        config, "params", model_dir="/models/second" if config.params.model_dir == "/models/first" else "/models/first"
    ),
    "broken model": lambda config: edited(config, "params", model_dir="/models/broken"),
    "missing model": lambda config: edited(config, "params", model_dir="/models/missing"),
}


class SupervisorMachine(RuleBasedStateMachine):
    @initialize(
        swap=st.sampled_from(["auto", "auto", "beside", "after"]),
        workers=st.integers(1, 2),
        monitor=st.booleans(),
        gateway=st.booleans(),
        serving=st.booleans(),
        faults=st.sampled_from([True, True, True, False]),
        traffic=st.sampled_from([0.0, 0.2, 0.8]),
        pace=ORDERS,
        share=st.sampled_from([0.9, 1.0]),
        groups=st.sampled_from([(1, 1), (1, 1), (2, 1), (3, 1), (1, 2), (1, 2), (1, 3)]),
    )
    def start(
        self,
        swap: str,
        workers: int,
        monitor: bool,
        gateway: bool,
        serving: bool,
        faults: bool,
        traffic: float,
        pace: int,
        share: float,
        groups: tuple[int, int],
    ) -> None:
        """`serving`: it comes to serve before anything is done to it. `faults`: of host and children, not of models.
        `share`: of the device's memory, that a plan may use. `groups`: tp and replicas."""
        flags = {"supervisor.swap": swap, "http.workers": workers, "engine.memory_fraction": share}
        flags["tp"], flags["engine.replicas"] = groups
        if gateway:
            flags["metric_gateway"] = "gateway:9091"
        self.simulation = Simulation(configuration(health_monitor=monitor, **flags), traffic, pace)
        self.truths = Truths(self.simulation)
        self.order = random.Random(0)
        self.sure: list[RunningJob] = []  # swaps that only a fault can hinder
        self.told_to_stop = False
        self.faults = faults
        if serving:
            self.pass_time(20, 0)
            assert self.supervisor.state == "serving"

    @property
    def supervisor(self) -> Any:
        return self.simulation.supervisor

    @property
    def alive(self) -> bool:
        return not self.simulation.task.done()

    # --- events and time --------------------------------------------------------------------------------------------
    @rule(choices=st.lists(st.tuples(ORDERS, st.integers(1, 3)), min_size=1, max_size=8))
    def happen(self, choices: list[tuple[int, int]]) -> None:
        for choice, at_once in choices:
            self.simulation.happen(choice, at_once)
            self.check()

    @rule(choice=ORDERS)
    def work(self, choice: int) -> None:
        """One child gets on, the others don't."""
        if living := [process for process in self.simulation.processes if not process.still]:
            living[choice % len(living)].program.work()
            self.simulation.settle()

    @rule(ticks=st.sampled_from([1, 1, 2, 3, 5, 10, 40]), order=ORDERS)
    def pass_time(self, ticks: int, order: int) -> None:
        for _ in range(ticks):
            self.simulation.tick(random.Random(order))
            self.check()

    @rule(ticks=st.integers(1, 40), order=ORDERS)
    def wait(self, ticks: int, order: int) -> None:
        """Until no job runs, for a while at most."""
        while ticks > 0 and self.alive and self.supervisor.verbs.jobs.running():
            self.pass_time(1, order)
            ticks -= 1

    # --- requests -----------------------------------------------------------------------------------------------------
    @rule(choice=ORDERS, count=st.integers(1, 3))
    def request(self, choice: int, count: int) -> None:
        accepting = [p.program for p in self.simulation.apis() if isinstance(p.program, Api) and p.program.accepts]
        for _ in range(count if accepting else 0):
            accepting[choice % len(accepting)].open()

    @rule(choice=ORDERS, count=st.integers(1, 6))
    def finish(self, choice: int, count: int) -> None:
        for _ in range(count):
            self.finish_one(choice)

    def finish_one(self, choice: int) -> bool:
        able = [
            (process.program, revision)
            for process in self.simulation.apis()
            if isinstance(process.program, Api) and not process.still
            for revision in process.program.finishable()
        ]
        if able:
            program, revision = able[choice % len(able)]
            program.finish(revision)
        return bool(able)

    # --- faults -------------------------------------------------------------------------------------------------------
    def living(self) -> list[SimulatedProcess]:
        return [process for process in self.simulation.processes if process.alive]

    @precondition(lambda self: self.faults)
    @rule(choice=ORDERS, number=st.sampled_from([signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM]))
    def kill(self, choice: int, number: signal.Signals) -> None:
        if living := self.living():
            living[choice % len(living)].die(-number)
            self.simulation.settle()

    @precondition(lambda self: self.faults)
    @rule(choice=ORDERS, how=st.sampled_from(["hangs", "SIGSTOP", "SIGCONT"]))
    def hang(self, choice: int, how: str) -> None:
        if living := self.living():
            process = living[choice % len(living)]
            process.hung = process.hung or how == "hangs"
            process.stopped = how == "SIGSTOP" or (process.stopped and how == "hangs")

    @precondition(lambda self: self.faults)
    @rule(fates=st.lists(FATES, min_size=1, max_size=3))
    def doom(self, fates: list[tuple[str, Fate]]) -> None:
        """What befalls the next children of some kind."""
        for kind, fate in fates:
            self.simulation.fates[kind].append(fate)

    @precondition(lambda self: self.faults)
    @rule(processes=st.integers(0, 2), ports=st.booleans())
    def refuse(self, processes: int, ports: bool) -> None:
        """The host has no process, or no port, to give."""
        self.simulation.refuse_spawns, self.simulation.refuse_ports = processes, ports

    # --- the operator -------------------------------------------------------------------------------------------------
    def ask(self, verb: str, *arguments: Any) -> RunningJob | LightllmdError | None:
        if not self.alive:
            return None
        return self.simulation.ask(lambda: getattr(self.supervisor.verbs, verb)(Caller(), *arguments))

    @rule(
        model=st.sampled_from([*GOOD, *GOOD, *GOOD, *BAD, *UNPLANNABLE, "nobody"]),
        drain_timeout=st.sampled_from([None, None, 0.0, 3.0]),
        force=st.booleans(),
        keep=st.sampled_from([False, False, False, True]),
        plan_only=st.sampled_from([False, False, False, True]),
    )
    def swap(self, model: str, drain_timeout: float | None, force: bool, keep: bool, plan_only: bool) -> None:
        force = force and drain_timeout is not None
        self.simulation.forced |= force
        self.simulation.kept |= keep
        engines = self.supervisor.engines
        quiet = not engines.serving.down and not engines.leaving and drain_timeout is None and not keep
        answer = self.ask("swap", model, Terms(drain_timeout, force, keep), plan_only)
        if quiet and model in GOOD and isinstance(answer, RunningJob):
            self.sure.append(answer)

    @rule(
        edits=st.lists(st.sampled_from(sorted(EDITS)), max_size=3),
        valid=st.sampled_from([True, True, True, False]),
        dry_run=st.sampled_from([False, False, False, True]),
        by_signal=st.booleans(),
    )
    def reload(self, edits: list[str], valid: bool, dry_run: bool, by_signal: bool) -> None:
        config = self.simulation.settings.written
        for edit in edits:
            config = EDITS[edit](config)
        self.simulation.file = config if valid else None
        if by_signal:
            self.simulation.signal(signal.SIGHUP)
        else:
            self.ask("reload", dry_run)

    @rule(edit=st.sampled_from(["gateway", "job"]))
    def push_elsewhere(self, edit: str) -> None:
        self.reload([edit], valid=True, dry_run=False, by_signal=False)

    @rule(
        verb=st.sampled_from(["restart", "restart", "reset_failed", "drain", "resume"]),
        who=st.sampled_from(["", "engine", "api", "api-0", "api-1", "push", "nobody"]),
    )
    def other_verb(self, verb: str, who: str) -> None:
        self.ask(verb, *([who] if verb in ("restart", "reset_failed") else []))

    @rule(how=st.sampled_from(["stop", "stop now", "SIGTERM", "SIGINT"]), times=st.integers(1, 3), really=RARELY)
    def stop(self, how: str, times: int, really: bool) -> None:
        for _ in range(times if really else 0):
            self.told_to_stop = True
            if how.startswith("SIG"):
                self.simulation.signal(signal.Signals[how])
            else:
                self.ask("stop", how == "stop now")

    @precondition(lambda self: self.alive and self.supervisor.verbs.jobs.running("swap", "reload"))
    @rule(
        ticks=st.integers(0, 6),
        order=ORDERS,
        deed=st.sampled_from(["kill", "hang", "doom", "request", "other_verb", "SIGTERM", "stop now"]),
        whom=st.sampled_from(["api", "serving", "candidate", "leaving"]),
        fate=st.sampled_from([*ENGINE_FATES, *API_FATES * 2]),
        verb=st.sampled_from(["drain", "resume", "reset_failed"]),
    )
    def in_the_middle(self, ticks: int, order: int, deed: str, whom: str, fate: tuple[str, Fate], verb: str) -> None:
        """Something happens while a switch is on its way."""
        self.pass_time(ticks, order)
        if deed in ("kill", "hang", "doom") and not self.faults:
            return
        match deed:
            case "kill":
                for process in self.called(whom, order):
                    process.die(-signal.SIGKILL)
                self.simulation.settle()
            case "hang":
                for process in self.called(whom, order):
                    process.hung = True
            case "doom":
                self.doom([fate])
            case "request":
                self.request(order, 2)
            case "other_verb":
                self.other_verb(verb, "")
            case _ if order % 4 == 0:
                self.stop(deed, 1, really=True)

    def called(self, whom: str, choice: int) -> list[SimulatedProcess]:
        """One living process of that role, if there is one."""
        engines = self.supervisor.engines
        if whom == "api":
            return self.simulation.apis()[choice % 2 :][:1]
        found = {"serving": [engines.serving], "candidate": [engines.candidate], "leaving": engines.leaving}[whom]
        processes = [
            child.process
            for replicas in found
            if replicas is not None
            for one in replicas.all
            for child in one.children
        ]
        living = [process for process in processes if process.alive]
        return living[choice % len(living) :][:1] if living else []

    # --- what must hold -----------------------------------------------------------------------------------------------
    @invariant()
    def truths_hold(self) -> None:
        if hasattr(self, "truths"):
            self.check()

    def check(self) -> None:
        broken = self.truths.broken()
        assert not broken, "\n".join([*broken, *self.story()])

    def story(self) -> list[str]:
        """For whoever reads a failure."""
        events = [
            f"    {event.worker or ''}: {event.message}" for event in self.simulation.context.events.feed.last(40)
        ]
        jobs = [f"    {job.verb} {job.target}: {job.phase} {job.message}" for job in self.supervisor.verbs.jobs.all()]
        shown = [f"    {worker}" for worker in status.workers(self.supervisor)]
        return ["events:", *events, "jobs:", *jobs, "workers:", *shown, f"processes: {self.simulation.processes}"]

    def teardown(self) -> None:
        if not hasattr(self, "simulation"):
            return
        try:
            self.faults_cease()
            self.comes_to_rest()
            if self.alive:
                self.serves_or_says_why_not()
                self.nothing_failed_without_a_fault()
                self.stops()
            self.has_ended()
        finally:
            self.simulation.close()

    def faults_cease(self) -> None:
        for fates in self.simulation.fates.values():
            fates.clear()
        for process in self.simulation.processes:
            process.program.fate = None  # a spare has its own for later
        self.simulation.refuse_spawns, self.simulation.refuse_ports = 0, False
        self.simulation.traffic = 0.0

    def comes_to_rest(self) -> None:
        """Time passes, requests end; until there is nothing left to wait for."""
        for _ in range(PATIENCE):
            while self.finish_one(0):
                pass
            self.simulation.tick(self.order)
            self.simulation.flush(self.order)
            self.check()
            if not self.alive or self.at_rest():
                return
        pytest.fail("\n".join(["it comes to no rest", *self.story()]))

    def at_rest(self) -> bool:
        supervisor = self.supervisor
        if supervisor.verbs.jobs.running() or supervisor.engines.leaving or supervisor.front.dismissed:
            return False
        engines = [engine.worker for engine in supervisor.engines.serving.engines]
        if any(process.still for process in self.simulation.processes if process.program.configured):
            return False  # that is noticed
        if any(process.program.in_flight for process in self.simulation.apis()) and any(
            worker.fatal is None for worker in engines
        ):
            return False
        if any(api.spare is not None or api.retiring or api.outdated is not None for api in supervisor.front.apis):
            return False
        if self.kept_a_bad_one:
            engines = [worker for worker in engines if not worker.limited]  # they are tried again for ever
        pushing, wanted = supervisor.pusher.worker, supervisor.context.config.params.metric_gateway is not None
        if pushing.ready != wanted or any(child.asked is not None for child in supervisor.pusher.children()):
            return False
        workers = [*engines, *(api.worker for api in supervisor.front.apis)]
        return all(worker.fatal is not None or worker.ready for worker in workers)

    @property
    def kept_a_bad_one(self) -> bool:
        """Swapped to with --on-failure keep."""
        plan = self.supervisor.plan
        return plan is not None and plan.config.params.model_dir.removeprefix("/models/") in BAD

    def serves_or_says_why_not(self) -> None:
        supervisor = self.supervisor
        serving, apis = supervisor.engines.serving, supervisor.front.apis
        if supervisor.verbs.draining:
            assert status.state(supervisor) == "drained"
            self.ask("resume")
        if serving.down:
            last = serving.down[0].worker.fatal or serving.down[0].worker.last_exit
            assert last is not None
            assert last.cause in status.health(supervisor)[1]
            assert status.state(supervisor) in ("degraded", "starting")
        if any(api.worker.fatal for api in apis):
            assert status.state(supervisor) in ("degraded", "starting")
        if self.kept_a_bad_one:
            answer = self.ask("swap", "first", Terms())
            assert isinstance(answer, RunningJob), answer
            self.comes_to_rest()
            assert answer.snapshot.outcome == "done", "\n".join([str(answer.snapshot), *self.story()])
        if supervisor.engines.serving.down or any(api.worker.fatal for api in apis):
            self.ask("reset_failed", "")
            self.comes_to_rest()
        self.pass_time(8, 0)
        story = "\n".join(self.story())
        assert status.state(supervisor) == "serving", story
        assert status.build(supervisor).ready, story
        self.children_are_as_expected()

    def children_are_as_expected(self) -> None:
        """Every one that there should be, no other; each knows of the revision in force and of no other."""
        simulation, supervisor = self.simulation, self.supervisor
        story = "\n".join(self.story())
        serving = supervisor.engines.serving
        apis = [api.worker.child.process for api in supervisor.front.apis]
        assert len(apis) == simulation.context.config.http.workers, story
        expected = {*(child.process for engine in serving.engines for child in engine.children), *apis}
        assert all(len(engine.children) == serving.plan.ranks for engine in serving.engines), story
        expected |= {child.process for child in supervisor.engines.spares.children()}
        pushing = supervisor.pusher.children()
        assert bool(pushing) == (simulation.context.config.params.metric_gateway is not None), story
        expected |= {child.process for child in pushing}
        assert set(simulation.processes) == expected, story
        for process in apis:
            api = process.program
            assert api.revision == serving.revision, story
            assert set(api.fronts) == {serving.revision}, story
            assert not api.coming, story
            generations = {engine.replica: engine.generation.number for engine in serving.engines}
            assert api.fronts[api.revision].links == generations, story
            assert not any((api.shut, api.refusing, api.retired, api.in_flight)), story

    def nothing_failed_without_a_fault(self) -> None:
        """Only bad models were ended by something; no request was lost, nor ended unless that was asked for."""
        if self.faults:
            return
        story = "\n".join(self.story())
        crashed = {crash.worker.partition(".")[0].partition("-")[0] for crash in self.supervisor.crashes.all()}
        assert crashed <= ({"engine"} if self.simulation.kept or self.rolls else set()) | {"candidate", "leaving"}, (
            story
        )
        assert self.supervisor.front.total("failed") == 0 or self.simulation.kept, story
        assert self.supervisor.front.total("cancelled") == 0 or self.simulation.forced, story
        for job in self.sure:
            assert job.snapshot.outcome == "done", "\n".join([str(job.snapshot), story])

    @property
    def rolls(self) -> bool:
        """Engines are replaced one by one: a bad one may be in force for a while."""
        return len(self.supervisor.engines.serving.engines) > 1

    def stops(self) -> None:
        self.told_to_stop = True
        self.simulation.signal(signal.SIGTERM)
        for _ in range(PATIENCE):
            if not self.alive:
                return
            self.pass_time(1, 0)
        pytest.fail("\n".join(["it does not stop", *self.story()]))

    def has_ended(self) -> None:
        story = "\n".join(self.story())
        for _ in range(5):
            self.simulation.flush(self.order)
        code = self.simulation.task.result()
        if self.told_to_stop and self.supervisor.served_since:
            assert code == 0, story
        assert self.told_to_stop or code != 0, f"it ended by itself with exit {code}\n{story}"
        left = [process for process in self.simulation.processes if process.returncode is None]
        assert not left, f"left behind: {left}\n{story}"
        running = self.supervisor.verbs.jobs.running()
        assert not running, f"jobs without an end: {running}\n{story}"


TestSupervisorModel = SupervisorMachine.TestCase
TestSupervisorModel.settings = settings(
    max_examples=4000 if LONG else 80,
    stateful_step_count=60 if LONG else 40,
    deadline=None,
    derandomize=not LONG,
    database=None,
    suppress_health_check=list(HealthCheck),
)
