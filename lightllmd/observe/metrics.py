"""The Prometheus metrics, under the names of LightLLM's. prometheus_client appends ``_total`` to counters and
``_bucket``, ``_sum``, ``_count`` to histograms.

Every process keeps its values in files of a common directory (multiprocess mode), so that any one of them can render
the sum of all. The environment variable PROMETHEUS_MULTIPROC_DIR has to be set before this module is imported;
without it a process counts for itself only. A kind of process declares no more than it sets: what is declared takes
room in its files, which outlive it. The files are named by an id that the supervisor lends
(`use_files`), not by the pid: the next process with that id counts on in them, so totals survive any number of deaths
and files don't pile up. Readers open these files at any moment, so whatever moment a process dies at leaves them
readable. They are mapped, and a mapped file without room behind it ends its process by SIGBUS: the room is taken before
that, or the process counts for itself only.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, get_args

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest, values
from prometheus_client.multiprocess import MultiProcessCollector

__all__ = ["CONTENT_TYPE_LATEST", "ApiMetrics", "EngineMetrics", "PushMetrics", "registry_of", "render", "use_files"]

StepKind = Literal["prefill", "decode", "mixed"]

log = logging.getLogger(__name__)

# Bytes of a process's file for metrics of each kind: twice what those below take. Beyond it prometheus_client would let
# the file grow without taking the room.
_ROOM = {"counter": 1 << 14, "gauge_livesum": 1 << 16, "gauge_livemostrecent": 1 << 12, "histogram": 1 << 18}
_SECONDS = [0.001 * 1.5**i for i in range(1, 36)]
_BATCH_SIZES = [float(size) for size in range(1, 129)]
KEY_REFUSALS = ("unauthorized", "forbidden", "requests_per_minute", "tokens_per_minute", "max_concurrent")
_OF_REPLICAS = {  # by the names of heartbeats' stats
    "running": "Branches running in one of several engines",
    "waiting": "Branches never admitted yet there",
    "paused": "Branches paused there",
    "slots_used": "KV slots in use there",
    "slots_total": "KV slots there",
    "tokens_out": "Tokens generated there since its process started",
    "cache_tokens": "Tokens in its prompt cache",
    "cache_lookups_tokens": "Prompt tokens that were looked up there since its process started",
    "cache_hits_tokens": "Of them, found in its prompt cache",
}
_RATIOS = [i / 10 for i in range(11)]


def use_files(metrics_id: str, directory: str, kinds: Iterable[str] = tuple(_ROOM)) -> None:
    """Names this process's files in `directory`, one for each of the `kinds` of metrics that it makes, and takes their
    room; before any metric is made. Where there is none, what is counted is seen by this process alone, and the log
    says so."""
    try:
        for kind in kinds:
            _take_room(Path(directory), f"{kind}_{metrics_id}.db", _ROOM[kind])
    except OSError as refused:
        log.error("%s: no room for metrics: %s; this process is missing in /metrics", directory, refused.strerror)
        values.ValueClass = values.MutexValue
        return
    values.ValueClass = values.MultiProcessValue(lambda: metrics_id)


def _take_room(directory: Path, name: str, size: int) -> None:
    """A file appears with all of its room and zeros in it, which read as no values. Raises OSError."""
    path = directory / name
    partial = path if path.exists() else directory / f".{name}"
    try:
        fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, max(size, os.fstat(fd).st_size))
        finally:
            os.close(fd)
        partial.rename(path)
    except OSError:
        if partial != path:
            with contextlib.suppress(OSError):
                partial.unlink()
        raise


def _hundredths(most: int) -> list[float]:
    return [i * most / 100 for i in range(101)]


class _Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"lightllm_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, mode: Literal["livesum", "livemostrecent"] = "livesum") -> Gauge:
        return Gauge(f"lightllm_{name}", text, registry=self.registry, multiprocess_mode=mode)

    def _histogram(self, name: str, text: str, buckets: list[float], *labels: str) -> Histogram:
        return Histogram(f"lightllm_{name}", text, labels, registry=self.registry, buckets=buckets)


class ApiMetrics(_Metrics):
    """What an api worker knows. Durations in seconds. Each request that entered ends in one of three counts: success,
    failure (it was refused or ended with an error) or cancelled (its client went away); until then it is in flight."""

    def __init__(self, max_req_input_len: int, max_req_total_len: int) -> None:
        super().__init__()
        counter, histogram = self._counter, self._histogram
        inputs, totals = _hundredths(max_req_input_len), _hundredths(max_req_total_len)
        self._count = counter("request_count", "Requests that entered")
        self._success = counter("request_success", "Requests of which every branch finished")
        self._failure = counter("request_failure", "Requests that were refused or ended with an error")
        self._cancelled = counter("request_cancelled", "Requests whose client went away before their end")
        self._duration = histogram("request_duration", "From arrival to the end", _SECONDS)
        self._validation = histogram("request_validation_duration", "From arrival to the engine's queue", _SECONDS)
        self._inference = histogram("request_inference_duration", "From the engine's queue to the end", _SECONDS)
        self._per_token = histogram(
            "request_mean_time_per_token_duration", "Inference time over generated tokens", _SECONDS
        )
        self._first_token = histogram("request_first_token_duration", "From arrival to the first token", _SECONDS)
        self._input_length = histogram("request_input_length", "Prompt tokens of a request", inputs)
        self._max_new_tokens = histogram("request_max_new_tokens", "max_new_tokens of a request", totals)
        self._generated = histogram("request_generated_tokens", "Generated tokens of a branch", totals)
        self._cache_length = histogram("cache_length", "Prompt tokens found in the prompt cache", inputs)
        self._cache_ratio = histogram("cache_ratio", "Their share of the prompt", _RATIOS)
        keys = counter("key_refusal", "Requests refused because of their API key, or for want of one", "reason")
        self._refused = {reason: keys.labels(reason) for reason in KEY_REFUSALS}

        self._certificate: tuple[Gauge, Gauge] | None = None  # made with the first one
        self._settle()

    def _settle(self) -> None:
        """What the process before in this one's files had in flight when it died has failed."""

        def total(name: str) -> float:
            return self.registry.get_sample_value(f"lightllm_request_{name}_total") or 0.0

        lost = total("count") - total("success") - total("failure") - total("cancelled")
        if lost > 0:
            self._failure.inc(lost)

    def entered(self) -> None:
        """A request has come in."""
        self._count.inc()

    def refused(self, reason: str) -> None:
        """One of KEY_REFUSALS: because of its API key, or for want of one."""
        self._refused[reason].inc()

    def certificate(self, expires: float, broken: bool) -> None:
        """What HTTPS is served with. Where HTTP is, there are no such metrics."""
        if self._certificate is None:
            self._certificate = (
                self._gauge("tls_certificate_expiry", "Its end, in Unix seconds", "livemostrecent"),
                self._gauge("tls_certificate_broken", "1: the files hold another, unusable one", "livemostrecent"),
            )
        for gauge, value in zip(self._certificate, (expires, broken), strict=True):
            gauge.set(value)

    def submitted(self, seconds: float, input_length: int, max_new_tokens: int) -> None:
        """It is valid and tokenised, and on its way to the engine `seconds` after its arrival."""
        self._validation.observe(seconds)
        self._input_length.observe(input_length)
        self._max_new_tokens.observe(max_new_tokens)

    def first_token(self, seconds: float) -> None:
        """Its first token leaves `seconds` after its arrival."""
        self._first_token.observe(seconds)

    def succeeded(self, seconds: float, inference_seconds: float, generated: list[int]) -> None:
        """`generated`: tokens of each branch; none where the answer has other things than tokens."""
        self._success.inc()
        self._duration.observe(seconds)
        self._inference.observe(inference_seconds)
        if generated:
            self._per_token.observe(inference_seconds / max(1, sum(generated)))
        for tokens in generated:
            self._generated.observe(tokens)

    def cached(self, tokens: int, prompt_tokens: int) -> None:
        """Of a request that succeeded."""
        self._cache_length.observe(tokens)
        self._cache_ratio.observe(tokens / prompt_tokens)

    def failed(self) -> None:
        """It was refused, or ended with an error."""
        self._failure.inc()

    def cancelled(self) -> None:
        """Its client went away before its end."""
        self._cancelled.inc()


