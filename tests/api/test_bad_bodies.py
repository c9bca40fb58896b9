"""A body that is wrong gets a 4xx that says what is wrong; nothing reaches the engine and the next request works."""

from __future__ import annotations

import asyncio
import json
import random

import httpx
import pytest

from api.frontend_harness import expected, run, stack
from lightllmd.api.dialects.native.bodies import GenerateBody
from lightllmd.api.dialects.openai.bodies import ChatBody, CompletionBody
from lightllmd.api.web import bodies
from lightllmd.errors import RequestError


def _p(**parameters) -> bytes:
    return json.dumps({"inputs": "x", "parameters": parameters}).encode()


NATIVE: list[tuple[str, bytes, str]] = [
    ("empty", b"", "empty"),
    ("blanks", b"  \n", "empty"),
    ("no JSON", b"hello", "not JSON"),
    ("cut off", b'{"inputs": "x"', "not JSON"),
    ("two values", b'{"inputs": "x"} {}', "not JSON"),
    ("array", b"[1]", "an array"),
    ("string", b'"x"', "a string"),
    ("number", b"7", "a number"),
    ("null", b"null", "null"),
    ("true", b"true", "a boolean"),
    ("invalid UTF-8", b'{"inputs": "\xff\xfe"}', "UTF-8"),
    ("invalid UTF-8 in a key", b'{"\xc3": 1}', ""),
    ("UTF-16", '{"inputs": "x"}'.encode("utf-16"), "not JSON"),
    ("lone surrogate", b'{"inputs": "a\\ud800b"}', ""),
    ("lone low surrogate", b'{"inputs": "a\\udc00b"}', ""),
    ("control character", b'{"inputs": "\x01"}', "not JSON"),
    ("deep arrays", b'{"inputs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nests deeper"),
    ("deep objects", b'{"a":' * 500 + b"1" + b"}" * 500, "nests deeper"),
    (
        "deep in a field that takes anything",
        b'{"inputs": "x", "multimodal_params": {"images": ' + b"[" * 70 + b"]" * 70 + b"}}",
        "nests",
    ),
    ("inputs missing", b"{}", "inputs: required"),
    ("inputs null", b'{"inputs": null}', "inputs"),
    ("inputs number", b'{"inputs": 5}', "inputs"),
    ("inputs array", b'{"inputs": ["x"]}', "inputs"),
    ("inputs empty", b'{"inputs": ""}', "no tokens"),
    ("parameters array", b'{"inputs": "x", "parameters": []}', "parameters"),
    ("parameters string", b'{"inputs": "x", "parameters": "top_p"}', "parameters"),
    ("stop ids by vLLM's name", _p(stop_token_ids=[1]), "unknown field; did you mean 'stop_sequences'"),
    ("most tokens by OpenAI's name", _p(max_tokens=5), "unknown field; did you mean 'max_new_tokens'"),
    ("unknown parameter that is null", _p(topp=None), "did you mean 'top_p'"),
    ("add_special_tokens as number", _p(add_special_tokens=1), "add_special_tokens"),
    ("unknown parameter", _p(topp=0.5), "did you mean 'top_p'"),
    ("unknown parameter, nothing near", _p(zzzzqq=1), "known are"),
    ("images", b'{"inputs": "x", "multimodal_params": {"images": [{"type": "url"}]}}', "images.0.data: required"),
    ("no schema", _p(guided_json=[]), "parameters.guided_json: should be a valid dictionary; got []"),
    ("integer as text", _p(max_new_tokens="5"), "got '5'"),
    ("integer as float", _p(max_new_tokens=2.5), "got 2.5"),
    ("integer as whole float", _p(max_new_tokens=2.0), "max_new_tokens"),
    ("integer as boolean", _p(max_new_tokens=True), "max_new_tokens"),
    ("boolean as integer", _p(do_sample=1), "do_sample"),
    ("boolean as text", _p(ignore_eos="true"), "ignore_eos"),
    ("float as text", _p(temperature="1"), "temperature"),
    ("zero tokens", _p(max_new_tokens=0), "greater than or equal to 1; got 0"),
    ("negative tokens", _p(max_new_tokens=-1), "greater than or equal to 1; got -1"),
    ("huge tokens", _p(max_new_tokens=10**30), "max_new_tokens"),
    ("absurdly huge tokens", b'{"inputs": "x", "parameters": {"max_new_tokens": ' + b"9" * 400 + b"}}", ""),
    ("integer of 5000 digits", b'{"inputs": "x", "parameters": {"seed": ' + b"9" * 5000 + b"}}", ""),
    ("float for a huge integer", b'{"inputs": "x", "parameters": {"temperature": ' + b"9" * 400 + b"}}", ""),
    ("more tokens than fit", _p(max_new_tokens=3072), "max_req_total_len = 3072"),
    ("NaN", b'{"inputs": "x", "parameters": {"temperature": NaN}}', "not JSON"),
    ("infinity", b'{"inputs": "x", "parameters": {"temperature": Infinity}}', "not JSON"),
    ("out of a float's range", b'{"inputs": "x", "parameters": {"temperature": 1e999}}', "not JSON"),
    ("negative temperature", _p(temperature=-0.1), "greater than or equal to 0; got -0.1"),
    ("top_p zero", _p(top_p=0), "greater than 0; got 0"),
    ("top_p above one", _p(top_p=1.5), "less than or equal to 1; got 1.5"),
    ("top_k zero", _p(top_k=0), "top_k should be -1 (off) or at least 1"),
    ("top_k below -1", _p(top_k=-2), "-1; got -2"),
    ("min_p below zero", _p(min_p=-0.1), "parameters.min_p: should be greater than or equal to 0; got -0.1"),
    ("min_p above one", _p(min_p=1.5), "parameters.min_p: should be less than or equal to 1; got 1.5"),
    ("negative presence", _p(presence_penalty=-1), "presence_penalty"),
    ("huge frequency", _p(frequency_penalty=1e300), "less than or equal to 1000"),
    ("repetition below one", _p(repetition_penalty=0.9), "repetition_penalty"),
    ("decay of one", _p(exponential_decay_length_penalty=[1]), "exponential_decay_length_penalty"),
    ("decay below one", _p(exponential_decay_length_penalty=[1, 0.5]), "exponential_decay_length_penalty"),
    ("decay from below zero", _p(exponential_decay_length_penalty=[-1, 1.5]), "exponential_decay_length_penalty"),
    ("best_of zero", _p(best_of=0), "best_of"),
    ("best_of nine", _p(best_of=9), "less than or equal to 8; got 9"),
    ("n unlike best_of", _p(n=2, best_of=3), "n should equal best_of"),
    ("min above max", _p(max_new_tokens=3, min_new_tokens=4), "at most max_new_tokens = 3; got 4"),
    ("min zero", _p(min_new_tokens=0), "min_new_tokens"),
    ("seed too small", _p(seed=-2), "seed"),
    ("seed too large", _p(seed=2**63), "seed"),
    ("stop number", _p(stop_sequences=5), "stop_sequences"),
    ("stop mixed", _p(stop_sequences=["a", [1]]), "stop_sequences"),
    ("stop empty text", _p(stop_sequences=[""]), "stop_sequences"),
    ("stop empty ids", _p(stop_sequences=[[]]), "stop_sequences"),
    ("stop id outside the vocabulary", _p(stop_sequences=[[257]]), "token id 257 is not within 0 .. 256"),
    ("stop id negative", _p(stop_sequences=[[-1]]), "stop_sequences"),
    ("too many stops", _p(stop_sequences=["s"] * 65), "stop_sequences"),
    ("stop too long", _p(stop_sequences=["s" * 1025]), "stop_sequences"),
    ("bias of no number", _p(logit_bias={"5": "1"}), "the bias of token 5 should be a number -100 … 100; got '1'"),
    ("bias of true", _p(logit_bias={"5": True}), "got True"),
    ("bias too large", _p(logit_bias={"5": 100.5}), "token 5 should be a number -100 … 100; got 100.5"),
    ("bias of no token", _p(logit_bias={"the": 1}), "logit_bias: keys should be token ids; got 'the'"),
    ("bias of a negative token", _p(logit_bias={"-1": 1}), "got '-1'"),
    ("bias outside the vocabulary", _p(logit_bias={"257": 1}), "logit_bias: token id 257 is not within 0 .. 256"),
    ("biases as an array", _p(logit_bias=[1]), "parameters.logit_bias"),
    ("allowed none", _p(allowed_token_ids=[]), "allowed_token_ids: List should have at least 1 item"),
    ("allowed outside", _p(allowed_token_ids=[1, 257]), "allowed_token_ids: token id 257 is not within 0 .. 256"),
    ("allowed text", _p(allowed_token_ids=["a"]), "allowed_token_ids.0"),
    ("bad words as a text", _p(bad_words="a"), "bad_words"),
    ("bad word of texts", _p(bad_words=["a", ["b"]]), "bad_words.1.0"),
    ("bad word empty", _p(bad_words=[""]), "bad_words.0"),
    ("bad word of no ids", _p(bad_words=[[]]), "bad_words.0"),
    ("bad word outside", _p(bad_words=[[1, 257]]), "bad_words: token id 257 is not within 0 .. 256"),
    ("bad word too long", _p(bad_words=["x" * 257]), "at most 256 characters"),
    ("too many bad words", _p(bad_words=["x"] * 257), "at most 256 items"),
    ("bad words and nothing else", _p(allowed_token_ids=[97, 98], bad_words=["a", [98]]), "no token is left of the 2"),
    ("all words bad", _p(bad_words=[[i] for i in range(256)], min_new_tokens=2), "min_new_tokens = 2 no eos"),
    ("eos alone, but not yet", _p(allowed_token_ids=[256], min_new_tokens=2), "allowed_token_ids: no token is left"),
    ("prompt_logprobs true", _p(prompt_logprobs=True), "parameters.prompt_logprobs"),
    (
        "prompt_logprobs negative",
        _p(prompt_logprobs=-1),
        "prompt_logprobs: should be greater than or equal to 0; got -1",
    ),
    ("prompt_logprobs many", _p(prompt_logprobs=21), "less than or equal to 20; got 21"),
    ("disable_prompt_cache as number", _p(disable_prompt_cache=1), "disable_prompt_cache"),
    (
        "length_penalty too large",
        _p(length_penalty=10.5),
        "length_penalty: should be less than or equal to 10; got 10.5",
    ),
    ("length_penalty without beams", _p(length_penalty=0.5, n=2), "beam_mode is off; got 0.5"),
    ("prompt too long", json.dumps({"inputs": "x" * 2049}).encode(), "2049 tokens, more than max_req_input_len = 2048"),
    ("prompt much too long", json.dumps({"inputs": "x" * 900_000}).encode(), "max_req_input_len = 2048"),
]


@pytest.mark.parametrize(("name", "body", "says"), NATIVE, ids=[case[0] for case in NATIVE])
def test_native_body_that_is_wrong_is_told_so(bad_stack, name, body, says):
    answer = bad_stack("/generate", body)
    assert 400 <= answer.status_code < 500, answer.text
    assert list(answer.json()) == ["message"]
    assert says in answer.json()["message"]


def _c(**fields) -> bytes:
    return json.dumps({"prompt": "x"} | fields).encode()


def _m(**fields) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "x"}]} | fields).encode()


