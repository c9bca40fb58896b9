"""What a grammar constrains keeps to it, with the engine's own parts."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from lightllmd import LLM
from lightllmd.config.parameters import FakeSettings
from lightllmd.engine.loop import StepLoop
from lightllmd.engine.runners.fake import FakeRunner
from lightllmd.engine.scheduling import grammar_rows
from lightllmd.engine.scheduling.grammar_rows import CompiledGrammars
from lightllmd.engine.scheduling.restriction import Restrictions
from lightllmd.engine.scheduling.scheduler import Scheduler
from lightllmd.errors import InvalidRequest
from lightllmd.grammar.compiler import GrammarCompiler
from lightllmd.grammar.ebnf.translation import translated
from lightllmd.ipc.messages import FINISH_LENGTH, FINISH_STOP, Grammar, SamplingParams, Submit
from lightllmd.offline_jobs import OfflineJob
from lightllmd.requests.asked import Asked, FieldNames, Prompt
from lightllmd.requests.branch import TextOptions
from lightllmd.requests.constraint import Constraint
from lightllmd.requests.intake import AdmittedJob
from lightllmd.requests.text_work import without_waiting
from scheduler_samples import limits, submit

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
}


@pytest.fixture(scope="module", params=[False, True], ids=["each waited for", "overlapped"])
def fake(request: pytest.FixtureRequest) -> Iterator[LLM]:
    with LLM(engine={"backend": "fake", "fake": {"overlap": request.param}}) as llm:
        yield llm


def jobs_of(llm: LLM, kind: Any, text: str, *, new_tokens: int = 400, **params: Any) -> list[AdmittedJob]:
    what = Asked(
        [Prompt("Say it: ", "inputs", False)],
        SamplingParams(**params),
        TextOptions(),
        FieldNames("n", "max_new_tokens"),
        None,
        new_tokens,
        constraint=Constraint(kind, text, "grammar"),
        seed=params.get("seed"),
    )
    return without_waiting(llm.intake.jobs(what))


def texts(llm: LLM, kind: Any, text: str, **params: Any) -> list[str]:
    [job] = jobs_of(llm, kind, text, **params)
    offline = OfflineJob(job, llm.tokenizer)
    llm._run_all([offline], False, None)
    return [branch.text or "" for branch in offline.output().branches]


@pytest.mark.parametrize("seed", range(3))
def test_json_keeps_to_its_schema(fake: LLM, seed: int) -> None:
    for text in texts(fake, "json_schema", json.dumps(SCHEMA), do_sample=True, seed=seed, n=2):
        value = json.loads(text)
        assert 0 <= value["age"] <= 99
        assert len(value["name"]) <= 8


def test_a_pattern_and_a_choice_are_whole_matches(fake: LLM) -> None:
    [text] = texts(fake, "regex", r"[0-9]{3}-(ab|cd)")
    assert re.fullmatch(r"[0-9]{3}-(ab|cd)", text)
    [text] = texts(fake, "choice", json.dumps(['red "1"', "blüe\\n"]))
    assert text in ('red "1"', "blüe\\n")


def test_what_can_not_be_compiled_is_refused_by_name(fake: LLM) -> None:
    with pytest.raises(InvalidRequest, match=r"^grammar: a \) is missing, at character 2; got '\(a'") as refused:
        jobs_of(fake, "regex", "(a")
    assert refused.value.parameters["param"] == "grammar"


# --- with the scheduler, step by step ---------------------------------------------------------------------------------

WORDS = [bytes([byte]) for byte in range(256)] + [b"", b'{"', b'":', b"ab", b"abc", b"cab", b"12", b"\xc3\xa9", b"<s>"]
END, OTHER_END, SIZE = 256, 264, 300  # logits than tokens there are more
PROMPT = [65, 66, 67]


def vocabulary() -> list[bytes | None]:
    """`<s>` is a special token."""
    return [None if number in (END, OTHER_END) else raw for number, raw in enumerate(WORDS)]


def compiler() -> GrammarCompiler:
    return GrammarCompiler(vocabulary(), SIZE, [END, OTHER_END])


class Engine:
    """Scheduler and fake runner, whose tokens depend on prompt, seed, branch, position and mask alone."""

    def __init__(self, overlap: bool = True, **changes: Any) -> None:
        limits_ = limits(eos_ids=frozenset([END, OTHER_END]), **changes)
        restrictions = Restrictions(SIZE, limits_.eos_ids, vocabulary, CompiledGrammars(compiler))
        self.scheduler = Scheduler(limits_, 1, restrictions)
        self.loop = StepLoop(self.scheduler, FakeRunner(FakeSettings(overlap=overlap)))
        self.tokens: dict[tuple[int, int], list[int]] = {}
        self.finishes: dict[tuple[int, int], int] = {}
        self.steps = 0

    def run(self, *messages: Submit, turns: int = 1000) -> Engine:
        for message in messages:
            assert self.scheduler.submit(message) is None
            for branch, emitted in zip(message.branches, message.emitted, strict=True):
                self.tokens[message.request, branch] = list(emitted)
        for _ in range(turns):
            if not self.loop.busy:
                break
            for output in self.loop.turn(lambda: None).values():
                columns = (output.requests, output.branches, output.positions, output.tokens, output.finishes)
                for request, branch, position, token, finish in zip(*columns, strict=True):
                    assert position == len(self.tokens[request, branch])
                    self.tokens[request, branch].append(token)
                    self.finishes[request, branch] = finish
            self.scheduler.check()
            self.steps += self.loop.completed is not None
        return self

    def text(self, request: int, branch: int = 0) -> str:
        return b"".join(WORDS[token] for token in self.tokens[request, branch] if token < END or token > 256).decode()


def ebnf(kind: Any, text: str) -> Grammar:
    """As an engine gets it."""
    return translated(Grammar(kind, text), "grammar")


def constrained(request: int, kind: Any, text: str, most: int = 400, **params: Any) -> Submit:
    return submit(request, most=most, prompt=PROMPT, params={"grammar": ebnf(kind, text), **params})


def test_a_constrained_row_takes_as_many_steps_as_any_other() -> None:
    free = Engine().run(submit(1, prompt=PROMPT, most=60))
    held = Engine().run(
        constrained(1, "regex", "([a-z][0-9])*", 60, ignore_eos=True), submit(2, prompt=PROMPT, most=60)
    )
    assert held.steps == free.steps
    assert len(held.tokens[1, 0]) == len(free.tokens[1, 0]) == 60


@pytest.mark.parametrize("overlap", [False, True])
def test_a_killed_engines_stream_goes_on_with_the_tokens_that_it_would_have_had(overlap: bool) -> None:
    """With the next engine's matchers at their beginning: what was emitted advances them."""
    message = constrained(1, "json_schema", json.dumps(SCHEMA), do_sample=True, seed=3, n=2)
    whole = Engine(overlap).run(message)
    for branch in range(2):
        tokens = whole.tokens[1, branch]
        assert whole.finishes[1, branch] == FINISH_STOP
        for cut in range(0, len(tokens) - 1, 5):
            fields = {"branches": [branch], "emitted": [tokens[:cut]], "replay": True}
            again = Engine(overlap).run(msgspec.structs.replace(message, **fields))
            assert again.tokens[1, branch] == tokens


