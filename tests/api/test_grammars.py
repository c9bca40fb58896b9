"""Grammars of clients are compiled in helper processes, and refused there by name."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from api.frontend_harness import make_plan
from bench.grammar import words
from lightllmd.api.helpers import grammars as checked_grammars
from lightllmd.api.helpers import pool
from lightllmd.api.helpers.grammars import CheckedGrammars
from lightllmd.errors import InvalidRequest
from lightllmd.grammar.check import GrammarCheck
from lightllmd.grammar.compiler import GrammarCompiler
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


# --- time to match ----------------------------------------------------------------------------------------------------

ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "kind": {"enum": ["alpha", "beta", "gamma"]},
        "text": {"type": "string"},
        "count": {"type": "integer"},
        "code": {"type": "string", "pattern": "^[A-Z]{2}-.{1,20}$"},
        "tags": {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": 5},
        "when": {"type": "string", "format": "date-time"},
        "more": {"type": "object", "additionalProperties": {"type": ["string", "number", "null"]}},
    },
    "required": ["name", "kind", "text", "count", "code", "tags", "when", "more"],
}


@pytest.fixture(scope="module")
def check() -> GrammarCheck:
    """Of a vocabulary in which one of ten tokens has a quotation mark, which a string may end with."""
    vocabulary = list(dict.fromkeys(itertools.islice(words(), 8_000)))
    return GrammarCheck(lambda: GrammarCompiler([*vocabulary, None], len(vocabulary) + 1, [len(vocabulary)]))


@pytest.mark.parametrize(
    "schema",
    [ITEM, {"type": "array", "items": ITEM, "minItems": 1000}, {f"p{i}": ITEM for i in range(20)}, {}],
    ids=["one", "many", "10 kB", "any"],
)
def test_no_token_of_usual_schemas_takes_a_step_long_to_match(check: GrammarCheck, schema: dict[str, Any]) -> None:
    """CPU time: the bound is a hundred times what they take."""
    if "p0" in schema:
        schema = {"type": "object", "properties": schema, "required": [*schema]}
    check.check(Grammar("json_schema", json.dumps(schema)), "schema")


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("ebnf", 'root ::= a{1,1000}\na ::= b{1,1000}\nb ::= ("x" | "y"){1,1000}'),
    ],
)
def test_what_takes_a_step_long_to_match_is_refused(check: GrammarCheck, grammar: Grammar) -> None:
    with pytest.raises(InvalidRequest, match=r"^schema: a token takes \d+ ms to match, more than 10 ms; got ebnf"):
        check.check(grammar, "schema")


def test_what_takes_too_long_to_compile_is_refused_and_the_next_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the end of the process that compiled it."""
    monkeypatch.setattr(checked_grammars, "SECONDS", 0.2)
    monkeypatch.setattr(pool, "_PATIENCE", 300)  # seconds by the clock, for each of CPU time
    alternatives = " | ".join(
        f'"{number:x} {number}" [a-z]{{{number % 9},{number % 9 + 40}}}' for number in range(12_000)
    )

    async def work(grammars: CheckedGrammars) -> None:
        says = r"^guided: compiling this ebnf of \d+ characters takes more than 0.2 s of CPU time or 512 MB of memory$"
        with pytest.raises(InvalidRequest, match=says):
            await grammars.check(Grammar("ebnf", f"root ::= {alternatives}"), "guided")
        monkeypatch.setattr(checked_grammars, "SECONDS", 3.0)
        await grammars.check(Grammar("regex", "[a-z]+"), "guided")

    checking(work)
