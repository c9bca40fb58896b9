"""A prompt with images equals the model fed with their embeddings directly, in every way of generating."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from image_prompts import Prompt, Served, bytes_of, draw_prompts, hidden, plain, streams
from lightllmd.config.plan import Vision
from lightllmd.engine.runners.cpu import CpuRunner
from lightllmd.engine.runners.warmup import worst_steps
from lightllmd.engine.scheduling.scheduler import Scheduler
from lightllmd.engine.step import ImagePart
from lightllmd.ipc.messages import PoolingParams, RequestParams, SamplingParams, StepOutput, Submit
from tiny_models import Driver, load, load_on_device, plan_for, write_model

TOLERANCE = 1e-4
PLAIN = SamplingParams(max_new_tokens=6, ignore_eos=True)
SIZES = {"max_req_input_len": 120, "max_req_total_len": 160, "running_max_req_size": 8, "batch_max_tokens": 240}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"), {})


@pytest.fixture(scope="module")
def runner(model: Path) -> CpuRunner:
    return load(model, slots=400, **SIZES)


def table_of(runner: CpuRunner) -> torch.Tensor:
    return runner.decoder.embedding.weight


def served(model: Path, runner: CpuRunner, whole: bool = False, slots: int = 400, **params: Any) -> Served:
    return Served(plan_for(model, slots=slots, **SIZES | params), runner, whole)


def alike(told: list[StepOutput], truth: list[StepOutput]) -> None:
    found, expected = streams(told), streams(truth)
    assert found.keys() == expected.keys()
    for branch, stream in found.items():
        assert [token for token, _ in stream] == [token for token, _ in expected[branch]]
        for (_, logprob), (_, other) in zip(stream, expected[branch], strict=True):
            assert logprob == pytest.approx(other, abs=TOLERANCE)


def both(
    model: Path, runner: CpuRunner, prompts: list[Prompt], each: RequestParams = PLAIN, rounds: int = 1, **params: Any
) -> tuple[Served, list[StepOutput], list[StepOutput]]:
    """What is told of the prompts with images, and with ids; several times one after the other."""
    told = []
    for table in (None, table_of(runner)):
        engine = served(model, runner, **params)
        one: list[StepOutput] = []
        for _ in range(rounds):
            for prompt in prompts:
                engine.submit(prompt, each, table)
            one += engine.drain()
        told.append(one)
    return engine, told[1], told[0]


WAYS: dict[str, tuple[SamplingParams, dict[str, Any]]] = {
    "together": (PLAIN, {}),
    "drawn": (SamplingParams(do_sample=True, seed=5, max_new_tokens=6, ignore_eos=True, top_k=20), {}),
    "several branches": (SamplingParams(n=2, do_sample=True, seed=5, max_new_tokens=4, ignore_eos=True), {}),
    "diverse": (
        SamplingParams(n=2, do_sample=True, seed=5, max_new_tokens=4, ignore_eos=True),
        {"diverse_mode": True},
    ),
    "beams": (SamplingParams(n=3, max_new_tokens=4, ignore_eos=True), {"beam_mode": True}),
    "blocks of 1": (PLAIN, {"splitfuse_mode": True, "splitfuse_block_size": 1}),
    "blocks of 7": (PLAIN, {"splitfuse_mode": True, "splitfuse_block_size": 7}),
    "blocks of 64": (PLAIN, {"splitfuse_mode": True, "splitfuse_block_size": 64}),
    "cached": (PLAIN, {"use_dynamic_prompt_cache": True, "rounds": 2}),
    "cached, in blocks": (
        PLAIN,
        {"use_dynamic_prompt_cache": True, "rounds": 2, "splitfuse_mode": True, "splitfuse_block_size": 7},
    ),
    "paused": (
        SamplingParams(max_new_tokens=30, min_new_tokens=30),
        {"router_token_ratio": 1.0, "router_max_new_token_len": 1, "slots": 161},
    ),
    "told of": (SamplingParams(top_logprobs=5, prompt_logprobs=2, max_new_tokens=3, ignore_eos=True), {}),
}


@pytest.mark.parametrize("way", WAYS)
def test_images_equal_their_embeddings_fed_directly(model: Path, runner: CpuRunner, way: str) -> None:
    each, params = WAYS[way]
    prompts = draw_prompts(len(way)) * (2 if way == "paused" else 1)
    engine, told, truth = both(model, runner, prompts, each, **params)
    alike(told, truth)
    if "cached" in way:
        assert sum(count for output in told for _, count in output.cached) > 0
        assert engine.scheduler.keys.stats()["cache_hits_tokens"] > 20
    if way == "paused":
        assert any(row.sampling is not None and row.sampling.emitted for step in engine.steps for row in step.rows)
    if way == "told of":
        scores = [
            {part.request: part for output in one for part in output.prompts if part.first == 1}
            for one in (told, truth)
        ]
        for number, prompt in enumerate(prompts, 1):
            of_text = [at for at, target in enumerate(plain(prompt)[1:]) if target < 60]
            for at in of_text:
                assert scores[0][number].logprobs[at] == pytest.approx(scores[1][number].logprobs[at], abs=TOLERANCE)


def test_images_are_fed_whole_where_their_tokens_see_each_other(model: Path, runner: CpuRunner) -> None:
    prompts = draw_prompts(3)
    _, truth, causal = both(model, runner, prompts, rounds=2, whole=True)
    assert streams(truth) != streams(causal), "tokens of an image see later ones"
    for block in (1, 7, 16):
        modes = {"splitfuse_mode": True, "splitfuse_block_size": block, "use_dynamic_prompt_cache": True}
        engine, told, _ = both(model, runner, prompts, rounds=2, whole=True, **modes)
        alike(told, truth)
        spans = {len(part) for prompt in prompts for part in prompt if isinstance(part, tuple)}
        fed = [part.rows for step in engine.steps for row in step.rows for part in row.images or ()]
        assert fed
        assert set(fed) <= spans
        for step in engine.steps:
            most = max((part.rows for row in step.rows for part in row.images or ()), default=0)
            assert sum(len(row.tokens) for row in step.rows) <= max(block, most, 240)


def test_a_replayed_request_goes_on_as_if_nothing_had_happened(model: Path, runner: CpuRunner) -> None:
    prompt = draw_prompts(11)[1]
    engine = served(model, runner)
    engine.submit(prompt, PLAIN, table_of(runner))
    ((stream),) = streams(engine.drain()).values()
    again = served(model, runner)
    again.submit(prompt, PLAIN, table_of(runner), emitted=[[token for token, _ in stream[:3]]])
    ((rest),) = streams(again.drain()).values()
    assert [token for token, _ in rest] == [token for token, _ in stream[3:]]


def test_hidden_states_behind_images_become_the_same_vectors(model: Path, runner: CpuRunner) -> None:
    for params in (PoolingParams(), PoolingParams(mean=True)):
        _, told, truth = both(model, runner, draw_prompts(5), params)
        vectors, expected = (
            {one.request: one.vectors for output in some for one in output.pooled} for some in (told, truth)
        )
        assert vectors.keys() == expected.keys()
        for request, (vector,) in vectors.items():
            (other,) = expected[request]
            found, wanted = (torch.frombuffer(bytearray(one), dtype=torch.float32) for one in (vector, other))
            torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)


def test_other_images_of_one_size_share_nothing_but_what_is_before_them(model: Path, runner: CpuRunner) -> None:
    begin, images = [3, 4, 5], [tuple(range(60 + 20 * at, 80 + 20 * at)) for at in range(3)]
    prompts: list[Prompt] = [[*begin, image, 9, 9] for image in images]
    _, told, truth = both(model, runner, prompts, use_dynamic_prompt_cache=True, running_max_req_size=1)
    alike(told, truth)
    assert sorted(count for output in told for _, count in output.cached) == [3, 3]


def test_further_features_are_added_behind_the_first_layers(runner: CpuRunner) -> None:
    """As Qwen3-VL's: as many layers as there are, the last one behind which some are asked for included."""
    ids, first, count = [5, 6, 0, 0, 0, 7, 8], 2, 3
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(3, count, runner.decoder.spec.hidden, generator=draw)
    driver = Driver(runner)
    row = driver.row(0, ids)
    row.images = [ImagePart(first, count, bytes_of(values), 3)]
    with torch.inference_mode():
        batch = runner.table.pack([row], runner.decoder.rope)
        x = runner.decoder.embedding(batch)
        x[first : first + count] = values[0]
        for layer, cache, more in zip(runner.decoder.layers, runner.caches, values[1:], strict=True):
            x = layer.forward(x, cache, batch)
            x[first : first + count] += more
        expected = runner.decoder.head.logits(x)
    (logits,) = driver.logits(row)
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)
    result = runner.run(driver.step(row), lambda: None)
    assert result.tokens == [int(expected[-1].argmax())]
    assert math.isclose(result.logprobs[0], float(expected[-1].log_softmax(-1).max()), abs_tol=TOLERANCE)


