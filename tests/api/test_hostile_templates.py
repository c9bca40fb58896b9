"""A chat template may loop, hoard or compute as it likes: its requests are refused, and every other one goes on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from api.frontend_harness import expected, run, stack
from lightllmd.api.helpers import pool as helpers
from lightllmd.text import ChatTemplate

HOSTILE = {
    "a loop without output": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "one expression": "{{ 9 ** (9 ** 9) }}",
    "a long string": "{{ 'x' * 9999999999 }}",
    "recursion": "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_template_is_refused_and_no_other_request_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setitem(helpers.CPU_SECONDS, helpers.LIGHT, 0.3)

    async def scenario() -> None:
        async with stack(tmp_path) as one:
            revision = one.worker.revisions.current
            monkeypatch.setattr(revision.tokenizer, "chat_template", ChatTemplate(source))
            revision.texts.processes._end()  # the next zygote has this template
            chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
            refused = asyncio.create_task(one.client.post("/v1/chat/completions", json=chat))
            turns = 0
            while not refused.done():
                assert (await one.generate("p", max_new_tokens=2)).json()["generated_text"] == [expected("p", 2)]
                turns += 1
            assert turns
            answer = refused.result()
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["message"].startswith(("messages: ", "reading the request takes more than "))

    run(scenario())
