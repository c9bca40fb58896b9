"""What a grammar constrains keeps to it, with the engine's own parts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from lightllmd import LLM
from lightllmd.errors import InvalidRequest
from lightllmd.ipc.messages import SamplingParams
from lightllmd.offline_jobs import OfflineJob
from lightllmd.requests.asked import Asked, FieldNames, Prompt
from lightllmd.requests.branch import TextOptions
from lightllmd.requests.constraint import Constraint
from lightllmd.requests.intake import AdmittedJob
from lightllmd.requests.text_work import without_waiting

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
}


@pytest.fixture(scope="module", params=[False, True], ids=["each waited for", "overlapped"])
def fake(request: pytest.FixtureRequest) -> Iterator[LLM]:
    with LLM(engine={"backend": "fake", "fake": {"overlap": request.param}}) as llm:
        yield llm


def jobs_of(llm: LLM, kind: Any, text: str, *, new_tokens: int = 400, **params: Any) -> list[AdmittedJob]:
    what = Asked(
        [Prompt("Say it: ", "inputs", False)],
        SamplingParams(**params),
        TextOptions(),
        FieldNames("n", "max_new_tokens"),
        None,
        new_tokens,
        constraint=Constraint(kind, text, "grammar"),
        seed=params.get("seed"),
    )
    return without_waiting(llm._intake.jobs(what))


def texts(llm: LLM, kind: Any, text: str, **params: Any) -> list[str]:
    [job] = jobs_of(llm, kind, text, **params)
    offline = OfflineJob(job, llm.tokenizer)
    llm._run_all([offline], False, None)
    return [branch.text or "" for branch in offline.output().branches]


@pytest.mark.parametrize("seed", range(3))
def test_json_keeps_to_its_schema(fake: LLM, seed: int) -> None:
    for text in texts(fake, "json_schema", json.dumps(SCHEMA), do_sample=True, seed=seed, n=2):
        value = json.loads(text)
        assert 0 <= value["age"] <= 99
        assert len(value["name"]) <= 8


def test_a_pattern_and_a_choice_are_whole_matches(fake: LLM) -> None:
    [text] = texts(fake, "regex", r"[0-9]{3}-(ab|cd)")
    assert re.fullmatch(r"[0-9]{3}-(ab|cd)", text)
    [text] = texts(fake, "choice", json.dumps(['red "1"', "blüe\\n"]))
    assert text in ('red "1"', "blüe\\n")


def test_what_can_not_be_compiled_is_refused_by_name(fake: LLM) -> None:
    with pytest.raises(InvalidRequest, match=r"^grammar: a \) is missing, at character 2; got '\(a'") as refused:
        jobs_of(fake, "regex", "(a")
    assert refused.value.parameters["param"] == "grammar"
