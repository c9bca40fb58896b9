"""Requests wait for their grammars outside of the queue, and no step waits for a grammar."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine_process import Api, Connect, Start, expected
from lightllmd.engine.grammar_gate import GrammarGate, Refused
from lightllmd.engine.grammar_vocabulary import compiler_here, compiler_of
from lightllmd.engine.scheduling.grammar_rows import CompiledGrammars, GrammarRow
from lightllmd.errors import EngineError
from lightllmd.grammar.compiler import GrammarCompiler
from lightllmd.ipc.messages import Grammar, SamplingParams, StepOutput, Submit
from lightllmd.ipc.waiting import wait_ready
from lightllmd.offline import _plan
from lightllmd.text import ByteTokenizer
from lightllmd.text.healing import writable
from model_folders import TOKENIZER
from scheduler_samples import submit
from tiny_models import write_model

DIGITS, LETTERS = Grammar("ebnf", "root ::= [0-9]+"), Grammar("ebnf", "root ::= [a-z]+")
BAD = Grammar("ebnf", "root ::= (")


class Held:
    """A gate whose compiler comes when the test says so."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.may = threading.Event()
        self._failure = failure
        self.grammars = CompiledGrammars(self.compiler)
        self.gate = GrammarGate(self.grammars, self.compiler)

    def compiler(self) -> GrammarCompiler:
        assert self.may.wait(30)
        if self._failure is not None:
            raise self._failure
        return GrammarCompiler(writable(ByteTokenizer()), 257, [256])

    def passed(self, count: int) -> list[Any]:
        """So many, as soon as they need not wait any more."""
        self.may.set()
        taken: list[Any] = []
        while len(taken) < count:
            assert wait_ready([self.gate], 30)
            taken += self.gate.take()
        return taken


@pytest.fixture
def held() -> Iterator[Held]:
    one = Held()
    yield one
    one.may.set()


def asking(request: int, grammar: Grammar | None, **fields: Any) -> Submit:
    return submit(request, params={"grammar": grammar, "n": fields.pop("n", 1)}, **fields)


def test_requests_wait_for_what_is_not_compiled_and_for_nothing_else(held: Held) -> None:
    assert not held.gate.holds(asking(1, None), 0.0)
    assert [held.gate.holds(asking(number, DIGITS), float(number)) for number in (2, 3)] == [True, True]
    assert held.gate.holds(asking(4, LETTERS), 4.0)
    assert len(held.gate) == 3
    assert held.gate.take() == []
    passed = held.passed(3)
    assert [(one.message.request, one.since) for one in passed] == [(2, 2.0), (3, 3.0), (4, 4.0)]
    assert not held.gate.holds(asking(5, DIGITS), 5.0)
    assert (held.gate.compiled, held.grammars.hits, len(held.gate)) == (2, 1, 0)


def test_requests_that_are_aborted_or_whose_api_worker_is_gone_wait_no_more(held: Held) -> None:
    for message in (asking(1, DIGITS), asking(2, DIGITS, n=3), asking(3, DIGITS), asking(4, LETTERS)):
        held.gate.holds(message, 0.0)
    held.gate.holds(Submit(5, 1, 7, 5, [1], SamplingParams(grammar=LETTERS), [0], [[]]), 0.0)
    held.gate.abort(1, None)
    held.gate.abort(2, [0, 2])
    held.gate.abort(9, None)
    held.gate.api_gone((1, 7))
    assert len(held.gate) == 3
    passed = held.passed(3)
    assert [(one.message.request, one.message.branches) for one in passed] == [(2, [1]), (3, [0]), (4, [0])]
    held.gate.holds(asking(6, Grammar("ebnf", 'root ::= "x"')), 0.0)
    held.gate.clear()
    assert len(held.gate) == 0


def test_what_can_not_be_compiled_refuses_the_requests_that_wait_for_it(held: Held) -> None:
    held.gate.holds(asking(1, BAD), 0.0)
    held.gate.holds(asking(2, DIGITS), 0.0)
    bad, good = held.passed(2)
    assert isinstance(bad, Refused)
    assert bad.message.request == 1
    assert "EBNF parser error" in bad.why
    assert good.message.request == 2


def test_a_vocabulary_that_can_not_be_read_refuses_them_too_and_is_read_again_for_the_next() -> None:
    held = Held(EngineError("no vocabulary"))
    held.gate.holds(asking(1, DIGITS), 0.0)
    assert [one.why for one in held.passed(1)] == ["no vocabulary"]
    held._failure = None
    held.gate.holds(asking(2, DIGITS), 0.0)
    assert [one.message.request for one in held.passed(1)] == [2]


