"""What a request says of its tokens reaches the engine under every dialect's names, and the next engine too."""

from __future__ import annotations

import asyncio

import pytest

from api.frontend_harness import EOS, expected, fake_tokens, frames, run, stack
from lightllmd.errors import InvalidRequest
from lightllmd.requests.bad_words import bad_word_ids
from lightllmd.text import ByteTokenizer, Tokenizer
from lightllmd.text.ids import IdTokenizer
from lightllmd.text.spm import BYTE, CONTROL, NORMAL, UNKNOWN, Manner, PieceModel, PieceTokenizer, converted_encoder

FIELDS = {
    "logit_bias": {"65": -100, "66": 2.5},
    "allowed_token_ids": [66, 65, 66, EOS],
    "bad_words": [[65], [65, 66]],
    "disable_prompt_cache": True,
    "typical_p": 0.25,
}
ROUTES = {
    "generate": ("/generate", lambda fields: {"inputs": "x", "parameters": fields | {"max_new_tokens": 2}}),
    "completions": ("/v1/completions", lambda fields: {"prompt": "x", "max_tokens": 2} | fields),
    "chat": (
        "/v1/chat/completions",
        lambda fields: {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2} | fields,
    ),
}


def pieces() -> Tokenizer:
    """As Llama 2's: a space is put before a text and taken away from the answer."""
    words = ["a", "b", "d", "ba", "bad", "w", "▁", "▁bad", "▁w"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    kinds = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(words)
    model = PieceModel(names, [-float(rank) for rank in range(len(names))], kinds)
    return PieceTokenizer(model, converted_encoder(model), Manner(), bos_id=1, eos_ids=[2])


@pytest.mark.parametrize("route", ROUTES)
def test_they_reach_the_engine_and_the_one_after_it(tmp_path, route):
    path, body = ROUTES[route]

    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            engine = await one.up()
            answer = asyncio.create_task(one.client.post(path, json=body(FIELDS)))
            for _ in range(2):
                await engine.submitted(1)
                params = engine.submits[0].params
                assert params.logit_bias == {65: -100.0, 66: 2.5}
                assert params.allowed_token_ids == [65, 66, EOS]
                assert params.bad_words == [[65], [65, 66]]
                assert params.typical_p == 0.25
                assert (params.use_cache, params.prompt_logprobs, params.length_penalty) == (False, -1, 1.0)
                await one.kill()
                engine = await one.up()
            engine.free_run = True
            assert (await answer).status_code == 200
            await one.client.post(path, json=body({"bad_words": ["no"], "logit_bias": None}))
            params = engine.submits[-1].params
            assert (params.bad_words, params.logit_bias, params.use_cache) == ([list(b"no")], {}, True)

    run(scenario())


@pytest.mark.parametrize("route", ROUTES)
def test_length_penalty_is_for_servers_with_beams(tmp_path, route):
    path, body = ROUTES[route]

    async def scenario():
        async with stack(tmp_path, {"beam_mode": True}) as one:
            answer = await one.client.post(path, json=body({"n": 2, "length_penalty": -0.5}))
            assert answer.status_code == 200, answer.text
            assert one.engine.submits[-1].params.length_penalty == -0.5
            if route != "generate":
                for given, status in ((True, 200), (False, 400), (None, 200)):
                    answer = await one.client.post(path, json=body({"n": 2, "use_beam_search": given}))
                    assert answer.status_code == status

    run(scenario())


# --- bad words given as texts -----------------------------------------------------------------------------------------


def written(tokenizer: Tokenizer, text: str, special: bool = True) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=special)


def contains(ids: list[int], word: list[int]) -> bool:
    return any(ids[at : at + len(word)] == word for at in range(len(ids)))


