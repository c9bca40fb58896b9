"""/get_score: what is asked of a reward model gets its scores; what is asked of the other kind of server is refused."""

from __future__ import annotations

import asyncio

import pytest

from api.frontend_harness import make_plan, run, stack, until
from lightllmd.config.plan import Scoring
from lightllmd.engine.runners.fake_model import fake_score
from lightllmd.ipc import messages

ONE = Scoring(["LABEL_0"])
CHAT = "<user>Hi<assistant>Hello"


def test_a_templated_conversation_gets_the_score_of_its_last_token(tmp_path):
    async def scenario():
        async with stack(tmp_path, plan=make_plan(scoring=ONE)) as one:
            answer = await one.client.post("/get_score", json={"chat": CHAT, "parameters": {"top_k": 1}})
            assert answer.json() == {
                "score": fake_score(list(CHAT.encode())),
                "prompt_tokens": len(CHAT),
                "finish_reason": "stop",
            }
            assert answer.headers["x-lightllmd-ignored"] == "parameters"
            (submit,) = one.engine.submits
            assert submit.params == messages.PoolingParams()

    run(scenario())


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("steps", [False, True])
def test_several_labels_and_several_steps_are_lists(tmp_path, labels, steps):
    scoring = Scoring([f"LABEL_{number}" for number in range(labels)], marker=ord("#") if steps else None)

    async def scenario():
        async with stack(tmp_path, plan=make_plan(scoring=scoring)) as one:
            one.engine.labels = labels
            answer = await one.client.post("/get_score", json={"chat": "a#bc#d" if steps else CHAT})
            ends = [b"a#", b"a#bc#"] if steps else [CHAT.encode()]
            scores = [[fake_score(list(end), label) for label in range(labels)] for end in ends]
            scores = [each[0] for each in scores] if labels == 1 else scores
            assert answer.json()["score"] == (scores if steps else scores[0])

    run(scenario())


def test_a_prompt_without_the_token_that_is_scored_is_refused(tmp_path):
    async def scenario():
        async with stack(tmp_path, plan=make_plan(scoring=Scoring(["LABEL_0"], marker=35))) as one:
            answer = await one.client.post("/get_score", json={"chat": "abc"})
            assert (answer.status_code, answer.json()["message"]) == (
                400,
                "chat: this model scores a prompt at each token 35, of which it has none",
            )

    run(scenario())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"inputs": "a"}),
        ("/generate_stream", {"inputs": "a"}),
        ("/", {"inputs": "a"}),
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/completions", {"prompt": ["a", "b"], "stream": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ],
)
def test_a_reward_model_refuses_to_generate_by_name(tmp_path, path, body):
    async def scenario():
        async with stack(tmp_path, plan=make_plan(scoring=ONE)) as one:
            answer = await one.client.post(path, json=body)
            assert answer.status_code == 400
            assert "use_reward_model" in answer.text
            assert one.engine.submits == []

    run(scenario())


def test_a_model_that_generates_refuses_to_score_by_name(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            answer = await one.client.post("/get_score", json={"chat": CHAT})
            assert answer.status_code == 400
            assert "use_reward_model" in answer.json()["message"]

    run(scenario())


def test_what_was_not_answered_when_the_engine_died_is_asked_again_and_answered_once(tmp_path):
    async def scenario():
        async with stack(tmp_path, plan=make_plan(scoring=ONE), engine=False) as one:
            first = await one.up()
            answers = [one.client.post("/get_score", json={"chat": text}) for text in ("one", "two")]
            tasks = [asyncio.create_task(answer) for answer in answers]
            await first.submitted(2)
            answered = first.submits[0]
            first.step(only={answered.request})
            await until(lambda: any(task.done() for task in tasks))
            await one.kill()
            second = await one.up()
            await second.submitted(1)
            (again,) = second.submits
            assert (again.request, again.replay, again.emitted) == (first.submits[1].request, True, [[]])
            second.step()
            for task, text in zip(tasks, (b"one", b"two"), strict=True):
                assert (await task).json()["score"] == fake_score(list(text))

    run(scenario())


def test_the_health_probe_asks_a_reward_model_for_a_score(tmp_path):
    async def scenario():
        async with stack(tmp_path, plan=make_plan(scoring=ONE)) as one:
            one.tell(messages.Probe(7))
            assert (await one.answer(messages.Probed, 7)).error == ""
            (submit,) = one.engine.submits
            assert isinstance(submit.params, messages.PoolingParams)
            assert one.stats["ok"] == 0

    run(scenario())


def test_scores_that_are_no_numbers_are_an_error(tmp_path):
    async def scenario():
        async with stack(tmp_path, plan=make_plan(scoring=ONE), engine=False) as one:
            engine = await one.up()
            task = asyncio.create_task(one.client.post("/get_score", json={"chat": CHAT}))
            await engine.submitted(1)
            (submit,) = engine.submits
            output = messages.StepOutput(1, [], [], [], [], [], [], pooled=[messages.Pooled(submit.request, None)])
            engine.socket.send(0, 1, output)
            answer = await task
            assert answer.status_code == 500
            assert "NaN" in answer.json()["message"]

    run(scenario())
