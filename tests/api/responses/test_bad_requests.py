"""A wrong body is told what is wrong with it; no body is a fault of the server's."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.frontend_harness import stack
from api.responses.speech import events

USER = {"role": "user", "content": "x"}
TOOL = {"type": "function", "name": "look"}
RESULT = {"type": "function_call_output", "call_id": "call_1", "output": "x"}


def tool(**more: Any) -> dict[str, Any]:
    return {"input": "x", "tools": [TOOL | more]}


def items(*those: Any) -> dict[str, Any]:
    return {"input": list(those)}


FAULTS = [
    # body, what the message says, param
    ({}, "input: required", "input"),
    ({"input": 3}, "input: should be", "input"),
    ({"input": ""} | tool(type="web_search"), "tools.0.type: 'web_search' is not available here", "tools.0.type"),
    (tool(type="custom"), "'custom' is not available here", "tools.0.type"),
    (tool(name="a b"), "tools.0.name", "tools.0.name"),
    (tool(name=""), "tools.0.name", "tools.0.name"),
    ({"input": "x", "tools": [TOOL, TOOL]}, "'look' is the name of tools.0, too", "tools.1.name"),
    ({"input": "x", "tool_choice": "required"}, "needs tools", "tool_choice"),
    ({"input": "x", "tool_choice": "any"}, "tool_choice", "tool_choice"),
    (tool() | {"tool_choice": {"type": "function", "name": "nap"}}, "'nap' is no tool", "tool_choice"),
    (tool() | {"tool_choice": {"type": "file_search"}}, "'file_search' is not available", "tool_choice.type"),
    ({"input": "x", "background": True}, "background: not available here; got True", "background"),
    ({"input": "x", "conversation": "conv_1"}, "conversation: not available here", "conversation"),
    ({"input": "x", "prompt": {"id": "pmpt_1"}}, "prompt: not available here", "prompt"),
    ({"input": "x", "context_management": [{"type": "compaction"}]}, "context_management", "context_management"),
    ({"input": "x", "max_output_tokens": 0}, "greater than or equal to 1; got 0", "max_output_tokens"),
    ({"input": "x", "max_output_tokens": 5000}, "max_req_total_len = 3072 (max_output_tokens)", "max_output_tokens"),
    ({"input": "x" * 3000}, "max_req_input_len = 2048", "input"),
    ({"input": "x", "min_tokens": 3, "max_output_tokens": 2}, "min_tokens should be at most", "min_tokens"),
    ({"input": "x", "temperature": -1}, "temperature", "temperature"),
    ({"input": "x", "top_logprobs": 21}, "20; got 21", "top_logprobs"),
    ({"input": "x", "include": ["everything"]}, "include.0", "include.0"),
    ({"input": "x", "metadata": {"a": 1}}, "metadata", "metadata"),
    ({"input": "x", "metadata": {"a" * 65: "b"}}, "metadata", "metadata"),
    ({"input": "x", "truncation": "yes"}, "truncation", "truncation"),
    ({"input": "x", "prompt_logprobs": 1}, "prompt_logprobs", "prompt_logprobs"),
    ({"input": "x", "guided_regex": "a", "guided_choice": ["a"]}, "guided_regex says already", "guided_choice"),
    (
        {"input": "x", "guided_regex": "a", "text": {"format": {"type": "json_object"}}},
        "text.format says already",
        "guided_regex",
    ),
    ({"input": "x", "text": {"format": {"type": "xml"}}}, "text.format", "text.format"),
    (
        {"input": "x", "text": {"format": {"type": "json_schema", "name": "n"}}},
        "schema: required",
        "text.format.schema",
    ),
    ({"input": "x", "text": {"format": {"type": "json_schema", "schema": {}}}}, "name: required", "text.format.name"),
    ({"input": "x", "reasoning": {"effort": "huge"}}, "reasoning.effort", "reasoning.effort"),
    ({"input": "x", "previous_response_id": "resp_x"}, "'resp_x' not found", "previous_response_id"),
    (items(), "it has no items", "input"),
    (items("x"), "input.0", "input.0"),
    (items({"role": "nobody", "content": "x"}), "input.0.role", "input.0.role"),
    (items({"role": "user"}), "input.0.content: required", "input.0.content"),
    (items({"type": "web_search_call", "id": "x"}), "'web_search_call' is not available here", "input.0.type"),
    (items(USER, USER | {"content": [{"type": "input_image"}]}), "required", "input.1.content.0.image_url"),
    (items(USER, USER | {"content": [{"type": "input_file"}]}), "'input_file'", "input.1.content.0.type"),
    (items(RESULT), "No tool call found for function call output with call_id call_1", "input"),
    (items({"type": "item_reference", "id": "msg_1"}), "'msg_1' not found", "input.0.id"),
    (items({"type": "function_call", "call_id": "c"}), "input.0.name: required", "input.0.name"),
    (items(*[USER] * 4097), "4096", "input"),
]


@pytest.fixture(scope="module")
def post(tmp_path_factory):
    """Posts a body; the engine ends each answer at once."""
    loop = asyncio.new_event_loop()
    manager = stack(tmp_path_factory.mktemp("bodies"))
    one = loop.run_until_complete(manager.__aenter__())
    yield lambda body, path="/v1/responses": loop.run_until_complete(one.client.post(path, json=body))
    loop.run_until_complete(manager.__aexit__(None, None, None))
    loop.close()


@pytest.mark.parametrize(("body", "says", "param"), FAULTS, ids=[f"{number}" for number in range(len(FAULTS))])
def test_a_wrong_body_gets_openai_s_envelope_whole_or_as_a_stream(post, body, says, param):
    for more in ({}, {"stream": True}):
        answer = post(body | more)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert sorted(error) == ["code", "message", "param", "type"]
        assert says in error["message"]
        assert (error["type"], error["param"]) == ("invalid_request_error", param)


def test_fields_that_mean_nothing_here_are_passed_over_and_unknown_ones_named(post):
    body = {
        "input": [USER | {"prompt_cache_breakpoint": {"mode": "explicit"}}],
        "max_output_tokens": 1,
        "stream_options": {"include_obfuscation": True},
        "service_tier": "flex",
        "prompt_cache_retention": "24h",
        "background": False,
        "conversation": None,
        "include": ["reasoning.encrypted_content"],
        "max_tool_calls": 3,
        "max_tokens": 5,
    }
    answer = post(body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-lightllmd-ignored"] == "max_tokens, prompt_cache_breakpoint"
    assert answer.json()["usage"]["output_tokens"] == 1


def test_other_methods_and_paths_are_refused_in_the_same_form(post):
    for path, status in (
        ("/v1/responses/resp_1", 405),
        ("/v1/responses/resp_1/cancel", 404),
        ("/v1/responses/a/b", 404),
    ):
        answer = post({}, path)
        assert (answer.status_code, list(answer.json())) == (status, ["error"])


TEXT = st.text(max_size=6)
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.floats(allow_nan=False, allow_infinity=False),
    TEXT,
    st.just([]),
    st.just({}),
)
PART = st.fixed_dictionaries(
    {"type": st.sampled_from(["input_text", "output_text", "refusal", "input_image", "text"])},
    optional={"text": TEXT | ODD, "refusal": TEXT, "annotations": ODD},
)
ITEM = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(
            ["message", "function_call", "function_call_output", "reasoning", "item_reference", "mcp_call"]
        ),
        "role": st.sampled_from(["user", "assistant", "system", "developer", "tool"]) | ODD,
        "content": TEXT | st.lists(PART, max_size=2) | ODD,
        "output": TEXT | st.lists(PART, max_size=2) | ODD,
        "call_id": st.sampled_from(["a", "b"]) | ODD,
        "name": TEXT,
        "arguments": st.sampled_from(["{}", '{"a": 1}', "[", ""]) | ODD,
        "summary": st.lists(st.fixed_dictionaries({"type": st.just("summary_text"), "text": TEXT}), max_size=2) | ODD,
        "id": TEXT | ODD,
        "status": st.sampled_from(["completed", "incomplete"]) | ODD,
    },
)
BODY = st.fixed_dictionaries(
    {"input": TEXT | st.lists(ITEM, max_size=4) | ODD, "max_output_tokens": st.integers(1, 3)},
    optional={
        "instructions": TEXT | ODD,
        "stream": st.booleans() | ODD,
        "tools": st.lists(
            st.fixed_dictionaries({"type": st.just("function") | ODD, "name": TEXT}, optional={"parameters": ODD}),
            max_size=2,
        )
        | ODD,
        "tool_choice": st.sampled_from(["none", "auto", "required"]) | ODD,
        "text": st.fixed_dictionaries(
            {"format": st.fixed_dictionaries({"type": st.sampled_from(["text", "json_object"])})}
        )
        | ODD,
        "reasoning": st.fixed_dictionaries({"effort": st.sampled_from(["low", "none"]) | ODD}) | ODD,
        "previous_response_id": TEXT | ODD,
        "truncation": st.sampled_from(["auto", "disabled"]) | ODD,
        "include": st.lists(st.just("message.output_text.logprobs"), max_size=1) | ODD,
        "top_logprobs": st.integers(0, 3) | ODD,
        "metadata": st.dictionaries(TEXT, TEXT, max_size=2) | ODD,
        "store": st.booleans() | ODD,
        "temperature": ODD,
        "stop": TEXT | ODD,
        "seed": ODD,
    },
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(BODY)
def test_random_bodies_are_answered_or_refused(post, body):
    answer = post(body)
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 200 and body.get("stream"):
        assert events(answer.text)[-1]["type"] in ("response.completed", "response.incomplete")
    elif answer.status_code == 200:
        assert answer.json()["object"] == "response"
    else:
        assert answer.json()["error"]["message"]