@pytest.mark.parametrize("tokenizer", [pieces(), ByteTokenizer()], ids=["sentencepiece", "bytes"])
@pytest.mark.parametrize("word", ["bad", "  bad", "é", "b", "bad bad", "\n"])
def test_a_bad_text_is_found_wherever_it_is_written(tokenizer, word):
    found = bad_word_ids([word], "bad_words", tokenizer)
    for text in ("{}", "w {}", "w {} w", "\n{}", "(¤{}", "w\n {}."):
        whole = text.format(word.lstrip() or word)
        assert any(contains(written(tokenizer, whole), ids) for ids in found), whole
    assert not any(contains(written(tokenizer, "w da ¤"), ids) for ids in found)


def test_a_bad_text_needs_no_longer_sequence_than_the_one_that_all_end_in():
    """A sequence of several tokens is dearer to prevent than a single one."""
    assert bad_word_ids(["b", "x"], "bad_words", ByteTokenizer()) == [[98], [120]]
    tokenizer = pieces()
    names = [[tokenizer.id_to_token(token) for token in ids] for ids in bad_word_ids(["bad"], "bad_words", tokenizer)]
    assert names == [["▁bad"], ["bad"]]


def test_a_bad_text_without_tokens_is_refused_by_its_number():
    assert bad_word_ids(["17 4", "5"], "bad_words", IdTokenizer(20)) == [[17, 4], [5]]
    with pytest.raises(InvalidRequest, match=r"bad_words\.1: ' ' has no tokens"):
        bad_word_ids(["5", " "], "bad_words", IdTokenizer(20))


# --- several sequences ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["diverse_mode", "beam_mode", None])
def test_tokens_have_cumulative_logprobs_where_sequences_belong_together(tmp_path, mode):
    async def scenario():
        async with stack(tmp_path, {mode: True} if mode else {}) as one:
            several = (await one.generate("x", max_new_tokens=3, n=2, return_details=True)).json()["tokens"]
            single = (await one.generate("x", max_new_tokens=3, return_details=True)).json()["tokens"]
            for tokens in several:
                totals = [token.get("cumlogprob") for token in tokens]
                assert totals == ([-0.5, -1.0, -1.5] if mode else [None] * 3)
            assert all("cumlogprob" not in token for token in single)

    run(scenario())


@pytest.mark.parametrize(("beams", "shown"), [(True, [0, 1]), (False, [2, 1])])
def test_best_of_gives_the_first_beams_and_the_likeliest_samples(tmp_path, beams, shown):
    """Beams come best first, whatever their tokens' sum says; samples are ranked by the mean per token."""

    def token(submit, branch, position):
        return EOS if branch == 2 and position == 1 else fake_tokens(submit, branch, position)

    async def scenario():
        async with stack(tmp_path, {"beam_mode": beams}, engine=False) as one:
            engine = await one.up(token=token)
            engine.logprob = lambda branch, position: (-0.5, -0.3, -0.2)[branch]
            engine.free_run = True
            body = {"prompt": "x", "max_tokens": 4, "n": 2, "best_of": 3, "temperature": 0, "stop": "\x00"}
            choices = (await one.client.post("/v1/completions", json=body)).json()["choices"]
            texts = [expected("x", 4, branch=0), expected("x", 4, branch=1), expected("x", 1, branch=2)]
            assert [choice["text"] for choice in choices] == [texts[branch] for branch in shown]
            assert [choice["index"] for choice in choices] == [0, 1]

    run(scenario())


