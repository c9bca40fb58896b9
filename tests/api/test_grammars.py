"""Grammars of clients are compiled in helper processes, and refused there by name."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from api.frontend_harness import make_plan
from lightllmd.api.helpers.grammars import CheckedGrammars
from lightllmd.errors import InvalidRequest
from lightllmd.ipc.messages import Grammar
from lightllmd.requests.limits import RequestLimits
from lightllmd.text import ByteTokenizer


def checking(work: Callable[[CheckedGrammars], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        grammars = CheckedGrammars(ByteTokenizer(), RequestLimits.of(make_plan()))
        try:
            await work(grammars)
        finally:
            grammars.stop()

    asyncio.run(run())


def test_good_ones_pass_and_bad_ones_are_refused_by_field_value_and_reason() -> None:
    async def work(grammars: CheckedGrammars) -> None:
        good = Grammar("json_object", "")
        await asyncio.gather(*(grammars.check(good, "response_format") for _ in range(3)))
        for grammar, says in (
            (Grammar("regex", "(a"), r"^guided: a \) is missing, at character 2; got '\(a'"),
            (
                Grammar("ebnf", "root ::= nothing"),
                '^guided: EBNF parser error at line 1.*Rule "nothing" is not defined',
            ),
            (Grammar("ebnf", "root ::= root"), "^guided: no text that this model can write matches it"),
            (Grammar("json_schema", '{"type": "nope"}'), "^guided.type: should be of null, .*; got 'nope'"),
            (Grammar("regex", "a" * 600_000), "^guided: has 600000 characters, more than 524288"),
        ):
            with pytest.raises(InvalidRequest, match=says) as refused:
                await grammars.check(grammar, "guided")
            assert str(refused.value.parameters["param"]).startswith("guided")

    checking(work)
