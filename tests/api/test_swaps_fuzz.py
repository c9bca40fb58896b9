"""Random swaps, reloads and failures of both under closed-loop clients: every answer whole and of the right model."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest

from api.frontend_harness import ScriptedEngine, Stack, expected, fake_tokens, frames, make_plan, run, stack, until
from lightllmd.engine.runners.fake_model import fake_token
from lightllmd.ipc import messages

CLIENTS = 8
CHANGES = 12
TOKENS = 12
SEEDS = [0, 77]  # the two models


def model_tokens(seed: int) -> Callable[[messages.Submit, int, int], int]:
    def token(submit: messages.Submit, branch: int, position: int) -> int:
        return fake_token(submit.prompt_ids, seed, branch, position)

    return token if seed else fake_tokens


class Operator:
    """The supervisor's part: changes the revision in the ways that the design has."""

    def __init__(self, one: Stack, chance: random.Random) -> None:
        self.one, self.chance = one, chance
        self.number = 1  # in force
        self.newest = 1
        self.models = [0, 0]  # by revision, as an index of SEEDS; revision 0 never was
        self.engine: ScriptedEngine | None = None

    async def launch(self, revision: int) -> ScriptedEngine:
        engine = await self.one.up(revision, token=model_tokens(SEEDS[self.models[revision]]))
        engine.free_run = True
        return engine

    def end(self, engine: ScriptedEngine, revision: int) -> None:
        engine.die()
        self.one.tell(messages.EngineDown(engine.generation, "asleep", [], revision=revision))

    async def prepare(self, model: int) -> int:
        self.newest += 1
        self.models.append(model)
        await self.one.prepare(self.newest, make_plan())
        return self.newest

    async def commit(self, revision: int, carry: bool = False) -> int:
        """The number of the one before."""
        self.one.tell(messages.Commit(revision, carry))
        before, self.number = self.number, revision
        await until(lambda: self.one.worker.revisions.number == revision)
        return before

    async def drained(self, revision: int) -> None:
        await until(lambda: self.one.stats[f"in_flight@{revision}"] == 0)

    async def beside(self) -> None:
        revision = await self.prepare(self.chance.randrange(2))
        engine = await self.launch(revision)
        before = await self.commit(revision)
        await self.drained(before)
        self.one.tell(messages.Forget(before, "it is replaced"))
        self.engine.die()
        self.engine = engine

    async def after(self) -> None:
        revision = await self.prepare(self.chance.randrange(2))
        self.one.tell(messages.Hold())
        await until(lambda: self.one.worker.revisions.gate.shut)
        await self.drained(self.number)
        self.end(self.engine, self.number)
        self.engine = await self.launch(revision)
        before = await self.commit(revision)
        self.one.tell(messages.Release())
        self.one.tell(messages.Forget(before, "it is replaced"))

    async def reload(self) -> None:
        revision = await self.prepare(self.models[self.number])
        if self.chance.random() < 0.5:
            self.end(self.engine, self.number)
            before = await self.commit(revision, carry=True)
            self.engine = await self.launch(revision)
        else:
            engine = await self.launch(revision)
            before = await self.commit(revision, carry=True)
            self.engine.die()
            self.engine = engine
        self.one.tell(messages.Forget(before, "it is replaced"))

    async def roll_back(self) -> None:
        revision = await self.prepare(self.chance.randrange(2))
        self.one.tell(messages.Hold())
        await until(lambda: self.one.worker.revisions.gate.shut)
        if self.chance.random() < 0.5:
            await self.drained(self.number)
        self.end(self.engine, self.number)
        self.one.tell(messages.Forget(revision, "it does not start"))
        self.engine = await self.launch(self.number)
        self.one.tell(messages.Release())


@pytest.mark.parametrize("seed", range(4))
def test_random_swaps_reloads_and_failures_leave_every_answer_whole(tmp_path, seed):
    async def client(one: Stack, operator: Operator, number: int, over: asyncio.Event) -> int:
        def in_force() -> int:
            return one.worker.revisions.number

        chance, turn = random.Random(f"{seed}.{number}"), 0
        while not over.is_set():
            turn += 1
            prompt, stream, since = f"c{number}.{turn}", chance.random() < 0.5, in_force()
            body = {"inputs": prompt, "parameters": {"max_new_tokens": TOKENS}, "stream": stream}
            answer = await one.client.post("/", json=body)
            assert answer.status_code == 200, answer.text
            if stream:
                text = "".join(frame["token"]["text"] for frame in frames(answer.text))
            else:
                text = answer.json()["generated_text"][0]
            models = {operator.models[revision] for revision in range(since, in_force() + 1)}
            assert text in [expected(prompt, TOKENS, seed=SEEDS[model]) for model in models]
        return turn

    async def scenario() -> None:
        async with stack(tmp_path, engine=False) as one:
            chance = random.Random(seed)
            operator, over = Operator(one, chance), asyncio.Event()
            operator.engine = await operator.launch(1)
            clients = [asyncio.create_task(client(one, operator, number, over)) for number in range(CLIENTS)]
            for _ in range(CHANGES):
                change = chance.choice([operator.beside, operator.after, operator.reload, operator.roll_back])
                await change()
                before = one.stats["ok"]
                await until(lambda before=before: one.stats["ok"] > before + CLIENTS or any(c.done() for c in clients))
            over.set()
            turns = await asyncio.gather(*clients)
            stats = one.stats
            assert (stats["ok"], stats["failed"], stats["in_flight"], stats["gated"]) == (sum(turns), 0, 0, 0)
            assert [name for name in stats if "@" in name] == [f"in_flight@{operator.number}"]

    run(scenario())