def test_scheduling_changes_no_constrained_token() -> None:
    """Blocks of a prompt, a prompt cache, pauses for want of slots, and other rows beside it."""
    messages = [
        constrained(1, "json_schema", json.dumps(SCHEMA), do_sample=True, seed=3, n=2),
        constrained(2, "regex", "(ab|c[0-9]{2}){5,30}", do_sample=True, seed=4),
        constrained(3, "choice", '["abcab12", "cab"]', bad_words=[[99, 97]]),
        submit(4, prompt=PROMPT, most=100),
    ]
    alone = [Engine().run(msgspec.structs.replace(message)) for message in messages]
    for changes in (
        {"splitfuse_block_size": 2},
        {"use_dynamic_prompt_cache": True, "diverse_mode": True},
        {"max_total_token_num": 420, "router_token_ratio": 0.9, "router_max_new_token_len": 4},
        {"running_max_req_size": 2},
    ):
        together = Engine(**changes).run(*map(msgspec.structs.replace, messages))
        for one in alone:
            for key, tokens in one.tokens.items():
                assert together.tokens[key] == tokens, changes


@pytest.mark.parametrize("n", [2, 4])
def test_beams_keep_to_a_grammar(n: int) -> None:
    """Each of them is a text of its own that the grammar allows, whatever past it takes over."""
    found = Engine(beam_mode=True).run(constrained(1, "regex", "(ab|c[0-9]{2}|abc){3,9}", 60, n=n))
    texts = [found.text(1, branch) for branch in range(n)]
    assert all(re.fullmatch("(ab|c[0-9]{2}|abc){3,9}", text) for text in texts), texts
    assert all(found.finishes[1, branch] == FINISH_STOP for branch in range(n))


@pytest.mark.parametrize("params", [{"ignore_eos": True}, {"min_new_tokens": 30}])
def test_a_grammar_that_can_not_go_on_ends_the_text_and_one_that_can_goes_on_as_asked(params: dict[str, Any]) -> None:
    ended = Engine().run(constrained(1, "choice", '["cab"]', 30, **params))
    assert ended.text(1) == "cab"
    assert ended.finishes[1, 0] == FINISH_STOP
    assert ended.tokens[1, 0][-1] in (END, OTHER_END)


def test_max_new_tokens_cuts_a_text_short() -> None:
    cut = Engine().run(constrained(1, "regex", "[a-z]{50}", 7))
    assert re.fullmatch("[a-z]{7,21}", cut.text(1))
    assert cut.finishes[1, 0] == FINISH_LENGTH


