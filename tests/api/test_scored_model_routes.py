"""With a real model behind them /rerank, /score, /classify and /pooling tell what transformers makes of the same texts:
in blocks, behind a cached prefix, and after the engine died."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from api.frontend_harness import ScriptedEngine, Stack, run
from lightllmd.engine.runners.cpu import CpuRunner
from lightllmd.ipc import messages
from pair_tokenizers import FRAMES, SIZE, write_tokenizer
from scored_models import QWEN2, Engine, Truth, scored_plan, write_scored

ONE = {**QWEN2, "architectures": ["Qwen2ForSequenceClassification"], "id2label": {"0": "fits"}, "vocab_size": SIZE}
THREE = ONE | {"id2label": {"0": "bad", "1": "fair", "2": "good"}}
QUERY = "hello world, what is this \u4e16\u754c?"
DOCUMENTS = ["hello", "a world of its own", "", "hello", "\u00fcber " * 9, "what is this"]
OPTIONS = {"use_dynamic_prompt_cache": True, "splitfuse_mode": True, "splitfuse_block_size": 16}
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


class ModelEngine(ScriptedEngine):
    """Its scores are a model's."""

    def __init__(self, folder: Path, generation: int, engine: Engine) -> None:
        super().__init__(folder, generation)
        self.model = engine
        self.submitted_ones: set[int] = set()

    def step(self, only: set[int] | None = None, at_once: int = 1) -> int:
        """One of the real step loop."""
        for request, (submit, _) in self.running.items():
            if request not in self.submitted_ones:
                self.submitted_ones.add(request)
                assert self.model.scheduler.submit(submit) is None
        moved = 0
        for (api, epoch), output in self.model.loop.turn(lambda: None).items():
            output.generation = self.generation
            self.socket.send(api, epoch, output)
            for one in output.pooled:
                del self.running[one.request]
            moved += len(output.pooled)
        return moved


class Model:
    """A worker that serves a tiny random model, and transformers beside it."""

    def __init__(self, folder: Path, changes: dict[str, Any], family: str = "llama") -> None:
        from transformers import PreTrainedTokenizerFast

        write_tokenizer(folder, FRAMES[family])
        (folder / "chat_template.jinja").write_text(TEMPLATE)
        self.folder = write_scored(folder, changes)
        self.plan = scored_plan(folder, **OPTIONS)
        self.truth = Truth(folder)
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))

    def engine(self) -> Engine:
        runner = CpuRunner()
        runner.load(self.plan, lambda done, total: None)
        return Engine(self.plan, runner)

    def up(self, one: Stack, generation: int) -> ModelEngine:
        engine = ModelEngine(self.folder, generation, self.engine())
        one.engines.append(engine)
        one.engine, one.generation = engine, generation
        one.tell(messages.EngineUp(generation, engine.endpoint))
        one.tell(messages.Health(True, "ready"))
        return engine

    def logits(self, ids: list[int]) -> list[float]:
        (vector,) = self.truth.vectors(ids)
        return vector

    def pairs(self, documents: list[str]) -> list[float]:
        """As transformers encodes pairs."""
        ids = self.tokenizer([QUERY] * len(documents), documents)["input_ids"]
        return [torch.sigmoid(torch.tensor(self.logits(one)[0])).item() for one in ids]


def serving(model: Model, scenario: Any) -> None:
    async def whole() -> None:
        one = Stack(model.folder, model.plan)
        try:
            await scenario(one)
        finally:
            await one.stop()

    run(whole())


async def posted(one: Stack, path: str, **body: Any) -> dict[str, Any]:
    answer = await one.client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("family", FRAMES)
