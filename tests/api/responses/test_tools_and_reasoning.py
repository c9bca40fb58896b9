"""Calls and reasoning are items of their own, out and in again."""

from __future__ import annotations

import json

import pytest

from api.frontend_harness import run, stack
from api.responses.speech import checked_list, plain, respond, said, streamed, told
from lightllmd.api.dialects.responses.bodies import ResponsesBody
from lightllmd.dialogue.conventions import Conventions
from lightllmd.requests.constraint import Constraint
from lightllmd.text.chat_template import ChatTemplate

LOOK = {
    "type": "function",
    "name": "look",
    "description": "looks",
    "parameters": {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]},
    "strict": False,
}
NAP = {"type": "function", "name": "nap"}
CALLS = (
    'Let me see.<tool_call>\n{"name": "look", "arguments": {"at": "sky"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "nap", "arguments": {}}\n</tool_call>'
)
THINKING = "<think>\nwell, well\n</think>\n\nIt is blue."


def thinks(one, template: str = "<think></think>") -> None:
    """The model's template knows reasoning."""
    intake = one.worker.revisions.current.intake
    intake.__dict__["conventions"] = Conventions(ChatTemplate(template))


@pytest.mark.parametrize("stream", [False, True])
def test_calls_are_items_and_their_results_go_back(tmp_path, stream):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            (await one.up(token=said(CALLS, "It is blue."))).free_run = True

            async def ask(**body):
                return told(await streamed(one, **body)) if stream else await respond(one, **body)

            first = await ask(input="what colour is it?", tools=[LOOK, NAP])
            text, look, nap = first["output"]
            assert first["tools"] == [LOOK, NAP | {"description": None, "parameters": None, "strict": False}]
            assert text["content"][0]["text"] == "Let me see."
            assert [call["type"] for call in (look, nap)] == ["function_call"] * 2
            assert (look["name"], json.loads(look["arguments"])) == ("look", {"at": "sky"})
            assert (nap["name"], json.loads(nap["arguments"])) == ("nap", {})
            assert len({look["call_id"], nap["call_id"], look["id"], nap["id"]}) == 4
            assert first["status"] == look["status"] == "completed"

            results = [
                {"type": "function_call_output", "call_id": look["call_id"], "output": "blue"},
                {
                    "type": "function_call_output",
                    "call_id": nap["call_id"],
                    "output": [{"type": "input_text", "text": "zzz"}],
                },
            ]
            by_id = await ask(input=results, previous_response_id=first["id"], tools=[LOOK, NAP])
            user = {"role": "user", "content": "what colour is it?"}
            by_hand = await ask(input=[user, *first["output"], *results], tools=[LOOK, NAP])
            assert [one["output"][0]["content"][0]["text"] for one in (by_id, by_hand)] == ["It is blue."] * 2
            _, with_id, with_hand = one.engine.submits
            assert with_id.prompt_ids == with_hand.prompt_ids
            prompt = bytes(with_id.prompt_ids).decode()
            assert prompt.index("Let me see.") < prompt.index('"look"', prompt.index("Let me")) < prompt.index("blue")
            assert prompt.index("blue") < prompt.index("zzz")
            listed = await one.client.get(f"/v1/responses/{by_id['id']}/input_items", params={"order": "asc"})
            kinds = [item["type"] for item in checked_list(listed)["data"]]
            assert kinds == ["message", "message", *["function_call"] * 2, *["function_call_output"] * 2]

    run(scenario())


