"""The runner of GPUs: on one where there is one, else with Triton's interpreter, which runs the same kernels slowly."""

from __future__ import annotations

import math
import random
from pathlib import Path

import msgspec
import pytest
import torch

from lightllmd.engine.runners.gpu import GpuRunner
from lightllmd.engine.runners.step_shapes import StepShapes
from lightllmd.engine.step import DecodeRows, Row, Step, StepResult
from lightllmd.errors import NoUsableDevice
from lightllmd.ipc.messages import SamplingParams
from tiny_models import VARIANTS, Driver, load, load_on_device, plan_for, transformers_model, write_model

pytest.importorskip("triton")

IDS = [3, 14, 15, 92, 65, 35, 89]
ON_GPU = torch.cuda.is_available()
# In the interpreter a step takes a second: what differs in the kernels, and no more.
FAMILIES = ["qwen3", "olmo2", "gemma2", "gemma3"]
CASES = list(VARIANTS) if ON_GPU else ["plain", "three heads", "biases", "rope dynamic", *FAMILIES]


def nothing() -> None:
    pass


def decode(step: int, *rows: Row) -> Step:
    """A step of rows that go on with the tokens that the runner sampled."""
    lists = zip(*((row.table_row, row.start, row.slots[0], row.position) for row in rows), strict=True)
    return Step(step, "decode", DecodeRows(*map(list, lists)), [], [])