class EngineMetrics(_Metrics):
    """What the scheduler's process knows. Sizes count branches. Where several engines serve side by side, those with
    the label ``replica`` tell of each what others tell of all together."""

    def __init__(self, replica: int = 0, replicas: int = 1) -> None:
        super().__init__()
        counter, gauge, histogram = self._counter, self._gauge, self._histogram
        count = counter("batch_inference_count", "Steps run", "method")
        duration = histogram("batch_inference_duration_bucket", "Of one step, in seconds", _SECONDS, "method")
        self._steps = {kind: (count.labels(kind), duration.labels(kind)) for kind in get_args(StepKind)}
        self._queued = histogram("request_queue_duration_bucket", "From arrival to the first admission", _SECONDS)
        self._next_size = histogram("batch_next_size", "Branches that one step begins", _BATCH_SIZES)
        self._waiting = gauge("queue_size", "Branches never admitted yet")
        self._running = gauge("batch_current_size", "Branches running")
        self._paused = gauge("batch_pause_size", "Branches paused")
        self._peak = gauge("batch_current_max_tokens", "Token slots that the running batch may come to need at once")
        self._cached = gauge("prompt_cache_tokens", "Tokens in the prompt cache")
        self._evictable = gauge("prompt_cache_evictable_tokens", "Of them, used by no running branch")
        self._cache_counts = {
            "cache_lookups_tokens": counter("prompt_cache_lookup_tokens", "Prompt tokens that were looked up"),
            "cache_hits_tokens": counter("prompt_cache_hit_tokens", "Of them, found in the prompt cache"),
            "cache_evicted_tokens": counter("prompt_cache_evicted_tokens", "Tokens that gave way to others"),
        }
        self._cache_counted = dict.fromkeys(self._cache_counts, 0.0)
        self._grammar_bytes = gauge("grammar_cache_bytes", "Of compiled grammars that are kept")
        self._grammar_counts = (
            counter("grammar_compile_count", "Grammars compiled"),
            counter("grammar_compile_seconds", "That took"),
            counter("grammar_cache_hit_count", "Requests whose grammar was compiled already"),
        )
        self._grammars_counted = (0.0, 0.0, 0.0)
        self._replica: dict[str, Gauge] = {}  # this one's; none where there is no other
        if replicas > 1:
            for name, text in _OF_REPLICAS.items():
                of_all = Gauge(
                    f"lightllm_replica_{name}", text, ("replica",), registry=self.registry, multiprocess_mode="livesum"
                )
                for other in range(replicas):  # the process before with these files may have been another one
                    of_all.labels(str(other)).set(0)
                self._replica[name] = of_all.labels(str(replica))

    def of_replica(self, stats: Mapping[str, float]) -> None:
        """What its heartbeat says of this one of several engines."""
        for name, gauge in self._replica.items():
            gauge.set(stats.get(name, 0.0))

    def step(self, kind: StepKind, seconds: float, begun: int) -> None:
        """`begun`: branches whose first step it is."""
        count, duration = self._steps[kind]
        count.inc()
        duration.observe(seconds)
        if begun:
            self._next_size.observe(begun)

    def cache(self, stats: Mapping[str, float]) -> None:
        """`Scheduler.cache_stats`, whose counts grow from this process's start on."""
        self._cached.set(stats["cache_tokens"])
        self._evictable.set(stats["cache_evictable"])
        for name, counter in self._cache_counts.items():
            counter.inc(stats[name] - self._cache_counted[name])
            self._cache_counted[name] = stats[name]

    def grammars(self, compiled: int, seconds: float, hits: int, kept_bytes: int) -> None:
        """All but the last grow from this process's start on."""
        self._grammar_bytes.set(kept_bytes)
        counted = (float(compiled), seconds, float(hits))
        for counter, now, before in zip(self._grammar_counts, counted, self._grammars_counted, strict=True):
            counter.inc(now - before)
        self._grammars_counted = counted

    def admitted(self, queued_seconds: float) -> None:
        """A branch enters the running batch for the first time, `queued_seconds` after its arrival."""
        self._queued.observe(queued_seconds)

    def load(self, running: int, waiting: int, paused: int, peak_tokens: int) -> None:
        """Branches by their state; `peak_tokens`: KV slots that the running batch may come to need at once."""
        self._running.set(running)
        self._waiting.set(waiting)
        self._paused.set(paused)
        self._peak.set(peak_tokens)


class PushMetrics(_Metrics):
    """What the process that pushes knows of itself. A push is counted when it begins and a failure at its end, so that
    what arrives tells the same numbers as /metrics does meanwhile."""

    KINDS = ("counter",)

    def __init__(self) -> None:
        super().__init__()
        self._count = self._counter("push_count", "Pushes to the gateway that were begun")
        self._failure = self._counter("push_failure", "Pushes that the gateway did not take")

    def begun(self) -> None:
        """A push begins; what it sends is read after this."""
        self._count.inc()

    def failed(self) -> None:
        """The gateway did not take it."""
        self._failure.inc()


def registry_of(directory: str) -> CollectorRegistry:
    """What all processes of `directory` count, read anew at each collection."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=directory)
    return registry


def render(directory: str) -> bytes:
    """What all processes of `directory` counted, in Prometheus' text format (CONTENT_TYPE_LATEST)."""
    return generate_latest(registry_of(directory))
