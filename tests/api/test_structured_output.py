"""Each dialect's way to say what the output has to be: what the engine gets, what comes back, and what is refused."""

from __future__ import annotations

import json
import random
from typing import Any

import httpx
import jsonschema
import pytest

import transcripts
from api.frontend_harness import EOS, Stack, run, stack
from lightllmd.grammar.ebnf.translation import translated
from lightllmd.ipc.messages import Grammar, Submit
from matching import Matching

SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 4}, "n": {"type": "integer"}}}
TEXT = json.dumps(SCHEMA)
NAMED = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": False}}
TAG = {"triggers": ["<f>"], "structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}]}
LARK = 'start: "a" /[0-9]+/'
CHAT, COMPLETIONS, NATIVE = "/v1/chat/completions", "/v1/completions", "/generate"
AS_SCHEMA, ANY_OBJECT = Grammar("json_schema", TEXT), Grammar("json_object", "")
REGEX, CHOICE, EBNF = Grammar("regex", "[0-9]+x"), Grammar("choice", '["a", "b"]'), Grammar("ebnf", 'root ::= "a"')

# Route, fields, and what is meant.
ASKED: list[tuple[str, dict[str, Any], Grammar | None]] = [
    (CHAT, {"response_format": {"type": "text"}}, None),
    (CHAT, {"response_format": {"type": "json_object"}}, ANY_OBJECT),
    (CHAT, {"response_format": NAMED}, AS_SCHEMA),
    (COMPLETIONS, {"response_format": NAMED}, AS_SCHEMA),
    (CHAT, {"response_format": {"type": "json_object", "schema": SCHEMA}}, AS_SCHEMA),
    (CHAT, {"response_format": {"type": "json", "value": SCHEMA}}, AS_SCHEMA),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"name": "any"}}}, ANY_OBJECT),
    (CHAT, {"response_format": {"type": "regex", "value": "[0-9]+x"}}, REGEX),
    (CHAT, {"response_format": {"type": "structural_tag", **TAG}}, Grammar("structural_tag", json.dumps(TAG))),
    (CHAT, {"guided_json": SCHEMA}, AS_SCHEMA),
    (COMPLETIONS, {"guided_json": TEXT, "guided_decoding_backend": "outlines"}, AS_SCHEMA),
    (CHAT, {"guided_regex": "[0-9]+x"}, REGEX),
    (COMPLETIONS, {"guided_choice": ["a", "b"]}, CHOICE),
    (CHAT, {"guided_grammar": 'root ::= "a"'}, EBNF),
    (CHAT, {"guided_grammar": LARK}, Grammar("ebnf", LARK)),
    (CHAT, {"guided_grammar": "json"}, Grammar("json_schema", "true")),
    (CHAT, {"guided_json": SCHEMA, "guided_whitespace_pattern": "[\n ]?"}, Grammar("json_schema", TEXT, "[\n ]?")),
    (CHAT, {"regular_constraint": "[0-9]+x"}, REGEX),
    (CHAT, {"structured_outputs": {"json": SCHEMA}}, AS_SCHEMA),
    (CHAT, {"structured_outputs": {"json": TEXT, "disable_any_whitespace": True}}, Grammar("json_schema", TEXT, "")),
    (CHAT, {"structured_outputs": {"regex": "[0-9]+x"}}, REGEX),
    (COMPLETIONS, {"structured_outputs": {"choice": ["a", "b"]}}, CHOICE),
    (CHAT, {"structured_outputs": {"grammar": 'root ::= "a"'}}, EBNF),
    (CHAT, {"structured_outputs": {"json_object": True}}, ANY_OBJECT),
    (CHAT, {"structured_outputs": {"structural_tag": TAG}}, Grammar("structural_tag", json.dumps(TAG))),
    (CHAT, {"structured_outputs": {"structural_tag": json.dumps(TAG)}}, Grammar("structural_tag", json.dumps(TAG))),
    (CHAT, {"structured_outputs": None, "guided_json": None, "response_format": None}, None),
    (NATIVE, {"regular_constraint": "[0-9]+x"}, REGEX),
    (NATIVE, {"guided_json": SCHEMA}, AS_SCHEMA),
    (NATIVE, {"guided_json": TEXT, "allowed_token_ids": [*range(257)]}, AS_SCHEMA),
    (NATIVE, {"guided_grammar": 'root ::= "a"'}, EBNF),
    (NATIVE, {"guided_choice": ["a", "b"]}, CHOICE),
]
TGI_ASKED: list[tuple[dict[str, Any], Grammar]] = [
    ({"type": "json", "value": SCHEMA}, AS_SCHEMA),
    ({"type": "json", "value": TEXT}, AS_SCHEMA),
    ({"type": "json_schema", "value": {"name": "thing", "schema": SCHEMA}}, AS_SCHEMA),
    ({"type": "regex", "value": "[0-9]+x"}, REGEX),
]
SEVERAL = {"guided_json": SCHEMA, "guided_regex": "a"}
UNENFORCED = {"type": "object", "properties": {"x": {"not": {"type": "string"}}}}
# Route and fields, one file of transcripts for each dialect.
REFUSED: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "openai": [
        (CHAT, {"response_format": {"type": "json_schema"}}),
        (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}),
        (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": SCHEMA}}}),
        (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": UNENFORCED}}}),
        (CHAT, {"response_format": {"type": "grammar"}}),
        (CHAT, {"response_format": {"type": "json_object"}, "guided_json": SCHEMA}),
        (CHAT, SEVERAL),
        (COMPLETIONS, {"structured_outputs": {"regex": "a", "choice": ["b"]}}),
        (COMPLETIONS, {"guided_json": {"type": "string", "pattern": "(?=x)"}}),
        (COMPLETIONS, {"guided_json": "{"}),
        (COMPLETIONS, {"guided_regex": "a{2}{3}"}),
        (COMPLETIONS, {"guided_choice": []}),
        (COMPLETIONS, {"guided_grammar": "root ::= nothing"}),
        (COMPLETIONS, {"guided_grammar": 'start: "a" other'}),
        (COMPLETIONS, {"guided_json": SCHEMA, "guided_whitespace_pattern": "x*"}),
        (COMPLETIONS, {"guided_json": SCHEMA, "max_tokens": 0, "echo": True}),
        (CHAT, {"structured_outputs": {"structural_tag": {"structures": [{"begin": "<f>"}], "triggers": ["<f>"]}}}),
    ],
    "native": [
        (NATIVE, SEVERAL),
        (NATIVE, {"guided_json": UNENFORCED}),
        (NATIVE, {"regular_constraint": "("}),
        (NATIVE, {"guided_grammar": "root ::= root"}),
        (NATIVE, {"guided_json": 5}),
    ],
    "tgi": [
        (NATIVE, {"grammar": {"type": "json", "value": UNENFORCED}}),
        (NATIVE, {"grammar": {"type": "regex", "value": {}}}),
        (NATIVE, {"grammar": {"type": "xml", "value": "x"}}),
        (NATIVE, {"grammar": "json"}),
    ],
}


