"""The package `anthropic`, unchanged, against the front end: its own types, its helpers, its exceptions."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from api.frontend_harness import expected, make_plan, run, stack
from api.test_anthropic_messages import BLOCKS, BODY, GOOD, HI, PROMPT, TEXT, VERSION, events, post

anthropic = pytest.importorskip("anthropic", reason="pip install '.[clients]'")
from anthropic import types  # noqa: E402
from anthropic.types.shared import ErrorResponse  # noqa: E402
from pydantic import BaseModel, TypeAdapter  # noqa: E402

# The package's newest versions have no parameter for the temperature.
ASKED = {"model": "claude", "max_tokens": 5, "messages": HI, "extra_body": {"temperature": 0.0}}
EVENT = TypeAdapter(types.RawMessageStreamEvent)


def client(one: Any, **options: Any) -> Any:
    return anthropic.AsyncAnthropic(
        base_url=f"http://127.0.0.1:{one.port}", **{"api_key": "none", "max_retries": 0} | options
    )


def unknown(value: Any, path: str = "") -> Iterator[str]:
    """Fields that the package's types don't have."""
    if isinstance(value, BaseModel):
        yield from (f"{path}.{name}" for name in value.model_extra or ())
        for name in type(value).model_fields:
            yield from unknown(getattr(value, name), f"{path}.{name}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from unknown(item, f"{path}.{index}")


def test_every_answer_and_event_is_of_the_package_s_types(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            for case, fields in GOOD.items():
                answer = await post(one, BODY | fields)
                if "stream" in fields:
                    told = [EVENT.validate_python(event) for event in events(answer.text)]
                else:
                    told = [types.Message.model_validate_json(answer.content)]
                assert [*unknown(told)] == [], case
            refused = ErrorResponse.model_validate_json((await post(one, {})).content)
            assert [*unknown(refused)] == []
            page = (await one.client.get("/v1/models", headers=VERSION)).json()
            assert [*unknown([types.ModelInfo.model_validate(info) for info in page["data"]])] == []

    run(scenario())


def test_messages_whole_streamed_and_by_the_helper(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one, client(one) as ours:
            whole = await ours.messages.create(**ASKED)
            assert whole.content == [types.TextBlock(type="text", text=TEXT)]
            assert (whole.role, whole.stop_reason, whole.usage.output_tokens) == ("assistant", "max_tokens", 5)
            assert whole._request_id

            raw = [event async for event in await ours.messages.create(**ASKED, stream=True)]
            assert "".join(event.delta.text for event in raw if event.type == "content_block_delta") == TEXT

            async with ours.messages.stream(**ASKED, stop_sequences=[TEXT[3]]) as stream:
                assert "".join([text async for text in stream.text_stream]) == TEXT[:3]
                final = await stream.get_final_message()
            assert (final.stop_reason, final.stop_sequence) == ("stop_sequence", TEXT[3])
            assert (final.usage.input_tokens, final.usage.output_tokens) == (len(PROMPT), 4)

            counted = await ours.messages.count_tokens(model="m", messages=HI)
            assert counted.input_tokens == len(PROMPT)

            beta = await ours.beta.messages.create(**ASKED, betas=["context-1m-2025-08-07"])
            assert beta.content[0].text == TEXT

    run(scenario())


def test_a_conversation_goes_on_with_what_the_client_got(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one, client(one) as ours:
            conversation = [{"role": "user", "content": "hi"}]
            for _ in range(2):
                answer = await ours.messages.create(**ASKED | {"messages": conversation})
                conversation += [answer.to_param(), {"role": "user", "content": "more"}]
            prompt = f"user: hi\nassistant: {TEXT}\nuser: more\nassistant: "
            assert answer.content[0].text == expected(prompt, 5)
            await ours.messages.create(**ASKED | {"messages": BLOCKS, "system": "s"})

    run(scenario())


def test_models_are_listed_and_retrieved(tmp_path):
    async def scenario():
        async with stack(tmp_path, plan=make_plan(names=["fake-model", "b"])) as one, client(one) as ours:
            assert [model.id async for model in ours.models.list(limit=1)] == ["fake-model", "b"]
            assert (await ours.models.retrieve("b")).display_name == "b"
            with pytest.raises(anthropic.NotFoundError):
                await ours.models.retrieve("c")

    run(scenario())


def test_errors_are_the_package_s_exceptions(tmp_path):
    async def scenario():
        keys = tmp_path / "keys"
        keys.write_text("secret\n")
        async with stack(tmp_path, api_keys_file=str(keys), max_body_bytes=3000) as one:
            with pytest.raises(anthropic.AuthenticationError) as failed:
                await client(one).messages.create(**ASKED)
            assert failed.value.type == "authentication_error"
            assert failed.value.request_id
            for options in ({"api_key": "secret"}, {"api_key": None, "auth_token": "secret"}):
                assert (await client(one, **options).messages.create(**ASKED)).type == "message"
            # Older versions of the package send the key so.
            old = client(one, api_key="x", default_headers={"Authorization": anthropic.Omit(), "X-Api-Key": "secret"})
            assert (await old.messages.create(**ASKED)).type == "message"
            ours = client(one, api_key="secret")
            with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
                await ours.messages.create(**ASKED | {"messages": [{"role": "user", "content": "x" * 2500}]})
            with pytest.raises(anthropic.APIStatusError) as failed:
                await ours.messages.create(**ASKED | {"messages": [{"role": "user", "content": "x" * 4000}]})
            assert failed.value.status_code == 413
            one.worker.revisions.refuse("the daemon is stopping")
            with pytest.raises(anthropic.InternalServerError) as failed:
                await ours.messages.create(**ASKED)
            assert (failed.value.status_code, failed.value.type) == (529, "overloaded_error")

    run(scenario())


def test_an_error_within_a_stream_is_an_exception(tmp_path):
    async def scenario():
        async with stack(tmp_path, engine=False) as one, client(one) as ours:
            engine = await one.up()
            asking = asyncio.create_task(ours.messages.create(**ASKED, stream=True))
            await engine.submitted(1)
            engine.step()
            stream = await asking
            await one.kill()
            await one.expire(1)
            with pytest.raises(anthropic.APIStatusError) as failed:
                _ = [event async for event in stream]
            assert failed.value.type == "timeout_error"

    run(scenario())
