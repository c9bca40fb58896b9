"""What people read: the status page, tables, log lines. Pure functions from the daemon's JSON to rich text.

The JSON is read tolerantly: a field that an older or newer daemon doesn't send is left out of the picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.text import Text

from lightllmctl import units
from lightllmd import console

GOOD, WARN, BAD, FAINT, STRONG = "green", "yellow", "red", "dim", "bold"
LABEL_WIDTH = 11  # "   Requests", right-aligned as systemctl does
LONGEST_NAME = 200  # characters; more would push what stands behind it out of sight
HEAD_WIDTH = 92  # where "generation 7" ends

Json = dict[str, Any]


@dataclass(frozen=True)
class Glyphs:
    """What draws the page where only some characters can be shown."""

    active: str
    failed: str
    branch: str
    last: str


UNICODE = Glyphs("●", "×", "├─", "└─")
ASCII = Glyphs("*", "x", "|-", "`-")


@dataclass(frozen=True)
class Activity:
    """A state of the daemon in systemctl's words."""

    word: str
    style: str
    failed: bool = False


ACTIVITIES = {
    "serving": Activity("active", GOOD),
    "swapping": Activity("active", WARN),
    "draining": Activity("active", WARN),
    "drained": Activity("active", WARN),
    "degraded": Activity("degraded", BAD, failed=True),
    "starting": Activity("activating", ""),
    "stopping": Activity("deactivating", ""),
}


def activity(status: Json) -> Activity:
    """Of a status as the daemon answers it; "unknown" for a state of a later version."""
    return ACTIVITIES.get(str(status.get("state")), Activity("unknown", ""))


def clean(text: Any) -> str:
    """Text from elsewhere as one line, without control characters: it must not drive the reader's terminal."""
    return console.printable(str(text)).replace("\n", console.escaped("\n"))


def short_name(text: Any) -> str:
    """`clean`, of a name that more is to follow."""
    text = str(text)
    return clean(text if len(text) <= LONGEST_NAME else f"{text[: LONGEST_NAME - 1]}…")


# --- status ---------------------------------------------------------------------------------------------------


def status_page(status: Json, now: float, glyphs: Glyphs = UNICODE) -> Text:
    """The layout of ``systemctl status``. ``now``: Unix seconds, for everything that is said as an age."""
    page = Text()
    act = activity(status)
    title = f"{status.get('name', 'lightllmd')} - LightLLM serving daemon"
    page.append(glyphs.failed if act.failed else glyphs.active, act.style)
    generation = f"generation {status.get('generation', 0)}"
    page.append(f" {title}{generation:>{HEAD_WIDTH - len(title) - 2}}\n")
    for label, value in (
        ("Loaded", _loaded(status, now)),
        ("Active", _active(status, act, now)),
        ("Health", _health(status)),
        ("Main PID", _main_pid(status)),
        ("Listen", Text(clean(", ".join([*status.get("listeners", []), status.get("control_socket", "")])))),
        ("Model", _model(status)),
        *(("Lost", Text(clean(name), BAD)) for name in status.get("lost_devices") or []),
        *(("TLS", line) for line in _certificate(status, now)),
        *(("Models", Text(line)) for line in _others(status)),
        *(("Cache", Text(line)) for line in _cache(status)),
        ("Requests", _requests(status.get("requests") or {})),
        *(("Engines" if i == 0 else "", line) for i, line in enumerate(_replicas(status))),
        *(("Metrics", line) for line in _pushes(status, now)),
        *_tree(_workers(status, now), "Workers", glyphs),
        *(("Job" if i == 0 else "", job_line(job, now)) for i, job in enumerate(status.get("jobs") or [])),
    ):
        page.append(f"{label:>{LABEL_WIDTH}}{':' if label else ' '} ")
        page.append_text(value).append("\n")
    for event in status.get("events") or []:
        page.append_text(event_line(event)).append("\n")
    page.rstrip()
    return page


