"""What is documented of the API is what it does: every status, header and form of answer. /docs needs no one else."""

from __future__ import annotations

import hashlib
import json
import os
import re
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from api.frontend_harness import Stack, run, stack
from lightllmd.api.app import dialects_of, error_answers
from lightllmd.api.dialects.dialect import Dialect
from lightllmd.api.documentation.errors import client_errors, error_rows, errors_markdown, forms
from lightllmd.api.documentation.routes import FieldsRow, field_rows, fields_markdown, routes_of
from lightllmd.errors import RequestError

README = Path(__file__).parents[2] / "README.md"
TGI = {"use_tgi_api": True}
KEY = {"Authorization": "Bearer secret"}
# A body of each kind that is answered with 200 by a model that generates.
BODIES: dict[str, dict[str, Any]] = {
    "GenerateBody": {"inputs": "hi", "parameters": {"max_new_tokens": 2}},
    "TgiBody": {"inputs": "hi", "parameters": {"max_new_tokens": 2}},
    "TokensBody": {"text": "hi"},
    "CompletionBody": {"prompt": "hi", "max_tokens": 2},
    "ChatBody": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    "MessagesBody": {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    "CountTokensBody": {"model": "m", "messages": [{"role": "user", "content": "hi"}]},
    "ResponsesBody": {"input": "hi", "max_output_tokens": 16, "store": False},
    "EmbeddingsBody": {"input": "hi"},
    "TokenizeBody": {"prompt": "hi"},
    "DetokenizeBody": {"tokens": [104, 105]},
}
BODIES |= {"GenerateOrStreamBody": BODIES["GenerateBody"], "TgiEitherBody": BODIES["TgiBody"]}
SCORING = {"ScoreBody", "ScorePairsBody", "RerankBody", "ClassifyBody", "PoolingBody"}  # refused by such a model


class Documented:
    """An OpenAPI document, and answers that are held against it."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document

    def operations(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        for path, operations in self.document["paths"].items():
            for method, operation in operations.items():
                yield path, method, operation

    def body(self, operation: dict[str, Any]) -> str | None:
        """The name of its schema."""
        if "requestBody" not in operation:
            return None
        return operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]

    def check(self, path: str, method: str, answer: httpx.Response) -> None:
        """The status is documented, and so are its form and each header of ours."""
        place = f"{method} {path} {answer.status_code}"
        documented = self.document["paths"][path][method]["responses"]
        assert str(answer.status_code) in documented, place
        told = documented[str(answer.status_code)]
        kind = answer.headers.get("content-type", "").partition(";")[0]
        assert kind in told["content"], f"{place}: {kind}"
        assert answer.headers["x-request-id"], place
        named = {name.lower() for name in told["headers"]}
        ours = {"retry-after", "www-authenticate", "request-id", "x-lightllmd-ignored", "x-should-retry"}
        assert {name for name in answer.headers if name in ours or name.startswith("x-ratelimit")} <= named, place
        if kind == "application/json":
            schema = told["content"][kind]["schema"] | {"components": self.document["components"]}
            jsonschema.Draft202012Validator(schema).validate(answer.json())


async def documented(one: Stack) -> Documented:
    answer = await one.client.get("/openapi.json", headers=KEY)
    assert answer.headers["content-type"] == "application/json"
    return Documented(answer.json())


def filled(path: str) -> str:
    return re.sub(r"\{[^}]+\}", "unknown", path)


def wanted(operation: dict[str, Any]) -> dict[str, str]:
    return {"accept": "text/html"} if "page" in operation["tags"] else {}


@pytest.mark.parametrize("params", [{}, TGI], ids=["native", "tgi"])
def test_every_route_answers_as_documented(tmp_path: Path, params: dict[str, Any]) -> None:
    """Rightly asked, as a stream, with a body that is none, one that is too large, and one of an unknown field."""

    async def scenario() -> None:
        async with stack(tmp_path, params, max_body_bytes=4096) as one:
            one.engine.labels = 0
            api = await documented(one)
            seen = set()
            for path, method, operation in api.operations():
                name, target = api.body(operation), filled(path)
                if name is None:
                    answer = await one.client.request(method, target, headers=wanted(operation))
                    api.check(path, method, answer)
                    continue
                assert name in BODIES or name in SCORING, f"{name}: a body of it is needed here"
                for content in (b"", b"[1]", b"x" * 5000, json.dumps({"unheard_of": 1}).encode()):
                    answer = await one.client.request(method, target, content=content)
                    assert answer.status_code >= 400, (path, content[:9])
                    api.check(path, method, answer)
                body = BODIES.get(name, {"chat": "a", "input": "a", "query": "a", "documents": ["a"], "queries": "a"})
                answer = await one.client.request(method, target, json=body)
                api.check(path, method, answer)
                assert answer.status_code == (400 if name in SCORING else 200), (path, answer.text)
                streams = "text/event-stream" in operation["responses"]["200"]["content"]
                if streams and "stream" in api.document["components"]["schemas"][name]["properties"]:
                    answer = await one.client.request(method, target, json=body | {"stream": True})
                    api.check(path, method, answer)
                    assert answer.headers["content-type"].startswith("text/event-stream"), (path, answer.text)
                seen.add(name)
            assert {"EmbeddingsBody", "ChatBody", "MessagesBody", "ResponsesBody"} <= seen

    run(scenario())


@pytest.mark.parametrize("params", [{}, TGI], ids=["native", "tgi"])
def test_a_missing_key_and_an_engine_that_is_down_are_told_as_documented(
    tmp_path: Path, params: dict[str, Any]
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    keys.chmod(0o600)

    async def scenario() -> None:
        async with stack(tmp_path, params, engine=False, api_keys_file=str(keys), hold_timeout=0.01) as one:
            api = await documented(one)
            refused = set()
            for path, method, operation in api.operations():
                body = BODIES.get(api.body(operation) or "")
                answer = await one.client.request(method, filled(path), headers=wanted(operation))
                if answer.status_code == 401:
                    refused.add(path)
                    assert operation["security"], path
                else:
                    assert "security" not in operation, path
                api.check(path, method, answer)
                if body is not None:
                    api.check(path, method, await one.client.request(method, filled(path), json=body, headers=KEY))
            assert {"/v1/embeddings", "/docs", "/metrics"} <= refused

    run(scenario())


@pytest.mark.parametrize("params", [{}, TGI], ids=["native", "tgi"])
def test_every_error_is_in_the_table_and_told_in_each_dialects_form(tmp_path: Path, params: dict[str, Any]) -> None:
    async def scenario() -> None:
        async with stack(tmp_path, params) as one:
            api, dialects = await documented(one), dialects_of(one.plan)
            assert all(dialect.name for dialect in dialects)
            answers, schemas = error_answers(dialects), api.document["components"]["schemas"]
            rows = {row.kind: row for row in error_rows(dialects)}
            assert set(rows) == set(client_errors())
            assert {one for one in vars(__import__("lightllmd.errors").errors).values() if _is_client_error(one)} <= {
                *rows
            }
            forms_seen: dict[str, set[str]] = {}
            for dialect in dialects:
                name = next(name for name, shape in forms(dialects).items() if shape == dialect.errors)
                for kind, row in rows.items():
                    assert row.meaning
                    for path in dialect.paths:
                        scope = {"type": "http", "path": path, "headers": [], "state": {}}
                        response = answers.response(kind("what happened"), scope)
                        assert response.status_code == row.told[name].status
                        body = json.loads(response.body)
                        forms_seen.setdefault(name, set()).add(repr(sorted(body)))
                        schema = schemas[f"{''.join(filter(str.isalnum, name.title()))}Error"]
                        jsonschema.Draft202012Validator(schema).validate(body)
                        assert "what happened" in json.dumps(body)
            assert len({frozenset(keys) for keys in forms_seen.values()}) == len(forms_seen)

    run(scenario())


def _is_client_error(one: Any) -> bool:
    return isinstance(one, type) and issubclass(one, RequestError) and one is not RequestError


def test_the_document_is_valid_and_every_reference_leads_somewhere(tmp_path: Path) -> None:
    async def scenario() -> None:
        for params in ({}, TGI):
            async with stack(tmp_path, params) as one:
                api = (await documented(one)).document
                known = {f"#/components/{kind}/{name}" for kind, held in api["components"].items() for name in held}
                assert {*re.findall(r'"\$ref": "([^"]+)"', json.dumps(api))} <= known
                inner = "TgiParameters" if params else "Parameters"
                assert "top_p" in api["components"]["schemas"][inner]["properties"]
                for _, _, operation in Documented(api).operations():
                    assert "x-streams" not in operation
                    assert all("X-Request-Id" in told["headers"] for told in operation["responses"].values())
                validator = pytest.importorskip("openapi_spec_validator")
                validator.validate(api)

    run(scenario())


def test_docs_need_neither_network_nor_script(tmp_path: Path) -> None:
    async def scenario() -> tuple[httpx.Response, dict[str, Any]]:
        async with stack(tmp_path) as one:
            return await one.client.get("/docs"), (await documented(one)).document

    answer, api = run(scenario())
    text = answer.text
    policy = answer.headers["content-security-policy"]
    style = text.partition("<style>")[2].partition("</style>")[0]
    digest = b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}'; ")
    assert "unsafe" not in policy
    assert not re.search(r"<script|<link|<img|<iframe|\ssrc=|\son\w+=|\sstyle=|@import|url\(", text)
    links = set(re.findall(r'href="([^"]*)"', text))
    assert all(link.startswith("#") or link == "/openapi.json" for link in links)
    assert {link[1:] for link in links if link.startswith("#")} <= set(re.findall(r'id="([^"]*)"', text))
    for path in api["paths"]:
        assert f'<span class="path">{path}</span>' in text
    for kind in client_errors():
        assert f"<td>{kind.__name__}</td>" in text


# --- tables -------------------------------------------------------------------------------------------------------


async def tables(folder: Path) -> tuple[list[Dialect], list[FieldsRow]]:
    """Of everything that a front end may speak."""
    dialects: list[Dialect] = []
    rows: list[FieldsRow] = []
    for params in ({}, TGI):
        async with stack(folder, params) as one:
            spoken = dialects_of(one.plan)
            dialects += [dialect for dialect in spoken if dialect.errors not in [known.errors for known in dialects]]
            paths = (await documented(one)).document["paths"]
            known = [row.body for row in rows]
            rows += [row for row in field_rows(routes_of(paths, spoken)) if row.body not in known]
    return dialects, rows


def test_the_tables_of_the_readme_are_what_is_generated(tmp_path: Path) -> None:
    """With LIGHTLLMD_WRITE_TABLES=1 they are written there."""
    dialects, rows = run(tables(tmp_path))
    made = {"table of errors": errors_markdown(dialects), "table of fields": fields_markdown(rows)}
    text = README.read_text(encoding="utf-8")
    for name, table in made.items():
        begin, end = f"<!-- {name} -->\n", "\n<!-- end -->"
        before, _, rest = text.partition(begin)
        committed, _, after = rest.partition(end)
        if os.environ.get("LIGHTLLMD_WRITE_TABLES") == "1":
            text = f"{before}{begin}{table}{end}{after}"
            README.write_text(text, encoding="utf-8")
        else:
            assert committed == table, f"the {name} is another one: LIGHTLLMD_WRITE_TABLES=1 writes it"


def test_each_field_is_said_once_and_does_what_the_table_says(tmp_path: Path) -> None:
    _, rows = run(tables(tmp_path))
    for row in rows:
        groups = [*map(set, (row.works, row.ignored, row.refused))]
        assert not groups[0] & groups[1] | groups[0] & groups[2] | groups[1] & groups[2], row.paths
        body = row.body
        for name in body.without_effect.difference(body.fields_that_work()):
            assert name not in body.prepare({name: {"any": "value"}})
        for name, refusal in body.refused.items():
            if name in row.refused:
                assert all(name not in body.known({name: idle}) for idle in refusal.idle)
                with pytest.raises(RequestError, match=f"^{name}: ") as refused:
                    body.known({name: "what is asked for"})
                assert refused.value.parameters["param"] == name