def test_a_gpu_runner_embeds_images_beside_text(model: Path) -> None:
    """Padded and not, in parts and behind cached tokens; one launch after the other, as a GPU does."""
    runner = load_on_device(model, running_max_req_size=4)
    table = runner.decoder.embedding.weight
    image, text = list(range(60, 72)), [3, 4, 5]
    driver = Driver(runner)
    (truth,) = driver.logits(driver.row(0, [*text, *image, 9, 10]))
    driver.release(0)
    ids = [*text, *[0] * len(image), 9, 10]
    whole, beside = driver.row(1, ids), driver.row(2, [8, 9, 10])
    whole.images = [ImagePart(3, 12, bytes_of(table[image][None].cpu()))]
    logits, _ = driver.logits(whole, beside)
    torch.testing.assert_close(logits, truth, rtol=0, atol=1e-3)
    begin = driver.row(3, ids[:8])
    begin.images = [ImagePart(3, 5, bytes_of(table[image[:5]][None].cpu()))]
    driver.logits(begin)
    rest = driver.row(3, ids[8:])
    rest.images = [ImagePart(0, 7, bytes_of(table[image[5:]][None].cpu()))]
    (logits,) = driver.logits(rest)
    torch.testing.assert_close(logits, truth[8:], rtol=0, atol=1e-3)