def body(path: str, fields: dict[str, Any]) -> dict[str, Any]:
    if path == NATIVE:
        return {"inputs": "hi", "parameters": {"max_new_tokens": 2, **fields}}
    fields = fields if "max_tokens" in fields or "model" in fields else {**fields, "max_tokens": 2}
    return fields | ({"messages": [{"role": "user", "content": "hi"}]} if path == CHAT else {"prompt": "hi"})


async def grammar_of(one: Stack, path: str, fields: dict[str, Any]) -> Grammar | None:
    answer = await one.client.post(path, json=body(path, fields))
    assert answer.status_code == 200, answer.text
    assert "x-lightllmd-ignored" not in answer.headers
    return one.engine.submits[-1].params.grammar


def test_the_engine_gets_what_each_way_of_asking_means(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            for path, fields, meant in ASKED:
                wanted = None if meant is None else translated(meant, "field")
                assert await grammar_of(one, path, fields) == wanted, fields

    run(scenario())


def test_the_engine_gets_what_tgi_clients_ask_for(tmp_path):
    async def scenario():
        async with stack(tmp_path, {"use_tgi_api": True}) as one:
            for grammar, meant in TGI_ASKED:
                assert await grammar_of(one, NATIVE, {"grammar": grammar}) == translated(meant, "field"), grammar

    run(scenario())


def keeping(matching: Matching) -> Any:
    """Tokens of a text that the grammar of the request allows, the same each time."""

    def token(submit: Submit, branch: int, position: int) -> int:
        grammar = submit.params.grammar
        text = matching.text(grammar.text, random.Random(7 + branch)) if grammar is not None else b"no"
        assert text is not None
        return text[position] if position < len(text) else EOS

    return token


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("chat, schema", {"response_format": NAMED}),
        ("chat, schema, stream", {"response_format": NAMED, "stream": True}),
        ("chat, choices of two", {"guided_choice": ["yes", "no"], "n": 2, "logprobs": True}),
    ],
)
def test_answers_are_those_of_the_transcripts(tmp_path, name, fields):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            (await one.up(token=keeping(Matching()))).free_run = True
            asked = body(CHAT, {"model": "any", **fields})
            # An event loop that is late puts tokens of a stream together: one of five is as it is written down.
            for left in reversed(range(5 if "stream" in fields else 1)):
                answer = await one.client.post(CHAT, json=asked)
                try:
                    transcripts.check(f"structured/{name}", transcripts.transcript(asked, answer))
                except AssertionError:
                    if not left:
                        raise
                else:
                    break
            if name == "chat, schema":
                jsonschema.validate(json.loads(answer.json()["choices"][0]["message"]["content"]), SCHEMA)

    run(scenario())


@pytest.mark.parametrize("dialect", REFUSED)
def test_refusals_are_those_of_the_transcripts_and_reach_no_engine(tmp_path, dialect):
    async def scenario():
        async with stack(tmp_path, {"use_tgi_api": dialect == "tgi"}) as one:
            told = []
            for path, fields in REFUSED[dialect]:
                asked = body(path, fields)
                answer: httpx.Response = await one.client.post(path, json=asked)
                assert answer.status_code == (422 if dialect == "tgi" else 400), (fields, answer.text)
                told.append(transcripts.transcript(asked, answer))
            assert one.engine.submits == []
            transcripts.check(f"structured/refusals, {dialect}", "\n".join(told))

    run(scenario())


def test_with_token_healing_it_is_refused_by_name(tmp_path):
    async def scenario():
        async with stack(tmp_path, {"token_healing_mode": True}) as one:
            answer = await one.client.post(COMPLETIONS, json=body(COMPLETIONS, {"guided_json": SCHEMA}))
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "guided_json")
            assert "token_healing_mode is on" in answer.json()["error"]["message"]
            assert await grammar_of(one, CHAT, {"guided_json": SCHEMA}) is not None  # a chat isn't healed

    run(scenario())
