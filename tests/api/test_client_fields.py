"""What real client programs send beside the documented fields passes, and is told of where it changes nothing."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from itertools import accumulate

import pytest

from api.frontend_harness import expected, frames, run, stack
from lightllmd.api.dialects.openai.bodies import ChatBody
from lightllmd.api.web import bodies
from lightllmd.api.web.ignored_fields import IgnoredFields, listed
from lightllmd.api.web.tenants import KEY
from lightllmd.config.keys import ApiKey
from lightllmd.errors import InvalidRequest
from lightllmd.requests.faults import naming
from lightllmd.requests.fields import MAX_IGNORED

HI = [{"role": "user", "content": "hi"}]
ROUTES = {
    "/generate": {"inputs": "x", "parameters": {"max_new_tokens": 2}},
    "/generate_stream": {"inputs": "x", "parameters": {"max_new_tokens": 2}},
    "/": {"inputs": "x", "parameters": {"max_new_tokens": 2}},
    "/tokens": {"text": "x"},
    "/v1/completions": {"prompt": "x", "max_tokens": 2},
    "/v1/chat/completions": {"messages": HI, "max_tokens": 2},
}
OPENAI = [route for route in ROUTES if route.startswith("/v1/")]


def test_unknown_fields_are_ignored_and_named(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            for route, body in ROUTES.items():
                given = body | {"zeta": 1, "alpha": {"deep": [1]}, "evil\r\nname": None}
                answer = await one.client.post(route, json=given)
                assert answer.status_code == 200, answer.text
                assert answer.headers["x-lightllmd-ignored"] == "alpha, evil??name, zeta"
                plain = await one.client.post(route, json=body)
                assert "x-lightllmd-ignored" not in plain.headers

    run(scenario())


def test_unknown_fields_are_refused_where_that_is_configured(tmp_path):
    async def scenario():
        async with stack(tmp_path, unknown_fields="refuse") as one:
            for route, body in ROUTES.items():
                answer = await one.client.post(route, json=body | {"zeta": 1})
                assert answer.status_code == 400
                assert "zeta: unknown field" in answer.text
                assert (await one.client.post(route, json=body)).status_code == 200

    run(scenario())


def test_answers_that_stream_or_fail_or_wait_name_ignored_fields_too(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            body = {"prompt": "x", "max_tokens": 2, "zeta": 1}
            streamed = await one.client.post("/v1/completions", json=body | {"stream": True})
            refused = await one.client.post("/v1/completions", json=body | {"max_tokens": 10**6})
            assert (streamed.status_code, refused.status_code) == (200, 400)
            assert {a.headers["x-lightllmd-ignored"] for a in (streamed, refused)} == {"zeta"}
            gate = one.worker.revisions.gate
            gate.hold()
            request = one.client.build_request("POST", "/v1/completions", json=body | {"stream": True})
            waiting = asyncio.create_task(one.client.send(request))
            while not gate.waiting:
                await asyncio.sleep(0.001)
            gate.release()
            assert (await waiting).headers["x-lightllmd-ignored"] == "zeta"

    run(scenario())


def test_ignored_fields_are_logged_once_for_each_client(caplog):
    told = IgnoredFields()
    with caplog.at_level(logging.INFO, logger="lightllmd"):
        for address, key in [("10.0.0.1", None), ("10.0.0.2", None), ("10.0.0.1", ApiKey(name="alice"))]:
            known = {} if key is None else {KEY: key}
            for names in ({"a"}, {"a", "b"}, {"b"}):
                told.note({"path": "/x", "client": (address, 1), "headers": []} | known, names)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 6
    assert lines[0].startswith("client 10.0.0.1: ")
    assert lines[0].endswith(" are ignored: a")
    assert lines[1].endswith(" are ignored: b")
    assert lines[5].startswith("client 10.0.0.1 (key alice): ")


def test_however_many_clients_and_names_their_memory_is_bounded():
    messages = [{"role": "user", "content": "x"} | {f"{n}-{m}": 1 for m in range(100)} for n in range(100)]
    ignored: set[str] = set()
    bodies.decode(json.dumps({"messages": messages}).encode(), ChatBody, ignored)
    assert len(ignored) == MAX_IGNORED
    told = IgnoredFields()
    for number in range(2000):
        names = {f"{'n' * 1000}{index}" for index in range(100)}
        scope = {"path": "/x", "client": (str(number), 1), "headers": []}
        told.note(scope, names)
    assert len(told._logged) <= 4096
    assert len(listed(names)) < 1200
    assert listed({f"field{index}" for index in range(20)}).endswith(", and 4 more")


def test_null_says_what_leaving_a_field_out_says(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            api = (await one.client.get("/openapi.json")).json()
            schemas = api["components"]["schemas"]
            parameters = dict.fromkeys(schemas["Parameters"]["properties"]) | {"max_new_tokens": 2}
            for route, body in ROUTES.items():
                content = api["paths"][route]["post"]["requestBody"]["content"]["application/json"]
                schema = schemas[content["schema"]["$ref"].rsplit("/", 1)[-1]]
                bodies = [dict.fromkeys(schema["properties"]) | body]
                if "inputs" in body:
                    bodies += [body | {"parameters": parameters}, body | {"parameters": None}]
                for given in bodies:
                    answer = await one.client.post(route, json=given)
                    assert answer.status_code == 200, answer.text
                    assert "x-lightllmd-ignored" not in answer.headers

    run(scenario())


def test_what_openai_documents_and_changes_nothing_here_is_plainly_accepted(tmp_path):
    idle = {
        "metadata": {"a": "b"},
        "modalities": ["text"],
        "parallel_tool_calls": False,
        "prediction": {"type": "content", "content": "x"},
        "prompt_cache_key": "k",
        "prompt_cache_retention": "24h",
        "reasoning_effort": "low",
        "safety_identifier": "s",
        "service_tier": "auto",
        "store": True,
        "user": "u",
        "verbosity": "low",
        "web_search_options": None,
    }

    async def scenario():
        async with stack(tmp_path, unknown_fields="refuse") as one:
            for route in OPENAI:
                for fields in (idle, dict.fromkeys(idle)):
                    answer = await one.client.post(route, json=ROUTES[route] | fields)
                    assert answer.status_code == 200, answer.text
                    assert "x-lightllmd-ignored" not in answer.headers

    run(scenario())


def text_of(choice):
    """Of a streamed choice of either route; a chat's first chunk has none yet."""
    return choice["text"] if "text" in choice else choice["delta"].get("content") or ""


