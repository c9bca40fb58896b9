"""The control plane's wire types: what `GET /v1/status` and its sisters answer, version 1.

Everything is JSON with snake_case keys. Instants are Unix seconds (float), durations seconds, sizes bytes. A field
is never removed or given another meaning within ``api`` 1; new ones may be added, so readers ignore what they don't
know. Streams (`/v1/jobs/{id}`, `/v1/events`, `/v1/logs`) are newline-delimited JSON, one of these structs a line;
an empty line is a keep-alive.

=============================== ============================================ =================================
request                         answer                                       errors beside NotPermitted
=============================== ============================================ =================================
GET /v1/status                  `Status`
GET /v1/version                 `Version`
GET /v1/workers                 list of `Worker`
GET /v1/config                  the configuration as written (JSON)
GET /v1/config?effective=1      `Effective`                                  TryAgain (before the plan is made)
POST /v1/check {file}           `Checked`                                    ConfigInvalid
POST /v1/restart {worker?}      202 `Job`                                    NoSuchWorker, Busy, StaleGeneration
POST /v1/drain                  202 `Job`                                    Busy, StaleGeneration
POST /v1/resume                 202 `Job`                                    Busy, StaleGeneration
POST /v1/stop {now?}            202 `Job`                                    StaleGeneration
POST /v1/reload {dry_run?}      202 `Job`                                    Busy, StaleGeneration
POST /v1/swap {model, plan?,    202 `Job`                                    NoSuchModel, Busy,
drain_timeout?, force?,                                                      StaleGeneration
on_failure?}
POST /v1/reset-failed {worker?} 202 `Job`                                    NoSuchWorker, Busy, StaleGeneration
GET /v1/models                  list of `KnownModel`
GET /v1/cache                   `Cache`                                      PromptCacheOff, TryAgain
POST /v1/cache/flush            202 `Job`                                    PromptCacheOff, TryAgain, Busy,
                                                                             StaleGeneration
GET /v1/jobs                    list of `Job`, oldest first
GET /v1/jobs/{id}               stream of `Job`, ends with the job           NoSuchJob
GET /v1/events?follow=&lines=   stream of `Event`                            Usage
GET /v1/logs?follow=&lines=     stream of `LogLine`                          Usage, NoSuchWorker
&worker=&format=text
GET /v1/crashes                 list of `crashes.CrashSummary`, newest first
GET /v1/crashes/{id}            `crashes.Crash`                              NoSuchCrash
=============================== ============================================ =================================

An error is ``{"error": name, "message": text, **parameters}`` with the status of `lightllmd.errors`. Mutations take
``If-Match: <generation>``, the number in `Status.generation`, and answer StaleGeneration when it is another one.
A `stop` job's stream ends with the daemon itself: the end of file is its success.
"""

from __future__ import annotations

from typing import Any

import msgspec

from lightllmd.config.plan import Budget, Derived
from lightllmd.config.report import Place

API = 1


class Exit(msgspec.Struct, frozen=True, kw_only=True):
    """How a worker process ended."""

    cause: str  # in words: "killed by SIGKILL", "hung: no progress for 10 s while ready", "exit 78: configuration"
    at: float
    back_in_s: float | None = None  # from this exit until the worker was ready again; None: not yet
    stderr: list[str] = []  # the last lines that it printed


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One child process, or the place of one that will be started again."""

    name: str  # "api-0", "engine-0": kind and index, stable over restarts; "engine-0.1": its rank 1; "spare"
    # "api" | "engine" | "visual" | "push" | "spare": an engine that waits, "running" and "ready" once it can be taken
    kind: str
    index: int  # the api worker's number, the engine's among those that serve side by side
    rank: int | None  # engines only; restarts and the last exit are told with rank 0, which leads
    pid: int | None  # None: no process now
    state: str  # "starting" | "running" | "backoff" | "stopping" | "exited" | "fatal"
    phase: str  # as its heartbeats say: "boot" | "load" | "warmup" | "ready"; "" without a process
    progress: int  # within the phase: bytes while loading, steps when ready
    progress_total: int  # what `progress` heads for; 0: unknown
    restarts: int  # starts after the first; of the engine in force: of those before it, too
    generation: int  # the engine's generation, the api worker's epoch; 0: a spare
    memory_bytes: int  # resident set; 0 without a process
    heartbeat_age_s: float | None  # since the last heartbeat
    started: float | None  # of the present process
    last_exit: Exit | None
    next_try_at: float | None  # in back-off: when it is started again


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """The model in force."""

    name: str
    state: str  # "planning" | "loading" | "ready" | "down" | "failed"
    progress: float | None  # 0..1 while loading, where known
    device: str
    data_type: str
    weight_bytes: int
    tensor_parallel: int
    weights: str  # how they are stored: "dense", or the schemes of those that are quantised, such as "w4a16 g128"
    kv_cache: str  # likewise: "dense", "int8", ...
    kv_slots_used: int  # one slot holds one token
    kv_slots_total: int


class KnownModel(msgspec.Struct, frozen=True, kw_only=True):
    """What a swap can be asked for by name, and the model in force."""

    name: str
    model_dir: str
    served: bool


class Cache(msgspec.Struct, frozen=True, kw_only=True):
    """The prompt cache of the engine in force, or of all of them. The last three count since the start of its
    process."""

    tokens: int  # kept: each has a KV slot
    evictable: int  # of them, not used by any running request: they give way as soon as slots are needed
    kv_slots_total: int
    lookup_tokens: int  # of the prompts that were looked up
    hit_tokens: int  # of them, found
    evicted_tokens: int


class EngineStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One of several engines in force that serve side by side."""

    name: str  # of its worker: "engine-0"
    generation: int
    ready: bool
    running: int  # branches in its running batch
    waiting: int  # branches queued or paused there
    kv_slots_used: int
    kv_slots_total: int
    tokens_out: int  # generated since its process started
    cache: Cache | None  # None: it has no prompt cache, or isn't ready


