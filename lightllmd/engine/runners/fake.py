"""A runner without a model: deterministic tokens, a chosen pace, and faults on demand. No torch.

It goes through the real worker loop and scheduler, so that everything around a model can be tested, deaths included.
What it generates: `fake_model`.
"""

from __future__ import annotations

import os
import signal
import struct
import time
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

from lightllmd.config.files import read_bytes
from lightllmd.config.parameters import FakeSettings
from lightllmd.engine.ranks.member import SOLE, Member
from lightllmd.engine.runners.base import BaseRunner, Beat, KeptWeights, Progress
from lightllmd.engine.runners.fake_model import (
    EMPTY,
    allowed_bits,
    branch_key,
    extended,
    fake_score,
    fake_state,
    fake_target,
    fake_target_alternatives,
    first_allowed,
    ranking,
    token_at,
)
from lightllmd.engine.runners.fake_sight import FakeSight
from lightllmd.engine.step import Masks, PoolingRow, Row, SamplingRow, Step, StepResult, TargetLogprobs
from lightllmd.errors import ConfigInvalid, OutOfMemory, Problem

_LAG = 0.02  # seconds that a late loop may catch up


class Pace:
    """Holds decode steps to `tokens_per_second` per branch; all branches advance together.

    The worker's loop waits the delay out in its poll. A torch engine has the pace of default settings: none.
    """

    def __init__(self, settings: FakeSettings) -> None:
        self._interval = 1 / settings.tokens_per_second if settings.tokens_per_second else 0.0
        self._due = 0.0  # monotonic seconds at which the next step may begin; 0: at once

    def delay(self, now: float) -> float:
        """Seconds until the next step may begin."""
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
    """What goes wrong, and when: `fault` and `fault_file` of the settings, in the rank `fault_rank`. `model`: the
    model_dir."""

    def __init__(self, settings: FakeSettings, model: str, rank: int) -> None:
        self._settings, self._ours = settings, rank == settings.fault_rank
        self._file = os.path.join(model, settings.fault_file) if settings.fault_file else ""

    @property
    def _due(self) -> str:
        if not self._ours:
            return ""
        if not self._file:
            return self._settings.fault
        try:
            return read_bytes(self._file, 1024).decode().strip() or self._settings.fault
        except OSError:
            return ""

    def at_boot(self) -> None:
        """Before anything is loaded. Raises ConfigInvalid."""
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
        """Once the engine is."""
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


@dataclass
class _SeenPrompt:
    """A row's prompt and what it had emitted, as they are seen as far as they have been fed."""

    sampling: SamplingRow
    tokens: list[int]
    sees: bool  # some of them are those of an image


@dataclass
class _Branch:
    """What a table row's tokens depend on; of `history` nothing is kept where neither alternatives nor candidates are
    asked for."""

    key: int
    top_logprobs: int
    candidates: int
    history: int  # of all tokens that the scheduler named or the row was fed
    length: int  # tokens
    prompt: _SeenPrompt | None = None  # until it is fed
    mask: int = 0  # its bits; 0: every token is allowed
    newest: int = 0  # token

    def feed(self, start: int, tokens: list[int]) -> None:
        """`tokens` come at `start`; those that it entered with are known."""
        if self.top_logprobs or self.candidates:
            fresh = tokens[max(0, self.length - start) :]
            self.history = extended(self.history, fresh)
            self.length += len(fresh)


class _Pending(NamedTuple):
    result: StepResult
    ending: str  # `poison_way`, where a prompt is poisoned

    def wait(self, beat: Beat) -> StepResult:
        """Like a device it shows a step's death when the step is collected."""
        beat()
        if self.ending:
            end_by(self.ending)
        return self.result