def test_a_stream_shows_beams_when_they_are_decided(tmp_path):
    """All tokens of all beams come in one message, at the end."""

    async def scenario():
        async with stack(tmp_path, {"beam_mode": True}, engine=False) as one:
            engine = await one.up()
            body = {
                "messages": [{"role": "user", "content": "hi"}],
                "n": 3,
                "max_tokens": 4,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            answer = asyncio.create_task(one.client.post("/v1/chat/completions", json=body))
            await engine.submitted(1)
            engine.step(at_once=4)
            got = frames((await answer).text)
            texts, ends = [""] * 3, []
            for frame in got:
                for choice in frame["choices"]:
                    texts[choice["index"]] += choice["delta"].get("content", "")
                    ends += [choice["finish_reason"]] if choice["finish_reason"] else []
            prompt = "user: hi\nassistant: "
            assert texts == [expected(prompt, 4, branch=branch) for branch in range(3)]
            assert ends == ["length"] * 3
            assert got[-1]["usage"]["completion_tokens"] == 12

    run(scenario())


def test_beams_count_towards_the_slots_that_a_request_may_need(tmp_path):
    async def scenario():
        limits = {"beam_mode": True, "max_req_input_len": 100, "max_req_total_len": 3000}
        async with stack(tmp_path, limits) as one:
            refused = await one.generate("x", n=4, max_new_tokens=1500)
            assert "6001 tokens (1 in the prompt, 6000 in the completion of 4 beams)" in refused.json()["message"]
            assert (await one.generate("x", n=4, max_new_tokens=1499)).status_code == 200
            chat = {"messages": [{"role": "user", "content": "x"}], "n": 4}
            answer = await one.client.post("/v1/chat/completions", json=chat)
            submit = one.engine.submits[-1]
            assert submit.params.max_new_tokens == (6000 - 1 - len(submit.prompt_ids)) // 4
            assert answer.json()["usage"]["completion_tokens"] == 4 * submit.params.max_new_tokens

    run(scenario())


# --- the prompt cache -------------------------------------------------------------------------------------------------


def test_cached_tokens_are_told_in_details_usage_and_metrics(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            one.engine.cached = 3
            body = (await one.generate("abcd", max_new_tokens=2, return_details=True)).json()
            assert [token["prompt_cache_len"] for token in body["tokens"]] == [3, 3]
            prompts = {"prompt": ["abcd", "abcdef"], "max_tokens": 2}
            usage = (await one.client.post("/v1/completions", json=prompts)).json()["usage"]
            assert (usage["prompt_tokens"], usage["prompt_tokens_details"]) == (10, {"cached_tokens": 6})
            stream = prompts | {"stream": True, "stream_options": {"include_usage": True}}
            last = frames((await one.client.post("/v1/completions", json=stream)).text)[-1]
            assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 6}
            registry = one.worker._accounts._metrics.registry
            assert registry.get_sample_value("lightllm_cache_length_sum") == 15.0
            assert registry.get_sample_value("lightllm_cache_ratio_count") == 5.0
            assert registry.get_sample_value("lightllm_cache_ratio_sum") == pytest.approx(3 * 3 / 4 + 2 * 3 / 6)

    run(scenario())


# --- long prompts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 6])
@pytest.mark.parametrize("mode", ["head", "center"])
def test_every_route_cuts_a_long_prompt_alike_and_counts_what_is_left(tmp_path, mode, limit):
    text = "abcdefghijk"

    def cut(ids):
        half = limit // 2
        return ids[-limit:] if mode == "head" else ids[:half] + ids[len(ids) - (limit - half) :]

    async def scenario():
        async with stack(tmp_path, {"long_truncation_mode": mode, "max_req_input_len": limit}) as one:
            rendered = list(f"user: {text}\nassistant: ".encode())
            for path, body, whole in (
                ("/generate", {"inputs": text}, list(text.encode())),
                ("/v1/completions", {"prompt": text, "max_tokens": 2}, list(text.encode())),
                ("/v1/completions", {"prompt": list(range(30)), "max_tokens": 2}, list(range(30))),
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], "max_tokens": 2}, rendered),
            ):
                answer = (await one.client.post(path, json=body)).json()
                assert one.engine.submits[-1].prompt_ids == cut(whole)
                counted = answer["prompt_tokens"] if path == "/generate" else answer["usage"]["prompt_tokens"]
                assert counted == limit
            fits = text[:limit]
            await one.generate(fits)
            assert bytes(one.engine.submits[-1].prompt_ids) == fits.encode()
            echoed = {"prompt": text, "max_tokens": 1, "echo": True, "temperature": 0}
            answer = (await one.client.post("/v1/completions", json=echoed)).json()
            left = bytes(cut(list(text.encode()))).decode()
            assert answer["choices"][0]["text"] == left + expected(left, 1)

    run(scenario())


