"""Random JSON schemas through the daemon: whatever the demo model ends by itself, at temperature 1, is valid."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import jsonschema
import pytest

from harness import Daemon
from long_run import LONG
from random_schemas import Schemas

PARTS, EACH = 6, 50  # 300 schemas
TOKENS = 150
SEVERAL = 32  # at a time


@pytest.mark.skipif(not LONG, reason="LIGHTLLMD_LONG_TESTS=1 runs it; against a matcher: test_random_schemas.py")
@pytest.mark.parametrize("part", range(PARTS))
def test_what_the_demo_model_ends_is_valid_under_a_random_schema(demo: Daemon, part: int) -> None:
    drawn = Schemas(200 + part)
    schemas = [drawn.next() for _ in range(EACH)]

    async def ask(client: httpx.AsyncClient, free: asyncio.Semaphore, seed: int, schema: dict[str, Any]) -> bool:
        body = {
            "messages": [{"role": "user", "content": "Give me a short example as JSON."}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "it", "strict": True, "schema": schema}},
            "temperature": 1,
            "seed": seed,
            "max_tokens": TOKENS,
        }
        async with free:
            answer = await client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, (schema, answer.text)
        [choice] = answer.json()["choices"]
        if choice["finish_reason"] != "stop":
            return False
        jsonschema.Draft202012Validator(schema).validate(json.loads(choice["message"]["content"]))
        return True

    async def all_of_them() -> list[bool]:
        free = asyncio.Semaphore(SEVERAL)
        async with httpx.AsyncClient(base_url=demo.url, timeout=280) as client:
            return await asyncio.gather(*(ask(client, free, at, schema) for at, schema in enumerate(schemas)))

    ended = asyncio.run(all_of_them())
    print(f"{sum(ended)} of {len(ended)} ended by themselves; all of these are valid")
    assert sum(ended) > EACH // 2
