"""Whole models of Qwen2-VL, 2.5 and 3 beside transformers: logits and generated tokens, with images of odd sizes, in
every way that a prompt may be computed."""

from __future__ import annotations

from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from PIL import Image
from torch import Tensor

import lightllmd.offline
from image_prompts import Served, bytes_of, streams
from lightllmd.engine.images.prompt_images import ImageEmbedding, PromptImages, positions_in_grids
from lightllmd.engine.runners.cpu import CpuRunner
from lightllmd.engine.runners.gpu import GpuRunner
from lightllmd.engine.step import Row
from lightllmd.ipc.messages import ImageSpan, SamplingParams, Submit
from long_run import LONG
from qwen_vl_models import IMAGE, VISION, processor_of, write_qwen_vl
from rank_threads import ThreadRanks
from tiny_models import Driver, plan_for
from vision_models import VisionModel, picture, prompt_ids

TOLERANCE = 1e-4
GREEDY = SamplingParams(max_new_tokens=5, ignore_eos=True)
# Of each prompt the sizes of its images.
PROMPTS = [[(90, 41)], [], [(33, 101), (64, 64), (5, 7)], [(64, 64), (90, 41)], [(300, 20)]]


class Scene:
    """One kind of model on disk, ours and transformers'."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind
        self.theirs = write_qwen_vl(folder, kind)
        self.theirs.generation_config.eos_token_id = None
        self.ours = VisionModel.of(folder)

    def plan(self, **options: Any) -> Any:
        return msgspec.structs.replace(plan_for(self.folder, **options), model=self.ours.facts)

    def load(self, runner: CpuRunner | GpuRunner, **options: Any) -> Any:
        runner.load(self.plan(**options), lambda done, total: None)
        return runner

    @cached_property
    def runner(self) -> CpuRunner:
        return self.load(CpuRunner())

    @cached_property
    def prompts(self) -> list[Prompt]:
        return [Prompt(self, [picture(*size) for size in sizes], at) for at, sizes in enumerate(PROMPTS)]


class Prompt:
    """Text and images in turns."""

    def __init__(self, scene: Scene, images: list[Image.Image], seed: int, texts: list[str] | None = None) -> None:
        """`texts`: of "a" and "b", before, between and behind the images."""
        self._scene = scene
        self.ids, begins = prompt_ids(scene.ours, images, seed)
        if texts is not None:
            self.ids, begins = ids_of(scene, images, texts)
        made = scene.ours.embeddings(images)
        layouts = [scene.ours.encoder.spec.geometry.layout(image.width, image.height) for image in images]
        self.spans = [
            ImageSpan(begin, layout.tokens, repr(image.size).encode(), layout.grid)
            for begin, layout, image in zip(begins, layouts, images, strict=True)
        ]
        embeddings = [ImageEmbedding(len(each), each.shape[1], bytes_of(each)) for each in made]
        positions = positions_in_grids(self.spans, len(self.ids))
        self.images = PromptImages(self.spans, embeddings, positions=positions) if images else None
        self.given: dict[str, Any] = {}
        if images:
            self.given = dict(processor_of(scene.kind)(images, return_tensors="pt"))

    def words(self, emitted: list[int]) -> dict[str, Any]:
        """For transformers' model."""
        ids = torch.tensor([[*self.ids, *emitted]])
        return (
            {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE).int(), **self.given}
            if self.given
            else {"input_ids": ids}
        )

    @torch.inference_mode()
    def truth(self, emitted: list[int]) -> Tensor:
        """transformers' logits ``[tokens, vocab]``."""
        self._scene.theirs.model.rope_deltas = None
        logits: Tensor = self._scene.theirs(**self.words(emitted)).logits[0]
        return logits

    @torch.inference_mode()
    def generated(self, count: int) -> list[int]:
        """By transformers' generate, over its cache."""
        self._scene.theirs.model.rope_deltas = None
        words = self.words([])
        mask = torch.ones_like(words["input_ids"])
        ids = self._scene.theirs.generate(
            **words, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0
        )
        return ids[0, len(self.ids) :].tolist()

    def row(self, driver: Driver, number: int, begin: int, end: int, emitted: list[int]) -> Row:
        """Of its tokens from `begin` on, with what is emitted behind them."""
        row = driver.row(number, [*self.ids, *emitted][begin:end], len(emitted), prompt_length=len(self.ids))
        if self.images is not None:
            row.images, row.positions = self.images.parts(begin, end), self.images.positions(begin, end)
            row.shift = self.images.shift
        return row


