"""What is counted and what is said: the original's metric names, log lines that a supervisor can read."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from prometheus_client import generate_latest

from lightllmd.engine.step import Kind
from lightllmd.observe.log import ChildFormatter
from lightllmd.observe.metrics import _ROOM, ApiMetrics, EngineMetrics, render
from lightllmd.observe.stats import Statistics

COUNTERS = {"request_count", "request_success", "request_failure", "batch_inference_count"}
HISTOGRAMS = {
    "request_duration": 35,
    "request_validation_duration": 35,
    "request_inference_duration": 35,
    "request_mean_time_per_token_duration": 35,
    "request_first_token_duration": 35,
    "request_queue_duration_bucket": 35,
    "batch_inference_duration_bucket": 35,
    "request_input_length": 101,
    "cache_length": 101,
    "request_max_new_tokens": 101,
    "request_generated_tokens": 101,
    "batch_next_size": 128,
    "cache_ratio": 11,
}
GAUGES = {"queue_size", "batch_current_size", "batch_pause_size", "batch_current_max_tokens"}
OUR_COUNTERS = {
    "prompt_cache_lookup_tokens",
    "prompt_cache_hit_tokens",
    "prompt_cache_evicted_tokens",
    "grammar_compile_count",
    "grammar_compile_seconds",
    "grammar_cache_hit_count",
    "request_cancelled",
    "key_refusal",
}
OUR_GAUGES = {"grammar_cache_bytes", "prompt_cache_tokens", "prompt_cache_evictable_tokens"}


def test_names_kinds_and_buckets_are_the_originals_and_ours() -> None:
    metrics = [*ApiMetrics(2048, 3072).registry.collect(), *EngineMetrics().registry.collect()]
    found = {metric.name.removeprefix("lightllm_"): metric for metric in metrics}
    assert all(metric.name.startswith("lightllm_") for metric in metrics)
    assert set(found) == COUNTERS | OUR_COUNTERS | set(HISTOGRAMS) | GAUGES | OUR_GAUGES
    assert {name for name, metric in found.items() if metric.type == "counter"} == COUNTERS | OUR_COUNTERS
    assert {name for name, metric in found.items() if metric.type == "gauge"} == GAUGES | OUR_GAUGES
    for name, count in HISTOGRAMS.items():
        samples = [
            sample for sample in found[name].samples if sample.name.endswith("_bucket") and "le" in sample.labels
        ]
        bounds = {sample.labels["le"] for sample in samples} - {"+Inf"}
        assert len(bounds) == count, name


def test_bucket_bounds_follow_the_limits() -> None:
    text = generate_latest(ApiMetrics(2000, 3000).registry).decode()
    assert 'lightllm_request_input_length_bucket{le="20.0"}' in text
    assert 'lightllm_request_max_new_tokens_bucket{le="3000.0"}' in text
    assert 'lightllm_request_duration_bucket{le="0.0015"}' in text


def test_a_request_is_counted_once_at_each_station() -> None:
    metrics = ApiMetrics(100, 200)
    metrics.entered()
    metrics.submitted(0.01, input_length=7, max_new_tokens=16)
    metrics.first_token(0.1)
    metrics.succeeded(1.0, 0.9, generated=[4, 5])
    metrics.entered()
    metrics.failed()
    value = metrics.registry.get_sample_value
    assert value("lightllm_request_count_total") == 2
    assert value("lightllm_request_success_total") == 1
    assert value("lightllm_request_failure_total") == 1
    assert value("lightllm_request_generated_tokens_count") == 2
    assert value("lightllm_request_generated_tokens_sum") == 9
    assert value("lightllm_request_mean_time_per_token_duration_sum") == pytest.approx(0.1)
    assert value("lightllm_request_input_length_sum") == 7


def test_steps_of_every_kind_are_counted_and_what_begins_in_them() -> None:
    metrics = EngineMetrics()
    metrics.step("prefill", 0.1, begun=3)
    metrics.step("mixed", 0.1, begun=2)
    metrics.step("mixed", 0.1, begun=0)
    metrics.step("decode", 0.1, begun=0)
    value = metrics.registry.get_sample_value
    counts = {kind: value("lightllm_batch_inference_count_total", {"method": kind}) for kind in get_args(Kind)}
    assert counts == {"prefill": 1, "mixed": 2, "decode": 1}
    assert (value("lightllm_batch_next_size_count"), value("lightllm_batch_next_size_sum")) == (2, 5)


def test_each_of_several_engines_is_told_by_its_number_and_an_engine_alone_is_not() -> None:
    metrics = EngineMetrics(replica=1, replicas=2)
    metrics.of_replica({"running": 3.0, "tokens_out": 70.0, "memory_used": 1.0})
    value = metrics.registry.get_sample_value
    assert [value("lightllm_replica_running", {"replica": number}) for number in "01"] == [0, 3]
    assert value("lightllm_replica_tokens_out", {"replica": "1"}) == 70
    alone = EngineMetrics()
    alone.of_replica({"running": 3.0})
    assert not any("replica" in metric.name for metric in alone.registry.collect())


def test_the_caches_counts_become_counters() -> None:
    metrics = EngineMetrics()
    stats = {"cache_lookups_tokens": 100.0, "cache_hits_tokens": 60.0, "cache_evicted_tokens": 0.0}
    metrics.cache(stats | {"cache_tokens": 70, "cache_evictable": 20})
    metrics.cache(stats | {"cache_tokens": 7, "cache_evictable": 2, "cache_hits_tokens": 90.0})
    value = metrics.registry.get_sample_value
    assert value("lightllm_prompt_cache_tokens") == 7
    assert value("lightllm_prompt_cache_evictable_tokens") == 2
    assert value("lightllm_prompt_cache_lookup_tokens_total") == 100
    assert value("lightllm_prompt_cache_hit_tokens_total") == 90
    assert value("lightllm_prompt_cache_evicted_tokens_total") == 0


CHILD = """
import os, sys
os.environ["PROMETHEUS_MULTIPROC_DIR"] = sys.argv[1]
from lightllmd.observe.metrics import ApiMetrics, render
metrics = ApiMetrics(100, 200)
metrics.entered()
print(render(sys.argv[1]).decode())
"""


def test_any_process_renders_the_sum_of_all(tmp_path: Path) -> None:
    texts = [
        subprocess.run([sys.executable, "-c", CHILD, str(tmp_path)], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert "lightllm_request_count_total 1.0" in texts[0]
    assert "lightllm_request_count_total 2.0" in texts[1]


FOUR_ENTER = """
import os, sys
os.environ["PROMETHEUS_MULTIPROC_DIR"] = sys.argv[1]
from lightllmd.observe import metrics
metrics.use_files("seat-0", sys.argv[1])
made = metrics.ApiMetrics(100, 200)
for _ in range(4):
    made.entered()