def test_an_image_that_is_fed_whole_and_exceeds_a_step_is_refused(model: Path, runner: CpuRunner) -> None:
    engine = served(model, runner, whole=True)
    limits = engine.scheduler.limits._replace(batch_max_tokens=20)
    scheduler = Scheduler(limits, 1)
    ids, images = hidden([3, tuple(range(60, 81)), 4], table_of(runner), whole=True)
    message = Submit(1, 0, 1, 1, ids, PLAIN, [0], [[]], images=list(images.spans))
    refused = scheduler.submit(message, images=images)
    assert refused
    assert "an image of 21 tokens" in refused.message
    assert "batch_max_tokens 20" in refused.message
    assert not scheduler.busy


def test_the_worst_step_of_images_runs_before_a_gpu_is_ready(model: Path) -> None:
    vision = Vision("float32", most_tokens=8, token_bytes=4 * 64, patches=8, capacity=4)
    plan = msgspec.structs.replace(plan_for(model, slots=31), vision=vision)
    (step,) = [step for step in worst_steps(plan) if any(row.images for row in step.rows)]
    assert sum(part.rows for row in step.rows for part in row.images or ()) == step.fed == 31
    runner = load_on_device(model)
    result = runner.run(step, lambda: None)
    assert len(result.tokens) == len(step.rows)
