"""Images in requests, in every dialect: one file in, the same spans out. What sees them is a fake."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from api.frontend_harness import Stack, expected, make_plan, run, stack, until
from fake_sight import TOKENS, FakeSight, key_of
from lightllmd.api.worker import ApiWorker
from lightllmd.errors import NotReady
from lightllmd.ipc.messages import Commit, Forget, ImageSpan

URL = "http://images.example/red.png"
DATA = "data:image/png;base64,aGVsbG8="
BASE64 = base64.b64encode(b"hello").decode()
PLACE = [0] * TOKENS


@asynccontextmanager
async def seeing(folder: Path, *, tokens: int = TOKENS, **options: Any) -> AsyncIterator[tuple[Stack, FakeSight]]:
    sight = FakeSight(tokens)
    with patch.object(ApiWorker, "_sight", lambda worker, number, plan: sight):
        async with stack(folder, plan=make_plan(sees=True, **options)) as one:
            yield one, sight


def span(start: int, content: str, tokens: int = TOKENS) -> ImageSpan:
    return ImageSpan(start, tokens, key_of(content))


def native(url: str, **body: Any) -> dict[str, Any]:
    kind = "url" if ":" in url else "base64"
    images = [{"type": kind, "data": url}]
    return {
        "inputs": "a <image> b",
        "parameters": {"max_new_tokens": 3},
        "multimodal_params": {"images": images},
        **body,
    }


def parts(url: str) -> list[dict[str, Any]]:
    return [{"type": "image_url", "image_url": {"url": url, "detail": "low"}}, {"type": "text", "text": "What?"}]


def openai(url: str, **body: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": parts(url)}], "max_tokens": 3, **body}


def responses(url: str, **body: Any) -> dict[str, Any]:
    content = [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": "What?"}]
    return {"input": [{"role": "user", "content": content}], "max_output_tokens": 3, **body}


def anthropic(url: str, **body: Any) -> dict[str, Any]:
    source = {"type": "url", "url": url} if ":" in url else {"type": "base64", "media_type": "image/png", "data": url}
    content = [{"type": "image", "source": source}, {"type": "text", "text": "What?"}]
    return {"messages": [{"role": "user", "content": content}], "model": "m", "max_tokens": 3, **body}


def tgi(url: str, **body: Any) -> dict[str, Any]:
    return {"inputs": f"a ![]({url}) b", "parameters": {"max_new_tokens": 3}, **body}


CHAT = b"user: ", b"\nWhat?\nassistant: "  # around the image, by the fake model's template
PROMPT = b"a ", b" b"

DIALECTS: dict[str, tuple[str, Callable[..., dict[str, Any]], tuple[bytes, bytes], dict[str, Any]]] = {
    "native": ("/generate", native, PROMPT, {}),
    "native, either": ("/", native, PROMPT, {}),
    "OpenAI": ("/v1/chat/completions", openai, CHAT, {}),
    "Responses": ("/v1/responses", responses, CHAT, {}),
    "Anthropic": ("/v1/messages", anthropic, CHAT, {}),
    "TGI": ("/generate", tgi, PROMPT, {"use_tgi_api": True}),
    "TGI's chat": ("/v1/chat/completions", openai, CHAT, {"use_tgi_api": True}),
}
USED: dict[str, Callable[[Any], int]] = {
    "native": lambda answer: answer["prompt_tokens"],
    "native, either": lambda answer: answer["prompt_tokens"],
    "OpenAI": lambda answer: answer["usage"]["prompt_tokens"],
    "Responses": lambda answer: answer["usage"]["input_tokens"],
    "Anthropic": lambda answer: answer["usage"]["input_tokens"],
    "TGI's chat": lambda answer: answer["usage"]["prompt_tokens"],
}


@pytest.mark.parametrize("params", [{}, {"use_tgi_api": True}], ids=str)
def test_an_image_is_a_span_of_the_prompt_in_every_dialect(params: dict[str, Any], tmp_path: Path) -> None:
    async def go() -> None:
        async with seeing(tmp_path, params=params) as (one, sight):
            for dialect, (path, body, (before, behind), needed) in DIALECTS.items():
                if needed != params:
                    continue
                kinds = [URL, DATA, "file:///srv/images/red%20one.png"]
                for url in [*kinds, *([BASE64] if body in (native, anthropic) else [])]:
                    answer = await one.client.post(path, json=body(url))
                    assert answer.status_code == 200, (dialect, answer.text)
                    submit = one.engines[0].submits[-1]
                    named = "/srv/images/red one.png" if url.startswith("file:") else url
                    assert submit.images == [span(len(before), named)]
                    assert submit.prompt_ids == [*before, *PLACE, *behind]
                    if dialect in USED:
                        assert USED[dialect](answer.json()) == len(submit.prompt_ids)
                    if dialect == "TGI":
                        assert answer.headers["x-prompt-tokens"] == str(len(submit.prompt_ids))
            assert [image.kind for image in sight.shown[:3]] == ["url", "data", "file"]
            assert not sight.held

    run(go())


def test_healing_takes_nothing_back_of_an_image(tmp_path: Path) -> None:
    """Though its tokens, which have id 0 here, are tokens of text, too."""

    async def go() -> None:
        params = {"token_healing_mode": True}
        async with seeing(tmp_path, params=params) as (one, _):
            for text, taken in (("a <image>", b""), ("a <image>b", b"b"), ("a <image>bcd", b"cd")):
                answer = await one.client.post("/generate", json=native(URL, inputs=text))
                assert answer.status_code == 200, answer.text
                submit = one.engines[0].submits[-1]
                assert submit.params.healing == taken
                assert submit.prompt_ids == [*b"a ", *PLACE, *text.partition(">")[2].encode().removesuffix(taken)]

    run(go())


STREAMS = {
    "native": ("/generate_stream", native, {}),
    "OpenAI": ("/v1/chat/completions", openai, {"stream": True}),
    "Responses": ("/v1/responses", responses, {"stream": True}),
    "Anthropic": ("/v1/messages", anthropic, {"stream": True}),
}


@pytest.mark.parametrize("dialect", STREAMS)
def test_a_stream_holds_its_images_until_it_ends_and_a_replay_has_them(dialect: str, tmp_path: Path) -> None:
    path, body, options = STREAMS[dialect]

    async def go() -> None:
        async with seeing(tmp_path) as (one, sight):
            engine = one.engines[0]
            engine.free_run = False
            asking = asyncio.create_task(one.client.post(path, json=body(URL, **options)))
            await engine.submitted(1)
            engine.step()
            await one.token()
            assert len(sight.held) == 1
            await one.kill()
            again = await one.up()
            await again.submitted(1)
            assert again.submits[0].images == engine.submits[0].images != []
            again.free_run = True
            answer = await asking
            assert answer.status_code == 200
            assert "data:" in answer.text
            assert not sight.held

    run(go())


def test_the_images_of_a_client_that_leaves_are_let_go(tmp_path: Path) -> None:
    async def go() -> None:
        async with seeing(tmp_path) as (one, sight):
            one.engines[0].free_run = False
            asking = asyncio.create_task(one.client.post("/generate", json=native(URL)))
            await one.engines[0].submitted(1)
            (seen,) = sight.held
            asking.cancel()
            async with asyncio.timeout(30):
                while sight.held:
                    await asyncio.sleep(0.005)
            assert seen.released

    run(go())


REFUSED: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "more tags than images": ("/generate", native(URL, inputs="<image> <image>"), "it has 2 image tags", {}),
    "no tag": ("/generate", native(URL, inputs="a"), "it has 0 image tags (<image>), the request 1 images", {}),
    "a tag without an image": ("/generate", {"inputs": "a <image>"}, "inputs: it has an image tag (<image>)", {}),
    "a scheme": ("/generate", native("ftp://x/y"), "multimodal_params.images.0.data: should be a URL", {}),
    "a file elsewhere": ("/generate", native("file://host/y"), "should be a URL of an image", {}),
    "a kind": (
        "/generate",
        native(URL, multimodal_params={"images": [{"type": "path", "data": "x"}]}),
        "multimodal_params.images.0.type",
        {},
    ),
    "audio": ("/generate", native(URL, multimodal_params={"audios": [{}]}), "takes no audio and no video", {}),
    "audio, OpenAI": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
        "messages.0.content.0.type: input_audio: this server takes no audio",
        {},
    ),
    "video, OpenAI": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "x"}}]}]},
        "this server takes no video",
        {},
    ),
    "an assistant's": (
        "/v1/chat/completions",
        {"messages": [{"role": "assistant", "content": parts(URL)}]},
        "an assistant shows no images",
        {},
    ),
    "audio, Responses": (
        "/v1/responses",
        {"input": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        "input.0.content.0.type: input_audio: this server takes no audio",
        {},
    ),
    "a file of OpenAI's": (
        "/v1/responses",
        {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "file-1"}]}]},
        "input.0.content.0.file_id: there are no files here",
        {},
    ),
    "a file of Anthropic's": (
        "/v1/messages",
        {
            "model": "m",
            "max_tokens": 1,
            "messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "file", "file_id": "f"}}]}],
        },
        "messages.0.content.0.source.type: sources of type 'file' are not available here",
        {},
    ),
    "too many": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": parts(URL) * 3}]},
        "messages.0.content.4.image_url.url: 3 images in a request, more than images.max_images = 2",
        {"images": {"max_images": 2}},
    ),
    "more than the cache": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": parts(URL) * 3}]},
        "3 images in a request, more than cache_capacity = 2",
        {"params": {"cache_capacity": 2}},
    ),
    "one that is broken": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [*parts(URL), *parts("http://x/broken")]}]},
        "messages.0.content.2.image_url.url: no image",
        {},
    ),
    "too long": (
        "/generate",
        native(URL),
        "This model's maximum context length is 8 tokens. However, your prompt resulted in 9 tokens",
        {"tokens": 5, "params": {"max_req_input_len": 8}},
    ),
    "an image that truncation would cut": (
        "/generate",
        native(URL),
        "inputs: to fit, the prompt would go without its tokens 0 to 3, and cut an image (tokens 2 to 9)",
        {"tokens": 8, "params": {"max_req_input_len": 8, "long_truncation_mode": "head"}},
    ),
    "pairs": (
        "/rerank",
        {"query": "q", "documents": [{"content": parts(URL)}]},
        "documents.0.content.0: image_url is not available yet",
        {"params": {"use_reward_model": True}},
    ),
}


OPTIONS = [{}, *(options for *_, options in REFUSED.values() if options)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_can_not_be_seen_is_a_400_that_says_why(options: dict[str, Any], tmp_path: Path) -> None:
    async def go() -> None:
        async with seeing(tmp_path, **options) as (one, sight):
            for name, (path, body, words, needed) in REFUSED.items():
                if needed != options:
                    continue
                answer = await one.client.post(path, json=body)
                assert answer.status_code == 400, (name, answer.text)
                assert words in answer.text.replace("\\u0027", "'"), name
            assert not sight.held
            assert not one.engines[0].submits

    run(go())


@pytest.mark.parametrize("params", [{}, {"use_tgi_api": True}], ids=str)
def test_images_where_none_are_served_are_a_400_that_says_how_to_switch_them_on(
    params: dict[str, Any], tmp_path: Path
) -> None:
    async def go() -> None:
        async with stack(tmp_path, params) as one:
            for dialect, (path, body, _, needed) in DIALECTS.items():
                if needed == params and dialect != "TGI":
                    answer = await one.client.post(path, json=body(URL))
                    assert answer.status_code == 400, dialect
                    assert "enable_multimodal is false; true or" in answer.text, dialect

    run(go())


def test_markdown_is_text_where_no_images_are_served(tmp_path: Path) -> None:
    async def go() -> None:
        async with stack(tmp_path, {"use_tgi_api": True}) as one:
            body = tgi(URL)
            answer = await one.client.post("/generate", json=body)
            assert answer.json()["generated_text"] == expected(body["inputs"], 3)

    run(go())


def test_a_tag_in_the_text_of_a_chat_is_text(tmp_path: Path) -> None:
    async def go() -> None:
        async with seeing(tmp_path) as (one, _):
            content = [{"type": "text", "text": "an <image> tag"}, *parts(URL)]
            answer = await one.client.post(
                "/v1/chat/completions", json={"messages": [{"role": "user", "content": content}], "max_tokens": 1}
            )
            assert answer.status_code == 200
            before = b"user: an <image> tag\n"
            assert one.engines[0].submits[0].images == [span(len(before), URL)]
            assert one.engines[0].submits[0].prompt_ids == [*before, *PLACE, *b"\nWhat?\nassistant: "]

    run(go())


def test_images_in_results_of_tools_are_seen(tmp_path: Path) -> None:
    async def go() -> None:
        async with seeing(tmp_path) as (one, sight):
            image = {"type": "image", "source": {"type": "base64", "data": BASE64}}
            result = {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "here"}, image]}
            call = {"type": "tool_use", "id": "t", "name": "look", "input": {}}
            messages = [
                {"role": "user", "content": "look"},
                {"role": "assistant", "content": [call]},
                {"role": "user", "content": [result, image]},
            ]
            body = {"model": "m", "max_tokens": 1, "messages": messages}
            answer = await one.client.post("/v1/messages", json=body)
            assert answer.status_code == 200, answer.text
            assert [image.field for image in sight.shown] == [
                "messages.2.content.0.content.1.source.data",
                "messages.2.content.1.source.data",
            ]
            submit = one.engines[0].submits[0]
            for one_span in submit.images:
                assert submit.prompt_ids[one_span.start :][:TOKENS] == PLACE
            assert len(submit.images) == 2

    run(go())


def test_tokens_of_images_are_counted_where_tokens_are(tmp_path: Path) -> None:
    length = len(CHAT[0]) + TOKENS + len(CHAT[1])

    async def go() -> None:
        async with seeing(tmp_path) as (one, sight):

            async def told(path: str, body: dict[str, Any]) -> Any:
                answer = await one.client.post(path, json=body)
                assert answer.status_code == 200, answer.text
                assert not sight.held
                return answer.json()

            images = native(URL)["multimodal_params"]
            assert await told("/tokens", {"text": "a <image> b", "multimodal_params": images}) == {"ntokens": 8}
            body = {name: value for name, value in anthropic(URL).items() if name != "max_tokens"}
            assert (await told("/v1/messages/count_tokens", body))["input_tokens"] == length
            assert (await told("/v1/responses/input_tokens", responses(URL)))["input_tokens"] == length
            shown = await told("/tokenize", {"messages": openai(URL)["messages"]})
            assert (shown["count"], len(shown["tokens"])) == (length, length)

    run(go())


def test_an_embedding_may_be_of_a_conversation_with_images(tmp_path: Path) -> None:
    async def go() -> None:
        async with seeing(tmp_path) as (one, sight):
            one.engines[0].labels = 0
            answer = await one.client.post("/v1/embeddings", json={"messages": openai(URL)["messages"]})
            assert answer.status_code == 200, answer.text
            assert one.engines[0].submits[0].images == [span(len(CHAT[0]), URL)]
            assert answer.json()["usage"]["prompt_tokens"] == len(one.engines[0].submits[0].prompt_ids)
            assert not sight.held

    run(go())


def test_a_conversation_that_goes_on_has_its_earlier_images(tmp_path: Path) -> None:
    async def go() -> None:
        async with seeing(tmp_path) as (one, _):
            first = (await one.client.post("/v1/responses", json=responses(URL))).json()
            body = {"input": "And now?", "previous_response_id": first["id"], "max_output_tokens": 1}
            answer = await one.client.post("/v1/responses", json=body)
            assert answer.status_code == 200, answer.text
            assert one.engines[0].submits[1].images == [span(len(CHAT[0]), URL)]
            shown = await one.client.get(f"/v1/responses/{first['id']}/input_items")
            assert shown.json()["data"][0]["content"][0] == {
                "type": "input_image",
                "detail": "auto",
                "image_url": URL,
            }

    run(go())


def test_what_truncation_leaves_out_whole_is_not_in_the_prompt(tmp_path: Path) -> None:
    async def go() -> None:
        async with seeing(tmp_path, params={"max_req_input_len": 6, "long_truncation_mode": "head"}) as (one, _):
            images = [{"type": "url", "data": URL}, {"type": "url", "data": DATA}]
            body = native(URL, inputs="<image>a<image>b", multimodal_params={"images": images})
            assert (await one.client.post("/generate", json=body)).status_code == 200
            submit = one.engines[0].submits[0]
            assert (submit.prompt_ids, submit.images) == ([*b"a", *PLACE, *b"b"], [span(1, DATA)])

    run(go())


def test_the_oldest_images_go_with_their_messages(tmp_path: Path) -> None:
    async def go() -> None:
        async with seeing(tmp_path, tokens=40, params={"max_req_input_len": 90}) as (one, _):
            turns = [responses(url)["input"][0] for url in (URL, DATA)]
            answer = {"role": "assistant", "content": "yes"}
            body = {"input": [turns[0], answer, turns[1]], "truncation": "auto", "max_output_tokens": 1}
            told = await one.client.post("/v1/responses", json=body)
            assert told.status_code == 200, told.text
            assert one.engines[0].submits[0].images == [span(len(CHAT[0]), DATA, 40)]

    run(go())


def test_a_stream_is_kept_alive_while_its_images_are_looked_at(tmp_path: Path) -> None:
    async def go() -> None:
        async with seeing(tmp_path, hold_keepalive=0.1) as (one, sight):
            for path, body, options in STREAMS.values():
                sight.looked = asyncio.Event()
                async with (
                    one.client.stream("POST", path, json=body(URL, **options)) as fine,
                    one.client.stream("POST", path, json=body(f"{URL}-broken", **options)) as refused,
                ):
                    pieces, faults = fine.aiter_text(), refused.aiter_text()
                    comments = [await anext(pieces), await anext(pieces), await anext(faults)]
                    assert set("".join(comments).split("\n\n")) == {": held", ""}
                    sight.looked.set()
                    assert "data:" in "".join([piece async for piece in pieces])
                    assert "no image" in "".join([piece async for piece in faults])
            sight.looked = None
            answer = await one.client.post("/generate_stream", json=native(f"{URL}-broken"))
            assert answer.status_code == 400  # where nothing was sent yet
            assert not sight.held

    run(go())


def test_images_that_are_lost_end_a_request_that_no_engine_has_had_them_for(tmp_path: Path) -> None:
    gone = NotReady("they can't be seen any more")

    async def go() -> None:
        async with seeing(tmp_path) as (one, sight):
            engine = one.engines[0]
            engine.free_run = False
            waits = asyncio.create_task(one.client.post("/generate", json=native(URL)))
            await until(lambda: len(engine.running) == 1)
            (first,) = sight.held
            first.lose(gone)
            answer = await waits
            assert answer.status_code == 503
            assert gone.message in answer.text
            await until(lambda: not engine.running)  # it is told, too
            bodies = [native(URL), native(DATA)]
            goes_on, replayed = (asyncio.create_task(one.client.post("/generate", json=body)) for body in bodies)
            await until(lambda: len(engine.running) == 2)
            engine.step()
            await until(lambda: all(entry.proven for entry in one.ledger.entries))
            for seen in list(sight.held):
                seen.lose(gone)
            first_request = min(engine.running)
            while first_request in engine.running:
                engine.step(only={first_request})
            done, _ = await asyncio.wait((goes_on, replayed), return_when=asyncio.FIRST_COMPLETED)
            assert [task.result().status_code for task in done] == [200]
            await one.kill()
            await one.up()
            (last,) = {goes_on, replayed} - done
            assert (await last).status_code == 503
            assert not sight.held

    run(go())


def test_a_reload_that_carries_requests_over_takes_their_images_along(tmp_path: Path) -> None:
    sights = {number: FakeSight() for number in (1, 2)}
    plan = make_plan(sees=True)

    async def go() -> None:
        with patch.object(ApiWorker, "_sight", lambda worker, number, plan: sights[number]):
            async with stack(tmp_path, plan=plan) as one:
                one.engines[0].free_run = False
                asking = asyncio.create_task(one.client.post("/generate", json=native(URL)))
                await one.engines[0].submitted(1)
                await one.prepare(2, plan)
                one.tell(Commit(2, True))
                engine = await one.up(2)
                await engine.submitted(1)
                assert engine.submits[0].images == one.engines[0].submits[0].images
                assert sights[1].successor is sights[2]
                assert not sights[1].closed
                one.tell(Forget(1, "it is over"))
                await until(lambda: sights[1].closed)
                engine.free_run = True
                assert (await asking).status_code == 200
                assert not sights[1].held

    run(go())
