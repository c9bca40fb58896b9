"""Grammars on the runners of a CPU and of a GPU (in Triton's interpreter where there is none): the same tokens, in as
many steps as without them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lightllmd.engine.loop import StepLoop
from lightllmd.engine.runners.cpu import CpuRunner
from lightllmd.engine.runners.gpu import GpuRunner
from lightllmd.engine.scheduling.admission import SchedulerLimits
from lightllmd.engine.scheduling.grammar_rows import CompiledGrammars
from lightllmd.engine.scheduling.restriction import Restrictions
from lightllmd.engine.scheduling.scheduler import Scheduler
from lightllmd.grammar.compiler import GrammarCompiler
from lightllmd.ipc.messages import Grammar
from scheduler_samples import submit
from tiny_models import BASE, load, load_on_device, plan_for, write_model

pytest.importorskip("triton")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
VOCAB = 128
END = 2
WORDS: list[bytes | None] = [bytes([byte]) for byte in range(VOCAB)]
WORDS[3:6] = [b"ab", b"12", b'":']
PATTERN = Grammar("ebnf", 'root ::= "{" pair ("," pair)* "}"\npair ::= "\\"" [a-z]{1,4} "\\":" [0-9]{5,9}')
MOST = 8


def run(
    runner: CpuRunner | GpuRunner, plan: Any, overlap: bool
) -> tuple[dict[int, list[int]], list[tuple[float, Any]]]:
    """Tokens of each request, and what is reported of those of the first."""
    runner.overlaps = overlap
    limits = SchedulerLimits.of(plan)._replace(eos_ids=frozenset([END]))
    grammars = CompiledGrammars(lambda: GrammarCompiler(WORDS, VOCAB, [END]))
    scheduler = Scheduler(limits, 1, Restrictions(VOCAB, [END], lambda: WORDS, grammars))
    loop = StepLoop(scheduler, runner)
    drawn = {"do_sample": True, "seed": 5, "grammar": PATTERN, "ignore_eos": True}
    messages = [
        submit(1, most=MOST, prompt=[9, 8, 7], params={"grammar": PATTERN, "top_logprobs": 3, "ignore_eos": True}),
        submit(2, most=MOST, prompt=[9, 8], params=drawn | {"temperature": 2.0, "presence_penalty": 0.5}),
        submit(3, most=MOST, prompt=[9, 8], params=drawn | {"top_p": 0.9, "top_k": 20, "n": 2}),
        submit(4, most=MOST, prompt=[7, 7], params={"ignore_eos": True}),
    ]
    for message in messages:
        assert scheduler.submit(message) is None
    tokens: dict[int, list[int]] = {}
    reported: list[tuple[float, Any]] = []
    steps = 0
    while loop.busy:
        for output in loop.turn(lambda: None).values():
            steps += 1
            for at, request in enumerate(output.requests):
                tokens.setdefault(10 * request + output.branches[at], []).append(output.tokens[at])
                if request == 1 and output.alternatives is not None:
                    reported.append((output.logprobs[at], output.alternatives[at]))
    assert steps == MOST
    return tokens, reported


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"), BASE | {"num_hidden_layers": 1})


def test_constrained_rows_are_the_same_on_every_runner_and_skip_no_step(model: Path) -> None:
    plan = plan_for(model, slots=255)
    made = [run(load(model, slots=255), plan, False)]
    device = load_on_device(model)
    made += [run(device, plan, True)]
    tokens, reported = made[0]
    for other, told in made[1:]:
        assert other == tokens
        assert [value for value, _ in told] == pytest.approx([value for value, _ in reported], abs=1e-4)
        assert [[token for token, _ in pairs] for _, pairs in told] == [
            [token for token, _ in pairs] for _, pairs in reported
        ]
    for number in (10, 20, 30, 31):
        assert len(tokens[number]) == MOST
        text = b"".join(WORDS[token] or b"" for token in tokens[number]).decode()
        assert re.match(r'\{"[a-z]{1,4}($|":)', text), text


def test_log_probabilities_are_the_models_own_however_a_grammar_restricts_it(model: Path) -> None:
    """Those of a token and of its alternatives, which the grammar may not allow."""
    _, reported = run(load(model, slots=255), plan_for(model, slots=255), False)
    free = [[token for token, _ in pairs] for _, pairs in reported]
    assert any(token >= 123 or token < 32 for pairs in free for token in pairs)
    assert all(value <= max(of for _, of in pairs) + 1e-5 for value, pairs in reported)
