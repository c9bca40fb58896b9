"""Priority and timeout of a request: in headers or in the body, within bounds."""

from __future__ import annotations

from typing import Any

import pytest

from lightllmd.api.dialects.anthropic.bodies import MessagesBody
from lightllmd.api.dialects.embeddings import EmbeddingsBody
from lightllmd.api.dialects.native import bodies as native_bodies
from lightllmd.api.dialects.native import scores as native_scores
from lightllmd.api.dialects.openai import bodies as openai_bodies
from lightllmd.api.dialects.responses.bodies import ResponsesBody
from lightllmd.api.dialects.scoring import bodies as scoring_bodies
from lightllmd.api.dialects.tgi import bodies as tgi_bodies
from lightllmd.api.web.tenants import KEY, Tenants
from lightllmd.config.keys import ApiKey
from lightllmd.config.parameters import HttpSettings
from lightllmd.errors import InvalidRequest
from lightllmd.requests.urgency import UNHURRIED, Urgency, urgency_of

HURRY = {"priority": -3, "timeout": 2.5}
BODIES: list[tuple[type, dict[str, Any]]] = [
    (native_bodies.GenerateBody, {"inputs": "x", "parameters": HURRY}),
    (tgi_bodies.TgiBody, {"inputs": "x", "parameters": HURRY}),
    (openai_bodies.CompletionBody, {"prompt": "x"} | HURRY),
    (openai_bodies.ChatBody, {"messages": [{"role": "user", "content": "x"}]} | HURRY),
    (scoring_bodies.ScorePairsBody, {"text_1": "x", "text_2": "y"} | HURRY),
    (scoring_bodies.RerankBody, {"query": "x", "documents": ["y"]} | HURRY),
    (scoring_bodies.PoolingBody, {"input": "x"} | HURRY),
    (native_scores.ScoreBody, {"chat": "x"} | HURRY),
    (EmbeddingsBody, {"input": "x"} | HURRY),
    (ResponsesBody, {"input": "x"} | HURRY),
    (MessagesBody, {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}]} | HURRY),
]


@pytest.mark.parametrize(("kind", "body"), BODIES, ids=lambda one: getattr(one, "__name__", ""))
def test_each_body_says_how_urgent_it_is(kind: type, body: dict[str, Any]) -> None:
    assert kind.model_validate(kind.prepare(body)).urgency == Urgency(-3, 2.5)


def test_headers_say_what_the_body_does_not() -> None:
    headers = {"x-request-priority": " -7 ", "x-request-timeout": "1e1"}
    assert urgency_of(headers, UNHURRIED) == Urgency(-7, 10.0)
    assert urgency_of(headers, Urgency(0, 3.0)) == Urgency(0, 3.0)
    assert urgency_of({}, UNHURRIED) == UNHURRIED


@pytest.mark.parametrize("written", ["", "x", "101", "-101", "1.0", "--1", "9" * 99, "٣", "-"])
def test_a_priority_that_is_none_is_refused_by_name(written: str) -> None:
    with pytest.raises(InvalidRequest, match="X-Request-Priority: should be an integer from -100 to 100"):
        urgency_of({"x-request-priority": written}, UNHURRIED)


@pytest.mark.parametrize("written", ["", "x", "0", "-1", "nan", "inf", "86401", "1" * 99])
def test_a_timeout_that_is_none_is_refused_by_name(written: str) -> None:
    with pytest.raises(InvalidRequest, match="X-Request-Timeout: should be seconds, more than 0 and at most 86400"):
        urgency_of({"x-request-timeout": written}, UNHURRIED)


def test_a_key_bounds_the_priority_of_its_requests() -> None:
    def priority(bound: int, asked: int | None) -> int | None:
        scope = {"client": ("10.0.0.1", 1), "headers": [], KEY: ApiKey(sha256="0" * 64, priority=bound)}
        return Tenants(HttpSettings()).turn(scope, Urgency(asked)).urgency.priority

    assert priority(-100, None) == 0
    assert priority(-100, -100) == -100
    assert priority(5, None) == 5, "a request that says nothing has what is allowed"
    assert priority(5, 6) == 6
    with pytest.raises(InvalidRequest, match="priority: the key's requests may have 5 or more, which is later; got 4"):
        priority(5, 4)
