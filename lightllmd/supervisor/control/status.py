"""The status page as data: one consistent look at everything, made inside the loop's thread, waiting for nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightllmd import __version__
from lightllmd.config.models import name_of
from lightllmd.supervisor import snapshot
from lightllmd.supervisor.change.switch import describe, fraction

if TYPE_CHECKING:
    from lightllmd.supervisor.supervisor import Supervisor

EVENTS_SHOWN = 10


def health(supervisor: Supervisor) -> tuple[bool, str]:
    """Whether new requests are served, and why or why not. The reason changes with the state, not with progress."""
    verbs, worker = supervisor.verbs, supervisor.engines.serving.worker
    if verbs.stopping is not None:
        return False, "stopping"
    if verbs.draining:
        return False, "drained" if verbs.drained else "draining"
    if supervisor.plan is None:
        return False, "planning: reading the model's headers"
    if supervisor.front.holding:
        return False, "the model is being replaced: new requests wait"
    if worker.ready:
        return True, "; ".join(["ready", *filter(None, (supervisor.monitor.trouble, _crowded(supervisor)))])
    if worker.child is not None and worker.child.dying:
        return False, "the engine is dying"
    if worker.fatal is not None:
        return False, f"the engine is not started again: {worker.fatal.cause}"
    if supervisor.engines.serving.memory.short:
        return False, "waiting for memory to become free"
    if worker.last_exit is not None:
        return False, f"the engine is restarting: {worker.last_exit.cause}"
    return False, "the model is loading"


def _crowded(supervisor: Supervisor) -> str:
    """What is said when the front end had to refuse connections, or close some, within the last seconds."""
    front = supervisor.front
    if not front.now("connections_full"):
        return ""
    open_now, most = front.now("connections"), front.now("connections_most")
    return f"the front end is full: {open_now} of {most} connections are open"


def state(supervisor: Supervisor) -> str:
    verbs = supervisor.verbs
    if verbs.ending:
        return "stopping"
    if verbs.draining:
        return "drained" if verbs.drained else "draining"
    if supervisor.served_since is None:
        return "starting"
    if supervisor.front.holding:
        return "swapping"
    workers = [supervisor.engines.serving.worker, *(api.worker for api in supervisor.front.apis)]
    return "serving" if all(worker.ready for worker in workers) else "degraded"


def sentence(supervisor: Supervisor) -> str:
    """The state in one line, as systemctl status shows it."""
    verbs, worker = supervisor.verbs, supervisor.engines.serving.worker
    if verbs.stopping is not None:
        return f"Stopping: {verbs.stopping.snapshot.phase}"
    if verbs.draining:
        return f"Draining: {supervisor.front.now('in_flight')} requests in flight"
    if supervisor.plan is None:
        return "Reading the model's headers"
    for job in verbs.jobs.running("swap", "reload"):
        return f"{job.snapshot.verb.capitalize()}: {job.snapshot.phase}"
    if worker.ready:
        if supervisor.front.ready:
            return f"Serving {supervisor.plan.model_name}"
        worker = supervisor.front.apis[0].worker
    why = f" after: {worker.last_exit.cause}" if worker.last_exit else ""
    return f"{worker.name}: {describe(worker)}{why}" if worker.kind == "api" else describe(worker) + why


def _model(supervisor: Supervisor) -> snapshot.Model | None:
    plan, worker = supervisor.plan, supervisor.engines.serving.worker
    if plan is None:
        return None
    if worker.ready:
        how = "ready"
    elif worker.fatal is not None:
        how = "failed"
    else:
        how = "loading" if worker.child is not None else "down"
    stats = worker.child.stats if worker.child else {}
    return snapshot.Model(
        name=plan.model_name,
        state=how,
        progress=fraction(worker),
        device=plan.device.kind,
        data_type=plan.data_type,
        weight_bytes=plan.budget.row("weights"),
        tensor_parallel=plan.config.params.tp,
        kv_slots_used=int(stats.get("slots_used", 0)),
        kv_slots_total=int(stats.get("slots_total", plan.max_total_token_num)),
    )


def cache(supervisor: Supervisor) -> snapshot.Cache | None:
    child = supervisor.engines.serving.worker.child
    stats = child.stats if child is not None and child.ready else {}
    if "cache_tokens" not in stats:
        return None
    return snapshot.Cache(
        tokens=int(stats["cache_tokens"]),
        evictable=int(stats["cache_evictable"]),
        kv_slots_total=int(stats["slots_total"]),
        lookup_tokens=int(stats["cache_lookups_tokens"]),
        hit_tokens=int(stats["cache_hits_tokens"]),
        evicted_tokens=int(stats["cache_evicted_tokens"]),
    )


def _requests(supervisor: Supervisor) -> snapshot.Requests:
    front = supervisor.front
    stats = [engine.child.stats for engine in supervisor.engines if engine.child is not None]
    return snapshot.Requests(
        running=int(sum(one.get("running", 0) for one in stats)),
        waiting=int(sum(one.get("waiting", 0) + one.get("paused", 0) for one in stats)),
        held=front.now("held"),
        in_flight=front.now("in_flight"),
        ok=front.total("ok"),
        cancelled=front.total("cancelled"),
        failed=front.total("failed"),
        resumed=front.total("resumed"),
    )


def measured_memory(supervisor: Supervisor) -> dict[str, int]:
    """Bytes by the engine's own account; empty before it is ready, and with the fake engine."""
    child = supervisor.engines.serving.worker.child
    stats = child.stats if child else {}
    return {name: int(value) for name, value in stats.items() if name.startswith("memory_")}


