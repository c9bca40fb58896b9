"""With `use_tgi_api` each route answers byte for byte in the shapes of Text Generation Inference."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx

from api.frontend_harness import EOS, expected, frames, make_plan, run, stack
from lightllmd import __version__

TGI = {"use_tgi_api": True}
TEXT = expected("hello", 3)


def answered(tmp_path, path: str, body: Any, *, params: dict[str, Any] | None = None, **http: Any) -> httpx.Response:
    """By a front end whose engine generates freely."""

    async def scenario():
        async with stack(tmp_path, TGI | (params or {}), **http) as one:
            if isinstance(body, bytes):
                return await one.client.post(path, content=body)
            return await one.client.post(path, json=body)

    return run(scenario())


def token(text: str, logprob: float = -0.5) -> dict[str, Any]:
    return {"id": ord(text), "text": text, "logprob": logprob, "special": False}


def tops(text: str) -> list[dict[str, Any]]:
    return [token(text), token("A", -1.5), token("B", -2.5)]


def told(text: str, **more: Any) -> dict[str, Any]:
    """Of one sequence, what its details tell."""
    return {
        "finish_reason": "length",
        "generated_tokens": len(text),
        "seed": None,
        "prefill": [],
        "tokens": [token(one) for one in text],
    } | more


PREFILL = [{"id": ord("h"), "text": "h", "logprob": None}]
PREFILL += [{"id": ord(one), "text": one, "logprob": -at / 8} for at, one in enumerate("hello") if at]

NULLABLE = (
    *("best_of", "temperature", "repetition_penalty", "frequency_penalty", "top_k", "top_p", "typical_p", "do_sample"),
    *("return_full_text", "stop", "truncate", "watermark", "details", "decoder_input_details", "seed", "top_n_tokens"),
    *("grammar", "adapter_id", "return_details", "stop_sequences"),
)

# Parameters, and the answer of /generate.
WHOLE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {"generated_text": TEXT}),
    "details": ({"details": True}, {"generated_text": TEXT, "details": told(TEXT)}),
    "the original's name": ({"return_details": True}, {"generated_text": TEXT, "details": told(TEXT)}),
    "prompt": ({"decoder_input_details": True}, {"generated_text": TEXT, "details": told(TEXT, prefill=PREFILL)}),
    "full text": ({"return_full_text": True}, {"generated_text": "hello" + TEXT}),
    "top tokens": (
        {"details": True, "top_n_tokens": 2},
        {"generated_text": TEXT, "details": told(TEXT, top_tokens=[tops(one)[:2] for one in TEXT])},
    ),
    "truncated": (
        {"truncate": 2, "details": True, "decoder_input_details": True},
        {
            "generated_text": (text := expected("lo", 3)),
            "details": told(text, prefill=[PREFILL[3] | {"logprob": None}, PREFILL[4] | {"logprob": -1 / 8}]),
        },
    ),
    "stop": (
        {"stop": ["?", TEXT[1]], "details": True},
        {"generated_text": TEXT[:2], "details": told(TEXT[:2], finish_reason="stop_sequence")},
    ),
    "the original's stop": ({"stop_sequences": TEXT[1], "stop": [TEXT[0]]}, {"generated_text": TEXT[:2]}),
    "seed": (
        {"do_sample": True, "seed": 9, "details": True},
        {"generated_text": (text := expected("hello", 3, seed=9)), "details": told(text, seed=9)},
    ),
    "seed of 64 bits": (
        {"temperature": 0.5, "seed": 2**64 - 1, "details": True},
        {"generated_text": (text := expected("hello", 3, seed=2**63 - 1)), "details": told(text, seed=2**64 - 1)},
    ),
    "greedy seed": ({"seed": 9, "details": True}, {"generated_text": TEXT, "details": told(TEXT)}),
    "nulls": (
        dict.fromkeys(NULLABLE),
        {"generated_text": TEXT},
    ),
    "nothing asked": (
        {"watermark": False, "stop": [], "top_n_tokens": 0, "grammar": None, "decoder_input_details": False},
        {"generated_text": TEXT},
    ),
}


def test_an_answer_in_one_piece_is_an_object_and_a_list_of_one_at_the_root(tmp_path):
    async def scenario():
        async with stack(tmp_path, TGI) as one:
            for case, (parameters, body) in WHOLE.items():
                asked = {"inputs": "hello", "parameters": {"max_new_tokens": 3} | parameters}
                answer = await one.client.post("/generate", json=asked)
                assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json"), case
                assert answer.json() == body, case
                at_root = await one.client.post("/", json=asked | {"stream": False})
                assert at_root.json() == [body], case

    run(scenario())


def test_the_bytes_of_an_answer_and_of_a_stream(tmp_path):
    """The order of the fields, too."""
    (first, second), third = TEXT[:2], TEXT[2]
    body = {"inputs": "hello", "parameters": {"max_new_tokens": 2, "details": True}}

    def shown(one: str) -> str:
        return f'{{"id":{ord(one)},"text":{json.dumps(one)},"logprob":-0.5,"special":false}}'

    assert answered(tmp_path, "/generate", body).text == (
        f'{{"generated_text":{json.dumps(TEXT[:2])},"details":{{"finish_reason":"length","generated_tokens":2,'
        f'"seed":null,"prefill":[],"tokens":[{shown(first)},{shown(second)}]}}}}'
    )
    body["parameters"] = {"max_new_tokens": 3, "details": True, "top_n_tokens": 1}
    events = [
        f'data:{{"index":{index},"token":{shown(one)},"top_tokens":[{shown(one)}],"generated_text":null,"details":null}}'
        for index, one in enumerate(TEXT[:2], 1)
    ] + [
        f'data:{{"index":3,"token":{shown(third)},"top_tokens":[{shown(third)}],"generated_text":{json.dumps(TEXT)},'
        '"details":{"finish_reason":"length","generated_tokens":3,"seed":null,"input_length":5}}'
    ]
    streamed = answered(tmp_path, "/generate_stream", body)
    assert streamed.text == "".join(f"{event}\n\n" for event in events)
    assert streamed.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answered(tmp_path, "/", body | {"stream": True}).text == streamed.text


def test_the_likeliest_of_several_is_the_answer_and_the_others_are_told(tmp_path):
    async def scenario():
        async with stack(tmp_path, TGI) as one:
            one.engine.logprob = lambda branch, position: (-0.75, -0.25, -0.5)[branch]
            asked = {"inputs": "hello", "parameters": {"best_of": 3, "do_sample": True, "max_new_tokens": 4}}
            assert len((await one.client.post("/generate", json=asked)).json()["generated_text"]) == 4
            asked["parameters"] |= {"details": True, "top_n_tokens": 1, "return_full_text": True}
            answer = (await one.client.post("/generate", json=asked)).json()
            seed = one.engine.submits[-1].params.seed
            details = answer["details"]
            texts = [expected("hello", 4, seed=seed, branch=branch) for branch in range(3)]
            others = details.pop("best_of_sequences")
            assert answer["generated_text"] == f"hello{texts[1]}"
            assert [other["generated_text"] for other in others] == [f"hello{texts[0]}", f"hello{texts[2]}"]
            assert details["tokens"] == [token(one, -0.25) for one in texts[1]]
            assert others[1]["tokens"] == [token(one, -0.5) for one in texts[2]]
            assert [one[0]["text"] for one in others[0]["top_tokens"]] == list(texts[0])
            # What one sequence by itself gives again has its seed.
            assert [details["seed"], *(other["seed"] for other in others)] == [None, seed, None]

    run(scenario())


def test_beams_stay_in_their_order_and_have_no_seed(tmp_path):
    async def scenario():
        async with stack(tmp_path, TGI | {"beam_mode": True}) as one:
            one.engine.logprob = lambda branch, position: (-0.5, -0.25)[branch]
            asked = {"inputs": "hello", "parameters": {"best_of": 2, "do_sample": True, "max_new_tokens": 3}}
            asked["parameters"]["details"] = True
            details = (await one.client.post("/generate", json=asked)).json()["details"]
            assert [one["logprob"] for one in details["tokens"]] == [-0.5] * 3
            assert (details["seed"], details["best_of_sequences"][0]["seed"]) == (None, None)

    run(scenario())


def test_an_eos_is_shown_as_a_special_token_and_not_in_the_text(tmp_path):
    async def scenario():
        async with stack(tmp_path, TGI, engine=False) as one:
            engine = await one.up(token=lambda submit, branch, position: (72, 105, EOS)[position])
            engine.free_run = True
            asked = {"inputs": "hello", "parameters": {"details": True}}
            answer = (await one.client.post("/generate", json=asked)).json()
            assert answer["generated_text"] == "Hi"
            assert answer["details"]["finish_reason"] == "eos_token"
            assert answer["details"]["generated_tokens"] == 3
            eos = answer["details"]["tokens"][2]
            assert (eos["id"], eos["special"]) == (EOS, True)
            assert eos["text"] != ""
            shown = "".join(one["text"] for one in answer["details"]["tokens"] if not one["special"])
            assert shown == answer["generated_text"]
            streamed = (await one.client.post("/generate_stream", json=asked)).text.split("\n\n")
            last = json.loads(streamed[2][5:])
            assert last["token"] == eos
            assert last["generated_text"] == "Hi"
            ignoring = {"inputs": "hello", "parameters": {"ignore_eos": True, "max_new_tokens": 3, "details": True}}
            assert (await one.client.post("/generate", json=ignoring)).json()["details"]["finish_reason"] == "length"

    run(scenario())


def test_a_hundred_tokens_are_the_default_or_what_fits(tmp_path):
    asked = {"inputs": "hello"}
    assert len(answered(tmp_path, "/generate", asked).json()["generated_text"]) == 100
    few = {"max_req_total_len": 30, "max_req_input_len": 20}
    assert len(answered(tmp_path, "/generate", asked, params=few).json()["generated_text"]) == 25
    asked["parameters"] = {"min_new_tokens": 120}
    assert len(answered(tmp_path, "/generate", asked).json()["generated_text"]) == 120


SAMPLING = {
    "temperature": 0.75,
    "repetition_penalty": 0.5,
    "frequency_penalty": -0.25,
    "presence_penalty": 0.125,
    "top_k": 7,
    "top_p": 0.5,
    "min_p": 0.0625,
    "typical_p": 0.25,
    "seed": 3,
}


def test_every_sampling_parameter_reaches_the_engine_and_the_one_after_it(tmp_path):
    async def scenario():
        async with stack(tmp_path, TGI, engine=False) as one:
            engine = await one.up()
            body = {"inputs": "x", "parameters": SAMPLING | {"max_new_tokens": 3, "logit_bias": {"65": 2}}}
            answer = asyncio.create_task(one.client.post("/generate", json=body))
            for _ in range(2):
                await engine.submitted(1)
                params = engine.submits[0].params
                assert {name: getattr(params, name) for name in SAMPLING} == SAMPLING
                assert params.do_sample
                assert params.input_penalty, "TGI's penalties count the prompt, too"
                assert params.logit_bias == {65: 2.0}
                await one.kill()
                engine = await one.up()
            engine.free_run = True
            assert (await answer).json() == {"generated_text": expected("x", 3, seed=3)}

    run(scenario())


DRAWN: list[tuple[dict[str, Any], bool]] = [
    ({}, False),
    ({"temperature": 1.0}, False),
    ({"repetition_penalty": 1.5, "frequency_penalty": 1.0}, False),
    ({"do_sample": True}, True),
    ({"temperature": 0.5}, True),
    ({"top_k": 3}, True),
    ({"top_p": 0.5}, True),
    ({"typical_p": 0.5}, True),
]


def test_what_shapes_a_draw_asks_for_one(tmp_path):
    async def scenario():
        async with stack(tmp_path, TGI) as one:
            for parameters, drawn in DRAWN:
                asked = {"inputs": "x", "parameters": {"max_new_tokens": 1} | parameters}
                await one.client.post("/generate", json=asked)
                assert one.engine.submits[-1].params.do_sample is drawn, parameters

    run(scenario())


BOUND = "Input validation error: parameters."
# Path, parameters, the error.
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("/generate", {"best_of": 0}, f"{BOUND}best_of: should be greater than or equal to 1; got 0"),
    ("/generate", {"best_of": 9}, f"{BOUND}best_of: should be less than or equal to 8; got 9"),
    ("/generate", {"temperature": 0}, f"{BOUND}temperature: should be greater than 0; got 0"),
    ("/generate", {"repetition_penalty": 0}, f"{BOUND}repetition_penalty: should be greater than 0; got 0"),
    ("/generate", {"frequency_penalty": 3}, f"{BOUND}frequency_penalty: should be less than or equal to 2; got 3"),
    ("/generate", {"top_k": 0}, f"{BOUND}top_k: should be greater than 0; got 0"),
    ("/generate", {"top_p": 1.0}, f"{BOUND}top_p: should be less than 1; got 1.0"),
    ("/generate", {"typical_p": 1.0}, f"{BOUND}typical_p: should be less than 1; got 1.0"),
    ("/generate", {"max_new_tokens": 0}, f"{BOUND}max_new_tokens: should be greater than or equal to 1; got 0"),
    ("/generate", {"truncate": 0}, f"{BOUND}truncate: should be greater than 0; got 0"),
    ("/generate", {"seed": -1}, f"{BOUND}seed: should be greater than or equal to 0; got -1"),
    ("/generate", {"top_n_tokens": 21}, f"{BOUND}top_n_tokens: should be less than or equal to 20; got 21"),
    ("/generate", {"do_sample": "yes"}, f"{BOUND}do_sample: should be a valid boolean; got 'yes'"),
    ("/generate", {"watermark": True}, f"{BOUND}watermark: the output is not watermarked here; got True"),
    (
        "/generate",
        {"grammar": {"type": "regex", "value": "("}},
        f"{BOUND}grammar.value: a ) is missing, at character 1; got '('",
    ),
    ("/generate", {"adapter_id": "lora"}, f"{BOUND}adapter_id: not available yet; got 'lora'"),
    (
        "/generate",
        {"prompt_logprobs": 1},
        f"{BOUND}prompt_logprobs: decoder_input_details asks for the log-probabilities of the prompt; got 1",
    ),
    (
        "/generate",
        {"best_of": 2},
        "Input validation error: parameters: best_of should be 1 without sampling (do_sample is false); got 2",
    ),
    (
        "/generate",
        {"best_of": 2, "do_sample": True, "seed": 1},
        "Input validation error: parameters: seed should be absent with best_of = 2; got 1",
    ),
    (
        "/generate_stream",
        {"best_of": 2, "do_sample": True},
        f"{BOUND}best_of: a stream has one sequence, so should be 1; got 2",
    ),
    (
        "/generate_stream",
        {"decoder_input_details": True},
        f"{BOUND}decoder_input_details: a stream doesn't show the prompt's tokens, so should be false; got true",
    ),
    (
        "/generate",
        {"max_new_tokens": 3000, "min_new_tokens": 3001},
        "Input validation error: parameters: min_new_tokens should be at most max_new_tokens = 3000; got 3001",
    ),
    (
        "/generate",
        {"max_new_tokens": 10_000},
        "Input validation error: This model's maximum context length is 3072 tokens. However, you requested 10005 "
        "tokens (5 in the prompt, 10000 in the completion), more than max_req_total_len = 3072 "
        "(parameters.max_new_tokens). Please reduce the length of the prompt or completion (context_length_exceeded).",
    ),
]


def test_what_can_t_be_is_refused_with_422_field_value_and_bound(tmp_path):
    async def scenario():
        async with stack(tmp_path, TGI) as one:
            for path, parameters, error in REFUSED:
                answer = await one.client.post(path, json={"inputs": "hello", "parameters": parameters})
                got = (answer.status_code, answer.json())
                assert got == (422, {"error": error, "error_type": "validation"}), parameters
            assert not one.engine.submits

    run(scenario())


# Method, path, body, then status and answer.
ERRORS: list[tuple[str, str, Any, int, dict[str, str]]] = [
    ("POST", "/generate", {}, 422, {"error": "Input validation error: inputs: required", "error_type": "validation"}),
    (
        "POST",
        "/",
        {"inputs": ""},
        422,
        {
            "error": "Input validation error: inputs: String should have at least 1 character; got ''",
            "error_type": "validation",
        },
    ),
    (
        "POST",
        "/generate",
        b"{",
        422,
        {
            "error": "Input validation error: the body is not JSON: Input data was truncated",
            "error_type": "validation",
        },
    ),
    ("GET", "/generate", None, 405, {"error": "/generate does not take GET; see /docs", "error_type": "validation"}),
    ("POST", "/nowhere", {}, 404, {"error": "there is no /nowhere; see /docs", "error_type": "not_found"}),
    (
        "POST",
        "/generate",
        b" " * 5000,
        413,
        {"error": "the body is larger than max_body_bytes = 4096", "error_type": "validation"},
    ),
]


def test_errors_before_the_engine_have_tgi_s_body(tmp_path):
    async def scenario():
        async with stack(tmp_path, TGI, max_body_bytes=4096) as one:
            for method, path, body, status, error in ERRORS:
                content = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
                answer = await one.client.request(method, path, content=content)
                assert (answer.status_code, answer.json()) == (status, error)
            assert (await one.client.post("/tokens", json={})).json() == {"message": "text: required"}
            openai = await one.client.post("/v1/completions", json={})
            assert (openai.status_code, openai.json()["error"]["type"]) == (400, "invalid_request_error")

    run(scenario())


def test_what_is_no_request_is_told_in_tgi_s_shape_too(tmp_path):
    async def scenario():
        async with stack(tmp_path, TGI) as one:
            reader, writer = await asyncio.open_connection("127.0.0.1", one.port)
            writer.write(b"nonsense\r\n\r\n")
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            writer.close()
            assert head.startswith(b"HTTP/1.1 400 ")
            assert json.loads(body).keys() == {"error", "error_type"}

    run(scenario())


def test_a_large_body_is_read_in_a_helper_and_cut_where_that_is_asked(tmp_path):
    async def scenario():
        async with stack(tmp_path, TGI) as one:
            body = {"inputs": "hello " * 20_000 + "hello", "parameters": {"max_new_tokens": 3}}
            refused = await one.client.post("/generate", json=body)
            assert (refused.status_code, refused.json()["error_type"]) == (422, "validation")
            body["parameters"] |= {"truncate": 5, "return_full_text": True, "watermark": None, "novelty": 1}
            answer = await one.client.post("/generate", json=body)
            assert answer.json() == {"generated_text": body["inputs"] + TEXT}
            assert answer.headers["x-lightllmd-ignored"] == "novelty"

    run(scenario())


def test_a_key_that_is_missing_is_told_in_tgi_s_shape(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("one\n")
    answer = answered(tmp_path, "/generate", {"inputs": "x"}, api_keys_file=str(keys))
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert answer.json() == {
        "error": "a valid API key is required: Authorization: Bearer KEY (x-api-key and api-key do, too)",
        "error_type": "unauthorized",
    }


def test_health_is_told_in_tgi_s_shape_under_all_its_names(tmp_path):
    async def scenario():
        async with stack(tmp_path, TGI) as one:
            for path in ("/health", "/", "/ping"):
                assert (await one.client.get(path)).status_code == 200
            await one.kill()
            for path in ("/health", "/healthz", "/", "/ping"):
                answer = await one.client.get(path)
                assert answer.status_code == 503
                assert answer.json() == {"error": "unhealthy: the engine died", "error_type": "healthcheck"}
                assert int(answer.headers["retry-after"]) >= 1

    run(scenario())


def test_info_tells_the_model_and_its_bounds(tmp_path):
    async def scenario():
        async with stack(tmp_path, TGI | {"max_req_input_len": 100, "max_req_total_len": 200}) as one:
            assert (await one.client.get("/info")).json() == {
                "model_id": "fake-model",
                "model_sha": None,
                "model_dtype": "torch.float32",
                "model_device_type": "cpu",
                "model_pipeline_tag": "text-generation",
                "max_concurrent_requests": 2024,
                "max_best_of": 8,
                "max_stop_sequences": 64,
                "max_top_n_tokens": 20,
                "max_input_length": 100,
                "max_input_tokens": 100,
                "max_total_tokens": 200,
                "waiting_served_ratio": 0.0,
                "max_batch_total_tokens": 6000,
                "max_waiting_tokens": 10,
                "max_batch_size": 1000,
                "max_client_batch_size": 2048,
                "validation_workers": 1,
                "router": "lightllmd",
                "version": __version__,
                "sha": None,
                "docker_label": None,
            }

    run(scenario())


def test_headers_tell_what_an_answer_took(tmp_path):
    body = {"inputs": "hällo", "parameters": {"max_new_tokens": 3}}
    headers = answered(tmp_path, "/generate", body).headers
    told = {name: headers[f"x-{name}"] for name in ("compute-type", "compute-characters", "prompt-tokens")}
    assert told == {"compute-type": "cpu", "compute-characters": "5", "prompt-tokens": "6"}
    assert headers["x-generated-tokens"] == "3"
    assert 0 < float(headers["x-compute-time"]) < 60
    for name in ("total-time", "validation-time", "inference-time", "time-per-token"):
        assert 0 <= int(headers[f"x-{name}"]) < 60_000
    assert int(headers["x-total-time"]) >= int(headers["x-inference-time"])
    streamed = answered(tmp_path, "/generate_stream", body).headers
    assert (streamed["x-compute-type"], streamed["x-compute-characters"]) == ("cpu", "5")


def test_unknown_parameters_are_passed_over_and_named(tmp_path):
    body = {"inputs": "hello", "options": {"wait_for_model": True}, "parameters": {"max_new_tokens": 3, "novelty": 1}}
    answer = answered(tmp_path, "/", body)
    assert answer.json() == [{"generated_text": TEXT}]
    assert answer.headers["x-lightllmd-ignored"] == "novelty, options"
    refused = answered(tmp_path, "/", body, unknown_fields="refuse")
    assert (refused.status_code, refused.json()["error_type"]) == (422, "validation")
    assert "novelty" in refused.json()["error"]


def test_prompt_log_probabilities_of_the_server_s_mode_are_details(tmp_path):
    params = {"return_all_prompt_logprobs": True}
    body = {"inputs": "hello", "parameters": {"max_new_tokens": 3}}
    assert answered(tmp_path, "/generate", body, params=params).json() == {"generated_text": TEXT}
    body["parameters"]["details"] = True
    answer = answered(tmp_path, "/generate", body, params=params).json()
    assert answer["details"]["prefill"] == PREFILL


def test_openai_s_answers_have_a_fingerprint_and_streams_of_the_model_tgi_are_tgi_s(tmp_path):
    """Whom `text-generation` asks for by the name of tgi must have a role and tool calls in every delta, and stumbles
    over [DONE]."""
    asked = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "temperature": 0}
    text = expected("user: x\nassistant: ", 2)
    params, names = {"use_tgi_api": True}, ["small"]

    async def scenario():
        async with stack(tmp_path, plan=make_plan(params, "small", names)) as one:
            chat = "/v1/chat/completions"
            whole = (await one.client.post(chat, json=asked)).json()
            assert whole["system_fingerprint"] == f"{__version__}-lightllmd"
            usual = (await one.client.post(chat, json=asked | {"stream": True})).text
            assert usual.endswith("data: [DONE]\n\n")
            told = frames(usual)
            assert [one["system_fingerprint"] for one in told] == [whole["system_fingerprint"]] * len(told)
            assert told[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
            assert told[-1]["choices"][0]["delta"] == {}
            theirs = await one.client.post(chat, json=asked | {"stream": True, "model": "tgi"})
            assert theirs.status_code == 200, "whichever model is served"
            deltas = [one["choices"][0]["delta"] for one in frames(theirs.text)]
            assert all(delta["role"] == "assistant" and delta["tool_calls"] is None for delta in deltas)
            assert "".join(delta["content"] for delta in deltas) == text
            assert "[DONE]" not in theirs.text
            assert (await one.client.post(chat, json=asked | {"model": "other"})).status_code == 404

    run(scenario())

    async def without():
        async with stack(tmp_path) as one:
            assert "system_fingerprint" not in (await one.client.post("/v1/chat/completions", json=asked)).json()
            streamed = await one.client.post("/v1/chat/completions", json=asked | {"stream": True, "model": "tgi"})
            assert "[DONE]" in streamed.text

    run(without())


def test_without_the_switch_the_routes_are_lightllm_s(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            assert "generated_text" in (await one.generate("x", max_new_tokens=1)).json()
            assert (await one.client.get("/info")).status_code == 404
            assert (await one.client.post("/generate", json={})).json() == {"message": "inputs: required"}

    run(scenario())
