"""Prompts with images for a model of text: their embeddings are rows of its own table, so the truth is the same prompt
with the ids of those rows."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightllmd.config.plan import Plan
from lightllmd.engine.images.prompt_images import ImageEmbedding, PromptImages
from lightllmd.engine.loop import StepLoop
from lightllmd.engine.scheduling.admission import SchedulerLimits
from lightllmd.engine.scheduling.scheduler import Scheduler
from lightllmd.engine.step import Runner, Step
from lightllmd.ipc.messages import ImageSpan, RequestParams, StepOutput, Submit

PLACEHOLDER = 0

Prompt = list[int | tuple[int, ...]]  # ids, and images: the ids whose embeddings they are


def bytes_of(values: Tensor) -> memoryview:
    return memoryview(values.contiguous().view(torch.uint8).numpy().tobytes())


def embedding_of(table: Tensor, ids: Sequence[int]) -> ImageEmbedding:
    """Of an image: those rows of the table, in its data type."""
    return ImageEmbedding(1, len(ids), bytes_of(table[list(ids)][None]))


def plain(prompt: Prompt) -> list[int]:
    return [number for part in prompt for number in (part if isinstance(part, tuple) else (part,))]


def hidden(prompt: Prompt, table: Tensor, whole: bool = False) -> tuple[list[int], PromptImages]:
    """The prompt with placeholders, and its images."""
    ids: list[int] = []
    spans, embeddings = [], []
    for part in prompt:
        if isinstance(part, tuple):
            spans.append(ImageSpan(len(ids), len(part), repr(part).encode()))
            embeddings.append(embedding_of(table, part))
            ids += [PLACEHOLDER] * len(part)
        else:
            ids.append(part)
    return ids, PromptImages(spans, embeddings, whole=whole)


def draw_prompts(seed: int, images: Iterable[int] = (1, 2, 0, 1)) -> list[Prompt]:
    """Of so many images each, between text."""
    draw, prompts = random.Random(seed), []
    for count in images:
        prompt: Prompt = [*draw.choices(range(3, 60), k=draw.randint(1, 6))]
        for _ in range(count):
            prompt += [tuple(draw.choices(range(60, 120), k=draw.randint(1, 24))), *draw.choices(range(3, 60), k=3)]
        prompts.append(prompt)
    return prompts


class Served:
    """A scheduler and a runner that has loaded."""

    def __init__(self, plan: Plan, runner: Runner, whole: bool = False) -> None:
        self._loop: StepLoop
        self._runner, self._whole = runner, whole
        self._limits = SchedulerLimits.of(plan)._replace(whole_images=whole)
        self.scheduler = Scheduler(self._limits, 1)
        self.steps: list[Step] = []
        self._loop = StepLoop(self.scheduler, runner, self.steps.append)
        self._requests = 0

    def submit(
        self,
        prompt: Prompt,
        params: RequestParams,
        table: Tensor | None = None,
        emitted: list[list[int]] | None = None,
    ) -> int:
        """With images where there is a `table`; else of the ids that they stand for."""
        self._requests += 1
        ids, images = (plain(prompt), None) if table is None else hidden(prompt, table, self._whole)
        branches = list(range(params.n))
        emitted = emitted or [[] for _ in branches]
        message = Submit(self._requests, 0, 1, self._requests, ids, params, branches, emitted)
        message.replay = any(emitted)
        message.images = [] if images is None else list(images.spans)
        assert self.scheduler.submit(message, images=images) is None
        return self._requests

    def drain(self) -> list[StepOutput]:
        told: list[StepOutput] = []
        while self._loop.busy:
            told += self._loop.turn(lambda: None).values()
            self.scheduler.check()
        return told


Stream = list[tuple[int, float]]  # (token, log-probability)


def streams(told: Iterable[StepOutput]) -> dict[tuple[int, int], Stream]:
    """By request and branch."""
    found: dict[tuple[int, int], Stream] = {}
    for output in told:
        columns = output.requests, output.branches, output.tokens, output.logprobs
        for request, branch, token, logprob in zip(*columns, strict=True):
            found.setdefault((request, branch), []).append((token, logprob))
    return found
