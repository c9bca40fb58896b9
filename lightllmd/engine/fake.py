"""A runner without a model: deterministic tokens, a chosen pace, and faults on demand. No torch.

It goes through the real worker loop and scheduler, so that everything around a model can be tested, deaths included.
"""

from __future__ import annotations

import os
import signal
import time
import zlib
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, NoReturn

from lightllmd.config.parameters import FakeSettings
from lightllmd.config.plan import Plan
from lightllmd.engine.batch import Row, Step, StepResult
from lightllmd.errors import ConfigInvalid, OutOfMemory, Problem

_LAG = 0.02  # seconds that a late loop may catch up
_MASK = (1 << 64) - 1


def _key(prompt_ids: list[int], seed: int, branch: int, model: str) -> int:
    """What the tokens of one branch depend on beside their position; 64 bits."""
    crc = zlib.crc32(repr((prompt_ids, seed, branch)).encode(), zlib.crc32(model.encode()))
    return crc * 0x9E3779B97F4A7C15 & _MASK


def _token(key: int, position: int) -> int:
    """The finaliser of SplitMix64 on (key, position), folded to the 95 printable ASCII bytes."""
    x = (key + position * 0xBF58476D1CE4E5B9) & _MASK
    x = (x ^ x >> 30) * 0x94D049BB133111EB & _MASK
    return 32 + (x ^ x >> 31) % 95


def fake_token(prompt_ids: list[int], seed: int, branch: int, position: int, model: str = "") -> int:
    """The token that a fake generation has at `position`: a printable ASCII byte, never eos. ``seed = 0``: greedy.

    `model`: its model_dir, which no one opens; other names have other tokens.
    """
    return _token(_key(prompt_ids, seed, branch, model), position)


class Pace:
    """Holds decode steps to `tokens_per_second` per branch; all branches advance together.

    The worker's loop waits the delay out in its poll. A torch engine has the pace of default settings: none.
    """

    def __init__(self, settings: FakeSettings) -> None:
        self._interval = 1 / settings.tokens_per_second if settings.tokens_per_second else 0.0
        self._due = 0.0  # monotonic seconds at which the next step may begin; 0: at once

    def delay(self, now: float) -> float:
        return max(0.0, self._due - now)

    def ran(self, step: Step, now: float, idle: bool) -> None:
        """A step ended; `idle`: nothing is left to do, and the next request begins a new beat."""
        if idle:
            self._due = 0.0
        elif not self._due:
            self._due = now + self._interval
        elif step.kind == "decode":
            self._due = max(self._due, now - _LAG) + self._interval


class Faults:
    """What goes wrong, and when: `fault` and `fault_file` of the settings. `model`: the model_dir."""

    def __init__(self, settings: FakeSettings, model: str) -> None:
        self._settings = settings
        self._file = os.path.join(model, settings.fault_file) if settings.fault_file else ""

    @property
    def _due(self) -> str:
        if not self._file:
            return self._settings.fault
        try:
            with open(self._file, encoding="utf-8") as file:
                return file.read().strip() or self._settings.fault
        except OSError:
            return ""

    def at_boot(self) -> None:
        if self._due == "exit_at_boot":
            os._exit(1)
        if self._due == "config":
            raise ConfigInvalid([Problem("engine.fake.fault", "a configuration that this fault pretends is wrong")])

    def in_load(self, fraction: float) -> None:
        """Called over and over; they strike half-way."""
        if fraction < 0.5:
            return
        if self._due == "memory":
            raise OutOfMemory("this fault pretends that the weights don't fit")
        if self._due == "crash_in_load":
            end_by("SIGSEGV")
        if self._due == "hang_in_load":
            end_by("hang")

    def when_ready(self) -> None:
        if self._due == "hang_when_ready":
            end_by("hang")


def end_by(way: str) -> NoReturn:
    """Ends this process as `poison_way` names it; "hang" never returns and never beats again."""
    if way == "exception":
        raise RuntimeError("the fake engine was poisoned")
    if way == "exit":
        os._exit(1)
    while True:
        if way != "hang":
            os.kill(os.getpid(), signal.Signals[way])
        time.sleep(3600)


