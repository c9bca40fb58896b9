"""A front end whose model brings its own tokenizer: it is asked in its own process, and what it does wrong costs the
request that made it do so."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
import pytest

from api.frontend_harness import Stack, expected, frames, make_plan, run, stack, until
from lightllmd.api.helpers import pool as helpers
from lightllmd.config.plan import Plan, encode_plan
from lightllmd.ipc import messages
from remote_checkpoints import TOKENIZER_CODE, remote_facts, write_tokenizer


def plan_of(folder: Path, **params: Any) -> Plan:
    return msgspec.structs.replace(make_plan(params), model=remote_facts(folder))


def hosts(one: Stack) -> list[psutil.Process]:
    """The processes that have loaded the tokenizer, and the helpers that they forked."""
    found = []
    for guard in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it has just ended
            if "lightllmd.code_host" in guard.cmdline():
                found += guard.children(recursive=True)
    return found


def chat(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 2}


def test_everything_that_needs_a_tokenizer_works(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "m")

    async def scenario() -> None:
        async with stack(tmp_path, plan=plan_of(folder)) as one:
            texts = one.worker.revisions.current.texts
            here: list[str] = []
            one.worker.revisions.current.tokenizer._encode = lambda *_: here.append("encode")  # type: ignore[method-assign, assignment, func-returns-value]
            for prompt in ("né", "x" * 1500, "y" * 100_000):
                answer = await one.generate(prompt, max_new_tokens=3)
                if len(prompt) > 2048:
                    assert answer.status_code == 400
                    assert "max_req_input_len" in answer.json()["message"]
                else:
                    assert one.engine.submits[-1].prompt_ids == [ord(letter) for letter in prompt]
            assert (await one.generate("prompt", max_new_tokens=8)).json()["generated_text"] == [expected("prompt", 8)]

            streamed = await one.client.post("/generate_stream", json={"inputs": "ab", "parameters": {}})
            assert "".join(frame["token"]["text"] for frame in frames(streamed.text)) == expected("ab", 16)

            stop = expected("stop", 8)[3:5]
            stopped = await one.generate("stop", max_new_tokens=8, stop_sequences=[stop])
            assert stopped.json()["generated_text"] == [expected("stop", 8).partition(stop)[0] + stop]

            bad = await one.client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2, "bad_words": ["zq"]})
            assert bad.status_code == 200, bad.text
            assert [122, 113] in one.engine.submits[-1].params.bad_words

            told = await one.client.post("/v1/chat/completions", json=chat("Hi<end>"))
            assert told.status_code == 200, told.text
            assert one.engine.submits[-1].prompt_ids == [*b"user=Hi", 256, *b";"]
            counted = await one.client.post("/tokens", json={"text": "four"})
            assert counted.json() == {"ntokens": 4}
            tokenized = (await one.client.post("/tokenize", json={"prompt": "hi", "return_token_strs": True})).json()
            assert (tokenized["tokens"], tokenized["token_strs"]) == ([104, 105], ["t104", "t105"])
            detokenized = await one.client.post("/detokenize", json={"tokens": [104, 105, 256]})
            assert detokenized.json() == {"prompt": "hi<end>"}
            told = (await one.client.get("/tokenizer_info")).json()
            assert told["eos_token"] == "<end>"
            assert "message.content" in told["chat_template"]
            assert here == []
            assert texts.encoders is not texts.processes
        assert not [name for name in sys.modules if "tokenization_odd" in name]

    run(scenario())


# A text that makes the tokenizer do it, the answer's status, and a part of what is said.
HOSTILE = {
    "HANG": (400, "takes more than"),
    "SPIN": (400, "takes more than"),
    "EXIT": (400, "takes more than"),
    "LEAVE": (400, "takes more than"),
    "HOARD": (400, "512 MB of memory"),
    "RAISE": (500, "the model's own tokenizer can't encode this: KeyError: 'odd'"),
    "PRINT": (200, ""),
    "FORK": (200, ""),
}


def test_what_it_does_wrong_costs_that_request_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(helpers.CPU_SECONDS, helpers.LIGHT, 0.2)
    folder = write_tokenizer(tmp_path / "m")

    async def scenario() -> None:
        async with stack(tmp_path, plan=plan_of(folder)) as one:
            for word, (status, said) in HOSTILE.items():
                asked = asyncio.create_task(one.generate(word, max_new_tokens=1))
                while not asked.done():
                    answer = await one.generate("p", max_new_tokens=2)
                    assert answer.json().get("generated_text") == [expected("p", 2)], (word, answer.text)
                assert asked.result().status_code == status, (word, asked.result().text)
                assert said in asked.result().json().get("message", ""), word
            await until(lambda: len(hosts(one)) <= 2)  # the host and one helper: what was forked is gone

    run(scenario())


def test_one_that_is_killed_is_started_again_and_requests_wait_for_it(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "m")

    async def scenario() -> None:
        async with stack(tmp_path, plan=plan_of(folder)) as one:
            for _ in range(2):
                for process in hosts(one):
                    process.kill()
                answers = await asyncio.gather(*(one.generate("prompt", max_new_tokens=4) for _ in range(4)))
                assert [answer.json()["generated_text"] for answer in answers] == [[expected("prompt", 4)]] * 4
            assert len(hosts(one)) <= 1 + 2

    run(scenario())


def test_one_that_is_killed_and_was_changed_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "m")

    async def scenario() -> None:
        async with stack(tmp_path, plan=plan_of(folder)) as one:
            (folder / "tokenization_odd.py").write_text(f"{TOKENIZER_CODE}\n# another\n")
            assert (await one.generate("prompt", max_new_tokens=2)).status_code == 200
            for process in hosts(one):
                process.kill()
            for _ in range(2):
                answer = await one.generate("prompt", max_new_tokens=2)
                assert answer.status_code == 503
                assert f"{folder}/tokenization_odd.py changed since the model was planned" in answer.json()["message"]
            await until(lambda: not hosts(one))
            ids = await one.client.post("/v1/completions", json={"prompt": [1, 2], "max_tokens": 2})
            assert ids.status_code == 200  # needs no tokenizer

    run(scenario())


@pytest.mark.parametrize("first", ["raise RuntimeError('odd')", "import os; os._exit(3)"])
def test_a_revision_whose_tokenizer_can_not_be_loaded_is_not_prepared(tmp_path: Path, first: str) -> None:
    folder = write_tokenizer(tmp_path / "m", f"{first}\n{TOKENIZER_CODE}")

    async def scenario() -> None:
        async with stack(tmp_path) as one:
            one.tell(messages.Prepare(2, encode_plan(plan_of(folder))))
            prepared = await one.answer(messages.Prepared, 2)
            assert "running the code that it brings, tokenization_odd.OddTokenizer, failed" in prepared.error
            await until(lambda: not hosts(one))
            assert (await one.generate("p", max_new_tokens=2)).json()["generated_text"] == [expected("p", 2)]

    run(scenario())


def test_its_process_ends_with_its_revision(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "m")

    async def scenario() -> None:
        async with stack(tmp_path, plan=plan_of(folder)) as one:
            await one.prepare(2, plan_of(folder))
            assert len(hosts(one)) == 2
            (await one.up(revision=2)).free_run = True
            one.tell(messages.Commit(2))
            await until(lambda: one.worker.revisions.number == 2)
            one.tell(messages.Forget(1, "replaced"))
            await until(lambda: len(hosts(one)) == 1)
            assert (await one.generate("p", max_new_tokens=2)).json()["generated_text"] == [expected("p", 2)]

    run(scenario())


def test_a_worker_stops_while_one_is_being_started(tmp_path: Path) -> None:
    folder = write_tokenizer(
        tmp_path / "m",
        f"import os\nif os.path.exists('{tmp_path}/slow'):\n    import time\n    time.sleep(1e6)\n{TOKENIZER_CODE}",
    )

    async def scenario() -> None:
        async with stack(tmp_path, plan=plan_of(folder)) as one:
            (tmp_path / "slow").touch()
            for process in hosts(one):
                process.kill()
            asked = asyncio.create_task(one.generate("p", max_new_tokens=2))
            await until(lambda: hosts(one))
            began = time.monotonic()
        assert time.monotonic() - began < 60, "it doesn't wait for ever"
        assert isinstance((await asyncio.gather(asked, return_exceptions=True))[0], Exception | httpx.Response)

    run(scenario())
    assert os.path.exists(folder)