class Requests(msgspec.Struct, frozen=True, kw_only=True):
    """The first three are now, the others count since the daemon's start."""

    running: int  # branches in the running batch
    waiting: int  # branches queued or paused in the engine
    held: int  # requests waiting in api workers for an engine
    in_flight: int  # requests open in api workers, held ones too
    ok: int
    cancelled: int
    failed: int
    resumed: int  # went on after an engine's death


class Certificate(msgspec.Struct, frozen=True, kw_only=True):
    """Of HTTPS."""

    file: str
    expires: float  # Unix seconds; of the one in force
    mutual: bool  # clients need one, too
    fault: str  # why what the files hold by now is not in force; empty: it is


class Push(msgspec.Struct, frozen=True, kw_only=True):
    """The pushes of metrics to the gateway in force. They count since the start of the process that makes them."""

    gateway: str
    job: str
    grouping_key: dict[str, str]
    pushed_at: float | None  # when the last push was taken; None: none was
    pushes: int
    failures: int
    failing: bool  # the last push was not taken, or the process that pushes is not there


class JobStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One mutation, from request to outcome."""

    id: int
    verb: str  # "restart" | "drain" | "resume" | "reload" | "swap" | "reset-failed" | "flush-cache" | "stop"
    target: str  # what it acts on: "", "engine", "api-0", a model, …
    phase: str  # in words; "done" at the end
    progress: float | None  # 0..1, where known
    outcome: str | None  # None while it runs; "done" | "failed" | "rolled-back" | "cancelled"
    message: str  # why it failed, or what it did
    started: float
    ended: float | None
    by_uid: int | None  # the peer that asked; None: the daemon itself (a signal)
    by_pid: int | None
    error: dict[str, Any] | None = None  # of one that failed: "error" (a name), "message", and its parameters
    details: dict[str, Any] = {}  # reload: "changes"; swap: "how", "plan", "phases" ([name, seconds]), "kept"


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened to the daemon, as an operator would tell it."""

    seq: int  # grows by one
    at: float
    kind: str  # "start" | "ready" | "exit" | "hang" | "restart" | "job" | "drain" | "stop" | "warning" …
    worker: str | None
    message: str


class LogLine(msgspec.Struct, frozen=True, kw_only=True):
    """One line that a worker printed or the supervisor wrote."""

    at: float
    worker: str  # "lightllmd" for the supervisor itself
    level: str  # "debug" | "info" | "warning" | "error"
    message: str


class ConfigSource(msgspec.Struct, frozen=True, kw_only=True):
    """Where the configuration came from, and whether a reload would change it."""

    file: str | None  # None: all from the command line
    loaded: float  # or reloaded
    pending_changes: int = 0  # that a reload would take up: settings that the file says otherwise, the model's files
    pending_fault: str = ""  # why the file can't be reloaded as it is
    swapped_to: str | None = None  # what a swap serves in place of the configured model, until the daemon starts anew


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The status page."""

    api: int = API
    name: str
    version: str
    pid: int
    state: str  # "starting" | "serving" | "swapping" | "degraded" | "draining" | "drained" | "stopping"
    since: float  # when `state` was entered
    started: float  # when the daemon was started
    ready: bool  # new requests are accepted and an engine runs
    health: str  # why it is ready or not, in words
    heartbeat_age_s: float | None  # the oldest among the running workers'
    generation: int  # the engine generation in force; 0 before the first
    restarts: int  # of all workers together
    config: ConfigSource
    listeners: list[str]  # URLs
    control_socket: str
    model: Model | None  # None before the plan is made
    lost_devices: list[str] = []  # GPUs that the engines were planned for and that can't be used any more, and why
    models: list[KnownModel]  # as `GET /v1/models`
    cache: Cache | None  # None: there is no prompt cache, or no engine is ready
    requests: Requests
    replicas: list[EngineStatus] = []  # one for each engine in force; empty where there is only one
    push: Push | None  # None: no gateway is configured
    certificate: Certificate | None = None  # None: HTTP is served
    workers: list[WorkerStatus]
    jobs: list[JobStatus]  # those in progress
    events: list[Event]  # the last ten, oldest first


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """Of the program and of what runs it."""

    api: int = API
    name: str = "lightllmd"
    version: str
    python: str
    pid: int


class Effective(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /v1/config?effective=1`: the plan in force."""

    config: dict[str, Any]  # as written, defaults filled in
    values: dict[str, Any]  # what replaced "auto" and unset values
    derived: list[Derived]  # each with its reason
    budget: Budget  # of several devices that of the one with the least room
    budget_needed: int  # bytes
    devices: list[Place]  # by replica and rank; empty where there is one
    measured: dict[str, int]  # what the engine says it took: memory_loaded, memory_worst_step, memory_used; bytes
    report: str  # the same as text, as it was printed at the start


class Checked(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /v1/check` of a file without a fault."""

    file: str
    ok: bool = True
