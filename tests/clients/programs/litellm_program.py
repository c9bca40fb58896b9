"""litellm: chat completions, responses, Anthropic's messages, embeddings."""

from __future__ import annotations

import asyncio
import json
import sys

import litellm

URL = sys.argv[1]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
OPENAI = {"model": "openai/demo", "api_base": f"{URL}/v1", "api_key": "none", "num_retries": 0}
ANTHROPIC = {"model": "anthropic/demo", "api_base": URL, "api_key": "none", "num_retries": 0}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}},
    "required": ["name"],
    "additionalProperties": False,
}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "weather", "parameters": PARAMETERS}}

for provider in (OPENAI, ANTHROPIC):
    asked = {**provider, "messages": QUESTION, "temperature": 0, "max_tokens": 60}
    answer = litellm.completion(**asked).choices[0].message.content
    assert "Paris" in answer, answer
    chunks = litellm.completion(**asked, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == answer
    choice = {"type": "function", "function": {"name": "get_weather"}}
    one_call = {"tools": [TOOL], "tool_choice": choice, "parallel_tool_calls": False}
    called = litellm.completion(**asked, **one_call).choices[0].message
    (call,) = called.tool_calls
    assert list(json.loads(call.function.arguments)) == ["city"]
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    again = litellm.completion(**asked | {"messages": [*QUESTION, called, result]}, tools=[TOOL])
    assert again.choices[0].message.content or again.choices[0].message.tool_calls
form = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA, "strict": True}}
structured = litellm.completion(**OPENAI, messages=QUESTION, temperature=0, max_tokens=60, response_format=form)
assert list(json.loads(structured.choices[0].message.content)) == ["name"]

asked = {**OPENAI, "input": "What is the capital of France?", "temperature": 0, "max_output_tokens": 60}
response = litellm.responses(**asked)
text = response.output[0].content[0].text
assert "Paris" in text
events = [*litellm.responses(**asked, stream=True)]
assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == text
function = {"type": "function", "name": "get_weather", "parameters": PARAMETERS}
made = litellm.responses(**asked, tools=[function], tool_choice={"type": "function", "name": "get_weather"})
assert made.output[0].name == "get_weather"
following = litellm.responses(**asked | {"input": "And of Spain?"}, previous_response_id=response.id)
assert following.usage.input_tokens > response.usage.input_tokens


async def messages() -> None:
    """Anthropic's own form; a stream of it needs what litellm's proxy needs."""
    told = {**ANTHROPIC, "messages": QUESTION, "max_tokens": 20, "temperature": 0}
    message = await litellm.anthropic.messages.acreate(**told)
    assert "Paris" in message["content"][0]["text"]


asyncio.run(messages())
vectors = litellm.embedding(**OPENAI, input=["Paris", "a tree"]).data
assert len(vectors[0]["embedding"]) == len(vectors[1]["embedding"]) > 1
print("litellm works")