@pytest.mark.parametrize("route", OPENAI)
def test_continuous_usage_counts_up_to_the_last_chunk(tmp_path, route):
    async def scenario():
        async with stack(tmp_path) as one:
            options = {"include_usage": True, "continuous_usage_stats": True}
            body = ROUTES[route] | {"stream": True, "stream_options": options, "max_tokens": 6, "n": 2}
            chunks = frames((await one.client.post(route, json=body)).text)
            usages = [chunk["usage"] for chunk in chunks]
            prompt = usages[-1]["prompt_tokens"]
            assert prompt == (1 if route == "/v1/completions" else 20)
            assert all(usage["prompt_tokens"] == prompt for usage in usages)
            assert all(usage["total_tokens"] == prompt + usage["completion_tokens"] for usage in usages)
            characters = [sum(len(text_of(choice)) for choice in chunk["choices"]) for chunk in chunks]
            counts = [usage["completion_tokens"] for usage in usages]
            assert counts == list(accumulate(characters))  # a token of the fake engine is a character
            assert counts[-1] == 12
            options["include_usage"] = False
            plain = frames((await one.client.post(route, json=body)).text)
            assert not any("usage" in chunk for chunk in plain)

    run(scenario())


def test_a_completion_has_16_tokens_by_default_or_what_fits(tmp_path):
    async def scenario():
        async with stack(tmp_path, {"max_req_input_len": 20, "max_req_total_len": 30}) as one:
            for prompt, extra, count in (("x", {}, 16), ("x" * 20, {}, 10), ("x", {"min_tokens": 20}, 20)):
                answer = await one.client.post("/v1/completions", json={"prompt": prompt, "max_tokens": None} | extra)
                assert answer.json()["usage"]["completion_tokens"] == count

    run(scenario())


def test_an_assistant_without_content_is_empty(tmp_path):
    empty = [
        {"content": None},
        {},
        {"content": None, "refusal": "I won't"},
        {"content": []},
        {"content": [{"type": "refusal", "refusal": "I won't"}]},
        {"content": "", "tool_calls": []},
    ]

    async def scenario():
        async with stack(tmp_path) as one:
            for fields in empty:
                messages = [*HI, {"role": "assistant", **fields}, {"role": "user", "content": "so?"}]
                body = {"messages": messages, "max_tokens": 1}
                answer = await one.client.post("/v1/chat/completions", json=body)
                assert answer.status_code == 200, answer.text
                prompt = bytes(one.engine.submits[-1].prompt_ids)
                assert prompt == b"user: hi\nassistant: \nuser: so?\nassistant: "

    run(scenario())


