"""What the parameter page says of generation means in `LLM` what it means over HTTP, and outputs tell of it."""

from __future__ import annotations

from typing import Any

import pytest

from lightllmd import LLM
from lightllmd.errors import EngineError, InvalidRequest
from lightllmd.ipc.messages import PromptLogprobs

QUIET = {"backend": "fake", "progress": False}


def texts(llm: LLM, prompt: Any, **sampling: Any) -> list[str | None]:
    (output,) = llm.generate(prompt, progress=False, **sampling)
    return [branch.text for branch in output.branches]


def test_prompts_are_scored_where_it_is_asked_for() -> None:
    with LLM(**QUIET) as llm:
        plain, scored, ranked = llm.generate(
            ["hello", "hello", "hello"],
            parameters=[{}, {"prompt_logprobs": 0}, {"prompt_logprobs": 3, "n": 2}],
            max_new_tokens=4,
        )
        single = llm.generate(prompt_token_ids=[[65]], prompt_logprobs=1)[0]
    assert (plain.prompt_logprobs, plain.prompt_top_logprobs) == (None, None)
    assert scored.prompt_logprobs is not None
    assert len(scored.prompt_logprobs) == 4
    assert scored.prompt_top_logprobs is None
    assert ranked.prompt_logprobs == scored.prompt_logprobs
    assert ranked.prompt_top_logprobs is not None
    assert [len(others) for others in ranked.prompt_top_logprobs] == [3] * 4
    assert all(others == sorted(others, key=lambda one: -one[1]) for others in ranked.prompt_top_logprobs)
    assert plain.token_ids == scored.token_ids == ranked.token_ids
    assert (single.prompt_logprobs, single.prompt_top_logprobs) == ([], [])


@pytest.mark.parametrize("block", [1, 2, 100])
def test_scores_are_the_same_in_blocks_and_beside_the_prompt_cache(block: int) -> None:
    with LLM(**QUIET, return_all_prompt_logprobs=True) as llm:
        (whole,) = llm.generate("hello world", prompt_logprobs=2)
    modes = {"splitfuse_mode": True, "splitfuse_block_size": block, "use_dynamic_prompt_cache": True}
    with LLM(**QUIET, **modes) as llm:
        assert llm.generate("hello worms")[0].cached == 0
        (blocks,) = llm.generate("hello world", prompt_logprobs=2)
        assert llm.generate("hello world")[0].cached == len("hello worl")
    assert blocks.prompt_logprobs == whole.prompt_logprobs
    assert blocks.prompt_top_logprobs == whole.prompt_top_logprobs
    assert blocks.cached == 0
    assert blocks.token_ids == whole.token_ids


def test_a_part_that_is_missing_is_no_output() -> None:
    with LLM(**QUIET) as llm:
        turn = llm._loop.turn

        def gap(*arguments: Any) -> Any:
            outputs = turn(*arguments)
            for output in outputs.values():
                output.prompts = [PromptLogprobs(part.request, 3, [-1.0], None) for part in output.prompts]
            return outputs

        llm._loop.turn = gap  # type: ignore[method-assign]
        with pytest.raises(EngineError, match="a part of its prompt's log-probabilities is missing"):
            llm.generate("hello", prompt_logprobs=0)
        llm._loop.turn = turn  # type: ignore[method-assign]
        assert llm.generate("hello")[0].text


def test_cached_tokens_are_counted_and_a_request_may_stay_out_of_the_cache() -> None:
    with LLM(**QUIET, use_dynamic_prompt_cache=True) as llm:
        outputs = [
            llm.generate("a long prompt", max_new_tokens=3, disable_prompt_cache=disabled)[0]
            for disabled in (True, False, True, False)
        ]
    assert [output.cached for output in outputs] == [0, 0, 0, len("a long promp")]
    assert len({tuple(output.token_ids) for output in outputs}) == 1


