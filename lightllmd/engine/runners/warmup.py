"""The steps that a GPU runs before it is ready: each that has a kernel of its own, and the worst admissible ones, so
that no later step compiles anything or runs out of memory."""

from __future__ import annotations

from collections.abc import Iterator

from lightllmd.config.plan import Plan
from lightllmd.engine.sampling.gpu_sampler import MOST_CANDIDATES
from lightllmd.engine.step import DecodeRows, ImagePart, PoolingRow, Row, SamplingRow, Step, no_decode
from lightllmd.ipc.messages import SamplingParams

PLAIN = SamplingParams()
DRAWN = SamplingParams(do_sample=True)
EVERYTHING = SamplingParams(
    do_sample=True,
    top_p=0.9,
    top_k=40,
    typical_p=0.9,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    repetition_penalty=1.1,
    exponential_decay_length_penalty=(1, 1.01),
    min_new_tokens=2,
    top_logprobs=20,
    logit_bias={0: 0.1},
)
BEAM = SamplingParams(top_logprobs=20, candidates=MOST_CANDIDATES, repetition_penalty=1.1)


def worst_steps(plan: Plan) -> Iterator[Step]:
    """From one token to the most that a step may feed, then that beside decode rows, then the most rows that may be
    sampled in one. Of a model that scores each token becomes a vector; of others the tokens of each prompt become one
    together, and the last ones of as many prompts as there can be one each."""
    params = plan.config.params
    longest, widest = params.max_req_total_len, params.running_max_req_size
    most, embeds = min(plan.batch_max_tokens, plan.max_total_token_num, widest * longest), plan.scoring is None
    tokens = 1
    while tokens < most:
        step = _step(tokens, longest, PLAIN)
        yield step if plan.generates else _pooled(step, summed=embeds)
        tokens = 2 * tokens + (tokens > 1)  # 1, 2, 5, 11 …: between the powers of two that kernels are made for
    yield _pooled(_step(most, longest, PLAIN), summed=embeds)
    if embeds:
        yield _pooled(_step(min(widest, most), 1, PLAIN))
    if not plan.generates:
        return
    if plan.vision is not None:
        yield _of_images(_step(most, longest, PLAIN), plan)
    scored = _step(most, longest, EVERYTHING)
    for row in scored.rows:
        row.targets, row.top_targets = row.tokens, 20
    yield scored
    if plan.sees_both_ways:
        yield _bidirectional(_step(most, longest, PLAIN))
    if params.splitfuse_mode:
        yield _beside_decode_rows(_step(most, longest, PLAIN), widest)
    rows = min(widest, most)
    for params_of_all in (EVERYTHING, BEAM, DRAWN):
        yield _step(rows, 1, params_of_all)
    masked = _step(1, 1, DRAWN)
    masked.masks[0] = b"\xff\xff\xff\xff" * -(-plan.vocab_size // 32)
    yield masked


def _step(tokens: int, longest: int, params: SamplingParams) -> Step:
    """`tokens` in rows of at most `longest`, in the slots from 0 on."""
    rows = []
    for number, first in enumerate(range(0, tokens, longest)):
        slots = list(range(first, min(first + longest, tokens)))
        rows.append(Row(number, 0, 0, 0, [1] * len(slots), slots, True, 0, SamplingRow(params, [], [])))
    return Step(0, "prefill", no_decode(), rows, [])


def _of_images(step: Step, plan: Plan) -> Step:
    """All of its tokens are those of images."""
    assert plan.vision is not None
    each, layers = plan.vision.token_bytes, plan.image_layers
    for row in step.rows:
        count = len(row.tokens)
        row.images = [ImagePart(0, count, memoryview(bytes(count * each)), layers)]
        if plan.sees_both_ways:
            row.bidirectional = [(0, count)]
    return step


def _pooled(step: Step, summed: bool = False) -> Step:
    """Its rows ask for a vector at each of their tokens, or for the sum of these."""
    for row in step.rows:
        row.sample, row.sampling = False, None
        row.pooling = PoolingRow(list(range(len(row.tokens))), row.tokens, summed)
    return step


def _bidirectional(step: Step) -> Step:
    """Each token of its rows sees all of its row."""
    for row in step.rows:
        row.bidirectional = [(0, len(row.tokens))]
    return step


def _beside_decode_rows(step: Step, widest: int) -> Step:
    """With as many of them as there can be, each in its first slot's place."""
    numbers = list(range(len(step.rows), widest))
    nothing = [0] * len(numbers)
    step.decode = DecodeRows(numbers, nothing, nothing, nothing)
    return step