def _loaded(status: Json, now: float) -> Text:
    config = status.get("config") or {}
    file = clean(config.get("file") or "from the command line")
    notes = []
    if (loaded := config.get("loaded")) is not None:
        notes.append(f"loaded {units.about(now - loaded)} ago")
    if fault := config.get("pending_fault"):
        notes.append(f"the file is bad now: {clean(fault.splitlines()[0])}")
    else:
        pending = config.get("pending_changes", 0)
        notes.append(f"{pending} pending change{'' if pending == 1 else 's'}")
    if swapped := config.get("swapped_to"):
        notes.append(f"swapped to {clean(swapped)} until the next start")
    return Text(f"{file} ({'; '.join(notes)})")


def _active(status: Json, act: Activity, now: float) -> Text:
    state = clean(status.get("state", "?"))
    line = Text(act.word if act.word == state else f"{act.word} ({state})", act.style)
    if (since := status.get("since")) is not None:
        line.append(f" since {units.instant(since)}; {units.duration(now - since)} ago", "not bold default")
    return line


def _health(status: Json) -> Text:
    line = Text(clean(status.get("health", "")), "" if status.get("ready") else WARN)
    if (age := status.get("heartbeat_age_s")) is not None:
        line.append(f"; heartbeat {units.duration(age)} ago", "default")
    return line


def _main_pid(status: Json) -> Text:
    return Text(f"{status.get('pid', '?')} ({status.get('name', 'lightllmd')})   Restarts: {status.get('restarts', 0)}")


def _model(status: Json) -> Text:
    model = status.get("model")
    if not model:
        return Text("not planned yet", FAINT)
    state = model.get("state", "?")
    styles = {"ready": GOOD, "down": BAD, "failed": BAD}
    line = Text(short_name(model.get("name", "?")), STRONG)
    line.append("  ").append(state, f"not bold {styles.get(state, WARN)}")
    if (progress := model.get("progress")) is not None and state != "ready":
        line.append(f" {progress:.0%}", "not bold")
        line.append(_loaded_bytes(status), "not bold")
    facts = [" ".join(filter(None, (model.get("device"), model.get("data_type"))))]
    if (ranks := model.get("tensor_parallel", 1)) > 1:
        facts.append(f"tp {ranks}")
    if weights := model.get("weight_bytes"):
        facts.append(f"{units.size(weights)} weights{_stored(model.get('weights'))}")
    if total := model.get("kv_slots_total"):
        used = f"{model.get('kv_slots_used', 0) / total:.0%} of {units.count(total)} tokens"
        facts.append(f"KV {used}{_stored(model.get('kv_cache'))}")
    for fact in filter(None, facts):
        line.append(f"  {fact}", "not bold")
    return line


def _stored(scheme: str | None) -> str:
    """How what is quantised is stored."""
    return "" if scheme in (None, "dense") else f" ({scheme})"


def _others(status: Json) -> list[str]:
    """One line with the models that a swap knows by name, where there are such."""
    names = [short_name(model.get("name", "?")) for model in status.get("models") or [] if not model.get("served")]
    return [f"{', '.join(names)} (lightllmctl swap NAME)"] if names else []


_RENEW = 14 * 86400.0  # seconds before its end from which a certificate stands out


def _certificate(status: Json, now: float) -> list[Text]:
    """One line where HTTPS is served."""
    if not (certificate := status.get("certificate")):
        return []
    left = certificate.get("expires", 0) - now
    line = Text(
        short_name(certificate.get("file", "?")) + (", with clients' certificates" if certificate.get("mutual") else "")
    )
    line.append(
        f"   (expires in {units.duration(left)})" if left > 0 else f"   (expired {units.duration(-left)} ago)",
        WARN if left < _RENEW else "",
    )
    if fault := certificate.get("fault"):
        line.append(f"   not taken up: {clean(fault)}", BAD)
    return [line]


