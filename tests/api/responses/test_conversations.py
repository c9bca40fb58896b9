"""Conversations go on from what is kept, and no key reads what is of another."""

from __future__ import annotations

import threading

import httpx
import pytest

from api.frontend_harness import run, stack
from api.responses.speech import checked, checked_list, plain, respond, said, streamed
from lightllmd.api.dialects.responses import answering


def prompts(one) -> list[str]:
    return [bytes(submit.prompt_ids).decode() for submit in one.engine.submits]


async def speaking(one, *texts: str) -> None:
    (await one.up(token=said(*texts))).free_run = True


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_goes_on_from_the_one_before(tmp_path, stream):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            await speaking(one, "hello", "good", "bye")

            async def ask(**body) -> str:
                if stream:
                    return (await streamed(one, **body))[-1]["response"]["id"]
                return (await respond(one, **body))["id"]

            first = await ask(input="hi", instructions="be kind")
            second = await ask(input="how are you?", previous_response_id=first)
            await ask(input="so", previous_response_id=second, instructions="be short")
            await ask(input="again", previous_response_id=first)
            assert prompts(one) == [
                "system: be kind\nuser: hi\nassistant: ",
                "user: hi\nassistant: hello\nuser: how are you?\nassistant: ",
                "system: be short\nuser: hi\nassistant: hello\nuser: how are you?\nassistant: good\n"
                "user: so\nassistant: ",
                "user: hi\nassistant: hello\nuser: again\nassistant: ",
            ]

    run(scenario())


def test_a_kept_response_is_fetched_listed_and_deleted(tmp_path):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            await speaking(one, "hello", "good")
            first = await respond(one, input="hi", metadata={"a": "b"})
            parts = [{"type": "input_text", "text": "how"}, {"type": "input_text", "text": "are you?"}]
            items = [{"role": "user", "content": parts}, {"role": "developer", "content": "x", "id": "msg_mine"}]
            second = await respond(one, input=items, previous_response_id=first["id"])
            for response in (first, second):
                assert checked(await one.client.get(f"/v1/responses/{response['id']}")) == response

            path = f"/v1/responses/{second['id']}/input_items"
            listed = checked_list(await one.client.get(path, params={"order": "asc"}))
            shown = [(item["role"], [part["text"] for part in item["content"]]) for item in listed["data"]]
            assert shown == [
                ("user", ["hi"]),
                ("assistant", ["hello"]),
                ("user", ["how", "are you?"]),
                ("developer", ["x"]),
            ]
            ids = [item["id"] for item in listed["data"]]
            assert ids[1] == first["output"][0]["id"]
            assert ids[3] == "msg_mine"
            assert [item["id"] for item in (await one.client.get(path)).json()["data"]] == ids[::-1]
            page = checked_list(await one.client.get(path, params={"limit": 2, "after": ids[3]}))
            assert [item["id"] for item in page["data"]] == [ids[2], ids[1]]
            assert (page["first_id"], page["last_id"], page["has_more"]) == (ids[2], ids[1], True)

            answer = await one.client.delete(f"/v1/responses/{first['id']}")
            assert answer.json() == {"id": first["id"], "object": "response", "deleted": True}
            for request in (one.client.get, one.client.delete):
                assert (await request(f"/v1/responses/{first['id']}")).status_code == 404
            broken = await one.client.post("/v1/responses", json={"input": "x", "previous_response_id": second["id"]})
            assert (broken.status_code, broken.json()["error"]["code"]) == (400, "previous_response_not_found")
            assert f"the response '{first['id']}'" in broken.json()["error"]["message"]

    run(scenario())


def test_what_shall_not_be_kept_is_not(tmp_path):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            await speaking(one, "hello")
            response = await respond(one, input="hi", store=False)
            assert response["store"] is False
            assert (await one.client.get(f"/v1/responses/{response['id']}")).status_code == 404

    run(scenario())


def test_a_server_that_keeps_nothing_says_so(tmp_path):
    async def scenario():
        async with stack(tmp_path, stored_responses=0) as one:
            response = await respond(one, input="hi", max_output_tokens=1)
            assert (await one.client.get(f"/v1/responses/{response['id']}")).status_code == 404
            body = {"input": "x", "previous_response_id": response["id"]}
            error = (await one.client.post("/v1/responses", json=body)).json()["error"]
            assert "stored_responses = 0" in error["message"]
            assert not (tmp_path / "responses.sqlite").exists()

    run(scenario())


