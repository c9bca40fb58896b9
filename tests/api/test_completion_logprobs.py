"""`logprobs` of /v1/completions: each token and its alternatives under names of their own, and where each begins."""

from __future__ import annotations

import pytest

from api.frontend_harness import EOS, frames, run, stack


async def logprobs_of(one, body, stream):
    """The choice's lists, of a stream joined."""
    answer = await one.client.post("/v1/completions", json=body | {"stream": stream})
    assert answer.status_code == 200, answer.text
    choices = [frame["choices"][0] for frame in frames(answer.text)] if stream else answer.json()["choices"]
    merged = {key: [v for c in choices for v in c["logprobs"][key]] for key in choices[0]["logprobs"]}
    return merged | {"text": "".join(choice["text"] for choice in choices)}


@pytest.mark.parametrize("stream", [False, True])
def test_offsets_count_the_prompt_and_what_is_held_back(tmp_path, stream):
    """Of the text as the tokens spell it, whether a stop or an incomplete character holds it back meanwhile."""
    cases = [  # prompt, ids, stop, offsets of the generated tokens behind the prompt
        ("ab", b"hello lo x", "lo w", list(range(10))),
        ("ab", b"hello lo w", "lo w", list(range(10))),
        ([97, EOS, 98], b"xyz", None, [0, 1, 2]),
        ("ab", "a\u6f22b".encode(), None, [0, 1, 1, 1, 2]),
        ("ab", "a\u6f22b".encode(), "b!", [0, 1, 1, 1, 2]),
        ("ab", b"\xe6x\xe6\xe6y", None, [0, 1, 2, 2, 4]),  # bytes that make no character: one U+FFFD each
        ("ab", bytes([120, 0xE6]) + b"z", "never", [0, 1, 2]),
    ]

    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            ids: list[int] = []
            (await one.up(token=lambda submit, branch, position: ids[position])).free_run = True
            for prompt, generated, stop, begins in cases:
                ids[:] = generated
                length = len(prompt) if isinstance(prompt, str) else len("a<eos>b")
                body = {"prompt": prompt, "max_tokens": len(ids), "stop": stop, "logprobs": 0}
                got = await logprobs_of(one, body, stream)
                assert got["text_offset"] == [length + begin for begin in begins], (prompt, generated)

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_a_hidden_token_at_the_end_begins_where_the_text_ends(tmp_path, stream):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            (await one.up(token=lambda submit, branch, position: [120, 0xE6, EOS][position])).free_run = True
            got = await logprobs_of(one, {"prompt": "ab", "max_tokens": 5, "logprobs": 0, "echo": True}, stream)
            assert got["text"] == "abx\ufffd"
            assert got["tokens"] == ["a", "b", "x", "bytes:\\xe6", "<eos>"]
            assert got["text_offset"] == [0, 1, 2, 3, 4]

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_the_token_itself_is_always_among_its_alternatives(tmp_path, stream):
    """With the N best ones where it is not one of them, so that there may be N + 1."""

    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            engine = await one.up(token=lambda submit, branch, position: 120)
            engine.logprob = lambda branch, position: -7.5
            engine.others = lambda token: [(0xE6, -0.1), (0xE7, -0.2), (0xE6 + 2, -0.3)]
            engine.free_run = True
            for count, best in enumerate([{}, {"bytes:\\xe6": -0.1}, {"bytes:\\xe6": -0.1, "bytes:\\xe7": -0.2}]):
                body = {"prompt": "ab", "max_tokens": 2, "logprobs": count}
                got = await logprobs_of(one, body, stream)
                assert got["top_logprobs"] == [best | {"x": -7.5}] * 2
            echoed = await logprobs_of(one, body | {"echo": True, "logprobs": 1}, stream)
            assert echoed["top_logprobs"] == [None, {"A": -1.0, "b": -0.125}, *[{"bytes:\\xe6": -0.1, "x": -7.5}] * 2]

    run(scenario())


def test_tokens_of_equal_text_keep_values_of_their_own(tmp_path):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            tokenizer = one.worker.revisions.current.tokenizer
            tokenizer.vocabulary.texts[66] = tokenizer.vocabulary.texts[67] = "x"
            engine = await one.up(token=lambda submit, branch, position: 120)
            engine.others = lambda token: [(66, -0.1), (120, -0.2), (67, -0.3), (65, -0.4)]
            engine.logprob = lambda branch, position: -0.2
            engine.free_run = True
            got = await logprobs_of(one, {"prompt": "ab", "max_tokens": 1, "logprobs": 4}, False)
            assert got["top_logprobs"] == [{"token_id:66": -0.1, "x": -0.2, "token_id:67": -0.3, "A": -0.4}]

    run(scenario())