def _replicas(status: Json) -> list[Text]:
    """A line for each of several engines in force."""
    lines = []
    for one in status.get("replicas") or []:
        line = Text(short_name(one.get("name", "?")))
        line.append("  ").append("serves" if one.get("ready") else "down", GOOD if one.get("ready") else BAD)
        line.append(f"  {one.get('running', 0)} running, {one.get('waiting', 0)} waiting")
        if total := one.get("kv_slots_total"):
            line.append(f"  KV {one.get('kv_slots_used', 0) / total:.0%} of {units.count(total)} tokens")
        cache = one.get("cache") or {}
        if looked := cache.get("lookup_tokens"):
            line.append(f"  prompt cache {cache.get('hit_tokens', 0) / looked:.0%} found")
        lines.append(line)
    return lines


def _cache(status: Json) -> list[str]:
    """One line where there is a prompt cache."""
    if not (cache := status.get("cache")):
        return []
    found = f"{cache.get('hit_tokens', 0) / looked_up:.0%}" if (looked_up := cache.get("lookup_tokens")) else "none"
    return [
        f"{units.count(cache.get('tokens', 0))} prompt tokens cached   (since the engine's start: {found} of "
        f"{units.count(looked_up or 0)} found, {units.count(cache.get('evicted_tokens', 0))} evicted)"
    ]


def _pushes(status: Json, now: float) -> list[Text]:
    """One line where metrics are pushed to a gateway."""
    if not (push := status.get("push")):
        return []
    at = push.get("pushed_at")
    last = "not pushed yet" if at is None else f"pushed {units.duration(now - at)} ago"
    line = Text(last, WARN if push.get("failing") else "")
    line.append(f" to {short_name(push.get('gateway', '?'))}, job {short_name(push.get('job', '?'))}", "default")
    failures, pushes = push.get("failures", 0), push.get("pushes", 0)
    return [line.append(f"   ({failures:,} of {pushes:,} pushes failed)" if failures else "", "default")]


def _loaded_bytes(status: Json) -> str:
    """(12.4/20.3 GB): the furthest engine rank that says what it loads."""
    for worker in status.get("workers") or []:
        if worker.get("kind") == "engine" and worker.get("phase") == "load" and worker.get("progress_total"):
            return f" ({units.size(worker.get('progress', 0))} of {units.size(worker['progress_total'])})"
    return ""


def _requests(requests: Json) -> Text:
    def number(key: str) -> str:
        return f"{requests.get(key, 0):,}"

    return Text(
        f"{number('running')} running, {number('waiting')} waiting, {number('held')} held   (since start: "
        f"{number('ok')} ok, {number('cancelled')} cancelled, {number('failed')} failed, {number('resumed')} resumed)"
    )


def _workers(status: Json, now: float) -> list[Text]:
    workers = status.get("workers") or []
    api_workers = sum(worker.get("kind") == "api" for worker in workers)
    pids = ["-" if worker.get("pid") is None else str(worker["pid"]) for worker in workers]
    names = [_name(worker, api_workers) for worker in workers]
    pid_width, name_width = max(map(len, pids), default=0), max(map(len, names), default=0)
    return [
        _worker(worker, f"{pid:>{pid_width}} {name:<{name_width}}", now)
        for worker, pid, name in zip(workers, pids, names, strict=True)
    ]


def _name(worker: Json, api_workers: int) -> str:
    name = str(worker.get("kind", worker.get("name", "?")))
    if worker.get("rank") is not None:
        name += f" rank {worker['rank']}"
    elif name == "api" and api_workers > 1 and worker.get("index") is not None:
        name += f" {worker['index']}"
    return short_name(name)


def worker_state(worker: Json) -> tuple[str, str]:
    """(word, style): the phase of a running worker, else its state."""
    state, phase = str(worker.get("state", "?")), str(worker.get("phase") or "")
    if state == "running" and phase == "ready":
        return "ready", GOOD
    if state in ("running", "starting"):
        word = {"boot": "booting", "load": "loading", "warmup": "warming up"}.get(phase, state)
        total = worker.get("progress_total") or 0
        return (f"{word} {worker.get('progress', 0) / total:.0%}" if total and phase == "load" else word), WARN
    return state, {"backoff": WARN, "fatal": BAD}.get(state, FAINT)


