"""Steps of every kind on the runner of GPUs (in Triton's interpreter where there is none): what they make is what the
runner of a CPU makes, padded to a shape or not, waited for or overlapped."""

from __future__ import annotations

import random
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightllmd.config.bounds import PREFILL_ROWS
from lightllmd.engine.runners.cpu import CpuRunner
from lightllmd.engine.runners.gpu import GpuRunner
from lightllmd.engine.runners.step_shapes import StepShape, StepShapes, first_tokens
from lightllmd.engine.step import DecodeRows, Row, SamplingRow, Step, StepResult, no_decode
from lightllmd.ipc.messages import SamplingParams
from lightllmd.kernels import fused_attention, split_prefill
from lightllmd.kernels.kv_cache import LayerCache
from lightllmd.kernels.layout import Heads, PrefillTiles
from tiny_models import VARIANTS, Driver, load, load_on_device, plan_for, write_model

pytest.importorskip("triton")

# numpy, which interprets, tells of each infinity that is dealt with later.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
VOCAB, ROWS = 128, 16
PADDED = {"prefill": [16, 32], "mixed": [(8, 16), (ROWS, 16)]}


def nothing() -> None:
    pass


def mask_of(allowed: range) -> bytes:
    return sum(1 << token for token in allowed).to_bytes(VOCAB // 8, "little")


class Script:
    """Steps that are fixed beforehand, whatever the runner makes of them. Each row's tokens have scattered slots."""

    def __init__(self) -> None:
        draw = random.Random(5)
        self._free = iter(draw.sample(range(255), k=255))
        self._held: dict[int, list[int]] = {}  # table row -> its slots
        self._positions: dict[int, int] = {}  # table row -> that of its next token
        self._prompts: dict[int, int] = {}  # table row -> length
        self.a, self.b, self.c = ([draw.randrange(VOCAB) for _ in range(length)] for length in (13, 9, 14))

    def steps(self) -> list[Step]:
        a, b, c, row = self.a, self.b, self.c, self._row
        entering = [
            row(0, a, params={"presence_penalty": 0.7, "input_penalty": True}, ids=a),
            row(1, b, params={"top_logprobs": 3}, targets=b[1:], top_targets=2),
            self._twin(2, 0, {"repetition_penalty": 1.4}),
            row(3, c[:6], sample=False, params={"logit_bias": {9: 4.0, 40: 4.5}}, whole=14, targets=c[1:7]),
        ]
        return [
            self._step([], entering),
            # The rest of a prompt beside rows that go on.
            self._step([0, 2, 1], [row(3, c[6:], targets=c[7:], top_targets=3)], {2: mask_of(range(1, 128, 2))}),
            # A token that somebody else has chosen; its row is restricted from now on.
            self._step(
                [0, 1, 2], [row(3, [77], params={"frequency_penalty": 2.0}, emitted=[77])], {3: mask_of(range(9))}
            ),
            # All of a prompt but its last token, and a part of another, is cached; row 1 has left.
            self._step([3, 0], [row(4, a[12:], past=self._held[0][:12]), row(5, c[8:], past=self._held[3][:8])]),
            # Row 2 takes over the past of row 0, and forgets its mask.
            self._step(
                [5, 0, 4],
                [
                    row(
                        2,
                        [5],
                        params={"top_logprobs": 9, "candidates": 40, "presence_penalty": 1.0},
                        emitted=[1, 2, 5],
                        past=self._held[0][:15],
                    )
                ],
            ),
            self._step([], [row(6, b[:3], sample=False, params={}, whole=9)]),
            # Two parts of prompts, one of them a single token, and one that has chosen; the mask of row 3 is lifted.
            self._step(
                [4, 2, 3],
                [row(6, b[3:]), row(5, [8]), row(7, b[:1], params={}, whole=9, sample=False), row(8, c[:5], params={})],
                {3: b""},
            ),
            self._step([2, 3, 4, 5, 6, 8, 0], []),
        ]

    def _row(
        self,
        number: int,
        tokens: list[int],
        *,
        params: dict | None = None,
        ids: list[int] | None = None,
        emitted: list[int] | None = None,
        past: list[int] | None = None,
        whole: int = 0,
        sample: bool = True,
        targets: list[int] | None = None,
        top_targets: int = 0,
    ) -> Row:
        """With `params`, or with a past, the row enters (again); `whole`: the length of its prompt, here or before."""
        if past is not None:
            self._held[number] = list(past)
            params = params or {}
        held = self._held.setdefault(number, [])
        start, slots = len(held), list(islice(self._free, len(tokens)))
        held += slots
        self._prompts[number] = self._prompts.get(number) or whole or len(held)
        if emitted is not None:
            self._positions[number] = len(emitted)
        sampling = None if params is None else SamplingRow(SamplingParams(**params), ids or [], emitted or [])
        row = Row(number, number, 0, start, tokens, slots, sample, self._positions.setdefault(number, 0), sampling)
        row.prompt_length, row.past, row.targets, row.top_targets = self._prompts[number], past, targets, top_targets
        self._positions[number] += sample
        return row

    def _twin(self, number: int, of: int, params: dict) -> Row:
        row = self._row(number, [], params=params, past=list(self._held[of]))
        row.sibling_of = of
        return row

    def _step(self, numbers: list[int], rows: list[Row], masks: dict[int, bytes] | None = None) -> Step:
        decode = no_decode()
        for number in numbers:
            decode.table_rows.append(number)
            decode.starts.append(len(self._held[number]))
            decode.slots.append(next(self._free))
            decode.positions.append(self._positions[number])
            self._held[number].append(decode.slots[-1])
            self._positions[number] += 1
        return Step(1, "mixed", decode, rows, [], masks or {})


def waited_for(runner: GpuRunner | CpuRunner) -> list[StepResult]:
    return [runner.run(step, nothing) for step in Script().steps()]


def overlapped(runner: GpuRunner) -> list[StepResult]:
    results = []
    for number, step in enumerate(Script().steps()):
        runner.launch(step, nothing)
        if number:
            results.append(runner.collect(nothing))
    return [*results, runner.collect(nothing)]


def pad(runner: GpuRunner) -> GpuRunner:
    """As on a GPU, with splitfuse_mode."""
    runner._shapes = StepShapes(ROWS, **PADDED)
    return runner


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layer with windows, which most rows outgrow, and one without, and capped scores."""
    return write_model(tmp_path_factory.mktemp("tiny"), VARIANTS["gemma2"] | {"num_hidden_layers": 2})


@pytest.fixture(scope="module")
def on_a_cpu(model: Path) -> list[StepResult]:
    return waited_for(load(model, slots=255))


def alike(ours: list[StepResult], theirs: list[StepResult]) -> None:
    """The same tokens and, but for rounding, the same probabilities."""
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert one.tokens == other.tokens, number
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        for pairs, truth in zip(one.alternatives, other.alternatives, strict=True):
            assert (pairs is None) == (truth is None)
            assert [token for token, _ in pairs or ()] == [token for token, _ in truth or ()]
            assert [value for _, value in pairs or ()] == pytest.approx([value for _, value in truth or ()], abs=1e-4)
        for found, wanted in zip(one.candidates, other.candidates, strict=True):
            assert (found is None) == (wanted is None)
            for some, their in zip(found or (), wanted or (), strict=False):  # a device's are as many as it can report
                assert (some[0], pytest.approx(some[1:], abs=1e-4)) == (their[0], their[1:])
        for score, truth in zip(one.targets, other.targets, strict=True):
            assert score.logprobs == pytest.approx(truth.logprobs, abs=1e-4)
            assert (score.alternatives is None) == (truth.alternatives is None)
            for few, true in zip(score.alternatives or (), truth.alternatives or (), strict=True):
                assert [token for token, _ in few] == [token for token, _ in true]
                assert [value for _, value in few] == pytest.approx([value for _, value in true], abs=1e-4)


@pytest.fixture(scope="module")
def padded(model: Path) -> list[StepResult]:
    return waited_for(pad(load_on_device(model)))


def test_every_kind_of_step_makes_what_a_cpu_makes(
    model: Path, on_a_cpu: list[StepResult], padded: list[StepResult]
) -> None:
    alike(waited_for(load_on_device(model)), on_a_cpu)
    alike(padded, on_a_cpu)
    assert [len(result.tokens) for result in on_a_cpu] == [3, 4, 4, 4, 4, 0, 6, 7]
    assert [len(result.targets) for result in on_a_cpu] == [2, 1, 0, 0, 0, 0, 0, 0]
    assert on_a_cpu[1].tokens[1] % 2 == 1, "row 2 is masked"
    assert on_a_cpu[2].tokens[2] % 2 == 1, "and stays so"
    assert on_a_cpu[2].tokens[3] < 9
    assert len(on_a_cpu[4].alternatives[3] or ()) == 9
    assert len(on_a_cpu[4].candidates[3] or ()) == 40


def test_steps_that_overlap_make_the_same_to_the_bit(model: Path, padded: list[StepResult]) -> None:
    assert overlapped(pad(load_on_device(model))) == padded


def test_a_block_whose_keys_are_split_makes_what_a_cpu_makes(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two parts of prompts, one behind a long past, beside rows that go on, in the place of a padded step."""
    monkeypatch.setattr(split_prefill, "FEWEST_KEYS", 32)
    launched: list[int] = []
    split = fused_attention.split_prefill

    def noted(q: Tensor, cache: LayerCache, heads: Heads, table: Tensor, rows: PrefillTiles, *more: Any) -> None:
        launched.append(rows.segments)
        split(q, cache, heads, table, rows, *more)

    monkeypatch.setattr(fused_attention, "split_prefill", noted)
    draw = random.Random(8)
    a, b, c = (draw.choices(range(VOCAB), k=length) for length in (84, 9, 5))
    results = []
    for runner in (pad(load_on_device(model)), load(model, slots=255)):
        driver = Driver(runner, scattered=True)
        first = driver.step(driver.row(0, a[:71], sample=False, prompt_length=84), driver.row(1, b))
        beside = [driver.row(0, a[71:], prompt_length=84), driver.row(2, c[:2], sample=False, prompt_length=5)]
        mixed = driver.step(*beside)
        mixed.decode = DecodeRows([1], [len(b)], [driver.row(1, [0]).slots[0]], [1])
        last = driver.step(driver.row(2, c[2:], prompt_length=5))
        results.append([runner.run(step, nothing) for step in (first, mixed, last)])
    alike(*results)
    assert len(set(launched)) == 1
    assert launched[0] > 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_graphs_of_mixed_steps_compute_what_their_launches_compute(tmp_path: Path, dtype: str) -> None:
    folder = write_model(tmp_path, {"hidden_size": 256, "head_dim": 64})
    results = []
    for graphs in (True, False):
        plan = plan_for(folder, device="cuda", dtype=dtype, slots=255, splitfuse_mode=True, splitfuse_block_size=16)
        engine = msgspec.structs.replace(plan.config.engine, cuda_graphs=graphs)
        runner = GpuRunner()
        config = msgspec.structs.replace(plan.config, engine=engine)
        runner.load(msgspec.structs.replace(plan, config=config), lambda done, total: None)
        runner.prepare(nothing)
        results.append(overlapped(runner))
    assert results[0] == results[1]


@pytest.mark.parametrize("variant", ["plain", "rope dynamic"])
def test_logits_behind_a_cached_past_are_those_of_the_whole_prompt(variant: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path, VARIANTS[variant])
    ids = random.Random(1).choices(range(VOCAB), k=30)
    reference = Driver(load(folder))
    truth = reference.logits(reference.row(0, ids))[0]
    runner = load_on_device(folder)
    driver = Driver(runner, scattered=True, poisoned=True)
    runner.run(driver.step(driver.row(4, ids[:21], sample=False, prompt_length=30)), nothing)
    for shared in (20, 7):
        number = 10 + shared % 5
        driver.slots[number] = driver.slots[4][:shared]
        row = driver.row(number, ids[shared:], prompt_length=30)
        row.past = driver.slots[4][:shared]
        logits = driver.logits(driver.row(1, [3]), row)[1].cpu()
        torch.testing.assert_close(logits, truth[shared:], atol=2e-4, rtol=0)


def test_a_twin_draws_what_it_would_have_drawn_alone(model: Path) -> None:
    runner, ids = load_on_device(model), [3, 14, 15, 92, 65]
    params = SamplingParams(do_sample=True, seed=11, top_k=60, temperature=1.3)
    driver, rows = Driver(runner, scattered=True), []
    for branch in range(4):
        row = driver.row(branch, [] if branch else ids, params=params)
        if branch:
            row.sibling_of, row.start, row.past = branch - 1 if branch == 2 else 0, len(ids), list(driver.slots[0])
            driver.slots[branch] = list(driver.slots[0])
        row.branch = branch
        rows.append(row)
    together = [runner.run(driver.step(*rows), nothing).tokens]
    lists = zip(*((n, 5, driver.row(n, [0]).slots[0], 1) for n in range(4)), strict=True)
    together.append(runner.run(Step(2, "decode", DecodeRows(*map(list, lists)), [], []), nothing).tokens)
    assert len(set(together[0])) > 1
    for branch in range(4):
        alone = Driver(runner)
        row = alone.row(9, ids, params=params)
        row.branch = branch
        first = runner.run(alone.step(row), nothing).tokens[0]
        second = DecodeRows([9], [5], [alone.row(9, [0]).slots[0]], [1])
        assert [first, *runner.run(Step(2, "decode", second, [], []), nothing).tokens] == [
            tokens[branch] for tokens in together
        ]


def test_more_rows_than_a_padded_prefill_has_each_feed_their_own_token(model: Path) -> None:
    """As beams do: all behind one past, whose slots they share."""
    count = PREFILL_ROWS + 6
    runner, reference = (make(model, running_max_req_size=count + 1) for make in (load_on_device, load))
    runner._shapes = StepShapes(count + 1, [16, 64], [(count + 1, 16)])
    ids = random.Random(2).choices(range(VOCAB), k=40)
    for one in (runner, reference):
        driver = Driver(one)
        one.run(driver.step(driver.row(count, ids)), nothing)
        rows = []
        for number in range(count):
            driver.slots[number] = driver.slots[count][:40]
            row = driver.row(number, [number], 1)
            row.past, row.sampling = driver.slots[count][:40], SamplingRow(SamplingParams(), [], [number])
            rows.append(row)
        result = one.run(driver.step(*rows), nothing)
        if one is runner:
            ours = result
    assert ours.tokens == result.tokens
    assert ours.logprobs == pytest.approx(result.logprobs, abs=1e-4)


rows_of_steps = st.lists(st.tuples(st.sampled_from([0, 1, 1, 1, 2, 3, 9, 40]), st.booleans()), max_size=90)


@given(
    going_on=st.integers(0, 40),
    fed=rows_of_steps,
    padded=st.booleans(),
    block=st.integers(1, 64),
)
def test_every_step_fits_its_shape_and_each_token_has_a_place(
    going_on: int, fed: list[tuple[int, bool]], padded: bool, block: int
) -> None:
    rows = [
        Row(0, 0, 0, 5, [1] * count, [1] * count, sample, 0, None, sibling_of=None if count else 0)
        for count, sample in fed
    ]
    if rows and not rows[0].tokens:
        rows[0].tokens, rows[0].slots, rows[0].sibling_of = [1], [1], None
    if not rows and not going_on:
        return
    step = Step(1, "mixed", DecodeRows(*([0] * going_on for _ in range(4))), rows, [])
    mixed = [(32, 2 * block), (64, block + block // 2), (130, block)]
    shapes = StepShapes(130, [16, 64] if padded else [], mixed if padded else [])
    shape = shapes.of(step)
    single = sum(len(row.tokens) == 1 for row in rows)
    firsts = first_tokens(step, shape)
    taken = [place for row, first in zip(rows, firsts, strict=True) for place in range(first, first + len(row.tokens))]
    assert len(set(taken)) == len(taken) == step.fed - going_on
    assert all(going_on <= place < shape.tokens for place in taken)
    assert len([place for place in taken if place >= shape.decode_tokens]) <= shape.prefill_tokens
    if shape.padded:
        assert shape in shapes
        longer = [first for row, first in zip(rows, firsts, strict=True) if row.tokens and first >= shape.decode_tokens]
        assert len(longer) < max(1, shape.prefill_rows) or not longer
    else:
        assert shape == StepShape(going_on + single, step.fed - going_on - single, False)


def test_a_step_of_single_tokens_has_the_shape_of_a_decode_step_whoever_named_them() -> None:
    shapes = StepShapes(130, [16, 64], [(32, 64), (130, 64)])
    rows = [Row(0, 0, 0, 90, [1], [1], True, 3, None) for _ in range(70)]
    beside = DecodeRows(*([0] * 20 for _ in range(4)))
    assert shapes.of(Step(1, "mixed", beside, rows, [])) == StepShape(96, 0)
    assert shapes.of(Step(1, "decode", no_decode(), rows, [])) == StepShape(80, 0)
    prompt = Row(0, 0, 0, 0, [1] * 50, [1] * 50, True, 0, None)
    assert shapes.of(Step(1, "prefill", no_decode(), [prompt, *rows[:9]], [])) == StepShape(0, 64)
    assert shapes.of(Step(1, "mixed", beside, [prompt, *rows[:9]], [])) == StepShape(32, 64)
