"""The status page as data: one consistent look at everything, made inside the loop's thread, waiting for nothing."""

from __future__ import annotations

from collections.abc import Sequence

from lightllmd import __version__
from lightllmd.config.models import name_of
from lightllmd.supervisor import snapshot
from lightllmd.supervisor.change.handover import describe, fraction
from lightllmd.supervisor.daemon import Daemon
from lightllmd.supervisor.workers.generation import Engine

EVENTS_SHOWN = 10


def health(daemon: Daemon) -> tuple[bool, str]:
    """Whether new requests are served, and why or why not. The reason changes with the state, not with progress."""
    verbs, serving = daemon.verbs, daemon.engines.serving
    if verbs.stopping is not None:
        return False, "stopping"
    if verbs.draining:
        return False, "drained" if verbs.drained else "draining"
    if daemon.plan is None:
        return False, "planning: reading the model's headers"
    if daemon.front.holding:
        return False, "the model is being replaced: new requests wait"
    if serving.ready:
        return True, "; ".join(["ready", *filter(None, (_fewer(daemon), daemon.monitor.trouble, _crowded(daemon)))])
    return False, _why_down(serving.first, "the engine")


def _why_down(engine: Engine, name: str) -> str:
    worker = engine.worker
    if not engine.wanted or engine.on_trial:
        return f"{name} is being replaced"
    if engine.ending:
        return f"{name} is dying"
    if worker.fatal is not None:
        return f"{name} is not started again: {worker.fatal.cause}"
    if engine.memory.short:
        return "waiting for memory to become free"
    if worker.last_exit is not None:
        return f"{name} is restarting: {worker.last_exit.cause}"
    return "the model is loading"


def _fewer(daemon: Daemon) -> str:
    """What is said while some of several engines don't serve."""
    serving = daemon.engines.serving
    down = serving.down
    if not down:
        return ""
    ready = len(serving.engines) - len(down)
    return f"{ready} of {len(serving.engines)} engines serve; {_why_down(down[0], down[0].worker.name)}"


def _crowded(daemon: Daemon) -> str:
    """What is said when the front end had to refuse connections, or close some, within the last seconds."""
    front = daemon.front
    if not front.now("connections_full"):
        return ""
    open_now, most = front.now("connections"), front.now("connections_most")
    return f"the front end is full: {open_now} of {most} connections are open"


def state(daemon: Daemon) -> str:
    """As `snapshot.Status.state`."""
    verbs = daemon.verbs
    if verbs.ending:
        return "stopping"
    if verbs.draining:
        return "drained" if verbs.drained else "draining"
    if daemon.served_since is None:
        return "starting"
    if daemon.front.holding:
        return "swapping"
    engines = daemon.engines
    if engines.candidate is not None and engines.serving.ready and engines.serving.down:
        return "swapping"  # one engine after the other
    workers = [*(engine.worker for engine in engines.serving.engines), *(api.worker for api in daemon.front.apis)]
    if engines.serving.visual is not None:
        workers.append(engines.serving.visual)
    return "serving" if all(worker.ready for worker in workers) else "degraded"


def _blind(daemon: Daemon) -> str:
    """Whether images wait, in words; empty: they don't, or there are none."""
    visual, plan = daemon.engines.serving.visual, daemon.plan
    if plan is None or plan.vision is None or visual is None or visual.ready:
        return ""
    why = f" after: {visual.last_exit.cause}" if visual.last_exit else ""
    return f"images wait for {visual.name}: {describe(visual)}{why}"


def sentence(daemon: Daemon) -> str:
    """The state in one line, as systemctl status shows it."""
    verbs, serving = daemon.verbs, daemon.engines.serving
    worker = serving.first.worker
    if verbs.stopping is not None:
        return f"Stopping: {verbs.stopping.snapshot.phase}"
    if verbs.draining:
        return f"Draining: {daemon.front.now('in_flight')} requests in flight"
    if daemon.plan is None:
        return "ReadAhead the model's headers"
    for job in verbs.jobs.running("swap", "reload"):
        return f"{job.snapshot.verb.capitalize()}: {job.snapshot.phase}"
    if worker.ready:
        if daemon.front.ready:
            less = [one for one in (_fewer(daemon), _blind(daemon)) if one]
            return f"Serving {daemon.plan.model_name}" + (f": {'; '.join(less)}" if less else "")
        worker = daemon.front.apis[0].worker
    why = f" after: {worker.last_exit.cause}" if worker.last_exit else ""
    return f"{worker.name}: {describe(worker)}{why}" if worker.kind == "api" else describe(worker) + why


def _model(daemon: Daemon) -> snapshot.Model | None:
    plan, serving = daemon.plan, daemon.engines.serving
    worker = serving.first.worker
    if plan is None:
        return None
    if worker.ready:
        how = "ready"
    elif worker.fatal is not None:
        how = "failed"
    else:
        how = "loading" if worker.child is not None else "down"
    return snapshot.Model(
        name=plan.model_name,
        state=how,
        progress=fraction(worker),
        device=plan.device.kind,
        data_type=plan.data_type,
        weight_bytes=plan.budget.row("weights"),
        tensor_parallel=plan.ranks,
        weights=plan.schemes.title,
        kv_cache=plan.kv_scheme,
        kv_slots_used=int(serving.stat("slots_used")),
        kv_slots_total=int(serving.stat("slots_total")) or plan.max_total_token_num * plan.replicas,
    )


