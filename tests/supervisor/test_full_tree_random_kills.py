"""Random kills at every state of the tree, under load, while the control socket is asked all the time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from harness import Daemon, SpareDaemon, generate_stream, run, wait_for
from lightllmd.engine.runners.fake_model import fake_token
from long_run import LONG

KILLS = 1000 if LONG else 30
SEED = int(os.environ.get("LIGHTLLMD_SEED", "20261123"))
CLIENTS = 8
TOKENS = 60
FLAGS = (
    *("--engine.fake.tokens_per_second", "100", "--engine.fake.load_seconds", "0.1", "--engine.fake.overlap", "true"),
    *("--supervisor.backoff_initial", "0.01", "--supervisor.backoff_max", "0.05"),
    *("--supervisor.start_limit_burst", "10000", "--supervisor.retry_interval", "0.1"),
    *("--supervisor.abort_grace", "0.2", "--http.workers", "2"),
)
# (kind, phase in which it is to be hit; None: whatever it is in; "serving": ready, and clients were given tokens since
# the last kill)
SERVED = 200  # such tokens
TARGETS = [
    *[("engine", "serving")] * 3,
    ("engine", "boot"),
    ("engine", "load"),
    ("engine", "ready"),
    ("engine", None),
    ("api", "boot"),
    ("api", "ready"),
]
SIGNALS = [signal.SIGKILL] * 6 + [signal.SIGSEGV, signal.SIGTERM, signal.SIGABRT]


@contextlib.contextmanager
def status_probe(daemon: Daemon) -> Iterator[subprocess.Popen[str]]:
    script = Path(__file__).parents[1] / "status_probe.py"
    command = [sys.executable, str(script), str(daemon.control)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as probe:
        try:
            yield probe
        finally:
            probe.kill()


def hit(
    daemon: Daemon,
    targets: list[tuple[str, str | None]],
    draw: random.Random,
    hits: Counter[str],
    served: Callable[[], int],
) -> None:
    """One kill: a drawn worker in a drawn phase; a phase that doesn't come soon is taken as it is."""
    kind, phase = draw.choice(targets)
    number = draw.choice(SIGNALS)
    if kind == "spare":
        patience = time.monotonic() + 0.5  # a dead one is followed only when the next generation is ready
        while not (pid := daemon.spare()) and time.monotonic() < patience:
            time.sleep(0.01)
        with contextlib.suppress(ProcessLookupError):
            if pid:
                os.kill(pid, number)
                hits["spare"] += 1
        return
    if phase == "serving":
        wait_for(lambda: served() >= SERVED, what="tokens for the clients")
        phase = "ready"
    patience = time.monotonic() + 0.5
    while True:
        workers = [worker for worker in daemon.workers(kind) if worker["pid"]]
        wanted = [worker for worker in workers if phase in (None, worker["phase"])]
        late = time.monotonic() > patience
        if wanted or (late and workers):
            victim = draw.choice(wanted or workers)
            break
        assert not late or time.monotonic() < patience + 30, f"no {kind} to kill for 30 s"
        time.sleep(0.002)
    try:
        os.kill(victim["pid"], number)
        hits[f"{kind} {victim['phase']}"] += 1
    except ProcessLookupError:
        hits["already dead"] += 1


@pytest.mark.parametrize("kind", [Daemon, SpareDaemon], ids=["no spare", "spare"])
def test_random_kills_leave_no_orphan_and_no_stuck_job(tmp_path: Path, kind: type[Daemon]) -> None:
    draw, hits = random.Random(SEED), Counter()
    targets = [*TARGETS, *([("spare", None)] * 3 if kind is SpareDaemon else [])]
    with kind(tmp_path, *FLAGS) as daemon, status_probe(daemon) as probe:
        family = {process.pid for process in daemon.processes()}
        outcomes: Counter[str] = Counter()
        tokens = 0

        def seen() -> None:
            nonlocal tokens
            tokens += 1

        async def client_loop(number: int, over: asyncio.Event) -> None:
            turn = 0
            while not over.is_set():
                prompt = f"c{number}-{turn}"
                turn += 1
                try:
                    async with httpx.AsyncClient(timeout=60) as client:
                        ids, _ = await generate_stream(client, daemon.url, prompt, TOKENS, seen)
                except httpx.TransportError:
                    outcomes["front end killed"] += 1  # the one loss that is allowed: its connections end
                    continue
                assert ids == [fake_token(list(prompt.encode()), 0, 0, p) for p in range(TOKENS)]
                outcomes["exact"] += 1

        def kills() -> None:
            for _ in range(KILLS):
                before = tokens
                hit(daemon, targets, draw, hits, lambda before=before: tokens - before)
                family.update(process.pid for process in daemon.processes())

        async def scenario() -> None:
            over = asyncio.Event()
            clients = [asyncio.ensure_future(client_loop(i, over)) for i in range(CLIENTS)]
            await asyncio.to_thread(kills)
            over.set()
            await asyncio.gather(*clients)

        run(scenario(), timeout=120 + 3 * KILLS)
        status = daemon.wait_ready()
        asked = json.loads(probe.communicate("over", timeout=30)[0])
        assert asked["failure"] is None
        wait_for(
            lambda: (
                (s := daemon.status())["model"]["kv_slots_used"] == 0
                and s["requests"]["running"] == s["requests"]["waiting"] == s["requests"]["held"] == 0
                and not s["jobs"]
            ),
            what="an idle daemon with every slot free and no job in progress",
        )

        def living() -> set[int]:
            return {process.pid for process in daemon.processes()} - {daemon.spare()}

        # Supervisor, two front ends, each with the process that forks its helpers, one engine: all are back.
        wait_for(lambda: len(living()) == 6, what="six processes beside the spare")
        orphans = [pid for pid in family - living() - {daemon.spare()} if psutil.pid_exists(pid)]
        assert not orphans
        assert outcomes["exact"] > 0
        ordered = sorted(asked["latencies"])
        p99 = ordered[int(len(ordered) * 0.99)]
        print(f"kills {dict(hits)}; answers {dict(outcomes)}; status p99 {p99 * 1e3:.1f} ms of {len(ordered)}")
        # The usual run has few samples, beside other tests; test_control_plane holds the bound there, alone.
        assert p99 < 0.050 or KILLS <= 100
        assert status["requests"]["failed"] == 0
        files = list(tmp_path.glob("metrics-*/*.db"))
        assert len(files) <= 15, "metrics files are taken over, not piled up"
        assert daemon.stop() == 0
