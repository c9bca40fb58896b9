"""A large vocabulary costs a row of free text no more than a few tenths of a millisecond per token."""

from __future__ import annotations

import itertools
import json
import random

import pytest

from lightllmd.grammar.check import _Walk
from lightllmd.grammar.compiler import GrammarCompiler
from lightllmd.grammar.ebnf.translation import translated
from lightllmd.ipc.messages import Grammar

SYLLABLES = [a + b for a in "bcdfgklmnprst" for b in ("a", "e", "i", "o", "u", "an", "or")]
ENDS = [""] * 97 + [",", '"', '",']  # few tokens of real vocabularies have quotes
SIZE = 60_000
MOST = 5e-3  # seconds of CPU time; alternatives that are repeated would take 17


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    draw, words = random.Random(0), [bytes([byte]) for byte in range(256)]
    for parts in itertools.product(SYLLABLES, repeat=3):
        word = "".join(parts) + draw.choice(ENDS)
        words.append((" " * draw.randrange(2) + word).encode())
        if len(words) == SIZE - 1:
            break
    return GrammarCompiler([*words, None], SIZE, [SIZE - 1])


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string"},
        {"type": "string", "minLength": 1},
        {"type": "string", "minLength": 3},
        {"type": "string", "maxLength": 200},
        {"type": "string", "pattern": "^[^x]+$"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "object", "additionalProperties": {"type": "string"}},
    ],
    ids=json.dumps,
)
def test_each_token_of_a_free_string_is_masked_at_once(compiler: GrammarCompiler, schema: dict[str, object]) -> None:
    compiled = compiler.compile(translated(Grammar("json_schema", json.dumps(schema)), "schema"))
    draw, walk = random.Random(1), _Walk(compiled, compiler)
    for _ in range(30):
        allowed = walk.allowed()
        if not len(allowed):
            break
        walk.take(int(draw.choice(allowed)))
    assert walk.steps > 1
    assert walk.slowest < MOST