# --- healing ----------------------------------------------------------------------------------------------------------


def test_a_text_is_healed_and_the_answer_hides_what_the_prompt_had(tmp_path):
    """The engine writes the two bytes that were taken back, then its own."""

    def token(submit, branch, position):
        return (submit.params.healing + b"ld!!!")[position]

    async def scenario():
        async with stack(tmp_path, {"token_healing_mode": True}, engine=False) as one:
            engine = await one.up(token=token)
            engine.free_run = True
            native = (await one.generate("hello wor", max_new_tokens=5, return_details=True)).json()
            params = engine.submits[-1]
            assert (bytes(params.prompt_ids), params.params.healing) == (b"hello w", b"or")
            assert (native["generated_text"], native["prompt_tokens"]) == (["ld!"], 9)
            assert native["count_output_tokens"] == 5
            assert {token["prompt_tokens"] for token in native["tokens"]} == {9}
            stream = await one.client.post(
                "/generate_stream", json={"inputs": "hello wor", "parameters": {"max_new_tokens": 5}}
            )
            assert "".join(frame["token"]["text"] for frame in frames(stream.text)) == "ld!"
            body = {"prompt": ["hello wor", "a"], "max_tokens": 5, "echo": True, "n": 2}
            answer = (await one.client.post("/v1/completions", json=body | {"stop": "zzz"})).json()
            texts = [choice["text"] for choice in answer["choices"]]
            assert texts[:2] == ["hello world!"] * 2
            assert [bytes(submit.prompt_ids) for submit in engine.submits[-2:]] == [b"hello w", b"a"]
            assert answer["usage"]["prompt_tokens"] == 10

    run(scenario())


def test_only_texts_that_the_answer_continues_are_healed(tmp_path):
    """No conversation, no token ids, and nothing of which log-probabilities are asked for: those are of the prompt as
    it was given."""

    async def scenario():
        async with stack(tmp_path, {"token_healing_mode": True}) as one:
            for path, body in (
                ("/v1/completions", {"prompt": list(b"hello"), "max_tokens": 3}),
                ("/v1/completions", {"prompt": "hello", "max_tokens": 3, "prompt_logprobs": 0}),
                ("/v1/completions", {"prompt": "hello", "max_tokens": 3, "echo": True, "logprobs": 1}),
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}),
                ("/generate", {"inputs": "hello", "parameters": {"prompt_logprobs": 1}}),
            ):
                answer = await one.client.post(path, json=body)
                assert answer.status_code == 200, answer.text
                submit = one.engine.submits[-1]
                assert submit.params.healing == b""
                assert bytes(submit.prompt_ids) in (b"hello", b"user: hello\nassistant: ")

    run(scenario())


def test_a_long_prompt_is_cut_first_and_healed_then(tmp_path):
    async def scenario():
        params = {"token_healing_mode": True, "long_truncation_mode": "head", "max_req_input_len": 5}
        async with stack(tmp_path, params) as one:
            body = (await one.generate("hello wor", max_new_tokens=4)).json()
            submit = one.engine.submits[-1]
            assert (bytes(submit.prompt_ids), submit.params.healing) == (b"o w", b"or")
            assert body["prompt_tokens"] == 5

    run(scenario())


def test_a_healed_request_goes_on_in_the_next_engine(tmp_path):
    text = b"orld of ours"

    async def scenario():
        async with stack(tmp_path, {"token_healing_mode": True}, engine=False) as one:
            engine = await one.up(token=lambda submit, branch, position: text[position])
            answer = asyncio.create_task(one.generate("hello wor", max_new_tokens=8))
            await engine.submitted(1)
            engine.step()
            await one.token()
            await one.kill()
            engine = await one.up(token=lambda submit, branch, position: text[position])
            engine.free_run = True
            assert (await answer).json()["generated_text"] == ["ld of "]
            assert [bytes(emitted) for emitted in engine.submits[0].emitted] == [b"o"]

    run(scenario())