@pytest.fixture(scope="module", params=CASES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"), VARIANTS[request.param])


def test_logits_are_those_of_transformers_whole_behind_a_prefix_and_decoded(folder: Path) -> None:
    """In one row, with others around it, slots scattered, NaN in all slots that nobody owns."""
    ids = random.Random(1).choices(range(128), k=40)
    with torch.inference_mode():
        model = transformers_model(folder)
        out = model(torch.tensor([ids[:29]]), use_cache=True)
        truth = [out.logits[0]]
        for token in ids[29:32]:
            out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
            truth.append(out.logits[0])
    driver = Driver(load_on_device(folder), scattered=True, poisoned=True)
    first = driver.logits(driver.row(3, ids[5:18]), driver.row(0, ids[:17], prompt_length=29))[1]
    second = driver.logits(driver.row(3, [7], 1), driver.row(0, ids[17:29], prompt_length=29))[1]
    logits = [first, second]
    for place, token in enumerate(ids[29:32]):
        logits.append(driver.logits(driver.row(3, [9], 2 + place), driver.row(0, [token], 1 + place))[1])
    difference = (torch.cat(logits).cpu() - torch.cat(truth)).abs().max().item()
    assert difference < 2e-4, difference


def continuation(runner: GpuRunner, prompts: list[list[int]], count: int, overlapped: bool) -> list[StepResult]:
    """The prompts together, then `count - 1` decode steps; overlapped: each launched before the one before is read."""
    driver = Driver(runner, scattered=True)
    steps = [driver.step(*[driver.row(number, prompt) for number, prompt in enumerate(prompts)])]
    for place in range(1, count):
        rows = [driver.row(number, [0], place) for number in range(len(prompts))]
        steps.append(decode(place + 1, *rows))
    results = []
    for number, step in enumerate(steps):
        runner.launch(step, nothing)
        if not overlapped or number:
            results.append(runner.collect(nothing))
    return results if not overlapped else [*results, runner.collect(nothing)]


def test_greedy_tokens_are_the_cpus_and_the_same_overlapped_captured_and_prepared(tmp_path: Path) -> None:
    model = write_model(tmp_path)
    prompts, count = [IDS, IDS[:2], [5]], 5
    reference = load(model)
    expected = []
    for prompt in prompts:
        driver, tokens = Driver(reference), []
        result = reference.run(driver.step(driver.row(0, prompt)), nothing)
        for place in range(1, count):
            tokens += result.tokens
            result = reference.run(decode(place + 1, driver.row(0, [0], place)), nothing)
        expected.append(tokens + result.tokens)
    for overlapped in (False, True):
        runner = load_on_device(model, running_max_req_size=5)
        assert list(zip(*(r.tokens for r in continuation(runner, prompts, count, overlapped)), strict=True)) == [
            tuple(tokens) for tokens in expected
        ]
    limits = {"running_max_req_size": 5, "max_req_total_len": 40, "max_req_input_len": 39}
    runner = load_on_device(model, splitfuse_mode=True, **limits)
    runner._shapes = StepShapes(5, [16], [(5, 16)])
    runner.prepare(nothing)
    assert [list(row) for row in zip(*(r.tokens for r in continuation(runner, prompts, count, True)), strict=True)] == (
        expected
    )


def test_a_runner_of_one_row_gets_ready_and_decodes(tmp_path: Path) -> None:
    runner = load_on_device(
        write_model(tmp_path), running_max_req_size=1, max_req_total_len=12, max_req_input_len=11, slots=20
    )
    runner.prepare(nothing)
    alone = load_on_device(write_model(tmp_path), running_max_req_size=5)
    ours, theirs = continuation(runner, [IDS], 3, True), continuation(alone, [IDS], 3, False)
    assert [result.tokens for result in ours] == [result.tokens for result in theirs]


def test_decode_rows_and_named_tokens_mix_in_one_step(tmp_path: Path) -> None:
    model = write_model(tmp_path)
    runner, alone = load_on_device(model), load_on_device(model)
    driver = Driver(runner, scattered=True)
    first = runner.run(driver.step(driver.row(0, IDS)), nothing)
    going_on, entering = driver.row(0, [0], 1), driver.row(1, IDS[2:5])
    mixed = Step(2, "prefill", decode(2, going_on).decode, [entering], [])
    together = runner.run(mixed, nothing)
    apart = Driver(alone)
    assert alone.run(apart.step(apart.row(0, IDS)), nothing).tokens == first.tokens
    assert alone.run(decode(2, apart.row(0, [0], 1)), nothing).tokens == together.tokens[:1]
    assert alone.run(apart.step(apart.row(4, IDS[2:5])), nothing).tokens == together.tokens[1:]


def test_only_sampling_rows_have_a_result(tmp_path: Path) -> None:
    runner = load_on_device(write_model(tmp_path))
    driver = Driver(runner)
    rows = [driver.row(0, IDS), driver.row(1, IDS[:3], sample=False), driver.row(2, IDS[:1])]
    result = runner.run(driver.step(*rows), nothing)
    assert len(result.tokens) == len(result.logprobs) == len(result.alternatives) == 2
    for index, ids in ((0, IDS), (1, IDS[:1])):
        logits = Driver(runner).logits(driver.row(9 + index, ids))[0][-1]
        assert result.tokens[index] == logits.argmax().item()
        assert result.logprobs[index] == pytest.approx(logits.log_softmax(-1).max().item(), abs=1e-4)


def test_a_seeded_row_draws_the_same_alone_in_a_batch_and_after_a_replay(tmp_path: Path) -> None:
    runner = load_on_device(write_model(tmp_path))
    params = SamplingParams(do_sample=True, seed=11, top_p=0.95, top_k=30, repetition_penalty=1.2, top_logprobs=3)
    alone, crowd, replay = Driver(runner), Driver(runner, scattered=True), Driver(runner)
    one = [runner.run(alone.step(alone.row(0, IDS, params=params)), nothing)]
    one += [runner.run(decode(2, alone.row(0, [0], 1)), nothing)]
    others = [crowd.row(2, [7, 8]), crowd.row(5, IDS, params=params)]
    assert runner.run(crowd.step(*others), nothing).tokens[1] == one[0].tokens[0]
    rows = [crowd.row(2, [0], 1), crowd.row(5, [0], 1)]
    assert runner.run(decode(2, *rows), nothing).tokens[1] == one[1].tokens[0]
    again = replay.row(6, IDS + one[0].tokens, 1, params=params, emitted=one[0].tokens)
    result = runner.run(replay.step(again), nothing)
    assert result.tokens == one[1].tokens
    assert result.alternatives[0] is not None
    assert len(result.alternatives[0]) == 3


def test_logits_that_are_no_numbers_are_told_of_their_row_alone(tmp_path: Path) -> None:
    runner = load_on_device(write_model(tmp_path))
    with torch.inference_mode():
        runner.decoder.tensors()["embed"][92] = float("nan")
    driver = Driver(runner)
    result = runner.run(driver.step(driver.row(4, IDS), driver.row(5, [1, 2, 3])), nothing)
    assert [math.isnan(logprob) for logprob in result.logprobs] == [True, False]


@pytest.mark.skipif(ON_GPU, reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_told_as_such(tmp_path: Path) -> None:
    plan = plan_for(write_model(tmp_path), device="cuda")
    with pytest.raises(NoUsableDevice):
        GpuRunner().load(plan, lambda done, total: None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_graph_computes_what_its_launches_compute(tmp_path: Path, dtype: str) -> None:
    model = write_model(tmp_path, {"hidden_size": 256, "head_dim": 64, "vocab_size": 1000})
    results = []
    for graphs in (True, False):
        plan = plan_for(model, device="cuda", dtype=dtype, running_max_req_size=40)
        engine = msgspec.structs.replace(plan.config.engine, cuda_graphs=graphs)
        plan = msgspec.structs.replace(plan, config=msgspec.structs.replace(plan.config, engine=engine))
        runner = GpuRunner()
        runner.load(plan, lambda done, total: None)
        runner.prepare(nothing)
        prompts = [[n + 1, 2 * n + 1, 7] for n in range(19)]
        results.append(continuation(runner, prompts, 20, graphs))
    assert results[0] == results[1]
