"""Whatever a matcher lets through is valid: random schemas, patterns, choices and grammars against random tokens."""

from __future__ import annotations

import json
import random
import re

import jsonschema
import pytest

import random_schemas
from lightllmd.grammar.ebnf.json_schema import schema_grammar
from lightllmd.grammar.ebnf.translation import translated
from lightllmd.ipc.messages import Grammar
from long_run import LONG
from matching import Matching

COUNT = 300 if LONG else 60


@pytest.fixture(scope="module")
def matching() -> Matching:
    return Matching()


def test_every_text_that_ends_is_valid_under_its_random_schema(matching: Matching) -> None:
    schemas, draw, ended = random_schemas.Schemas(14), random.Random(14), 0
    for _ in range(COUNT):
        schema = schemas.next()
        text = matching.text(schema_grammar(schema, "schema"), draw)
        if text is not None:
            ended += 1
            jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    assert ended > 0.95 * COUNT


def test_every_text_is_a_whole_match_of_its_random_pattern(matching: Matching) -> None:
    draw = random.Random(3)
    for _ in range(COUNT):
        pattern = random_schemas.pattern(draw)
        text = matching.text(translated(Grammar("regex", pattern), "guided_regex").text, draw)
        assert text is None or re.fullmatch(pattern, text.decode()), pattern


def test_every_text_is_one_of_its_random_choices(matching: Matching) -> None:
    draw = random.Random(5)
    for _ in range(COUNT):
        choices = [
            "".join(draw.choices("ab\"\\\n é{}|[]^-'", k=draw.randrange(6))) for _ in range(draw.randrange(1, 9))
        ]
        text = matching.text(translated(Grammar("choice", json.dumps(choices)), "guided_choice").text, draw)
        assert text is not None
        assert text.decode() in choices


def test_every_text_is_derived_from_its_random_grammar(matching: Matching) -> None:
    draw = random.Random(7)
    for _ in range(COUNT):
        depth, word = draw.randrange(1, 4), "".join(draw.choices("xyz", k=3))
        grammar = f'root ::= "(" root ")" | item{{{depth}}}\nitem ::= "{word}" [0-9]? ","'
        text = matching.text(translated(Grammar("ebnf", grammar), "guided_grammar").text, draw)
        if text is not None:
            inner = text.decode().strip("()")
            assert text.decode().count("(") == text.decode().count(")")
            assert re.fullmatch(f"({word}[0-9]?,){{{depth}}}", inner), (grammar, text)