class FakeRunner(BaseRunner[Step, None, KeptWeights]):
    """A Runner whose tokens are `fake_token`'s, whatever steps they come by: prompts in parts or behind a cached
    prefix, sibling sequences, rows that are fed token by token. The log-probability of each is 0; biases and penalties
    change nothing. Masks leave alternatives as they are, or have "processed" ones; candidates always do as masks say.
    Its scores are `fake_score`'s, its hidden states `fake_state`'s.
    """

    def __init__(self, settings: FakeSettings, member: Member = SOLE) -> None:
        super().__init__(member)
        self.overlaps = settings.overlap
        self._settings = settings
        self._poison = settings.poison.encode() if member.rank.index == settings.fault_rank else b""
        self._model = ""  # the plan's model_dir
        self._vocab: int | None = None  # None: as many as a mask has bits
        self._processed = False  # as [engine] logprobs
        self._branches: dict[int, _Branch] = {}  # by table row
        self._prompts: dict[int, list[int]] = {}  # of those that generate nothing, by table row, as they are seen
        self._sight = FakeSight()
        self._embeds = False  # vectors are hidden states, no scores
        self._poisoned = False  # a prompt that entered with the step that is made
        self._asleep = False
        self._pending, self._staged = deque(), None

    def _open(self) -> None:
        config = self._plan.config
        self._model = config.params.model_dir or ""
        self._embeds = self._plan.scoring is None
        self._vocab, self._processed = self._plan.vocab_size, config.engine.logprobs == "processed"

    def _load_weights(self, progress: Progress) -> None:
        """Pretends to read load_bytes for load_seconds."""
        total = self._settings.load_bytes or 1
        faults = Faults(self._settings, self._model, self._member.rank.index)
        begun = time.monotonic()
        while True:
            elapsed = time.monotonic() - begun
            fraction = min(1.0, elapsed / self._settings.load_seconds) if self._settings.load_seconds else 1.0
            progress(int(total * fraction), total)
            faults.in_load(fraction)
            if fraction >= 1.0:
                break
            time.sleep(min(0.02, self._settings.load_seconds - elapsed))

    def _allocate(self) -> None:
        self._asleep = False

    def prepare(self, beat: Beat) -> None:
        """Nothing is compiled here."""

    def _stage_weights(self) -> KeptWeights:
        return KeptWeights(self._settings.load_bytes)

    def _free(self, weights_stay: bool) -> None:
        self._branches.clear()
        self._prompts.clear()
        self._sight.clear()
        self._asleep = True

    def _restore_weights(self, staged: KeptWeights, progress: Progress) -> None:
        """What was staged comes back at once; else it is loaded again, with the faults of that."""

    def _memory(self) -> dict[str, float]:
        """That nothing is left asleep."""
        return {"memory_asleep": 0.0} if self._asleep else {}

    def _pack(self, step: Step) -> Step:
        for table_row in step.freed:
            self._branches.pop(table_row, None)
            self._prompts.pop(table_row, None)
        self._poisoned = False
        self._sight.store(step)
        return step

    def _forward(self, packed: Step, beat: Beat) -> None:
        """Tokens depend on nothing that a device would compute."""

    def _enter(self, row: Row, sampling: SamplingRow) -> None:
        """Notes what a row's tokens depend on, and whether its prompt is poison."""
        params, prompt = sampling.params, sampling.prompt_ids
        key = branch_key(prompt, params.seed if params.do_sample else 0, row.branch, self._model)
        whole = prompt + sampling.emitted
        history, length = EMPTY, 0
        if params.top_logprobs or params.candidates:
            history, length = extended(EMPTY, whole), len(whole)
        branch = _Branch(key, params.top_logprobs, params.candidates, history, length)
        known = whole[: row.start]
        past = self._sight.over(known, row.past or [])
        if row.images or not row.sample or past != known:
            branch.prompt = _SeenPrompt(sampling, past + whole[row.start :], past != known)
        self._branches[row.table_row] = branch
        self._poisoned |= self._is_poison(prompt)

    def _look(self, row: Row) -> None:
        """What it is fed is seen; once that is all, what its tokens depend on is known."""
        branch = self._branches[row.table_row]
        if (prompt := branch.prompt) is None:
            return
        if row.images:
            prompt.tokens[row.start : row.start + len(row.tokens)] = self._sight.tokens(row)
            prompt.sees = True
        if not row.sample:
            return
        branch.prompt = None
        if not prompt.sees:
            return
        params, length = prompt.sampling.params, len(prompt.sampling.prompt_ids)
        seed = params.seed if params.do_sample else 0
        branch.key = branch_key(prompt.tokens[:length], seed, row.branch, self._model)
        if params.top_logprobs or params.candidates:
            branch.history = extended(EMPTY, prompt.tokens)

    def _is_poison(self, prompt: list[int]) -> bool:
        return bool(self._poison) and self._poison in bytes(token for token in prompt if token < 256)

    def _restrict(self, masks: Masks) -> None:
        for table_row, mask in masks.items():
            self._branches[table_row].mask = allowed_bits(mask, self._vocab)

    def _sample(self, step: Step, packed: Step, hidden: None, beat: Beat) -> _Pending:
        decode = step.decode
        for row in step.rows:
            if row.pooling is None:
                self._look(row)
                self._branches[row.table_row].feed(row.start, row.tokens)
        places = list(zip(decode.table_rows, decode.positions, strict=True))
        places += [(row.table_row, row.position) for row in step.rows if row.sample]
        number = len(places)
        result = StepResult([], [0.0] * number, [None] * number, [None] * number)
        for index, (table_row, position) in enumerate(places):  # once per token served
            branch = self._branches[table_row]
            token = token_at(branch.key, position)
            if branch.mask or branch.top_logprobs or branch.candidates:
                if index < len(decode.starts):
                    branch.feed(decode.starts[index], [branch.newest])
                token = first_allowed(token, branch.mask)
                self._rank(branch, result, index)
            branch.newest = token
            result.tokens.append(token)
        result.pooled = [self._pooled(row, row.pooling) for row in step.rows if row.pooling is not None]
        result.targets = [
            _scored(row, row.targets, self._sight.tokens(row)) for row in step.rows if row.targets is not None
        ]
        return _Pending(result, self._settings.poison_way if self._poisoned else "")

    def _rank(self, branch: _Branch, result: StepResult, index: int) -> None:
        """What is told beside a token."""
        top, most = branch.top_logprobs, branch.candidates
        if top:
            result.alternatives[index] = ranking(branch.history, top, branch.mask if self._processed else 0)
        if most:
            ranked = ranking(branch.history, most, branch.mask)
            result.candidates[index] = [(token, logprob, logprob) for token, logprob in ranked] or None

    def _pooled(self, row: Row, pooling: PoolingRow) -> list[bytes]:
        """A vector for each place; what it depends on is the whole prompt before it."""
        if pooling.prompt_ids is not None:
            known = pooling.prompt_ids[: row.start]
            past = self._sight.over(known, row.past or [])
            self._prompts[row.table_row] = past + pooling.prompt_ids[row.start :]
            self._poisoned |= self._is_poison(pooling.prompt_ids)
        if row.images:
            self._prompts[row.table_row][row.start : row.start + len(row.tokens)] = self._sight.tokens(row)
        if self._embeds:
            return self._states(row, pooling)
        prompt, labels = self._prompts[row.table_row], range(self._settings.score_labels)
        ends = [row.start + at + 1 for at in pooling.at]
        return [
            struct.pack(f"<{len(labels)}f", *(fake_score(prompt[:end], label, self._model) for label in labels))
            for end in ends
        ]

    def _states(self, row: Row, pooling: PoolingRow) -> list[bytes]:
        size, tokens = range(self._settings.embedding_size), self._sight.tokens(row)
        vectors = [
            [fake_state(row.start + at, tokens[at], element, self._model) for element in size] for at in pooling.at
        ]
        if pooling.summed and vectors:
            vectors = [[sum(values) for values in zip(*vectors, strict=True)]]
        return [struct.pack(f"<{len(size)}f", *vector) for vector in vectors]


def _scored(row: Row, targets: list[int], tokens: list[int]) -> TargetLogprobs:
    """`tokens`: those that it feeds, as they are seen."""
    places = [(row.start + index, tokens[index]) for index in range(len(targets))]
    logprobs = [fake_target(*place, target) for place, target in zip(places, targets, strict=True)]
    top = row.top_targets
    return TargetLogprobs(logprobs, [fake_target_alternatives(*place, top) for place in places] if top else None)