def test_what_was_emitted_before_a_replay_is_gone_through_here_and_not_in_a_step(held: Held) -> None:
    long, short = list(b"12345678901234567890"), list(b"123")
    asked = [asking(1, DIGITS, n=2, emitted=[long, short], replay=True), asking(2, DIGITS, emitted=[short])]
    assert [held.gate.holds(message, 0.0) for message in asked] == [True, True]  # it is not compiled
    near, far = sorted(held.passed(2), key=lambda one: one.rows is not None)
    assert (near.message.request, far.message.request) == (2, 1)
    for row, emitted in zip(far.rows, [long, short], strict=True):
        assert row._accepted == emitted
        assert row.mask(emitted) == held.grammars.row(far.message.params).mask(emitted)
    assert held.gate.holds(asking(3, DIGITS, emitted=[[*long, *long]], replay=True), 0.0)  # it is compiled
    assert not held.gate.holds(asking(4, DIGITS, emitted=[short], replay=True), 0.0)
    assert [len(one.rows[0]._accepted) for one in held.passed(1)] == [40]
    assert len(held.gate) == 0


def test_a_replayed_request_that_is_aborted_comes_without_its_branch_or_not_at_all(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may, real = threading.Event(), threading.Event(), GrammarRow.advance

    def advance(row: GrammarRow, emitted: list[int]) -> None:
        begun.set()
        assert may.wait(30)
        real(row, emitted)

    held.gate.holds(asking(1, DIGITS), 0.0)
    held.passed(1)
    monkeypatch.setattr(GrammarRow, "advance", advance)
    numbers = [list(b"1") * 20, list(b"2") * 30]
    for request in (2, 3, 4):
        held.gate.holds(asking(request, DIGITS, n=2, emitted=numbers, replay=True), 0.0)
    assert begun.wait(30)
    held.gate.abort(2, [0])
    held.gate.abort(3, None)
    assert len(held.gate) == 2
    may.set()
    passed = held.passed(2)
    assert [(one.message.request, one.message.branches) for one in passed] == [(2, [1]), (4, [0, 1])]
    assert [[len(row._accepted) for row in one.rows] for one in passed] == [[30], [20, 30]]
    held.gate.holds(asking(5, DIGITS, n=2, emitted=numbers, replay=True), 0.0)
    held.gate.clear()
    assert len(held.gate) == 0


def tokens_of(api: Api, request: int) -> list[int]:
    """Whatever their positions."""
    outputs = [message for message in api.heard if isinstance(message, StepOutput)]
    pairs = [pair for output in outputs for pair in zip(output.requests, output.tokens, strict=True)]
    return [token for number, token in pairs if number == request]


def test_the_engine_process_compiles_beside_its_steps_and_imports_no_torch_for_it(
    start: Start, connect: Connect
) -> None:
    engine = start(overlap=True).wait_ready()
    api = connect(engine)
    plain = api.submit(1, "world", 200)
    grammar = Grammar("ebnf", 'root ::= "[" item ("," item){9,12} "]"\nitem ::= "\\"a\\"" | "17"')
    held = api.submit(2, "hello", 200, params={"grammar": grammar})
    again = api.submit(3, "hello", 200, params={"grammar": grammar})
    api.hear(lambda: 256 in api.tokens(held) and 256 in api.tokens(again) and len(api.tokens(plain)) == 200)
    assert api.tokens(plain) == expected("world", 200)
    assert api.tokens(held) == api.tokens(again)
    assert bytes(api.tokens(held)[:-1]).startswith(b"[")
    cut = api.submit(4, "hello", 200, params={"grammar": grammar}, emitted=[api.tokens(held)[:20]], replay=True)
    api.hear(lambda: tokens_of(api, cut)[-1:] == [256])
    assert tokens_of(api, cut) == api.tokens(held)[20:]
    bad = api.submit(5, "hello", 200, params={"grammar": BAD})
    api.hear(lambda: any(getattr(message, "request", None) == bad for message in api.heard))
    assert "libtorch" not in Path(f"/proc/{engine.process.pid}/maps").read_text()
    assert engine.process.poll() is None


def test_a_models_vocabulary_is_read_in_a_process_of_its_own(tmp_path: Path) -> None:
    """What it tells is what this process would have read."""
    folder = write_model(tmp_path / "model")
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    plan = _plan(folder, {"device": "cpu", "max_req_total_len": 200, "max_req_input_len": 100})
    there = compiler_of(plan)
    assert there.serialised() == compiler_here(plan).serialised()
    assert (there.vocab_size, there.eos_ids) == (plan.vocab_size, plan.eos_id)
    there.compile(DIGITS)
