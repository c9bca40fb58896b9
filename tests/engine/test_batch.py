"""A batch file loses no line and answers none twice, whatever is wrong with others and wherever it broke off."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fake_embeddings import fake_embedding
from lightllmd import LLM
from lightllmd.batch import __main__ as command
from lightllmd.batch import run
from lightllmd.batch.run import BatchCounts, run_batch
from lightllmd.engine.runners.fake_model import fake_token
from lightllmd.errors import EngineError
from lightllmd.ipc.messages import PoolingParams

FAKE = {"engine": {"backend": "fake"}, "progress": False}


def line(custom_id: str, url: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def write(path: Path, lines: Sequence[dict[str, Any] | str]) -> Path:
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines))
    return path


def told(path: Path) -> list[dict[str, Any]]:
    return [json.loads(one) for one in path.read_text().splitlines()]


def text(prompt: str, count: int) -> str:
    return bytes(fake_token(list(prompt.encode()), 0, 0, position) for position in range(count)).decode()


def completion(custom_id: str, prompt: str, count: int = 3) -> dict[str, Any]:
    return line(custom_id, "/v1/completions", prompt=prompt, max_tokens=count, temperature=0)


def test_each_line_gets_what_its_route_answers_and_a_wrong_one_its_error(tmp_path: Path) -> None:
    source = write(
        tmp_path / "in",
        [
            completion("text", "hello"),
            line("several", "/v1/completions", prompt=["a", "b"], n=2, max_tokens=2, temperature=0),
            line("chat", "/v1/chat/completions", messages=[{"role": "user", "content": "hi"}], max_tokens=4),
            line("vectors", "/v1/embeddings", input=["Hi", "H"], encoding_format="float"),
            "{not json",
            "",
            json.dumps({"custom_id": "no body", "url": "/v1/completions"}),
            line("elsewhere", "/v1/images", prompt="x"),
            line("stream", "/v1/completions", prompt="x", stream=True),
            line("wrong", "/v1/completions", prompt="x", temperature=-1),
            line("no prompt", "/v1/embeddings", input=""),
            completion("text", "another of the same id"),
        ],
    )
    with LLM(**FAKE) as llm:
        counts = run_batch(llm, source, tmp_path / "out", progress=False)
    assert counts == BatchCounts(total=11, completed=4, failed=6, skipped=1)
    lines = told(tmp_path / "out")
    assert all(set(one) == {"id", "custom_id", "response", "error"} for one in lines)
    assert len({one["id"] for one in lines}) == len(lines) == 10
    by_id = {one["custom_id"]: one["response"] for one in lines if one["custom_id"]}
    good = {name: by_id[name]["body"] for name in ("text", "several", "chat", "vectors")}
    assert all(by_id[name]["status_code"] == 200 for name in good)
    assert good["text"]["choices"][0]["text"] == text("hello", 3)
    assert good["text"]["usage"]["completion_tokens"] == 3
    assert [one["index"] for one in good["several"]["choices"]] == [0, 1, 2, 3]
    assert good["several"]["choices"][2]["text"] == text("b", 2)
    assert good["chat"]["object"] == "chat.completion"
    assert len(good["chat"]["choices"][0]["message"]["content"]) == 4
    unit = PoolingParams(unit=True)
    assert good["vectors"]["data"][1]["embedding"] == pytest.approx(fake_embedding([72], unit), abs=1e-6)
    for name, words in {
        "elsewhere": "line 8: POST /v1/images is not available in a batch",
        "stream": "stream: a batch has no streams",
        "wrong": "temperature: should be greater than or equal to 0; got -1",
        "no prompt": "input: the prompt has no tokens",
    }.items():
        assert by_id[name]["status_code"] == 400
        assert words in by_id[name]["body"]["error"]["message"]
    unread = [one["error"] for one in lines if one["custom_id"] is None]
    assert [one["code"] for one in unread] == ["invalid_json_line"] * 2
    assert [one["message"].partition(":")[0] for one in unread] == ["line 5", "line 7"]


def test_it_goes_on_where_it_was_broken_off(tmp_path: Path) -> None:
    """In the middle of a line, too."""
    source, out = (
        write(tmp_path / "in", [completion(str(number), f"p{number}") for number in range(40)]),
        tmp_path / "out",
    )
    with LLM(**FAKE, running_max_req_size=4) as llm:
        deliver = llm._deliver

        def breaking(output: Any) -> Any:
            if len(out.read_bytes().splitlines()) > 10:
                raise EngineError("broken off")
            return deliver(output)

        llm._deliver = breaking  # type: ignore[method-assign]
        with pytest.raises(EngineError):
            run_batch(llm, source, out, progress=False)
    done = out.read_bytes()
    assert 10 < len(done.splitlines()) < 40
    out.write_bytes(done[:-5])
    with LLM(**FAKE) as llm:
        counts = run_batch(llm, source, out, progress=False)
        assert counts.skipped == len(done.splitlines()) - 1
        assert counts.completed == 40 - counts.skipped
        assert run_batch(llm, source, out, progress=False) == BatchCounts(total=40, skipped=40)
    answers = {one["custom_id"]: one["response"]["body"]["choices"][0]["text"] for one in told(out)}
    assert answers == {str(number): text(f"p{number}", 3) for number in range(40)}
    assert len(told(out)) == 40


def test_lines_are_read_as_there_is_room_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "in", [completion(str(number), "p", 1) for number in range(200)])
    most = 0
    add = run._Batch.ended

    def counting(self: Any, job: Any) -> None:
        nonlocal most
        most = max(most, len(self._of))
        add(self, job)

    monkeypatch.setattr(run._Batch, "ended", counting)
    with LLM(**FAKE, running_max_req_size=8) as llm:
        submissions = llm._scheduler.submissions
        submissions._limits = submissions._limits._replace(max_queue=20)  # it is 1024 otherwise
        assert run_batch(llm, source, tmp_path / "out", progress=False).completed == 200
    assert most <= 2 * 20 + 8 + 1
    assert {one["custom_id"] for one in told(tmp_path / "out")} == {str(number) for number in range(200)}


def test_the_command_takes_the_daemons_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write(tmp_path / "in", [completion("a", "hello"), completion("b", "x" * 99)]), tmp_path / "out"
    flags = ["--engine.backend", "fake", "--max_req_input_len", "50"]
    assert command.main([str(source), str(out), *flags]) == 0
    assert "2 lines: 1 answered, 1 failed, 0 done before" in capsys.readouterr().out
    assert [one["response"]["status_code"] for one in sorted(told(out), key=lambda one: one["custom_id"])] == [200, 400]
    assert command.main([str(tmp_path / "none"), str(out), *flags]) != 0
    assert "none" in capsys.readouterr().err
    assert command.main([str(source)]) == 2