def test_a_top_k_of_0_is_off_where_vllms_clients_ask(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            for route in OPENAI:
                answer = await one.client.post(route, json=ROUTES[route] | {"top_k": 0})
                assert answer.status_code == 200, answer.text
                assert one.engine.submits[-1].params.top_k == -1

    run(scenario())


def test_a_fault_between_fields_names_one_of_them(tmp_path):
    faults = [
        ("/v1/completions", {"stream_options": {"include_usage": True}}, "stream_options"),
        ("/v1/completions", {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ("/v1/completions", {"min_tokens": 3}, "min_tokens"),
        ("/v1/completions", {"best_of": 1, "n": 2}, "best_of"),
        ("/v1/completions", {"best_of": 2, "stream": True}, "best_of"),
        ("/v1/completions", {"use_beam_search": True, "n": 2}, "use_beam_search"),
        ("/v1/completions", {"length_penalty": 2.0}, "length_penalty"),
        ("/v1/completions", {"stop": ["x"] * 60, "stop_token_ids": [*range(60)]}, "stop"),
        ("/v1/completions", {"prompt": ""}, "prompt"),
        ("/v1/chat/completions", {"top_logprobs": 1}, "top_logprobs"),
        ("/v1/chat/completions", {"messages": [*HI, {"role": "user"}]}, "messages.1.content"),
    ]

    async def scenario():
        async with stack(tmp_path) as one:
            for route, fields, param in faults:
                answer = await one.client.post(route, json=ROUTES[route] | fields)
                assert answer.status_code == 400
                assert answer.json()["error"]["param"] == param

    run(scenario())


def test_a_refusal_inside_names_the_field_that_is_answered():
    """Such as the chat template's, which doesn't know of fields."""
    for given, told in (({}, "messages"), ({"param": "stop"}, "stop")):
        with pytest.raises(InvalidRequest) as refused, naming("messages"):
            raise InvalidRequest("the template refuses them", **given)
        assert refused.value.parameters["param"] == told


def test_native_fields_of_the_original_are_taken(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            tokenizer, given = one.worker.revisions.current.tokenizer, []
            encode = tokenizer._encode
            tokenizer._encode = lambda text, special: given.append(special) or encode(text, special)
            for special in (True, False, None):
                fields = {"add_special_tokens": special, "group_request_id": 7, "suggested_dp_index": -1}
                answer = await one.generate("x", max_new_tokens=2, **fields)
                assert answer.json()["generated_text"] == [expected("x", 2)]
            assert given == [True, False, True]

    run(scenario())


def test_what_does_not_fit_is_told_in_the_words_that_clients_know(tmp_path):
    known = (
        r"This model's maximum context length is (\d+) tokens\. However, you(?: requested|r prompt resulted in) (\d+)"
    )
    cases = [
        ("/generate", {"inputs": "x" * 61}, None, 60, 61),
        ("/generate", {"inputs": "x", "parameters": {"max_new_tokens": 100}}, None, 100, 101),
        ("/v1/completions", {"prompt": ["x", "y" * 61]}, "prompt.1", 60, 61),
        ("/v1/completions", {"prompt": "x", "max_tokens": 100}, "max_tokens", 100, 101),
        ("/v1/chat/completions", {"messages": HI, "max_tokens": 90}, "max_tokens", 100, 110),
        ("/v1/chat/completions", {"messages": HI, "max_completion_tokens": 90}, "max_completion_tokens", 100, 110),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 60}]}, "messages", 60, 78),
    ]

    async def scenario():
        async with stack(tmp_path, {"max_req_input_len": 60, "max_req_total_len": 100}) as one:
            for route, body, param, most, asked in cases:
                answer = await one.client.post(route, json=body)
                assert answer.status_code == 400, answer.text
                error = answer.json().get("error") or answer.json()
                match = re.match(known, error["message"])
                assert match, error["message"]
                assert "(context_length_exceeded)" in error["message"]  # langchain looks for the code in the text
                assert (int(match[1]), int(match[2])) == (most, asked)
                if param:
                    assert (error["param"], error["code"]) == (param, "context_length_exceeded")

    run(scenario())


