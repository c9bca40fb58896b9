"""/score, /rerank, /classify and /pooling answer as vLLM's, Jina's and Cohere's clients expect, errors included."""

from __future__ import annotations

import asyncio
import struct
import threading
from base64 import b64decode
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from api.frontend_harness import Stack, make_plan, run, stack, until
from lightllmd.api.dialects import dialect
from lightllmd.api.dialects.scoring.activation import sigmoid, softmax
from lightllmd.api.web.responses import json_in_parts
from lightllmd.config.plan import Scoring
from lightllmd.engine.runners.fake_model import fake_score
from lightllmd.ipc import messages

ONE = Scoring(["LABEL_0"])
THREE = Scoring(["good", "bad", "ugly"])
STEPS = Scoring(["no", "yes"], marker=ord("#"))
HI = [{"role": "user", "content": "hi"}]


@asynccontextmanager
async def scoring(folder: Path, how: Scoring | None = ONE, *, engine: bool = True, **plan: Any):
    async with stack(folder, plan=make_plan(scoring=how, **plan), engine=engine) as one:
        if one.engine is not None and how is not None:
            one.engine.labels = len(how.labels)
        yield one


def told(answer: httpx.Response) -> dict[str, Any]:
    """The body without what is different each time."""
    assert answer.status_code == 200, answer.text
    body = answer.json()
    kind, _, number = body.pop("id").partition("-")
    assert len(number) == 32
    assert body.pop("created", 1) > 0
    return {"id": kind} | body


def logit(text: str, label: int = 0) -> float:
    return fake_score(list(text.encode()), label)


def score(text: str) -> float:
    return sigmoid([logit(text)])[0]