made.succeeded(1.0, 1.0, [1])
made.cancelled()
os.kill(os.getpid(), 9)
"""


def test_what_a_dead_process_had_in_flight_has_failed_to_the_next_in_its_seat(tmp_path: Path) -> None:
    for count in (1, 2):
        subprocess.run([sys.executable, "-c", FOUR_ENTER, str(tmp_path)])
        subprocess.run([sys.executable, "-c", SEATED, str(tmp_path), "api"], check=True)
        lines = render(str(tmp_path)).decode().splitlines()
        ends = {"count": 4, "success": 1, "cancelled": 1, "failure": 2}
        for name, total in ends.items():
            assert f"lightllm_request_{name}_total {total * count}.0" in lines


SEATED = """
import os, sys
directory, kind = sys.argv[1:]
os.environ["PROMETHEUS_MULTIPROC_DIR"] = directory
from lightllmd.observe import metrics
metrics.use_files("seat-0", directory)
made = metrics.ApiMetrics(1 << 20, 1 << 20) if kind == "api" else metrics.EngineMetrics()
print("lives")
"""


@pytest.mark.parametrize("kind", ["api", "engine"])
def test_a_processs_values_take_no_more_than_the_room_that_was_taken_for_them(kind: str, tmp_path: Path) -> None:
    for _ in range(2):  # the second finds the first one's files
        subprocess.run([sys.executable, "-c", SEATED, str(tmp_path), kind], check=True)
        for name, room in _ROOM.items():
            file = tmp_path / f"{name}_seat-0.db"
            assert (file.stat().st_size, file.stat().st_blocks * 512) == (room, room)
            assert int.from_bytes(file.read_bytes()[:4], "little") <= room / 2
    assert len(list(tmp_path.iterdir())) == len(_ROOM)
    assert kind == "engine" or b"lightllm_request_count_total 0.0" in render(str(tmp_path))


def test_a_process_without_room_for_metrics_lives_and_says_so(tmp_path: Path) -> None:
    """It is a mapped file's first write that would end it."""
    inside = (
        f"mount -t tmpfs -o size=64k none {tmp_path} && {sys.executable} -c '{SEATED}' {tmp_path} api; ls -a {tmp_path}"
    )
    probe = subprocess.run(["unshare", "-m", "true"], capture_output=True)
    if probe.returncode:
        pytest.skip("no mount namespace here")
    done = subprocess.run(["unshare", "-m", "sh", "-c", inside], capture_output=True, text=True)
    assert "lives" in done.stdout
    assert "no room for metrics: No space left on device" in done.stderr
    assert ".histogram" not in done.stdout


def record(level: int, message: str, *arguments: object, failure: Exception | None = None) -> str:
    exc_info = (type(failure), failure, None) if failure else None
    return ChildFormatter().format(logging.LogRecord("x", level, "file", 1, message, arguments, exc_info))


def test_a_record_is_one_line_with_its_priority() -> None:
    assert record(logging.INFO, "all %s", "well") == "<6>all well"
    assert record(logging.WARNING, "two\nlines") == "<4>two\\nlines"
    assert record(logging.DEBUG, "x") == "<7>x"
    lines = record(logging.CRITICAL, "it broke", failure=ValueError("why")).splitlines()
    assert lines[0] == "<3>it broke"
    assert lines[-1] == "<3>ValueError: why"


def test_statistics_are_averages_over_the_time_that_a_batch_ran() -> None:
    statistics = Statistics(interval=10)
    assert not statistics.count(100, 1, now=5.0)
    assert not statistics.count(0, 99, now=14.9)
    assert statistics.count(100, 100, now=25.0)
    assert "throughput 20.0 tokens/s, prompt 10.0 tokens/s, generate 10.0 tokens/s" in statistics.line(now=25.0)
    assert not statistics.count(0, 10, now=34.0)
    statistics.idle()
    assert not statistics.count(0, 50, now=1000.0), "the idle time before is no part of the window"
    assert "generate 5.0 tokens/s" in statistics.line(now=1010.0)