def _tool(name: str, parameters: dict | None = None) -> dict:
    return {"type": "function", "function": {"name": name, "parameters": parameters or {"type": "object"}}}


OPENAI: list[tuple[str, str, bytes, str]] = [
    ("empty", "completions", b"", "empty"),
    ("no JSON", "chat/completions", b"{", "not JSON"),
    ("invalid UTF-8", "completions", b'{"prompt": "\xff"}', "UTF-8"),
    ("prompt missing", "completions", b"{}", "prompt: required"),
    ("prompt number", "completions", b'{"prompt": 5}', "prompt"),
    ("prompt empty list", "completions", b'{"prompt": []}', "prompt"),
    ("prompt of mixed kinds", "completions", b'{"prompt": ["a", 1]}', "prompt"),
    ("prompt id outside", "completions", b'{"prompt": [1, 257]}', "token id 257 is not within 0 .. 256"),
    ("prompt id negative", "completions", b'{"prompt": [-1]}', "prompt"),
    ("second prompt too long", "completions", json.dumps({"prompt": ["x", "y" * 3000]}).encode(), "prompt.1"),
    ("suffix", "completions", _c(suffix="x"), "suffix: a completion here goes on from its prompt"),
    ("tool without function", "chat/completions", _m(tools=[{"type": "function"}]), "tools.0.function: required"),
    ("custom tool", "chat/completions", _m(tools=[{"type": "custom"}]), "tools.0.type: should be 'function'"),
    ("tool's name", "chat/completions", _m(tools=[_tool("a b")]), "tools.0.function.name: String should match pattern"),
    ("tool's name too long", "chat/completions", _m(tools=[_tool("x" * 65)]), "{1,64}"),
    (
        "tools too many",
        "chat/completions",
        _m(tools=[_tool(f"f{n}") for n in range(129)]),
        "at most 128 items",
    ),
    (
        "tools with one name",
        "chat/completions",
        _m(tools=[_tool("f"), _tool("f")]),
        "tools.1.function.name: 'f' is the name of tools.0.function, too",
    ),
    (
        "tool's schema too large",
        "chat/completions",
        _m(tools=[_tool("f", {"x": "y" * 70_000})]),
        "tools.0.function.parameters: at most 65536 bytes of JSON; got 70008",
    ),
    ("tool_choice word", "chat/completions", _m(tools=[_tool("f")], tool_choice="always"), "tool_choice"),
    ("tool_choice alone", "chat/completions", _m(tool_choice="required"), "tool_choice: 'required' needs tools"),
    (
        "tool_choice of another",
        "chat/completions",
        _m(tools=[_tool("f")], tool_choice={"type": "function", "function": {"name": "g"}}),
        "tool_choice: 'g' is no tool of this request; known are f",
    ),
    (
        "allowed tools of another",
        "chat/completions",
        _m(
            tools=[_tool("f")],
            tool_choice={
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "g"}}]},
            },
        ),
        "tool_choice: 'g' is no tool of this request; known are f",
    ),
    (
        "functions and tools",
        "chat/completions",
        _m(tools=[_tool("f")], functions=[{"name": "g"}]),
        "functions: it is the older form of tools",
    ),
    (
        "function_call of another",
        "chat/completions",
        _m(functions=[{"name": "f"}], function_call={"name": "g"}),
        "function_call: 'g' is no tool",
    ),
    ("effort", "chat/completions", _m(reasoning_effort="huge"), "reasoning_effort: should be 'none', 'minimal'"),
    (
        "response_format",
        "chat/completions",
        _m(response_format={"type": "xml"}),
        "response_format.type: should be 'text'",
    ),
    ("guided", "chat/completions", _m(guided_regex=1), "guided_regex: should be a valid string; got 1"),
    (
        "image",
        "chat/completions",
        json.dumps(
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]}
        ).encode(),
        "this server takes no images: enable_multimodal is false",
    ),
    (
        "tool role",
        "chat/completions",
        json.dumps({"messages": [{"role": "tool", "content": "x"}]}).encode(),
        "messages.0: tool_call_id is required for the role 'tool'",
    ),
    (
        "result of no call",
        "chat/completions",
        json.dumps({"messages": [{"role": "tool", "content": "x", "tool_call_id": "c1"}]}).encode(),
        "messages.0.tool_call_id: no message before it made the call 'c1'",
    ),
    (
        "result of no function call",
        "chat/completions",
        json.dumps({"messages": [{"role": "function", "content": "x", "name": "f"}]}).encode(),
        "messages.0.name: no message before it made the call 'f'",
    ),
    (
        "a user's call",
        "chat/completions",
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": "x", "tool_calls": [{"id": "c", "function": {"name": "f"}}]},
                ]
            }
        ).encode(),
        "messages.0: tool_calls: only an assistant calls; the role is 'user'",
    ),
    ("no messages", "chat/completions", b'{"messages": []}', "messages"),
    ("message no object", "chat/completions", b'{"messages": ["x"]}', "messages.0"),
    ("role unknown", "chat/completions", b'{"messages": [{"role": "me", "content": "x"}]}', "messages.0.role"),
    ("content number", "chat/completions", b'{"messages": [{"role": "user", "content": 5}]}', "messages.0.content"),
    (
        "content by another name",
        "chat/completions",
        b'{"messages": [{"role": "user", "contents": "x"}]}',
        "messages.0: content is required for the role 'user'; it is missing or null",
    ),
    (
        "content null",
        "chat/completions",
        b'{"messages": [{"role": "system", "content": null}]}',
        "messages.0: content is required for the role 'system'; it is missing or null",
    ),
    (
        "a user's refusal",
        "chat/completions",
        b'{"messages": [{"role": "user", "content": null, "refusal": "no"}]}',
        "messages.0: content is required for the role 'user'; it is missing or null",
    ),
    (
        "a user's refusal part",
        "chat/completions",
        b'{"messages": [{"role": "user", "content": [{"type": "refusal", "refusal": "no"}]}]}',
        "messages.0: content: only an assistant refuses",
    ),
    ("messages null", "chat/completions", b'{"messages": null}', "messages"),
    ("prompt null", "completions", b'{"prompt": null}', "prompt"),
    ("n too large", "completions", _c(n=33), "less than or equal to 32; got 33"),
    ("n zero", "chat/completions", _m(n=0), "n"),
    ("best_of below n", "completions", _c(n=3, best_of=2), "best_of should be at least n = 3"),
    ("best_of in a stream", "completions", _c(best_of=2, stream=True), "best_of"),
    ("max_tokens zero", "chat/completions", _m(max_tokens=0), "max_tokens"),
    ("max_tokens too large", "chat/completions", _m(max_tokens=5000), "max_req_total_len"),
    ("temperature text", "chat/completions", _m(temperature="hot"), "temperature"),
    ("bias", "chat/completions", _m(logit_bias={"5": 101}), "logit_bias: the bias of token 5 should be a number -100"),
    ("bias outside", "completions", _c(logit_bias={"300": 1}), "logit_bias: token id 300 is not within 0 .. 256"),
    ("allowed outside", "chat/completions", _m(allowed_token_ids=[300]), "allowed_token_ids: token id 300"),
    ("bad words", "completions", _c(bad_words=[5]), "bad_words.0"),
    ("length_penalty without beams", "completions", _c(length_penalty=2), "length_penalty: beam search alone has one"),
    ("beams where there are none", "completions", _c(use_beam_search=True, n=2), "beam_mode off it should be false"),
    ("prompt_logprobs many", "chat/completions", _m(prompt_logprobs=21), "20; got 21"),
    ("prompt_logprobs of a stream", "completions", _c(prompt_logprobs=0, stream=True), "not for streams; got 0"),
    ("min_p above one", "completions", _c(min_p=1.01), "less than or equal to 1; got 1.01"),
    ("min_p below zero", "chat/completions", _m(min_p=-1), "greater than or equal to 0; got -1"),
    ("min_p text", "chat/completions", _m(min_p="0.1"), "min_p"),
    ("presence too large", "chat/completions", _m(presence_penalty=2.1), "presence_penalty"),
    ("top_logprobs alone", "chat/completions", _m(top_logprobs=2), "top_logprobs"),
    ("top_logprobs too many", "chat/completions", _m(logprobs=True, top_logprobs=21), "20; got 21"),
    ("logprobs as number", "chat/completions", _m(logprobs=1), "logprobs"),
    ("logprobs as boolean", "completions", _c(logprobs=True), "logprobs"),
    ("stream_options without stream", "chat/completions", _m(stream_options={"include_usage": True}), "stream"),
    ("stop number", "completions", _c(stop=3), "stop"),
    ("min above max", "completions", _c(max_tokens=2, min_tokens=3), "min_tokens"),
    ("prompt fills the context", "completions", json.dumps({"prompt": "x" * 2049}).encode(), "max_req_input_len"),
]