def test_a_call_that_is_cut_off_is_not_complete(tmp_path):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            (await one.up(token=said(CALLS))).free_run = True
            for cut in range(1, len(CALLS), 13):
                body = {"input": "x", "tools": [LOOK, NAP], "max_output_tokens": cut}
                whole = await respond(one, **body)
                assert plain(told(await streamed(one, **body))) == plain(whole)
                assert (whole["status"], whole["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
                assert {item["status"] for item in whole["output"][:-1]} <= {"completed"}
                calls = [item for item in whole["output"] if item["type"] == "function_call"]
                complete = [json.loads(call["arguments"]) for call in calls if call["status"] == "completed"]
                assert complete == [{"at": "sky"}, {}][: CALLS[:cut].count("}}")]
                assert {call["status"] for call in calls[len(complete) :]} <= {"incomplete"}

    run(scenario())


@pytest.mark.parametrize("summary", [None, "auto"])
def test_reasoning_is_an_item_before_the_answer(tmp_path, summary):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            thinks(one)
            (await one.up(token=said(THINKING, "yes"))).free_run = True
            body = {"input": "hi", "reasoning": {"effort": "low", "summary": summary}}
            whole = await respond(one, **body)
            reasoning, message = whole["output"]
            kind, field = ("summary_text", "summary") if summary else ("reasoning_text", "content")
            assert reasoning[field] == [{"type": kind, "text": "well, well"}]
            assert reasoning["content" if summary else "summary"] == []
            assert message["content"][0]["text"] == "It is blue."
            used = whole["usage"]["output_tokens_details"]["reasoning_tokens"]
            assert len("<think>\nwell, well") <= used <= len("<think>\nwell, well\n</think>")
            assert whole["reasoning"] == {"effort": "low", "summary": summary}

    run(scenario())


@pytest.mark.parametrize("summary", [None, "detailed"])
def test_a_stream_of_reasoning_says_what_the_whole_answer_says(tmp_path, summary):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            thinks(one)
            (await one.up(token=said(THINKING))).free_run = True
            body = {"input": "hi", "reasoning": {"summary": summary}}
            found = await streamed(one, **body)
            assert plain(told(found)) == plain(await respond(one, **body))
            part = "reasoning_summary_part" if summary else "content_part"
            text = "reasoning_summary_text" if summary else "reasoning_text"
            kinds = list(dict.fromkeys(event["type"].removeprefix("response.") for event in found))
            assert kinds[2:9] == [
                "output_item.added",
                f"{part}.added",
                f"{text}.delta",
                f"{text}.done",
                f"{part}.done",
                "output_item.done",
                *(["content_part.added"] if summary else ["output_text.delta"]),
            ]

    run(scenario())


def test_reasoning_that_comes_back_reaches_the_template(tmp_path):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            (await one.up(token=said("yes"))).free_run = True
            chats = []
            texts = one.worker.revisions.current.texts
            encode = texts.encode_chat

            async def noted(chat, *arguments, **options):
                chats.append(chat.messages)
                return await encode(chat, *arguments, **options)

            texts.encode_chat = noted
            thought = {"type": "reasoning", "id": "rs_1", "encrypted_content": "…", "status": "completed"}
            answer = {"role": "assistant", "content": "It is."}
            question = {"role": "user", "content": "x"}
            forms = (
                {"summary": [], "content": [{"type": "reasoning_text", "text": "well"}]},
                {"summary": [{"type": "summary_text", "text": "well"}]},
            )
            for form in forms:
                await respond(one, input=[question, thought | form, answer, question])
            thinking = {"role": "assistant", "content": "It is.", "reasoning_content": "well"}
            assert chats == [[question, thinking, question]] * 2

    run(scenario())


@pytest.mark.parametrize(
    ("choice", "mode", "names"),
    [
        (None, "auto", []),
        ("auto", "auto", []),
        ("none", "none", []),
        ("required", "required", []),
        ({"type": "function", "name": "nap"}, "required", ["nap"]),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "nap"}]}, "auto", ["nap"]),
    ],
)
def test_tool_choice_is_what_openai_says(choice, mode, names):
    body = {"input": "x", "tools": [LOOK, NAP], "tool_choice": choice, "parallel_tool_calls": False}
    dialogue = ResponsesBody.model_validate(body, context=set()).dialogue
    assert (dialogue.choice.mode, list(dialogue.choice.names), dialogue.parallel) == (mode, names, False)
    assert [(tool.name, tool.strict, tool.field) for tool in dialogue.tools] == [
        ("look", False, "tools.0"),
        ("nap", False, "tools.1"),
    ]


@pytest.mark.parametrize(
    ("form", "constraint"),
    [
        ({"type": "json_object"}, Constraint("json_object", "", "text.format")),
        (
            {"type": "json_schema", "name": "n", "schema": {"type": "object"}},
            Constraint("json_schema", '{"type":"object"}', "text.format.schema"),
        ),
    ],
)
def test_structured_text_reaches_the_engine_as_a_grammar(tmp_path, form, constraint):
    async def scenario():
        async with stack(tmp_path) as one:
            response = await respond(one, input="x", text={"format": form, "verbosity": "low"}, max_output_tokens=2)
            assert one.engine.submits[-1].params.grammar is not None
            body = ResponsesBody.model_validate({"input": "x", "text": {"format": form}}, context=set())
            assert body.constraint == constraint
            told = form | ({"description": None, "strict": False} if "schema" in form else {})
            assert response["text"] == {"format": told, "verbosity": "low"}

    run(scenario())