def cache(daemon: Daemon) -> snapshot.Cache | None:
    """Of all engines in service together; None where none of them has a prompt cache."""
    return _cache_of(daemon.engines.serving.engines)


def _cache_of(engines: Sequence[Engine]) -> snapshot.Cache | None:
    children = [engine.child for engine in engines if engine.child is not None and engine.ready]
    stats = [child.stats for child in children if "cache_tokens" in child.stats]
    if not stats:
        return None

    def total(name: str) -> int:
        return int(sum(one[name] for one in stats))

    return snapshot.Cache(
        tokens=total("cache_tokens"),
        evictable=total("cache_evictable"),
        kv_slots_total=total("slots_total"),
        lookup_tokens=total("cache_lookups_tokens"),
        hit_tokens=total("cache_hits_tokens"),
        evicted_tokens=total("cache_evicted_tokens"),
    )


def _replicas(daemon: Daemon) -> list[snapshot.EngineStatus]:
    engines = daemon.engines.serving.engines
    return [_replica(engine) for engine in engines] if len(engines) > 1 else []


def _replica(engine: Engine) -> snapshot.EngineStatus:
    stats = engine.child.stats if engine.child is not None else {}
    return snapshot.EngineStatus(
        name=engine.worker.name,
        generation=engine.worker.number,
        ready=engine.ready,
        running=int(stats.get("running", 0)),
        waiting=int(stats.get("waiting", 0) + stats.get("paused", 0)),
        kv_slots_used=int(stats.get("slots_used", 0)),
        kv_slots_total=int(stats.get("slots_total", 0)),
        tokens_out=int(stats.get("tokens_out", 0)),
        cache=_cache_of([engine]),
    )


def _requests(daemon: Daemon) -> snapshot.Requests:
    front = daemon.front
    stats = [engine.child.stats for engine in daemon.engines if engine.child is not None]
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


def measured_memory(daemon: Daemon) -> dict[str, int]:
    """Bytes by an engine's own account; empty before one is ready, and with the fake engine."""
    child = daemon.engines.serving.first.child
    stats = child.stats if child else {}
    return {name: int(value) for name, value in stats.items() if name.startswith("memory_")}


def workers(daemon: Daemon) -> list[snapshot.WorkerStatus]:
    """Api workers, the ranks of engines, then spare ones and what pushes metrics."""
    apis = [api.worker.snapshot() for api in daemon.front.apis]
    ranks = [rank for engine in daemon.engines for rank in engine.snapshots()]
    pusher = [daemon.pusher.worker.snapshot()] if daemon.pusher.snapshot() or daemon.pusher.children() else []
    return [*apis, *ranks, *daemon.visuals.snapshots(), *daemon.engines.spares.snapshots(), *pusher]


def models(daemon: Daemon) -> list[snapshot.KnownModel]:
    """The one in force first; the one at the top of the file where it is no entry, by the word that a swap takes."""
    config, plan, written = daemon.context.config, daemon.plan, daemon.settings.written
    served = plan.model_name if plan else name_of(config)
    known = [
        snapshot.KnownModel(name=name, model_dir=str(entry["model_dir"]), served=name == served)
        for name, entry in config.models.items()
    ]
    if plan is not None and not any(model.served for model in known):
        where = config.params.model_dir or ""
        known.append(snapshot.KnownModel(name=plan.model_name, model_dir=where, served=True))
    top = written.params.model_dir
    if top is not None and daemon.settings.swapped_to is not None and name_of(written) is None:
        name = written.http.served_model_name or top
        known.append(snapshot.KnownModel(name=name, model_dir=top, served=False))
    return sorted(known, key=lambda model: not model.served)


def build(daemon: Daemon) -> snapshot.Status:
    """All of the page."""
    shown = workers(daemon)
    ready, reason = health(daemon)
    # No request waits for what pushes metrics.
    ages = [one.heartbeat_age_s for one in shown if one.heartbeat_age_s is not None and one.kind != "push"]
    return snapshot.Status(
        name="lightllmd",
        version=__version__,
        pid=daemon.pid,
        state=daemon.state,
        since=daemon.since,
        started=daemon.started,
        ready=ready and daemon.front.ready,
        health=reason if daemon.front.ready or not ready else "no api worker is ready",
        heartbeat_age_s=max(ages, default=None),
        generation=daemon.engines.serving.number,
        restarts=sum(worker.restarts for worker in shown),
        config=snapshot.ConfigSource(
            file=daemon.config_file,
            loaded=daemon.settings.loaded,
            pending_changes=daemon.settings.pending,
            pending_fault=daemon.settings.pending_fault,
            swapped_to=daemon.settings.swapped_to,
        ),
        listeners=daemon.urls,
        control_socket=str(daemon.context.runtime.control_socket),
        model=_model(daemon),
        lost_devices=daemon.lost.named,
        models=models(daemon),
        cache=cache(daemon),
        requests=_requests(daemon),
        replicas=_replicas(daemon),
        push=daemon.pusher.snapshot(),
        certificate=daemon.certificate.snapshot(),
        workers=shown,
        jobs=[job.snapshot for job in daemon.verbs.jobs.running()],
        events=daemon.context.events.feed.last(EVENTS_SHOWN),
    )