def test_one_key_s_responses_are_not_there_for_another(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("first-key\nsecond-key\n")

    async def scenario():
        async with stack(tmp_path, engine=False, api_keys_file=str(keys)) as one:
            await speaking(one, "hello")
            mine, other = ({"Authorization": f"Bearer {key}-key"} for key in ("first", "second"))
            body = {"input": "hi"}
            response = checked(await one.client.post("/v1/responses", json=body, headers=mine))
            path, item = f"/v1/responses/{response['id']}", response["output"][0]["id"]

            async def statuses(headers: dict[str, str]) -> list[int]:
                client: httpx.AsyncClient = one.client
                reference = [{"type": "item_reference", "id": item}, {"role": "user", "content": "x"}]
                answers = [
                    await client.get(path, headers=headers),
                    await client.get(f"{path}/input_items", headers=headers),
                    await client.post(f"{path}/cancel", headers=headers),
                    await client.post(
                        "/v1/responses", json=body | {"previous_response_id": response["id"]}, headers=headers
                    ),
                    await client.post("/v1/responses", json={"input": reference}, headers=headers),
                    await client.delete(path, headers=headers),
                ]
                return [answer.status_code for answer in answers]

            assert await statuses(other) == [404, 404, 404, 400, 400, 404]
            assert await statuses({}) == [401] * 6
            assert await statuses(mine) == [200, 200, 400, 200, 200, 200]

    run(scenario())


def test_items_that_are_kept_may_be_referred_to(tmp_path):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            await speaking(one, "hello", "good")
            first = await respond(one, input="hi")
            reference = {"type": "item_reference", "id": first["output"][0]["id"]}
            said_so = [{"role": "user", "content": "hi"}, reference, {"role": "user", "content": "go on"}]
            second = await respond(one, input=said_so)
            assert prompts(one)[1] == "user: hi\nassistant: hello\nuser: go on\nassistant: "
            # What is kept of it has the item itself.
            await one.client.delete(f"/v1/responses/{first['id']}")
            await respond(one, input="and?", previous_response_id=second["id"])
            assert prompts(one)[2] == prompts(one)[1] + "good\nuser: and?\nassistant: "
            # Without a type, as clients send it, too.
            again = [{"id": second["output"][0]["id"]}, {"role": "user", "content": "x"}]
            await respond(one, input=again)
            assert prompts(one)[3] == "assistant: good\nuser: x\nassistant: "

            answer = await one.client.post(
                "/v1/responses", json={"input": [{"type": "item_reference", "id": "msg_no"}]}
            )
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input.0.id")

    run(scenario())


def test_what_a_worker_kept_outlives_it(tmp_path):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            await speaking(one, "hello")
            first = await respond(one, input="hi")
        async with stack(tmp_path, engine=False) as one:
            await speaking(one, "good")
            await respond(one, input="x", previous_response_id=first["id"])
            assert prompts(one) == ["user: hi\nassistant: hello\nuser: x\nassistant: "]
            assert plain(checked(await one.client.get(f"/v1/responses/{first['id']}"))) == plain(first)

    run(scenario())


def test_a_conversation_larger_than_a_body_is_refused(tmp_path):
    async def scenario():
        async with stack(tmp_path, engine=False, max_body_bytes=4000) as one:
            await speaking(one, "hello")
            previous = None
            for _ in range(2):
                previous = (await respond(one, input="x" * 1000, previous_response_id=previous))["id"]
            answer = await one.client.post("/v1/responses", json={"input": "x", "previous_response_id": previous})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "previous_response_id")
            assert "more than 4000" in answer.json()["error"]["message"]

    run(scenario())


def test_a_conversation_that_is_too_long_goes_without_its_oldest_items_if_it_may(tmp_path):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            await speaking(one, "x" * 300)
            previous = None
            for number in range(9):
                body = {"input": f"{number}" * 300, "previous_response_id": previous, "instructions": "be kind"}
                previous = (await respond(one, **body, truncation="auto", max_output_tokens=900))["id"]
            last = prompts(one)[-1]
            assert last.startswith("system: be kind\nuser: 666")
            assert last.endswith("user: " + "8" * 300 + "\nassistant: ")
            assert len(last) + 900 <= 3072
            refused = await one.client.post("/v1/responses", json=body | {"truncation": "disabled"})
            assert "max_req_input_len = 2048" in refused.json()["error"]["message"]
            # What stays is the last user's message, which alone may be too long.
            long = await one.client.post("/v1/responses", json=body | {"truncation": "auto", "input": "y" * 3000})
            assert "max_req_input_len = 2048" in long.json()["error"]["message"]
            # All that is kept of the conversation is there still.
            listed = await one.client.get(f"/v1/responses/{previous}/input_items", params={"limit": 100})
            assert len(listed.json()["data"]) == 17

    run(scenario())


def test_a_large_conversation_is_read_and_kept_off_the_event_loop(tmp_path, monkeypatch):
    threads: dict[str, set[int]] = {}

    def noting(name: str) -> None:
        work = getattr(answering, name)

        def noted(*arguments):
            threads.setdefault(name, set()).add(threading.get_ident())
            return work(*arguments)

        monkeypatch.setattr(answering, name, noted)

    for name in ("conversation", "turns", "json_in_parts", "ResponseShape"):
        noting(name)

    async def scenario():
        async with stack(tmp_path, {"long_truncation_mode": "head"}, engine=False) as one:
            await speaking(one, "yes")
            text = "x" * 100_000
            first = await respond(one, input=text, instructions=text, max_output_tokens=5)
            threads.clear()
            again = [{"role": "user", "content": text}]
            await respond(one, input=again, previous_response_id=first["id"], instructions=text)
            assert len(threads) == 4
            assert threading.get_ident() not in set.union(*threads.values())

    run(scenario())
