"""instructor: objects by tools, by JSON schemas and by plain JSON, whole and in parts; OpenAI's and Anthropic's way."""

from __future__ import annotations

import sys

import instructor
from anthropic import Anthropic
from openai import OpenAI
from pydantic import BaseModel, Field

URL = sys.argv[1]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=12)
    inhabitants: int = Field(ge=1, le=99999999)


openai = OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
asked = {"model": "demo", "messages": QUESTION, "response_model": City, "temperature": 0, "max_retries": 0}
for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(openai, mode=mode)
    more = {} if mode is instructor.Mode.JSON_SCHEMA else {"parallel_tool_calls": False}
    city = client.chat.completions.create(**asked, **more, max_tokens=80)
    assert isinstance(city, City), mode
client = instructor.from_openai(openai, mode=instructor.Mode.JSON_SCHEMA)
*parts, whole = client.chat.completions.create_partial(**asked, max_tokens=80)
assert whole.name
assert parts
client = instructor.from_openai(openai, mode=instructor.Mode.RESPONSES_TOOLS)
given = {"model": "demo", "input": QUESTION, "response_model": City, "temperature": 0, "max_output_tokens": 80}
given["parallel_tool_calls"] = False
assert isinstance(client.responses.create(**given), City)

anthropic = instructor.from_anthropic(Anthropic(base_url=URL, api_key="none", max_retries=0))
told = {name: value for name, value in asked.items() if name != "temperature"}  # the newest client has none
city = anthropic.messages.create(**told, max_tokens=80)
assert isinstance(city, City)
print("instructor works")