def test_pairs_have_transformers_scores_also_behind_the_cached_query(tmp_path, family):
    model = Model(tmp_path, ONE, family)
    expected = model.pairs(DOCUMENTS)
    ranked = sorted(range(len(DOCUMENTS)), key=lambda index: (-expected[index], index))

    async def scenario(one: Stack) -> None:
        model.up(one, 1).free_run = True
        for again in (False, True):
            answer = await posted(one, "/rerank", query=QUERY, documents=DOCUMENTS)
            assert [result["index"] for result in answer["results"]] == ranked
            told = [result["relevance_score"] for result in answer["results"]]
            assert told == pytest.approx([expected[index] for index in ranked], abs=1e-4)
            assert (answer["usage"]["prompt_tokens_details"]["cached_tokens"] > len(QUERY)) or not again
        answer = await posted(one, "/score", queries=[QUERY] * 6, documents=DOCUMENTS)
        assert [each["score"] for each in answer["data"]] == pytest.approx(expected, abs=1e-4)

    assert max(expected) - min(expected) > 0.05
    serving(model, scenario)


def test_a_rerank_goes_on_with_the_next_engine(tmp_path):
    model = Model(tmp_path, ONE)
    documents = [f"{text} {number}" for number in range(10) for text in DOCUMENTS]
    expected = model.pairs(documents)

    async def scenario(one: Stack) -> None:
        first = model.up(one, 1)
        task = asyncio.create_task(posted(one, "/rerank", query=QUERY, documents=documents))
        await first.submitted(len(documents))
        while one.ledger.in_flight == len(documents):
            first.step()
            await asyncio.sleep(0.001)
        await one.kill()
        assert not task.done()
        model.up(one, 2).free_run = True
        results = {result["index"]: result["relevance_score"] for result in (await task)["results"]}
        assert [results[index] for index in range(len(documents))] == pytest.approx(expected, abs=1e-4)

    serving(model, scenario)


def test_texts_and_conversations_have_transformers_labels(tmp_path):
    model = Model(tmp_path, THREE)
    messages_ = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
    chat = model.tokenizer("<user>hello<assistant>world", add_special_tokens=False)["input_ids"]
    texts = ["hello world", "a", "\u4e16\u754c hello"]
    prompts = [model.tokenizer(text)["input_ids"] for text in texts]

    async def scenario(one: Stack) -> None:
        model.up(one, 1).free_run = True
        for body, every in (
            ({"input": texts}, prompts),
            ({"input": prompts}, prompts),
            ({"messages": messages_}, [chat]),
        ):
            classified = (await posted(one, "/classify", **body))["data"]
            pooled = (await posted(one, "/pooling", **body))["data"]
            assert len(classified) == len(pooled) == len(every)
            for told, raw, ids in zip(classified, pooled, every, strict=True):
                logits = torch.tensor(model.logits(ids))
                assert told["probs"] == pytest.approx(torch.softmax(logits, -1).tolist(), abs=1e-4)
                assert told["label"] == ["bad", "fair", "good"][int(logits.argmax())]
                assert raw["data"] == pytest.approx(logits.tolist(), abs=1e-4)

    serving(model, scenario)


def test_the_models_own_template_for_pairs_says_what_is_read(tmp_path):
    model = Model(tmp_path, ONE)
    (tmp_path / "additional_chat_templates").mkdir()
    template = "{{ messages[1].content }} {{ instruction | default('fits') }} {{ messages[0].content }}?"
    (tmp_path / "additional_chat_templates" / "score.jinja").write_text(template)
    texts = [f"{document} fits {QUERY}?" for document in DOCUMENTS]
    ids = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    async def scenario(one: Stack) -> None:
        model.up(one, 1).free_run = True
        expected = [model.logits(each)[0] for each in ids]
        for more in (
            {},
            {"instruction": "fits"},
            {"chat_template_kwargs": {"instruction": "fits"}, "instruction": "x"},
        ):
            told = await posted(one, "/score", text_1=QUERY, text_2=DOCUMENTS, use_activation=False, **more)
            assert [each["score"] for each in told["data"]] == pytest.approx(expected, abs=1e-4)

    serving(model, scenario)