@pytest.mark.parametrize(("name", "route", "body", "says"), OPENAI, ids=[f"{case[1]}: {case[0]}" for case in OPENAI])
def test_openai_body_that_is_wrong_gets_openai_s_envelope(bad_stack, name, route, body, says):
    answer = bad_stack(f"/v1/{route}", body)
    assert 400 <= answer.status_code < 500, answer.text
    error = answer.json()["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    assert says in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.fixture(scope="module")
def bad_stack(tmp_path_factory):
    """Posts a body and sees that the engine got nothing and the next request works."""
    loop = asyncio.new_event_loop()
    manager = stack(tmp_path_factory.mktemp("bodies"))
    one = loop.run_until_complete(manager.__aenter__())

    async def post(path: str, body: bytes) -> httpx.Response:
        before = len(one.engine.submits)
        answer = await one.client.post(path, content=body)
        assert len(one.engine.submits) == before
        good = await one.generate("fine", max_new_tokens=2)
        assert good.json()["generated_text"] == [expected("fine", 2)]
        return answer

    yield lambda path, body: loop.run_until_complete(post(path, body))
    loop.run_until_complete(manager.__aexit__(None, None, None))
    loop.close()


def test_body_above_the_limit_is_413_however_it_is_sent(tmp_path):
    async def scenario():
        async with stack(tmp_path, max_body_bytes=1000) as one:
            big = json.dumps({"inputs": "x" * 5000}).encode()

            async def chunks():
                for start in range(0, len(big), 100):
                    yield big[start : start + 100]

            for path in ("/generate", "/v1/completions", "/tokens"):
                for content in (big, chunks()):
                    answer = await one.client.post(path, content=content)
                    assert answer.status_code == 413
                    assert "max_body_bytes = 1000" in answer.text
            assert (await one.generate("x", max_new_tokens=1)).status_code == 200

    run(scenario())


def test_client_that_leaves_in_the_middle_of_its_body_harms_nothing(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            reader, writer = await asyncio.open_connection("127.0.0.1", one.port)
            writer.write(b'POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"inputs"')
            await writer.drain()
            writer.close()
            reader, writer = await asyncio.open_connection("127.0.0.1", one.port)
            writer.write(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
            assert (await reader.read()).startswith(b"HTTP/1.1 400")
            writer.close()
            assert (await one.generate("x", max_new_tokens=1)).status_code == 200

    run(scenario())


def test_what_does_not_exist_is_404_and_a_wrong_method_405(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            answer = await one.client.get("/nothing")
            assert (answer.status_code, list(answer.json())) == (404, ["message"])
            answer = await one.client.get("/v1/nothing")
            assert answer.status_code == 404
            assert answer.json()["error"]["type"] == "not_found_error"
            answer = await one.client.get("/generate")
            assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
            assert (await one.client.get("/v1/completions")).json()["error"]["message"]

    run(scenario())


def test_random_bytes_and_values_are_never_a_fault_of_ours():
    """Mutations of good bodies either pass or raise RequestError, nothing else."""
    chance = random.Random(0)
    good = [
        (
            GenerateBody,
            _p(
                temperature=0.5,
                logit_bias={"5": 1},
                bad_words=["x"],
                stop_sequences=["a"],
                exponential_decay_length_penalty=[1, 1.5],
            ),
        ),
        (
            CompletionBody,
            _c(
                n=2,
                logit_bias={"5": 1},
                allowed_token_ids=[5],
                bad_words=[[1, 2]],
                prompt_logprobs=1,
                stop=["x"],
                logprobs=2,
            ),
        ),
        (ChatBody, _m(stream=True, stream_options={"include_usage": True}, logprobs=True, top_logprobs=3)),
    ]
    values = [
        b"null",
        b"[]",
        b"{}",
        b"-1",
        b"1e400",
        b'"\\ud800"',
        b"true",
        b"1.5",
        b"[[1]]",
        b'{"a":{}}',
        b"9" * 30,
        b'""',
    ]
    for _ in range(6000):
        model, body = chance.choice(good)
        raw = bytearray(body)
        for _ in range(chance.randrange(1, 4)):
            at = chance.randrange(len(raw))
            if chance.random() < 0.5:
                raw[at] = chance.randrange(256)
            else:
                colon = bytes(raw).find(b":", at)
                comma = bytes(raw).find(b",", colon)
                if 0 < colon < comma:
                    raw[colon + 1 : comma] = chance.choice(values)
        try:
            bodies.decode(bytes(raw), model)
        except RequestError:
            pass


def test_body_of_millions_of_faults_is_refused_with_few_words(bad_stack):
    floats = b'{"prompt": [' + b"1.5," * 400_000 + b"1.5]}"
    fields = b'{"prompt": "x", ' + b",".join(b'"a%d": 1' % number for number in range(200_000)) + b"}"
    nested = b'{"prompt": [' + b'[1, "x"],' * 200_000 + b"[1]]}"
    for body in (floats, fields, nested):
        answer = bad_stack("/v1/completions", body)
        assert answer.status_code == 400
        assert len(answer.content) < 1000


def test_more_sequences_than_can_ever_wait_are_refused(tmp_path):
    async def scenario():
        async with stack(tmp_path, {"running_max_req_size": 4}, max_queue=6) as one:
            answer = await one.client.post("/v1/completions", json={"prompt": ["x"] * 11, "max_tokens": 1})
            assert answer.status_code == 400
            assert "max_queue = 10" in answer.json()["error"]["message"]
            answer = await one.client.post("/v1/completions", json={"prompt": ["x"] * 10, "max_tokens": 1})
            assert answer.status_code == 200
            answer = await one.generate("x", best_of=5)
            assert "running_max_req_size = 4" in answer.json()["message"]

    run(scenario())


def test_long_prompts_and_all_templates_run_in_other_processes(tmp_path):
    async def scenario():
        async with stack(tmp_path, {"long_truncation_mode": "head"}) as one:
            tokenizer, here = one.worker.revisions.current.tokenizer, []
            encode, render = tokenizer._encode, tokenizer.render_chat
            tokenizer._encode = lambda *arguments: here.append("encode") or encode(*arguments)
            tokenizer.render_chat = lambda *arguments: here.append("render") or render(*arguments)
            for length in (10, 2000, 20_000, 1_000_000):
                assert (await one.generate("x" * length, max_new_tokens=1)).json()["prompt_tokens"] == min(length, 2048)
                chat = {"messages": [{"role": "user", "content": "x" * length}], "max_tokens": 1}
                assert (await one.client.post("/v1/chat/completions", json=chat)).status_code == 200
                assert one.engine.submits[-1].prompt_ids[-11:] == [*b"assistant: "]
                tokens = await one.client.post("/tokens", json={"text": "x" * length})
                assert tokens.json() == {"ntokens": length}
            assert here == ["encode"] * 2  # the short text of /generate and of /tokens

    run(scenario())


def test_a_body_of_many_containers_is_refused_by_their_number(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            body = b'{"inputs":[' + b"[]," * 100_000 + b"[]]}"
            answer = await one.client.post("/generate", content=body)
            assert answer.status_code == 400
            assert answer.json()["message"] == "the body has more than 65536 objects and arrays"

    run(scenario())


@pytest.mark.parametrize(("mode", "kept"), [("head", b"cdefg"), ("center", b"abefg")])
def test_long_prompts_are_cut_where_that_is_configured(tmp_path, mode, kept):
    async def scenario():
        async with stack(tmp_path, {"long_truncation_mode": mode, "max_req_input_len": 5}) as one:
            answer = await one.generate("abcdefg", max_new_tokens=1)
            assert answer.json()["prompt_tokens"] == 5
            assert bytes(one.engine.submits[-1].prompt_ids) == kept

    run(scenario())