# --- masks ------------------------------------------------------------------------------------------------------------


def allowed(mask: bytes) -> set[int]:
    return {at for at in range(8 * len(mask)) if mask[at // 8] >> at % 8 & 1}


def test_masks_are_those_of_a_reference_that_tries_each_token() -> None:
    """Of some texts: a token may come if one of them goes on with it; an end if one of them is whole. Ids beyond the
    vocabulary, special tokens and tokens without bytes never."""
    texts = ["ab", "abcab12", 'cab{":é', "cabé", "12"]
    grammars = CompiledGrammars(compiler)
    params = SamplingParams(grammar=ebnf("choice", json.dumps(texts)))
    raws = [text.encode() for text in texts]
    draw = random.Random(5)
    seen = 0
    for _ in range(60):
        row, emitted, said = grammars.row(params), [], b""
        while True:
            naive = {
                token
                for token, raw in enumerate(vocabulary())
                if raw and any(text.startswith(said + raw) for text in raws)
            }
            naive |= {END, OTHER_END} if said in raws else set()
            mask = row.mask(emitted)
            assert len(mask) == 4 * -(-SIZE // 32)
            assert allowed(mask) == naive
            emitted.append(draw.choice(sorted(naive)))
            seen += 1
            if emitted[-1] in (END, OTHER_END):
                break
            said += WORDS[emitted[-1]]
        assert allowed(row.mask(emitted)) == {END, OTHER_END}
    assert seen > 200


def test_a_row_that_takes_another_past_has_the_masks_of_that() -> None:
    grammars = CompiledGrammars(compiler)
    params = SamplingParams(grammar=ebnf("regex", "(ab|c){2,6}"))
    beam = grammars.row(params).fork(beam=True)
    for text in (b"abc", b"ab", b"cab", b"", b"cc", b"ccab"):
        assert beam.mask(list(text)) == grammars.row(params).mask(list(text)), text


def test_compiled_grammars_are_kept_by_content_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_rows, "CACHE", 20_000)
    grammars = CompiledGrammars(compiler)
    made = [ebnf("regex", f"[a-z]{{{number}}}x") for number in range(1, 40)]
    for one in made:
        grammars.row(SamplingParams(grammar=one))
    assert 0 < grammars.size <= 20_000
    assert grammars.has(Grammar("ebnf", made[-1].text))
    assert not grammars.has(made[0])
    grammars.row(SamplingParams(grammar=made[0]))
    assert grammars.has(made[0])


def test_llm_takes_lightllm_s_fields(fake: LLM) -> None:
    [output] = fake.generate("Say it: ", guided_json=SCHEMA, max_new_tokens=400, do_sample=True, seed=3)
    assert set(json.loads(output.text or "")) == {"name", "age"}
    outputs = fake.generate(["a", "b"], parameters=[{"guided_choice": ["x"]}, {"regular_constraint": "[0-9]{2}"}])
    assert outputs[0].text == "x"
    assert re.fullmatch("[0-9]{2}", outputs[1].text or "")
    for fields, says in (
        ({"guided_json": {"not": {}}}, "guided_json.not: "),
        ({"guided_json": SCHEMA, "guided_choice": ["x"]}, "guided_choice: guided_json says already"),
    ):
        with pytest.raises(InvalidRequest, match=f"^{says}"):
            fake.generate("a", **fields)


def test_a_grammar_that_ends_before_min_new_tokens_ends_the_text_all_the_same(fake: LLM) -> None:
    [output] = fake.generate("a", guided_choice=["xy"], min_new_tokens=9, max_new_tokens=20)
    assert (output.text or "").startswith("xy")


@pytest.mark.parametrize(("n", "beams"), [(1, False), (2, False), (3, True)])
def test_a_request_whose_grammar_holds_the_others_up_is_ended_and_they_go_on(
    monkeypatch: pytest.MonkeyPatch, n: int, beams: bool
) -> None:
    """After one mask that took too long there is no second one."""
    fills = []
    clock = iter(range(1000))
    monkeypatch.setattr(grammar_rows, "thread_time", lambda: fills.append(1) or float(next(clock)))
    engine = Engine(beam_mode=beams).run(constrained(1, "regex", "[a-z]+", 50, n=n), submit(2, prompt=PROMPT, most=30))
    [(owner, refused)] = engine.scheduler.take_refused()
    assert (owner, refused.request, refused.reason) == ((0, 1), 1, "invalid")
    assert "more than 0.1 s of CPU time for one token" in refused.message
    assert len(engine.tokens[2, 0]) == 30
    assert all(len(engine.tokens[1, branch]) == 0 for branch in range(n))
    assert 0 < len(fills) <= 2 * n
    assert engine.scheduler.keys.used == 0
    assert engine.scheduler.take_refused() == []