def workers(supervisor: Supervisor) -> list[snapshot.Worker]:
    places = [*(api.worker for api in supervisor.front.apis), *(engine.worker for engine in supervisor.engines)]
    spare = supervisor.engines.spare.snapshot()
    return [*(worker.snapshot() for worker in places), *([spare] if spare else [])]


def models(supervisor: Supervisor) -> list[snapshot.KnownModel]:
    """The one in force first."""
    config, plan = supervisor.context.config, supervisor.plan
    served = plan.model_name if plan else name_of(config)
    known = [
        snapshot.KnownModel(name=name, model_dir=str(entry["model_dir"]), served=name == served)
        for name, entry in config.models.items()
    ]
    if plan is not None and not any(model.served for model in known):
        where = config.params.model_dir or ""
        known.append(snapshot.KnownModel(name=plan.model_name, model_dir=where, served=True))
    return sorted(known, key=lambda model: not model.served)


def build(supervisor: Supervisor) -> snapshot.Status:
    shown = workers(supervisor)
    ready, reason = health(supervisor)
    ages = [worker.heartbeat_age_s for worker in shown if worker.heartbeat_age_s is not None]
    return snapshot.Status(
        name="lightllmd",
        version=__version__,
        pid=supervisor.pid,
        state=supervisor.state,
        since=supervisor.since,
        started=supervisor.started,
        ready=ready and supervisor.front.ready,
        health=reason if supervisor.front.ready or not ready else "no api worker is ready",
        heartbeat_age_s=max(ages, default=None),
        generation=supervisor.engines.serving.worker.number,
        restarts=sum(worker.restarts for worker in shown),
        config=snapshot.ConfigSource(
            file=supervisor.config_file,
            loaded=supervisor.settings.loaded,
            pending_changes=supervisor.settings.pending,
            pending_fault=supervisor.settings.pending_fault,
            swapped_to=supervisor.settings.swapped_to,
        ),
        listeners=supervisor.urls,
        control_socket=str(supervisor.context.runtime.control_socket),
        model=_model(supervisor),
        models=models(supervisor),
        cache=cache(supervisor),
        requests=_requests(supervisor),
        workers=shown,
        jobs=[job.snapshot for job in supervisor.verbs.jobs.running()],
        events=supervisor.context.events.feed.last(EVENTS_SHOWN),
    )
