"""A hundred tools that a real model is required to call: each call is one of them, and valid."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor

import httpx
import jsonschema
import pytest

from dialogue_outputs import random_tools
from harness import Daemon
from long_run import LONG

AT_ONCE = 8


@pytest.mark.slow
@pytest.mark.skipif(not LONG, reason="LIGHTLLMD_LONG_TESTS=1 runs it")
@pytest.mark.parametrize("part", range(4))
def test_each_of_a_hundred_required_tools_is_called_with_valid_arguments(demo: Daemon, part: int) -> None:
    """At temperature 1, one tool at a time by name, and five of which one is chosen. Some calls may not end in time."""
    tools = random_tools(100, random.Random(11))[part::4]
    rng = random.Random(part)

    def call(number: int) -> bool:
        tool = tools[number]
        named = number % 2 == 0
        shown = [tool] if named else [tool, *rng.sample([one for one in tools if one is not tool], 4)]
        body = {
            "messages": [{"role": "user", "content": "Please help me with this: call a function."}],
            "tools": [one.shown() for one in shown],
            "tool_choice": {"type": "function", "function": {"name": tool.name}} if named else "required",
            "parallel_tool_calls": False,
            "temperature": 1,
            "seed": number,
            "max_tokens": 220,
        }
        answer = httpx.post(f"{demo.url}/v1/chat/completions", json=body, timeout=280)
        assert answer.status_code == 200, answer.text
        (choice,) = answer.json()["choices"]
        if choice["finish_reason"] == "length":
            return False
        assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
        (called,) = choice["message"]["tool_calls"]
        schemas = {one.name: one.schema for one in shown}
        jsonschema.validate(json.loads(called["function"]["arguments"]), schemas[called["function"]["name"]])
        return True

    with ThreadPoolExecutor(AT_ONCE) as pool:
        ended = list(pool.map(call, range(len(tools))))
    print(f"{sum(ended)} of {len(ended)} calls ended")
    assert sum(ended) >= 0.8 * len(ended)
