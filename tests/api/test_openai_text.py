"""How the OpenAI routes turn tokens into text, where that differs from the native ones."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.frontend_harness import make_plan, run, stack
from lightllmd.api.dialects.openai.bodies import ChatBody, CompletionBody
from lightllmd.api.web.responses import json_in_parts
from lightllmd.errors import InvalidRequest
from lightllmd.requests.branch import TextOptions, open_branches
from lightllmd.requests.encoding import Encoder
from lightllmd.requests.fields import MAX_ALLOWED
from lightllmd.requests.intake import AdmittedJob, Intake
from lightllmd.requests.limits import RequestLimits
from lightllmd.requests.text_work import Inline, without_waiting
from lightllmd.text import ByteTokenizer, StopList

TOKENIZER = ByteTokenizer()


def jobs_of(body: CompletionBody | ChatBody) -> list[AdmittedJob]:
    plan = make_plan()
    intake = Intake(plan, lambda: TOKENIZER, Inline(lambda: TOKENIZER, RequestLimits.of(plan)))
    return without_waiting(intake.jobs(body.asked()))


def test_nothing_is_put_around_added_tokens_and_stops_are_left_out() -> None:
    for body in (CompletionBody(prompt="x", stop="y"), ChatBody(messages=[{"role": "user", "content": "x"}], stop="y")):
        text = jobs_of(body)[0].text
        assert not text.spaces_between_special_tokens
        assert not text.include_stop
        assert text.stops.strings == ["y"]


def test_what_a_body_says_once_is_made_once_for_all_its_prompts() -> None:
    """Stop automata, biases, allowed ids: their cost must not grow with prompts and n."""
    body = CompletionBody(prompt=["a"] * 4, n=8, stop=["x", "yz"], allowed_token_ids=[3, 1, 3], logit_bias={"1": 2})
    first, *others = jobs_of(body)
    assert first.text.stops.of_text is not None
    assert first.params.allowed_token_ids == [1, 3]
    for other in others:
        assert other.text is first.text
        assert other.params.allowed_token_ids is first.params.allowed_token_ids
        assert other.params.logit_bias is first.params.logit_bias


def test_token_ids_that_go_along_with_each_prompt_are_bounded_in_all() -> None:
    body = CompletionBody(prompt=["a"] * 900, allowed_token_ids=[0])
    body.allowed_token_ids = [0] * (MAX_ALLOWED // 128)
    with pytest.raises(InvalidRequest, match="allowed_token_ids: 4096 token ids for each of 900 prompts, more than"):
        jobs_of(body)


def test_the_total_of_the_stops_is_bounded_by_name() -> None:
    with pytest.raises(ValueError, match=r"should have at most 8192 characters or ids in all; got 65536"):
        CompletionBody(prompt="a", stop=["x" * 1024] * 64)


@pytest.mark.parametrize("include", [True, False])
def test_a_special_tokens_text_is_found_as_a_stop_although_it_is_not_shown(include: bool) -> None:
    (branch,) = open_branches(1, [1], TextOptions(StopList(["c<eos>d"]), include_stop=include), TOKENIZER)
    taken = [branch.take(token, 0.0, None) for token in (*b"abc", ByteTokenizer.EOS, *b"d")]
    assert taken == [False] * 4 + [True]
    assert branch.text == ("abcd" if include else "ab")
    assert branch.finish == "stop"


class Counting(ByteTokenizer):
    """Tells how much text was tokenised."""

    longest_token = None  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.characters = 0

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        self.characters += len(text)
        return super()._encode(text, add_special_tokens)


def test_a_text_that_can_not_fit_is_refused_before_all_of_it_is_tokenised() -> None:
    limits, text = RequestLimits.of(make_plan()), "x" * (4 << 20)
    for tokenizer, most in ((ByteTokenizer(), 0), (Counting(), 1 << 16)):
        with pytest.raises(InvalidRequest, match="resulted in at least"):
            Encoder(tokenizer, limits).encode([text], ["prompt"], True, False)
        assert getattr(tokenizer, "characters", 0) <= most


@pytest.mark.parametrize("mode", ["head", "center"])
def test_a_prompt_that_will_be_cut_comes_without_its_middle(mode: str) -> None:
    limits = RequestLimits.of(make_plan({"long_truncation_mode": mode, "max_req_input_len": 5}))
    text = "abcdefghij" * 10_000
    (ids,) = Encoder(TOKENIZER, limits).encode([text], ["prompt"], True, False)
    assert len(ids) <= 12
    assert [*limits.prompt(ids, "prompt")] == limits.prompt([*text.encode()], "prompt")


def test_bodies_of_millions_of_ids_carry_them_as_arrays() -> None:
    for prompt in ([1, 2], [[1, 2]]):
        (ids,) = CompletionBody(prompt=prompt).prompts
        assert ids == array("i", [1, 2])


@given(
    st.recursive(
        st.integers() | st.text() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_an_answer_in_parts_is_the_same_json(body: Any) -> None:
    body = {"choices": [{"logprobs": {"content": [body] * 200, "tokens": []}}], "x": body, "empty": {}}
    assert json_in_parts(body) == msgspec.json.encode(body)


def test_log_probabilities_of_prompts_are_bounded_in_all() -> None:
    body = CompletionBody(prompt=[[1] * 2000] * 200, prompt_logprobs=20, max_tokens=1)
    with pytest.raises(InvalidRequest, match=r"400000 tokens with 21 log-probabilities each are 8400000, more than"):
        jobs_of(body)


def test_a_name_as_long_as_the_body_is_not_repeated(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stack(tmp_path, unknown_fields="refuse") as one:
            for body in ({"prompt": "a", "x" * 100_000: 1}, {"prompt": "a", "stream_options": {"y" * 100_000: 1}}):
                answer = await one.client.post("/v1/completions", json=body)
                assert answer.status_code == 400
                assert len(answer.content) < 2000

    run(scenario())