def ids_of(scene: Scene, images: list[Image.Image], texts: list[str]) -> tuple[list[int], list[int]]:
    """As `prompt_ids` has them, of these texts."""
    spec = scene.ours.encoder.spec
    ids, begins = ["ab".index(one) for one in texts[0]], []
    for image, text in zip(images, texts[1:], strict=True):
        begin, span = spec.placeholder.resolved({}.get).of(spec.geometry.layout(image.width, image.height).tokens)
        begins.append(len(ids) + begin)
        ids += [*span, *("ab".index(one) for one in text)]
    return ids, begins


@pytest.fixture(scope="module", params=VISION)
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("vision"), request.param)


def some_of(name: str, values: list[Any]) -> pytest.MarkDecorator:
    """Each kind and each value once or more: what puts images and positions into batches knows no kind."""
    kinds = list(VISION)
    in_turn = [(kinds[at % len(kinds)], values[at % len(values)]) for at in range(max(len(kinds), len(values)))]
    rows = list(product(kinds, values)) if LONG else in_turn
    return pytest.mark.parametrize(("scene", name), rows, indirect=["scene"], scope="module")


def close(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> None:
    assert (ours.cpu() - theirs).abs().max() < tolerance


def test_logits_of_prompts_together_are_those_of_transformers(scene: Scene) -> None:
    """One image, several, none, of odd sizes; and the images count."""
    driver = Driver(scene.runner, scattered=True, poisoned=True)
    rows = [prompt.row(driver, at, 0, len(prompt.ids), []) for at, prompt in enumerate(scene.prompts)]
    for made, prompt in zip(driver.logits(*rows), scene.prompts, strict=True):
        close(made, prompt.truth([]))
    blind = driver.row(9, scene.prompts[0].ids)
    assert (driver.logits(blind)[0] - scene.prompts[0].truth([])).abs().max() > 0.05


@some_of("block", [1, 5, 16])
def test_logits_in_blocks_beside_others_decoded_and_replayed_are_those_of_transformers(
    scene: Scene, block: int
) -> None:
    check_blocks(scene, scene.runner, block, TOLERANCE)


def check_blocks(scene: Scene, runner: CpuRunner | GpuRunner, block: int, tolerance: float, at: int = 2) -> None:
    prompt, text, emitted = scene.prompts[at], scene.prompts[1], [5, 77, 9]
    driver, truth = Driver(runner, scattered=True, poisoned=True), prompt.truth(emitted)
    length, found = len(prompt.ids), []
    for begin in range(0, length, block):
        end = min(begin + block, length)
        other = text.row(driver, 3, 0, len(text.ids), []) if begin == 0 else driver.row(3, [4], 1)
        found.append(driver.logits(other, prompt.row(driver, 1, begin, end, []))[1])
    for count in range(1, 4):
        row = prompt.row(driver, 1, length + count - 1, length + count, emitted[:count])
        found.append(driver.logits(driver.row(3, [4], 1), row)[1])
    close(torch.cat(found), truth, tolerance)
    replayed = prompt.row(driver, 2, 0, length + 3, emitted)
    close(driver.logits(replayed, driver.row(3, [4], 1))[0], truth, tolerance)


WAYS: dict[str, tuple[SamplingParams, dict[str, Any]]] = {
    "together": (GREEDY, {}),
    "branches": (SamplingParams(n=2, do_sample=True, seed=5, max_new_tokens=4, ignore_eos=True), {}),
    "beams": (SamplingParams(n=3, max_new_tokens=4, ignore_eos=True), {"beam_mode": True}),
    "blocks": (GREEDY, {"splitfuse_mode": True, "splitfuse_block_size": 7}),
    "cached, in blocks": (
        GREEDY,
        {"use_dynamic_prompt_cache": True, "splitfuse_mode": True, "splitfuse_block_size": 7},
    ),
    "paused": (
        SamplingParams(max_new_tokens=25, min_new_tokens=25),
        {"router_token_ratio": 1.0, "router_max_new_token_len": 1, "slots": 130},
    ),
    "replayed": (GREEDY, {}),
}


@some_of("way", list(WAYS))
def test_tokens_and_their_probabilities_are_those_of_transformers(scene: Scene, way: str) -> None:
    """Whatever is drawn: each token's log-probability is the one that transformers has behind what is before it."""
    params, options = WAYS[way]
    runner = scene.load(CpuRunner(), **options) if "slots" in options else scene.runner
    engine = Served(scene.plan(**options), runner)
    for number in range(2 if "cached" in way else 1):
        told = serve(engine, scene, params, 1 + 10 * number, [7, 8] if way == "replayed" else [])
    for (request, branch), stream in streams(told).items():
        prompt, tokens = scene.prompts[(request - 1) % 10], [token for token, _ in stream]
        emitted = [7, 8] if way == "replayed" else []
        if way in ("together", "blocks", "cached, in blocks"):
            assert tokens == prompt.generated(len(tokens)), branch
        logprobs = prompt.truth([*emitted, *tokens])[len(prompt.ids) + len(emitted) - 1 : -1].log_softmax(-1)
        for place, (token, logprob) in enumerate(stream):
            assert logprob == pytest.approx(float(logprobs[place, token]), abs=TOLERANCE), (way, request, place)
    if "cached" in way:
        assert sum(count for output in told for _, count in output.cached) > 60
    if way == "paused":
        assert any(row.sampling is not None and row.sampling.emitted for step in engine.steps for row in step.rows)


def serve(
    engine: Served, scene: Scene, params: SamplingParams, first: int, emitted: list[int], count: int = 5
) -> list[Any]:
    """So many prompts at once."""
    for number, prompt in enumerate(scene.prompts[:count], first):
        branches = list(range(params.n))
        message = Submit(number, 0, 1, number, prompt.ids, params, branches, [emitted for _ in branches])
        message.replay, message.images = bool(emitted), prompt.spans
        assert engine.scheduler.submit(message, images=prompt.images) is None
    return engine.drain()


def test_a_gpu_has_the_same_logits_and_tokens(scene: Scene) -> None:
    pytest.importorskip("triton")
    if scene.kind != "qwen3_vl" and not torch.cuda.is_available():
        pytest.skip("in the interpreter the one with all features is enough")
    options = {"device": "cuda" if torch.cuda.is_available() else "cpu", "slots": 255}
    runner = scene.load(GpuRunner(), **options)
    check_blocks(scene, runner, 30, 2e-4, at=3)
    params = SamplingParams(max_new_tokens=2, ignore_eos=True)
    told = [serve(Served(scene.plan(**options), one), scene, params, 1, [], 2) for one in (runner, scene.runner)]
    ours, cpus = ({key: [token for token, _ in stream] for key, stream in streams(one).items()} for one in told)
    assert ours == cpus


@some_of("tp", [2, 1])
def test_an_offline_class_of_several_ranks_has_the_tokens_of_transformers(
    scene: Scene, tp: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From tags and pixels on: tokens, positions and what is added behind the first layers."""
    made: list[ThreadRanks] = []

    def start(plan: Any) -> ThreadRanks:
        made.append(ThreadRanks(plan))
        return made[-1]

    monkeypatch.setattr(lightllmd.offline, "ChildRanks", start)
    tag = scene.ours.encoder.spec.placeholder.tag
    images = [[picture(90, 41), picture(64, 64)], [], [picture(33, 101)]]
    asked = [f"ab{tag}{tag}ba", "ab", f"b{tag}a"]
    sizes = {"max_total_token_num": 600, "max_req_input_len": 120, "max_req_total_len": 160, "running_max_req_size": 4}
    quiet = {"device": "cpu", "threads": 1, "data_type": "float32", "progress": False}
    with lightllmd.LLM(scene.folder, enable_multimodal=True, tp=tp, **quiet, **sizes) as llm:
        told = llm.generate(asked, images=images, max_new_tokens=5, ignore_eos=True, detokenize=False, progress=False)
    for output, text, given in zip(told, asked, images, strict=True):
        prompt = Prompt(scene, given, 0, text.split(tag))
        assert output.prompt_tokens == len(prompt.ids)
        assert output.branches[0].token_ids == prompt.generated(5)
        logprobs = prompt.truth(output.branches[0].token_ids)[len(prompt.ids) - 1 : -1].log_softmax(-1)
        wanted = logprobs.gather(-1, torch.tensor(output.branches[0].token_ids)[:, None])[:, 0].tolist()
        assert output.branches[0].logprobs == pytest.approx(wanted, abs=TOLERANCE)
    assert [failure for ranks in made for failure in ranks.failures] == []
