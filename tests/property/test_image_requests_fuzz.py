"""Requests with images from their coming to their end: gate, client, scheduler and prompt cache with the fake engine,
while the visual worker answers late, dies and comes back. Every token is right, and in the end no slot is taken, no
embedding mapped and nothing asked for."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

from lightllmd.config.parameters import FakeSettings
from lightllmd.engine.grammar_gate import Refused, Waiting
from lightllmd.engine.images.client import EmbeddingClient
from lightllmd.engine.images.gate import ImageGate
from lightllmd.engine.images.prompt_images import PromptImages
from lightllmd.engine.loop import StepLoop
from lightllmd.engine.runners.fake import FakeRunner
from lightllmd.engine.runners.fake_model import fake_token, seen_tokens
from lightllmd.engine.scheduling.scheduler import Scheduler
from lightllmd.ipc.messages import ImageSpan, SamplingParams, Submit
from long_run import LONG
from scheduler_samples import limits
from stand_in_visual import VisualStandIn
from vision_plans import seeing_plan

OPERATIONS = 100_000 if LONG else 5_000
ROUND = 500
HIDDEN = 4
IMAGES = {bytes([number]) * 16: 1 + 3 * number % 11 for number in range(8)}  # key -> tokens
CURSED = b"cursed" + bytes(10)


def values_of(key: bytes) -> bytes:
    return random.Random(key).randbytes(IMAGES[key] * HIDDEN * 4)


class Life:
    """An engine, its visual worker and a client; nothing waits for anything by itself."""

    def __init__(self, draw: random.Random, folder: Path, seen: Counter[str]) -> None:
        self.draw, self.path, self.seen = draw, str(folder / "visual"), seen
        self.now = 0.0
        self.limits = limits(
            max_total_token_num=draw.choice([60, 120]),
            batch_max_tokens=60,
            running_max_req_size=draw.choice([1, 3, 8]),
            router_token_ratio=draw.choice([0.0, 0.9]),
            router_max_new_token_len=2,
            use_dynamic_prompt_cache=draw.random() < 0.7,
            splitfuse_block_size=draw.choice([0, 0, 1, 5, 16]),
            diverse_mode=draw.random() < 0.3,
            whole_images=draw.random() < 0.3,
        )
        self.visual: VisualStandIn | None = None
        self.open: dict[int, tuple[Submit, list[int], dict[int, list[int]]]] = {}  # with ids as they are seen
        self.numbers = 0
        self.start()

    def start(self) -> None:
        """Of an engine's process."""
        plan = seeing_plan()
        self.client = EmbeddingClient(self.path, "float32", HIDDEN * 4)
        self.gate = ImageGate(plan, self.client)
        self.scheduler = Scheduler(self.limits, 1)
        self.loop = StepLoop(self.scheduler, FakeRunner(FakeSettings(overlap=self.draw.random() < 0.5)))

    def crash(self) -> None:
        """What is in flight is replayed on the next engine."""
        self.client.close()
        self.start()
        for number, (message, _, emitted) in list(self.open.items()):
            self.seen["replayed"] += 1
            branches = sorted(emitted)
            again = Submit(number, 0, 1, number, list(message.prompt_ids), message.params, branches, [])
            again.emitted, again.images, again.replay = [list(emitted[one]) for one in branches], message.images, True
            self.take_in(again)

    # --- the visual worker --------------------------------------------------------------------------------------------
    def visual_dies(self) -> None:
        if self.visual is not None:
            self.seen["deaths"] += 1
            self.visual.die()
        self.visual = None

    def visual_answers(self, hangs: float = 0.1) -> None:
        """`hangs`: how likely it says nothing, which ends with its death."""
        if self.visual is None:
            self.visual = VisualStandIn(self.path)
        self.visual.silent = self.draw.random() < hangs
        shown = self.draw.sample(sorted(IMAGES), self.draw.randint(0, len(IMAGES)))
        self.visual.known = {key: ((1, IMAGES[key], HIDDEN), values_of(key)) for key in shown}
        self.visual.known[CURSED] = "it can't be encoded"
        self.visual.serve()

    # --- requests -----------------------------------------------------------------------------------------------------
    def submit(self) -> None:
        draw = self.draw
        ids, seen, spans = [7] * draw.randint(1, 4), [], []
        seen += ids
        for _ in range(draw.choice([0, 1, 1, 2, 3])):
            key = draw.choice(sorted(IMAGES)) if draw.random() < 0.97 else CURSED
            tokens = IMAGES.get(key, 2)
            spans.append(ImageSpan(len(ids), tokens, key))
            ids += [1] * tokens
            seen += seen_tokens(values_of(key), 1, tokens) if key != CURSED else [1] * tokens
            tail = [draw.choice([5, 6])] * draw.randint(0, 2)
            ids, seen = ids + tail, seen + tail
        n = draw.choice([1, 1, 2])
        params = SamplingParams(n=n, max_new_tokens=draw.randint(1, 8), use_cache=draw.random() < 0.9)
        if len(ids) + params.max_new_tokens + 1 > self.limits.max_total_token_num:
            return
        self.numbers += 1
        branches = list(range(n))
        message = Submit(self.numbers, 0, 1, self.numbers, ids, params, branches, [[] for _ in branches], images=spans)
        self.open[self.numbers] = message, seen, {branch: [] for branch in branches}
        self.take_in(message)

    def take_in(self, message: Submit) -> None:
        """As the worker does."""
        one = Waiting(message, self.now)
        if not message.images:
            self.schedule(one, None)
        elif (opened := self.gate.open(one, self.now)) is not None:
            assert not isinstance(opened, Refused)
            self.schedule(opened.waiting, opened.images)
        else:
            self.seen["waited"] += 1

    def schedule(self, one: Waiting, images: PromptImages | None) -> None:
        if self.scheduler.submit(one.message, one.since, None, images) is not None:
            del self.open[one.message.request]

    def abort(self) -> None:
        if self.open:
            number = self.draw.choice(sorted(self.open))
            _, _, branches = self.open[number]
            gone = None if self.draw.random() < 0.5 else [self.draw.choice(sorted(branches))]
            self.seen["aborted while it waited"] += self.gate.holds(number)
            self.gate.abort(number, gone)
            self.scheduler.abort(number, gone)
            for branch in list(branches) if gone is None else gone:
                del branches[branch]
            if not branches:
                del self.open[number]

    def end_all(self) -> None:
        self.gate.api_gone((0, 1)) if self.draw.random() < 0.5 else self.gate.clear()
        self.scheduler.clear()
        self.open.clear()

    def expire(self) -> None:
        self.now += self.draw.choice([1.0, 200.0])
        for message, _ in self.gate.expire(self.now):
            self.seen["expired"] += 1
            del self.open[message.request]

    def turn(self) -> None:
        self.now += 0.02
        for opened in self.gate.take(self.now):
            if isinstance(opened, Refused):
                self.seen["refused"] += 1
                del self.open[opened.message.request]
            else:
                self.schedule(opened.waiting, opened.images)
        if not self.loop.busy:
            return
        for output in self.loop.turn(lambda: None).values():
            columns = output.requests, output.branches, output.positions, output.tokens, output.finishes
            for number, branch, position, token, finish in zip(*columns, strict=True):
                message, seen, branches = self.open[number]
                assert position == len(branches[branch])
                assert token == fake_token(seen, 0, branch, position)
                branches[branch].append(token)
                if finish:
                    del branches[branch]
                    self.seen["finished"] += bool(message.images)
                    if not branches:
                        del self.open[number]
            self.seen["cached"] += len(output.cached)

    def check(self) -> None:
        self.scheduler.check()
        for step in self.loop.out:
            for row in step.rows:
                for part in row.images or ():
                    assert not self.limits.whole_images or len(part.values) // (4 * HIDDEN) == part.rows

    def drain(self) -> None:
        self.visual_dies()
        for _ in range(3000):
            if not self.open:
                break
            self.visual_answers(hangs=0)
            self.turn()
            self.check()
        assert not self.open
        while self.loop.busy:
            self.turn()
        assert len(self.gate) == self.client.wanted == self.client.mapped == 0
        assert self.scheduler.keys.locked == 0
        self.scheduler.flush_cache()
        assert self.scheduler.keys.slots.free == self.limits.max_total_token_num
        self.client.close()
        self.visual_dies()


def test_no_slot_and_no_embedding_is_left_whatever_happens(tmp_path: Path) -> None:
    draw, seen = random.Random(20261201), Counter[str]()
    for _ in range(OPERATIONS // ROUND):
        life = Life(draw, tmp_path, seen)
        ways = [life.turn, life.submit, life.visual_answers, life.abort, life.visual_dies, life.expire, life.crash]
        ways.append(life.end_all)
        for way in draw.choices(ways, [60, 16, 12, 4, 3, 1, 1, 0.3], k=ROUND):
            way()
            life.check()
        life.drain()
    assert not [name for name in HAPPENS if not seen[name]], seen
    assert seen["finished"] > OPERATIONS / 50


HAPPENS = ("waited", "replayed", "deaths", "aborted while it waited", "expired", "refused", "finished", "cached")