def used(*texts: str) -> dict[str, Any]:
    tokens = sum(len(text.encode()) for text in texts)
    return {
        "prompt_tokens": tokens,
        "completion_tokens": 0,
        "total_tokens": tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def posting(folder: Path, how: Scoring | None, *posts: tuple[str, dict[str, Any]], **plan: Any) -> list[httpx.Response]:
    async def scenario():
        async with scoring(folder, how, **plan) as one:
            return [await one.client.post(path, json=body) for path, body in posts]

    return run(scenario())


# --- /score -------------------------------------------------------------------------------------------------------


def test_pairs_are_scored_under_each_of_vllms_names(tmp_path):
    cases = []
    for path in ("/score", "/v1/score"):
        for first, second in (
            ("text_1", "text_2"),
            ("data_1", "data_2"),
            ("queries", "documents"),
            ("queries", "items"),
        ):
            for firsts, seconds, more, texts in (
                ("q", "d", {"model": "any"}, ["qd"]),
                (["q"], ["d1", {"text": "d2"}], {"encoding_format": "float", "user": "me"}, ["qd1", "qd2"]),
                (["q1", "q2"], ["d1", {"content": [{"type": "text", "text": "d2"}]}], {}, ["q1d1", "q2d2"]),
            ):
                cases.append((path, {first: firsts, second: seconds} | more, texts))
    answers = posting(tmp_path, ONE, *[(path, body) for path, body, _ in cases])
    for answer, (_, _, texts) in zip(answers, cases, strict=True):
        assert told(answer) == {
            "id": "score",
            "object": "list",
            "model": "fake-model",
            "data": [{"index": index, "object": "score", "score": score(text)} for index, text in enumerate(texts)],
            "usage": used(*texts),
        }
        assert "x-lightllmd-ignored" not in answer.headers


def test_the_logits_themselves_are_told_without_activation(tmp_path):
    pair = {"text_1": "q", "text_2": "d"}
    answers = posting(
        tmp_path, ONE, *[("/score", pair | more) for more in ({"use_activation": False}, {"activation": False}, {})]
    )
    assert [answer.json()["data"][0]["score"] for answer in answers] == [logit("qd"), logit("qd"), score("qd")]


def test_a_model_may_say_that_pairs_are_told_as_logits(tmp_path):
    body = {"text_1": "q", "text_2": "d"}
    for answer in posting(
        tmp_path, Scoring(["fits"], raw_pairs=True), ("/score", body), ("/score", body | {"use_activation": True})
    ):
        assert answer.json()["data"][0]["score"] == logit("qd")


# --- /rerank ------------------------------------------------------------------------------------------------------

DOCUMENTS = ["one", "two", "three", "two", ""]
RANKED = sorted(range(5), key=lambda index: (-score("q" + DOCUMENTS[index]), index))


def test_documents_are_ranked_and_equal_ones_stay_in_their_order(tmp_path):
    body = {"model": "any", "query": "q", "documents": DOCUMENTS, "unknown": 1}
    usage = used(*("q" + text for text in DOCUMENTS))
    assert RANKED.index(1) + 1 == RANKED.index(3)
    for answer in posting(tmp_path, ONE, *[(path, body) for path in ("/rerank", "/v1/rerank", "/v2/rerank")]):
        assert told(answer) == {
            "id": "rerank",
            "model": "fake-model",
            "results": [
                {"index": at, "relevance_score": score("q" + DOCUMENTS[at]), "document": {"text": DOCUMENTS[at]}}
                for at in RANKED
            ],
            "usage": usage,
            "meta": {"tokens": {"input_tokens": usage["prompt_tokens"], "output_tokens": 0}},
        }
        assert answer.headers["x-lightllmd-ignored"] == "unknown"


def test_top_n_bounds_the_results(tmp_path):
    shown = {None: 5, 0: 5, -1: 5, 1: 1, 4: 4, 5: 5, 6: 5, 2**31 - 1: 5}
    body = {"query": "q", "documents": DOCUMENTS, "return_documents": False}
    answers = posting(tmp_path, ONE, *[("/rerank", body | {"top_n": most}) for most in shown])
    for answer, count in zip(answers, shown.values(), strict=True):
        assert answer.json()["results"] == [
            {"index": at, "relevance_score": score("q" + DOCUMENTS[at])} for at in RANKED[:count]
        ]
        assert answer.json()["usage"]["total_tokens"] == sum(len("q" + text) for text in DOCUMENTS)


def test_documents_may_be_objects_of_which_some_fields_are_read(tmp_path):
    books = [{"title": "a", "text": "b", "year": 3}, {"text": "d", "title": "c"}]
    whole, by_field, single = posting(
        tmp_path,
        ONE,
        ("/v1/rerank", {"query": "q", "documents": books}),
        ("/v1/rerank", {"query": {"text": "q"}, "documents": books, "rank_fields": ["title", "text"]}),
        ("/v1/rerank", {"query": "q", "documents": "only"}),
    )
    for answer, texts in ((whole, ["qb", "qd"]), (by_field, ["qa\nb", "qc\nd"])):
        results = {result["index"]: result for result in answer.json()["results"]}
        assert [results[at]["relevance_score"] for at in (0, 1)] == [score(text) for text in texts]
        assert [results[at]["document"] for at in (0, 1)] == books
    assert single.json()["results"] == [{"index": 0, "relevance_score": score("qonly"), "document": {"text": "only"}}]


def test_texts_are_cut_as_asked(tmp_path):
    body = {"query": "abcd", "documents": ["efgh"], "use_activation": False}
    cuts = {
        "aef": {"max_tokens_per_query": 1, "max_tokens_per_doc": 2},
        "abefg": {"truncate_prompt_tokens": 5},
        "cdfgh": {"truncate_prompt_tokens": 5, "truncation_side": "left"},
        "abcdefgh": {"truncate_prompt_tokens": -1, "max_tokens_per_doc": 0},
    }
    answers = posting(tmp_path, ONE, *[("/rerank", body | cut) for cut in cuts.values()])
    for answer, text in zip(answers, cuts, strict=True):
        assert answer.json()["results"][0]["relevance_score"] == logit(text)
        assert answer.json()["usage"] == used(text)


# --- /classify ------------------------------------------------------------------------------------------------------


def test_prompts_are_classified(tmp_path):
    def probs(text: str) -> list[float]:
        return softmax([logit(text, label) for label in range(3)])

    inputs = [("a", ["a"]), (["b", "c"], ["b", "c"]), ([100, 101], ["de"]), ([[102], [103]], ["f", "g"])]
    answers = posting(tmp_path, THREE, *[("/classify", {"model": "any", "input": given}) for given, _ in inputs])
    for answer, (_, texts) in zip(answers, inputs, strict=True):
        data = [
            {
                "index": index,
                "label": THREE.labels[probs(text).index(max(probs(text)))],
                "probs": pytest.approx(probs(text), rel=1e-12),
                "num_classes": 3,
            }
            for index, text in enumerate(texts)
        ]
        expected = {"id": "classify", "object": "list", "model": "fake-model", "data": data, "usage": used(*texts)}
        assert told(answer) == expected


@pytest.mark.parametrize(
    ("problem", "labels", "activation"),
    [("regression", 3, list), ("multi_label_classification", 3, sigmoid), (None, 1, sigmoid), ("regression", 1, list)],
)
def test_what_probabilities_are_says_the_models_problem_type(tmp_path, problem, labels, activation):
    how = Scoring([f"L{number}" for number in range(labels)], problem)
    active, raw = posting(
        tmp_path, how, ("/classify", {"input": "a"}), ("/classify", {"input": "a", "use_activation": False})
    )
    logits = [logit("a", label) for label in range(labels)]
    assert active.json()["data"][0]["probs"] == activation(logits)
    assert raw.json()["data"][0]["probs"] == logits


def test_a_conversation_is_one_prompt_without_the_head_of_an_answer(tmp_path):
    async def scenario():
        async with scoring(tmp_path, THREE) as one:
            for extra in ({}, {"add_generation_prompt": True}, {"continue_final_message": True}):
                tokenize = {"messages": HI, "add_generation_prompt": False} | extra
                tokens = (await one.client.post("/tokenize", json=tokenize)).json()["tokens"]
                for path in ("/classify", "/pooling"):
                    answer = await one.client.post(path, json={"messages": HI} | extra)
                    assert answer.status_code == 200, answer.text
                    assert one.engine.submits[-1].prompt_ids == tokens

    run(scenario())


# --- /pooling -------------------------------------------------------------------------------------------------------


def test_pooling_tells_logits_as_they_are(tmp_path):
    plain, active, steps = (
        posting(tmp_path, how, ("/pooling", body))[0]
        for how, body in (
            (THREE, {"input": ["a", "b"], "task": "classify"}),
            (THREE, {"input": "a", "use_activation": True}),
            (STEPS, {"input": "a#b#c", "task": "token_classify"}),
        )
    )
    logits = [[logit(text, label) for label in range(3)] for text in "ab"]
    assert told(plain) == {
        "id": "pooling",
        "object": "list",
        "model": "fake-model",
        "data": [{"index": index, "object": "pooling", "data": logits[index]} for index in (0, 1)],
        "usage": used("a", "b"),
    }
    assert active.json()["data"][0]["data"] == softmax(logits[0])
    assert steps.json()["data"][0]["data"] == [[logit(text, label) for label in (0, 1)] for text in ("a#", "a#b#")]


def test_pooling_in_base64_has_the_type_and_byte_order_that_were_asked_for(tmp_path):
    forms = {"big": ">", "little": "<", "native": "="}
    cases = [(order, dtype) for order in forms for dtype in ("float32", "float16")]
    body = {"input": "a#b#", "encoding_format": "base64"}
    answers = posting(
        tmp_path, STEPS, *[("/pooling", body | {"embed_dtype": dtype, "endianness": order}) for order, dtype in cases]
    )
    expected = [logit(text, label) for text in ("a#", "a#b#") for label in (0, 1)]
    for answer, (order, dtype) in zip(answers, cases, strict=True):
        letter, near = ("f", 1e-7) if dtype == "float32" else ("e", 1e-3)
        numbers = struct.unpack(f"{forms[order]}4{letter}", b64decode(answer.json()["data"][0]["data"]))
        assert numbers == pytest.approx(expected, rel=near)


def test_prompts_are_cut_at_the_side_that_was_asked_for(tmp_path):
    body = {"input": ["abcdef", "ab"], "truncate_prompt_tokens": 3}
    cases = [
        (body, ["abc", "ab"]),
        (body | {"truncation_side": "left"}, ["def", "ab"]),
        (body | {"input": "x" * 100, "truncate_prompt_tokens": -1}, ["x" * 20]),
    ]
    for path, key, number in (("/classify", "probs", score), ("/pooling", "data", logit)):
        answers = posting(tmp_path, ONE, *[(path, asked) for asked, _ in cases], params={"max_req_input_len": 20})
        for answer, (_, texts) in zip(answers, cases, strict=True):
            assert [one[key] for one in answer.json()["data"]] == [[number(text)] for text in texts]
            assert answer.json()["usage"] == used(*texts)


# --- refusals -------------------------------------------------------------------------------------------------------

PAIRS = {"text_1": "q", "text_2": "d"}
RERANK = {"query": "q", "documents": ["d"]}
REFUSED = [
    ("/score", {}, "queries", "two fields are required, and no others of these: queries and documents"),
    ("/score", {"text_1": "a"}, "text_1", "got text_1"),
    ("/score", {"text_1": "a", "documents": "b"}, "documents", "got documents, text_1"),
    ("/score", PAIRS | {"data_1": "b"}, "data_1", "got data_1, text_1, text_2"),
    ("/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1", "as many as text_2 = 3; got 2"),
    ("/score", {"text_1": ["a", "b"], "text_2": "c"}, "text_1", "as many as text_2 = 1; got 2"),
    ("/score", {"text_1": [], "text_2": "a"}, "text_1", "at least 1"),
    ("/score", {"text_1": "a", "text_2": []}, "text_2", "at least 1"),
    ("/score", {"text_1": 3, "text_2": "a"}, "text_1", "got 3"),
    ("/score", {"text_1": "a", "text_2": ["b", 3]}, "text_2.1", "got 3"),
    ("/score", {"text_1": "a", "text_2": ["b", {"txt": "c"}]}, "text_2.1.text", "text_2.1.text: required"),
    ("/score", {"text_1": {"text": None}, "text_2": "b"}, "text_1.text", "should be a string; got None"),
    ("/score", {"text_1": "", "text_2": ""}, "text_2", "the prompt has no tokens"),
    ("/score", {"text_1": "x" * 3000, "text_2": "b"}, "text_2", "max_req_input_len = 2048"),
    ("/score", PAIRS | {"use_activation": "yes"}, "use_activation", "should be a valid boolean; got 'yes'"),
    ("/score", PAIRS | {"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "greater than or equal to -1"),
    ("/score", PAIRS | {"truncate_prompt_tokens": 0}, "text_2", "the prompt has no tokens"),
    ("/score", PAIRS | {"truncation_side": "middle"}, "truncation_side", "'left' or 'right'; got 'middle'"),
    ("/score", PAIRS | {"max_tokens_per_doc": -1}, "max_tokens_per_doc", "greater than or equal to 0"),
    ("/score", PAIRS | {"chat_template": "{{ 1 }}"}, "chat_template", "not available yet"),
    ("/score", PAIRS | {"instruction": "i"}, "instruction", "instruction: this model has no chat template for pairs"),
    ("/score", PAIRS | {"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs", "no chat template for pairs"),
    ("/rerank", {"documents": ["d"]}, "query", "query: required"),
    ("/rerank", {"query": "q"}, "documents", "documents: required"),
    ("/rerank", {"query": "q", "documents": []}, "documents", "at least 1"),
    ("/rerank", {"query": "q", "documents": [1, 2]}, "documents.0", "got 1"),
    ("/rerank", {"query": "q", "documents": [["d"]]}, "documents.0", "got ['d']"),
    ("/rerank", {"query": ["q"], "documents": ["d"]}, "query", "got ['q']"),
    ("/rerank", {"query": None, "documents": ["d"]}, "query", "got None"),
    ("/rerank", RERANK | {"top_n": -2}, "top_n", "greater than or equal to -1; got -2"),
    ("/rerank", RERANK | {"top_n": 2**31}, "top_n", "less than or equal to 2147483647"),
    ("/rerank", RERANK | {"top_n": 1.5}, "top_n", "got 1.5"),
    ("/rerank", RERANK | {"rank_fields": ["title"]}, None, None),
    ("/rerank", {"query": "q", "documents": [{"a": 1}], "rank_fields": ["a"]}, "documents.0.a", "got 1"),
    ("/rerank", {"query": "q", "documents": [{"a": ""}], "rank_fields": []}, "rank_fields", "at least 1"),
    ("/rerank", RERANK | {"rank_fields": ["x" * 257]}, "rank_fields.0", "at most 256 characters"),
    ("/rerank", {"query": "q", "documents": [{"image": "http://x"}]}, "documents.0.image", "not available yet"),
    (
        "/rerank",
        {"query": "q", "documents": [{"content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "documents.0.content.0",
        "image_url is not available yet",
    ),
    ("/rerank", {"query": "q", "documents": [{"content": [5]}]}, "documents.0.content.0", "part of type text; got 5"),
    ("/rerank", {"query": "q", "documents": ["d"] * 10_001}, "documents", "at most 10000"),
    ("/rerank", {"query": "q", "documents": ["d"] * 2025}, "documents", "http.max_queue = 2024"),
    ("/rerank", {"query": "q", "documents": ["d", "x" * 3000]}, "documents.1", "max_req_input_len = 2048"),
    ("/rerank", {"query": "q" * 70_000, "documents": ["d"]}, "query", "max_req_input_len = 2048"),
    ("/classify", {}, "input", "one of input and messages is required"),
    ("/classify", {"input": "a", "messages": HI}, "input", "and not both"),
    ("/classify", {"input": ""}, "input", "the prompt has no tokens"),
    ("/classify", {"input": []}, "input", "at least 1"),
    ("/classify", {"input": ["a", ""]}, "input.1", "the prompt has no tokens"),
    ("/classify", {"input": [[1], [257]]}, "input.1", "token id 257"),
    ("/classify", {"input": ["a", 1]}, "input.0", "input.0: should be"),
    ("/classify", {"messages": HI, "add_special_tokens": True}, "add_special_tokens", "the chat template adds them"),
    (
        "/classify",
        {"messages": HI, "add_generation_prompt": True, "continue_final_message": True},
        "add_generation_prompt",
        "should be false with continue_final_message",
    ),
    ("/pooling", {"input": "a", "task": "embed"}, "task", "this model has classify; got 'embed'"),
    ("/pooling", {"input": "a", "task": "token_classify"}, "task", "this model has classify"),
    ("/pooling", {"input": "a", "encoding_format": "bytes"}, "encoding_format", "got 'bytes'"),
    ("/pooling", {"input": "a", "embed_dtype": "fp8_e4m3"}, "embed_dtype", "got 'fp8_e4m3'"),
    ("/pooling", {"input": "a", "endianness": "middle"}, "endianness", "got 'middle'"),
    ("/pooling", {"input": "a", "dimensions": 3}, "dimensions", "not available yet"),
]


def test_what_is_wrong_is_told_by_name(tmp_path):
    posts = [(path, body) for path, body, _, _ in REFUSED]
    answers = posting(tmp_path, ONE, *posts)
    for answer, (path, body, param, says) in zip(answers, REFUSED, strict=True):
        if says is None:
            assert answer.status_code == 200, answer.text
            continue
        assert answer.status_code == 400, (path, str(body)[:200], answer.text)
        error = answer.json()["error"]
        assert says in error["message"], (path, str(body)[:200], error)
        assert (error["type"], error["param"]) == ("invalid_request_error", param), (path, str(body)[:200], error)


def test_the_scores_of_all_prompts_are_bounded(tmp_path):
    many = Scoring([str(number) for number in range(4096)])
    (answer,) = posting(tmp_path, many, ("/classify", {"input": ["a"] * 1025}))
    says = "input: 1025 places with 4096 scores each are 4198400, more than 4194304 in all"
    assert (answer.status_code, says in answer.json()["error"]["message"]) == (400, True)


def test_unknown_fields_are_refused_where_the_settings_say_so_and_keys_are_asked_for(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    keys.chmod(0o600)

    async def scenario():
        async with scoring(tmp_path, api_keys_file=str(keys), unknown_fields="refuse") as one:
            for path, body in BODIES.items():
                assert (await one.client.post(path, json=body)).status_code == 401
                key = {"Authorization": "Bearer secret"}
                assert (await one.client.post(path, json=body, headers=key)).status_code == 200
                refused = await one.client.post(path, json=body | {"text_3": "x"}, headers=key)
                assert (refused.status_code, refused.json()["error"]["param"]) == (400, "text_3")

    run(scenario())


def test_rerank_errors_are_told_as_each_client_reads_them(tmp_path):
    for answer in posting(tmp_path, ONE, *[(path, {}) for path in ("/rerank", "/v1/rerank", "/v2/rerank")]):
        body = answer.json()
        assert body["message"] == body["detail"] == body["error"]["message"] == "query: required; documents: required"


BODIES = {
    "/score": {"text_1": "q", "text_2": "#"},
    "/v2/rerank": {"query": "q", "documents": ["#"]},
    "/rerank": {"query": "q", "documents": ["#"]},
    "/classify": {"input": "a#"},
    "/pooling": {"input": "a#"},
}


@pytest.mark.parametrize(
    ("how", "refused"),
    [
        (
            THREE,
            {
                "/score": "/score needs a model with one label, and this one has 3; see /classify",
                "/rerank": "/rerank needs a model with one label, and this one has 3; see /classify",
            },
        ),
        (
            STEPS,
            {
                "/score": "this model scores the steps of a prompt, which /pooling tells; /score can't",
                "/rerank": "this model scores the steps of a prompt, which /pooling tells; /rerank can't",
                "/classify": "this model scores the steps of a prompt, which /pooling tells; /classify can't",
            },
        ),
        (None, dict.fromkeys(BODIES, "use_reward_model = true")),
    ],
)
def test_a_model_without_such_results_refuses_by_name(tmp_path, how, refused):
    async def scenario():
        async with scoring(tmp_path, how) as one:
            for path, says in refused.items():
                answer = await one.client.post(path, json=BODIES[path])
                assert answer.status_code == 400
                assert says in answer.json()["error"]["message"]
            assert not one.engine.submits

    run(scenario())


def test_scores_that_are_no_numbers_are_an_error(tmp_path):
    async def scenario():
        async with scoring(tmp_path, engine=False) as one:
            engine = await one.up()
            task = asyncio.create_task(one.client.post("/rerank", json={"query": "q", "documents": ["a", "b"]}))
            await engine.submitted(2)
            pooled = [messages.Pooled(engine.submits[1].request, None)]
            engine.socket.send(0, 1, messages.StepOutput(1, [], [], [], [], [], [], pooled=pooled))
            answer = await task
            assert answer.status_code == 500
            assert "NaN" in answer.json()["error"]["message"]
            await until(lambda: one.ledger.in_flight == 0)

    run(scenario())


# --- engines and clients that die, and many documents -------------------------------------------------------------


async def _reranked(one: Stack, documents: list[str]) -> dict[str, Any]:
    return told(await one.client.post("/rerank", json={"query": "q", "documents": documents}))


def test_a_rerank_whose_engine_dies_is_answered_whole_and_as_without_it(tmp_path):
    documents = [f"d{number}" for number in range(200)]

    async def scenario():
        async with scoring(tmp_path, engine=False) as one:
            first = await one.up()
            task = asyncio.create_task(_reranked(one, documents))
            await first.submitted(200)
            some = {submit.request for submit in first.submits[:70]}
            first.step(only=some)
            await until(lambda: one.ledger.in_flight == 130)
            await one.kill()
            assert not task.done()
            second = await one.up()
            second.free_run = True
            answer = await task
            assert {submit.request for submit in second.submits}.isdisjoint(some)
            assert answer == await _reranked(one, documents)

    run(scenario())


def test_a_client_that_leaves_ends_its_rerank(tmp_path):
    async def scenario():
        async with scoring(tmp_path, engine=False) as one:
            engine = await one.up()
            task = asyncio.create_task(_reranked(one, ["a", "b", "c"]))
            await engine.submitted(3)
            task.cancel()
            await until(lambda: one.ledger.in_flight == 0)
            await until(lambda: len(engine.aborts) == 3)

    run(scenario())


def test_large_bodies_and_answers_are_read_and_made_away_from_the_event_loop(tmp_path, monkeypatch):
    documents = [f"{number} " + "x" * 50 for number in range(1500)]
    threads = []

    def encoding(body: Any) -> bytes:
        threads.append(threading.current_thread())
        return json_in_parts(body)

    monkeypatch.setattr(dialect, "json_in_parts", encoding)

    async def scenario():
        async with scoring(tmp_path, params={"max_total_token_num": 100_000}) as one:
            helpers = one.worker.revisions.current.texts.processes
            run_there, tasks = helpers.run, []

            async def noted(name: str, *arguments: Any, **options: Any) -> Any:
                tasks.append(name)
                return await run_there(name, *arguments, **options)

            monkeypatch.setattr(helpers, "run", noted)
            answer = await _reranked(one, documents)
            assert sorted(result["index"] for result in answer["results"]) == list(range(1500))
            assert tasks == ["decode", "encode_pairs"]
            assert [thread is threading.main_thread() for thread in threads] == [False]

    run(scenario())