def test_a_prompt_is_healed_unless_it_is_token_ids_or_scored() -> None:
    with LLM(**QUIET, token_healing_mode=True) as llm:
        (healed,) = llm.generate("hello wor", max_new_tokens=6)
        (given,) = llm.generate(prompt_token_ids=[list(b"hello wor")], max_new_tokens=6)
        (scored,) = llm.generate("hello wor", max_new_tokens=6, prompt_logprobs=0)
        (silent,) = llm.generate("hello wor", max_new_tokens=6, detokenize=False)
        (short,) = llm.generate("hello wor", max_new_tokens=2)
        (single,) = llm.generate("hello wor", max_new_tokens=1)
    assert (bytes(healed.prompt_token_ids), healed.prompt_tokens) == (b"hello w", 9)
    assert bytes(healed.token_ids[:2]) == b"or"
    assert healed.text == bytes(healed.token_ids[2:]).decode()
    assert silent.token_ids == healed.token_ids
    # No more is taken back than leaves a token to be shown.
    assert (bytes(short.prompt_token_ids), bytes(short.token_ids[:1]), len(short.text or "")) == (b"hello wo", b"r", 1)
    for whole in (given, scored, single):
        assert (bytes(whole.prompt_token_ids), whole.prompt_tokens) == (b"hello wor", 9)
        assert whole.text == bytes(whole.token_ids).decode()


@pytest.mark.parametrize(("mode", "kept"), [("head", b"cdefg"), ("center", b"abefg")])
def test_a_long_prompt_is_cut(mode: str, kept: bytes) -> None:
    with LLM(**QUIET, long_truncation_mode=mode, max_req_input_len=5) as llm:
        for given in ({"prompts": "abcdefg"}, {"prompt_token_ids": [list(b"abcdefg")]}):
            (output,) = llm.generate(**given, max_new_tokens=2)
            assert (bytes(output.prompt_token_ids), output.prompt_tokens) == (kept, 5)
        assert texts(llm, "abcdefg", max_new_tokens=2) == texts(llm, kept.decode(), max_new_tokens=2)


def test_what_may_be_written_is_what_the_request_allows() -> None:
    with LLM(**QUIET) as llm:
        (text,) = texts(llm, "hello wor", max_new_tokens=30, allowed_token_ids=[65, 66])
        assert set(text or "") == {"A", "B"}
        (text,) = texts(llm, "hello wor", max_new_tokens=30, allowed_token_ids=[65, 66], bad_words=["BB", [66, 65, 65]])
        assert len(text or "") == 30
        assert "BB" not in (text or "")
        assert "BAA" not in (text or "")
        (text,) = texts(llm, "x", max_new_tokens=9, allowed_token_ids=[65, 66], bad_words=["B"])
        assert text == "A" * 9


def test_beams_come_best_first_all_their_tokens_at_once() -> None:
    with LLM(**QUIET, beam_mode=True) as llm:
        (output,) = llm.generate("x", n=4, max_new_tokens=6, top_logprobs=2)
        totals = [branch.cumulative_logprob for branch in output.branches]
        assert totals == sorted(totals, reverse=True)
        assert {len(branch.token_ids) for branch in output.branches} == {6}
        assert all(len(branch.top_logprobs or []) == 6 for branch in output.branches)
        with pytest.raises(InvalidRequest, match="6400 in the completion of 8 beams"):
            llm.generate("x", n=8, max_new_tokens=800)
        llm._scheduler.check()
        assert llm._scheduler.keys.used == 0


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"bad_words": ["a", ""]}, r"bad_words\.1: .* at least 1 character"),
    ({"allowed_token_ids": [97], "bad_words": ["a"]}, "bad_words: no token is left of the 1 allowed"),
    ({"logit_bias": {300: 1}}, "logit_bias: token id 300 is not within 0 .. 256"),
    ({"logit_bias": {5: float("nan")}}, "logit_bias: the bias of token 5 should be a number .* got nan"),
    ({"prompt_logprobs": 21}, "prompt_logprobs: should be less than or equal to 20; got 21"),
    ({"length_penalty": 2.0}, "length_penalty: beam search alone has one, and beam_mode is off; got 2.0"),
]


def test_what_can_not_be_is_refused_by_field_value_and_bound() -> None:
    with LLM(**QUIET) as llm:
        for given, words in REFUSED:
            with pytest.raises(InvalidRequest, match=words):
                llm.generate("x", **given)
            with pytest.raises(InvalidRequest, match=rf"parameters\[1\]\.{words}"):
                llm.generate(["x", "y"], parameters=[{}, given])