def test_a_chat_is_rendered_as_the_client_says(tmp_path):
    last = [*HI, {"role": "assistant", "content": "so "}]
    cases = [
        ({"messages": last}, "user: hi\nassistant: so \nassistant: "),
        ({"messages": last, "add_generation_prompt": False}, "user: hi\nassistant: so \n"),
        ({"messages": last, "continue_final_message": True}, "user: hi\nassistant: so "),
        ({"messages": HI, "chat_template_kwargs": {"enable_thinking": False}}, "user: hi\nassistant: "),
        ({"messages": [{"role": "developer", "content": "x"}, *HI]}, "system: x\nuser: hi\nassistant: "),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}],
                    }
                ]
            },
            "user: hi\nassistant: ",
        ),
    ]

    async def scenario():
        async with stack(tmp_path, unknown_fields="refuse") as one:
            for body, prompt in cases:
                answer = await one.client.post("/v1/chat/completions", json=body | {"max_tokens": 1})
                assert answer.status_code == 200, answer.text
                assert bytes(one.engine.submits[-1].prompt_ids).decode() == prompt

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_stop_token_ids_end_an_answer_and_are_shown_if_asked(tmp_path, stream):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            (await one.up(token=lambda submit, branch, position: b"hello"[position])).free_run = True
            for extra, text in (
                ({"stop_token_ids": [111, 101]}, "h"),
                ({"stop_token_ids": [101], "include_stop_str_in_output": True}, "he"),
                ({"stop": ["lo"], "include_stop_str_in_output": True}, "hello"),
                ({"stop": ["lo"], "stop_token_ids": [101]}, "h"),
                ({"stop_token_ids": []}, "hello"),
            ):
                body = {"prompt": "x", "max_tokens": 5, "stream": stream} | extra
                answer = await one.client.post("/v1/completions", json=body)
                choices = [f["choices"][0] for f in frames(answer.text)] if stream else answer.json()["choices"]
                assert "".join(choice["text"] for choice in choices) == text
                reason = "length" if "stop_token_ids" in extra and not extra["stop_token_ids"] else "stop"
                assert choices[-1]["finish_reason"] == reason
            refused = await one.client.post("/v1/completions", json={"prompt": "x", "stop_token_ids": [257]})
            assert refused.json()["error"]["param"] == "stop_token_ids"

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_token_ids_of_prompt_and_answer_are_told_on_request(tmp_path, stream):
    async def scenario():
        async with stack(tmp_path) as one:
            for route in OPENAI:
                body = ROUTES[route] | {"stream": stream, "return_token_ids": True, "max_tokens": 5, "temperature": 0}
                answer = await one.client.post(route, json=body)
                whole = frames(answer.text) if stream else [answer.json()]
                choices = [choice for chunk in whole for choice in chunk["choices"]]
                ids = [token for choice in choices for token in choice.get("token_ids", ())]
                prompt = one.engine.submits[-1].prompt_ids
                assert bytes(ids).decode() == expected(bytes(prompt).decode(), 5)
                told = [part["prompt_token_ids"] for part in [*whole, *choices] if "prompt_token_ids" in part]
                assert told == [prompt]
                plain = await one.client.post(route, json=body | {"return_token_ids": False})
                assert "token_ids" not in plain.text

    run(scenario())


def test_log_probabilities_may_name_tokens_by_their_ids(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            names = {"return_tokens_as_token_ids": True, "max_tokens": 1, "temperature": 0}
            completion = await one.client.post("/v1/completions", json={"prompt": "x", "logprobs": 1} | names)
            token = f"token_id:{ord(expected('x', 1))}"
            assert completion.json()["choices"][0]["logprobs"]["tokens"] == [token]
            chat = await one.client.post("/v1/chat/completions", json={"messages": HI, "logprobs": True} | names)
            assert chat.json()["choices"][0]["logprobs"]["content"][0]["token"].startswith("token_id:")

    run(scenario())


def test_of_a_long_prompt_the_last_tokens_are_used_on_request(tmp_path):
    async def scenario():
        async with stack(tmp_path, {"max_req_input_len": 20, "max_req_total_len": 30}) as one:
            for prompt, most, kept in (
                ("abcdef", 3, b"def"),
                ("abc", 3, b"abc"),
                ("x" * 50 + "yz", -1, b"x" * 18 + b"yz"),
            ):
                for given in (prompt, list(prompt.encode())):
                    body = {"prompt": given, "max_tokens": 1, "truncate_prompt_tokens": most, "echo": True}
                    answer = await one.client.post("/v1/completions", json=body)
                    assert answer.status_code == 200, answer.text
                    assert bytes(one.engine.submits[-1].prompt_ids) == kept
                    assert answer.json()["usage"]["prompt_tokens"] == len(kept)
                    assert answer.json()["choices"][0]["text"].startswith(kept.decode())
            chat = {"messages": HI, "max_tokens": 1, "truncate_prompt_tokens": 4}
            assert (await one.client.post("/v1/chat/completions", json=chat)).status_code == 200
            assert bytes(one.engine.submits[-1].prompt_ids) == b"nt: "

    run(scenario())
