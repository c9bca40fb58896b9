"""/tokenize, /detokenize and /version answer as vLLM's clients expect, and need no engine."""

from __future__ import annotations

import jinja2

from api.frontend_harness import EOS, run, stack
from lightllmd import __version__

HI = [{"role": "user", "content": "hi"}]


def test_a_text_and_its_tokens_come_back(tmp_path):
    async def scenario():
        async with stack(tmp_path, {"max_req_input_len": 60, "max_req_total_len": 100}, engine=False) as one:
            answer = await one.client.post("/tokenize", json={"model": "m", "prompt": "h\u00e9", "extra": 1})
            assert answer.headers["x-lightllmd-ignored"] == "extra"
            ids = list("h\u00e9".encode())
            assert answer.json() == {"count": 3, "max_model_len": 100, "tokens": ids, "token_strs": None}
            body = {"prompt": "h", "return_token_strs": True, "add_special_tokens": False}
            assert (await one.client.post("/tokenize", json=body)).json()["token_strs"] == ["<0x68>"]
            text = await one.client.post("/detokenize", json={"tokens": [*ids, EOS, 97], "model": None})
            assert text.json() == {"prompt": "h\u00e9<eos>a"}
            assert (await one.client.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}
            assert (await one.client.get("/version")).json() == {"version": __version__}

    run(scenario())


def test_a_text_beyond_the_context_is_counted_too(tmp_path):
    async def scenario():
        async with stack(tmp_path, {"max_req_input_len": 60, "max_req_total_len": 100}, engine=False) as one:
            answer = await one.client.post("/tokenize", json={"prompt": "x" * 100_000})
            assert answer.json()["count"] == 100_000

    run(scenario())


def test_a_conversation_has_the_tokens_that_chat_would_run(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            for extra in ({}, {"add_generation_prompt": False}, {"continue_final_message": True}):
                body = {"messages": HI} | extra
                tokens = (await one.client.post("/tokenize", json=body)).json()["tokens"]
                await one.client.post("/v1/chat/completions", json=body | {"max_tokens": 1})
                assert tokens == one.engine.submits[-1].prompt_ids

    run(scenario())


def test_a_client_that_renders_by_itself_is_told_how(tmp_path):
    async def scenario():
        async with stack(tmp_path, {"max_req_input_len": 60, "max_req_total_len": 100}, engine=False) as one:
            told = (await one.client.get("/tokenizer_info")).json()
            template = told.pop("chat_template")
            rendered = jinja2.Template(template).render(messages=HI, add_generation_prompt=True)
            ids = (await one.client.post("/tokenize", json={"prompt": rendered, "add_special_tokens": False})).json()
            chat = (await one.client.post("/tokenize", json={"messages": HI})).json()
            assert ids["tokens"] == chat["tokens"]
            assert told == {"bos_token": None, "eos_token": "<eos>", "pad_token": None, "model_max_length": 100}

    run(scenario())


def test_what_is_wrong_is_told_in_openai_s_envelope(tmp_path):
    faults = [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": HI}, "prompt"),
        ("/tokenize", {"messages": HI, "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages.0.content"),
        ("/tokenize", {"messages": HI, "add_generation_prompt": True, "continue_final_message": True}, None),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [257]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0"),
    ]

    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            for route, body, param in faults:
                answer = await one.client.post(route, json=body)
                assert answer.status_code == 400, answer.text
                assert answer.json()["error"]["param"] == (param or "add_generation_prompt")

    run(scenario())
