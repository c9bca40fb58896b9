"""What is asked becomes jobs by one set of rules, whose refusals name the dialect's own fields."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from api.frontend_harness import make_plan
from lightllmd.errors import InvalidRequest
from lightllmd.ipc.messages import SamplingParams
from lightllmd.requests.asked import Asked, Chat, FieldNames, Prompt
from lightllmd.requests.branch import TextOptions
from lightllmd.requests.intake import AdmittedJob, Intake
from lightllmd.requests.limits import RequestLimits
from lightllmd.requests.text_work import Inline, without_waiting
from lightllmd.text import ByteTokenizer

TOKENIZER = ByteTokenizer()
NAMES = FieldNames("how_many", "how_long", stops="ends", stop_tokens="end_ids", prefix="p.", subject="what")


def asked(*prompts: Any, params: dict[str, Any] | None = None, **changes: Any) -> Asked:
    listed = [Prompt(prompt, f"q.{index}", isinstance(prompt, str)) for index, prompt in enumerate(prompts)]
    return replace(Asked(listed, SamplingParams(**(params or {})), TextOptions(), NAMES, None, new_tokens=8), **changes)


def jobs(what: Asked, **plan: Any) -> list[AdmittedJob]:
    made = make_plan(plan)
    intake = Intake(made, lambda: TOKENIZER, Inline(lambda: TOKENIZER, RequestLimits.of(made)))
    return without_waiting(intake.jobs(what))


def test_texts_ids_and_conversations_become_prompts_in_their_order() -> None:
    chat = Chat([{"role": "user", "content": "c"}], {})
    made = jobs(asked("a", [98], chat, "d"))
    assert [bytes(job.prompt_ids) for job in made] == [b"a", b"b", bytes(TOKENIZER.encode_chat(chat.messages)), b"d"]


def test_a_seed_is_kept_and_without_one_each_prompt_gets_its_own() -> None:
    assert [job.params.seed for job in jobs(asked("a", "b", seed=0))] == [0, 0]
    first, second = (job.params.seed for job in jobs(asked("a", "b")))
    assert first != second
    assert 0 <= min(first, second) <= max(first, second) < 2**63


@pytest.mark.parametrize(
    ("what", "field", "says"),
    [
        (asked("a", params={"n": 2000}), "how_many", "how_many: 2000 sequences, more than running_max_req_size"),
        (asked("a", new_tokens=3072), "how_long", r"more than max_req_total_len = 3072 \(how_long\)"),
        (asked("a", ""), "q.1", "q.1: the prompt has no tokens"),
        (asked("a", [257]), "q.1", "q.1: token id 257 is not within 0 .. 256"),
        (asked("\ud800"), "what", "not valid Unicode"),
        (asked("a", stop_tokens=[257]), "end_ids", "end_ids: token id 257"),
        (asked("a", stop_sequences=[[1], [257]]), "ends", "ends: token id 257"),
        (asked("a", stop_texts=["x"] * 65), "ends", "65 stop sequences, at most 64"),
        (asked("a", params={"logit_bias": {257: 1.0}}), "p.logit_bias", "p.logit_bias: token id 257"),
        (asked("a", params={"length_penalty": 2.0}), "p.length_penalty", "beam_mode is off; got 2.0"),
        (asked("a", beams=True), "p.use_beam_search", "with 1 sequences .* beam_mode off it should be false"),
    ],
)
def test_a_refusal_names_the_dialects_field(what: Asked, field: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as refused:
        jobs(what)
    assert refused.value.parameters["param"] == field


def test_bounds_on_all_prompts_together_hold_where_the_dialect_takes_several() -> None:
    names = replace(NAMES, prompts="qs")
    with pytest.raises(InvalidRequest, match=r"^qs: 3000 sequences, more than running_max_req_size \+ http.max_queue"):
        jobs(asked(*["a"] * 3000, names=names), running_max_req_size=10)


@pytest.mark.parametrize(("prompts_first", "field"), [(True, "q.0"), (False, "p.logit_bias")])
def test_which_fault_is_told_first_is_the_dialects(prompts_first: bool, field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        jobs(asked("", params={"logit_bias": {257: 1.0}}, prompts_first=prompts_first))
    assert refused.value.parameters["param"] == field


def test_new_tokens_default_to_what_fits_or_to_the_dialects_own_number() -> None:
    for default, expected in ((None, 3072 - 4), (16, 16)):
        (job,) = jobs(asked("abcd", new_tokens=None, default_new_tokens=default))
        assert job.params.max_new_tokens == expected
    assert jobs(asked("abcd", keep_last=2))[0].prompt_ids == [*b"cd"]
