"""Cohere's own client reranks here unchanged, by version 1 and 2 of its API, and understands what is refused."""

from __future__ import annotations

import pytest

from api.frontend_harness import make_plan, run, stack
from lightllmd.api.dialects.scoring.activation import sigmoid
from lightllmd.config.plan import Scoring
from lightllmd.engine.runners.fake_model import fake_score

cohere = pytest.importorskip("cohere")

DOCUMENTS = ["one", "two", "three"]
SCORES = [sigmoid([fake_score(list(f"q{text}".encode()))])[0] for text in DOCUMENTS]
RANKED = sorted(range(3), key=lambda index: -SCORES[index])


def test_both_versions_of_its_client_rank_documents(tmp_path):
    async def scenario():
        async with stack(tmp_path, plan=make_plan(scoring=Scoring(["LABEL_0"]))) as one:
            url = f"http://127.0.0.1:{one.port}"
            async with cohere.AsyncClientV2("key", base_url=url) as client:
                answer = await client.rerank(model="m", query="q", documents=DOCUMENTS, max_tokens_per_doc=100)
                assert [(found.index, found.relevance_score) for found in answer.results] == [
                    (index, SCORES[index]) for index in RANKED
                ]
                assert answer.meta.tokens.input_tokens == sum(len(f"q{text}") for text in DOCUMENTS)
            async with cohere.AsyncClient("key", base_url=url) as client:
                objects = [{"title": text, "text": "not read"} for text in DOCUMENTS]
                answer = await client.rerank(
                    model="m", query="q", documents=objects, rank_fields=["title"], top_n=2, return_documents=True
                )
                assert [(found.index, found.document.title) for found in answer.results] == [
                    (index, DOCUMENTS[index]) for index in RANKED[:2]
                ]

    run(scenario())


def test_what_is_refused_is_its_bad_request(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            client = cohere.AsyncClientV2("key", base_url=f"http://127.0.0.1:{one.port}")
            with pytest.raises(cohere.BadRequestError, match="use_reward_model") as refused:
                async with client:
                    await client.rerank(model="m", query="q", documents=DOCUMENTS)
            assert "use_reward_model" in refused.value.body["message"]

    run(scenario())