def _worker(worker: Json, label: str, now: float) -> Text:
    word, style = worker_state(worker)
    line = Text(f"{label}   ")
    line.append(f"{word:<13}", style)
    facts = []
    if memory := worker.get("memory_bytes"):
        facts.append(f"{units.size(memory):>7}")
    if (next_try := worker.get("next_try_at")) is not None:
        facts.append(f"next try in {units.duration(next_try - now)}")
    last = worker.get("last_exit") or {}
    if restarts := worker.get("restarts"):
        facts.append(f"restarts {restarts}{_last_exit(last, now)}")
    elif last:
        facts.append(_last_exit(last, now).strip())
    line.append("  ".join(facts), "default")
    line.rstrip()
    return line


def _last_exit(last: Json, now: float) -> str:
    if not last:
        return ""
    notes = f"{clean(last.get('cause', '?'))}"
    if (at := last.get("at")) is not None:
        notes += f", {units.about(now - at)} ago"
    if (back := last.get("back_in_s")) is not None:
        notes += f"; back in {units.duration(back)}"
    return f" ({notes})"


def _tree(rows: Sequence[Text], label: str, glyphs: Glyphs) -> Iterable[tuple[str, Text]]:
    for i, row in enumerate(rows):
        bar = glyphs.last if i == len(rows) - 1 else glyphs.branch
        yield label if i == 0 else "", Text(f"{bar} ").append_text(row)


# --- jobs, events, logs -----------------------------------------------------------------------------------------


def job_name(job: Json) -> str:
    """Its number, verb and target: "#31 swap llama3-8b"."""
    return " ".join(
        filter(None, (f"#{job.get('id', '?')}", short_name(job.get("verb", "")), short_name(job.get("target", ""))))
    )


def job_line(job: Json, now: float) -> Text:
    """Name, phase, progress and time so far. `now`: Unix seconds."""
    line = Text(f"{job_name(job)}  {clean(job.get('phase', ''))}")
    if (progress := job.get("progress")) is not None:
        line.append(f" {progress:.0%}")
    if (started := job.get("started")) is not None:
        line.append(f"  {units.duration((job.get('ended') or now) - started)}")
    return line


_EVENT_STYLES = {"exit": BAD, "hang": BAD, "warning": WARN, "ready": GOOD}


def event_line(event: Json) -> Text:
    """Time, worker and message, in a colour by its kind."""
    line = Text(f"{units.stamp(event.get('at', 0.0))} ")
    if worker := event.get("worker"):
        line.append(f"{short_name(worker)}: ")
    return line.append(clean(event.get("message", "")), _EVENT_STYLES.get(str(event.get("kind")), ""))


_LEVEL_STYLES = {"debug": FAINT, "warning": WARN, "error": BAD}


def log_line(entry: Json) -> Text:
    """Time, worker and message, in a colour by its level."""
    line = Text(f"{units.stamp(entry.get('at', 0.0))} {short_name(entry.get('worker', '?'))}: ")
    return line.append(clean(entry.get("message", "")), _LEVEL_STYLES.get(str(entry.get("level")), ""))


# --- tables -----------------------------------------------------------------------------------------------------


def table(headers: Sequence[str], rows: Sequence[Sequence[str | Text]], right: Iterable[int] = ()) -> Text:
    """Columns two spaces apart, none wrapped; columns of ``right`` are right-aligned. The last one is free, the others
    are at most LONGEST_NAME wide."""
    right = set(right)
    cells = [[value if isinstance(value, Text) else Text(value) for value in row] for row in rows]
    for row in cells:
        for cell in row[:-1]:
            cell.truncate(LONGEST_NAME, overflow="ellipsis")
    heads = [Text(header, STRONG) for header in headers]
    widths = [max(len(row[i]) for row in [heads, *cells]) for i in range(len(headers))]
    page = Text()
    for row in [heads, *cells]:
        line = Text()
        for i, cell in enumerate(row):
            pad = " " * (widths[i] - len(cell))
            line.append("  " if i else "")
            line.append_text(Text(pad) + cell if i in right else cell + Text(pad))
        line.rstrip()
        page.append_text(line).append("\n")
    page.rstrip()
    return page