class _Branch(NamedTuple):
    key: int
    top_logprobs: int


class _Launched(NamedTuple):
    result: StepResult
    poisoned: bool


class FakeRunner:
    """A Runner whose tokens are `fake_token`'s. Like a device it shows a step's death when the step is collected."""

    def __init__(self, settings: FakeSettings) -> None:
        self.overlaps = settings.overlap
        self._settings = settings
        self._poison = settings.poison.encode()
        self._model = ""  # the plan's model_dir
        self._branches: dict[int, _Branch] = {}  # by table row
        self._out: deque[_Launched] = deque()
        self._staged = self._asleep = False

    def load(self, plan: Plan, progress: Callable[[int, int], None]) -> None:
        """Pretends to read load_bytes for load_seconds."""
        total = self._settings.load_bytes or 1
        self._model = plan.config.params.model_dir or ""
        faults = Faults(self._settings, self._model)
        begun = time.monotonic()
        while True:
            elapsed = time.monotonic() - begun
            fraction = min(1.0, elapsed / self._settings.load_seconds) if self._settings.load_seconds else 1.0
            progress(int(total * fraction), total)
            faults.in_load(fraction)
            if fraction >= 1.0:
                break
            time.sleep(min(0.02, self._settings.load_seconds - elapsed))
        self._plan = plan

    def prepare(self, beat: Callable[[], None]) -> None:
        pass

    def stage(self) -> None:
        self._staged = True

    def unstage(self) -> None:
        self._staged = False

    def release(self, progress: Callable[[int, int], None]) -> None:
        self._branches.clear()
        self._out.clear()
        self._asleep = True

    def restore(self, progress: Callable[[int, int], None]) -> None:
        """What was staged comes back at once; else it is loaded again, with the faults of that."""
        if not self._staged:
            self.load(self._plan, progress)
        self._staged = self._asleep = False

    def memory_stats(self) -> dict[str, float]:
        """Of what is staged, and that nothing is left asleep."""
        size = float(self._settings.load_bytes)
        staged = {"staged_bytes": size, "staged_total": size} if self._staged else {}
        return staged | ({"memory_asleep": 0.0} if self._asleep else {})

    def launch(self, step: Step, beat: Callable[[], None]) -> None:
        for table_row in step.freed:
            self._branches.pop(table_row, None)
        poisoned = False
        for row in step.rows:
            poisoned |= self._enter(row)
        places = list(zip(step.decode.table_rows, step.decode.positions, strict=True))
        places += [(row.table_row, row.position) for row in step.rows if row.sample]
        tokens, alternatives = [], []
        for table_row, position in places:
            branch = self._branches[table_row]
            token = _token(branch.key, position)
            tokens.append(token)
            alternatives.append(_alternatives(token, branch.top_logprobs) if branch.top_logprobs else None)
        self._out.append(_Launched(StepResult(tokens, [0.0] * len(tokens), alternatives), poisoned))

    def collect(self, beat: Callable[[], None]) -> StepResult:
        beat()
        launched = self._out.popleft()
        if launched.poisoned:
            end_by(self._settings.poison_way)
        return launched.result

    def _enter(self, row: Row) -> bool:
        """Notes what a row's tokens depend on; whether its prompt is poison."""
        assert row.sampling is not None  # batch.Row: set whenever a row enters
        params = row.sampling.params
        prompt = row.tokens[: len(row.tokens) - row.position]
        key = _key(prompt, params.seed if params.do_sample else 0, row.branch, self._model)
        self._branches[row.table_row] = _Branch(key, params.top_logprobs)
        return bool(self._poison) and self._poison in bytes(token for token in prompt if token < 256)


def _alternatives(token: int, count: int) -> list[tuple[int, float]]:
    """The chosen token first, then its neighbours in ASCII, each less likely by a factor of e."""
    return [(32 + (token - 32 + i) % 95, -float(i)) for i in range(count)]
