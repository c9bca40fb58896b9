"""Beam search finds what a straightforward reading of its rules finds, by itself and through the whole engine."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from itertools import product
from math import exp, log
from operator import add
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightllmd import LLM
from lightllmd.engine.scheduling.beam_search import BeamSearch, Hypothesis
from model_folders import TOKENIZER
from tiny_models import transformers_model, write_model

Sequence = tuple[int, ...]
LanguageModel = Callable[[Sequence], list[float]]  # log-probabilities of the next token, by what is generated so far
Scored = tuple[Sequence, float]  # with its score
WORST = -1e6  # what a sampler makes of a masked eos


class Spelt:
    """A reading of tokens that are written with a letter or two; stops are texts."""

    WORDS = "a", "b", "ab", "c", "bc", "", "aa"

    def __init__(self, stops: tuple[str, ...], tokens: Sequence = ()) -> None:
        self._stops, self._tokens = stops, tokens

    def after(self, token: int) -> Spelt:
        return Spelt(self._stops, (*self._tokens, token))

    @property
    def _whole(self) -> str:
        return "".join(self.WORDS[token] for token in self._tokens)

    @property
    def _end(self) -> int | None:
        """Of the stop that is complete first."""
        found = [self._whole.find(stop) + len(stop) for stop in self._stops if stop in self._whole]
        return min(found) if found else None

    @property
    def stopped(self) -> bool:
        return self._end is not None

    @property
    def text(self) -> str:
        return self._whole[: self._end]


def by_the_rules(
    model: LanguageModel, width: int, eos: frozenset[int], most: int, penalty: float, stops: tuple[str, ...] = ()
) -> tuple[list[Scored], int]:
    """The hypotheses, best first, and after how many steps the search is over. It looks at all continuations."""
    live: list[tuple[Sequence, float]] = [((), 0.0)]
    ended: list[Scored] = []
    for length in range(1, most + 1):
        # sorted() is stable: equal ones in the order of their beams, then of the tokens.
        all_of_them = [
            ((*tokens, token), total + logprob)
            for tokens, total in live
            for token, logprob in enumerate(model(tokens))
            if logprob != -float("inf")
        ]
        ranked = sorted(all_of_them, key=lambda one: -one[1])
        ends = {tokens: tokens[-1] in eos or length == most or Spelt(stops, tokens).stopped for tokens, _ in ranked}
        live = [one for one in ranked if not ends[one[0]]][:width]
        rank = 0
        for tokens, total in ranked:
            if rank == width:
                break
            rank += 1
            if ends[tokens]:
                score = total / length**penalty
                same = [one for one in ended if stops and Spelt(stops, one[0]).text == Spelt(stops, tokens).text]
                rank -= len(same)
                if same and same[0][1] >= score:
                    continue
                ended = [one for one in ended if one not in same] + [(tokens, score)]
                ended = sorted(ended, key=lambda one: -one[1])[:width]
        if not live or (len(ended) == width and live[0][1] / length**penalty <= ended[-1][1]):
            return ended, length
    raise AssertionError("the last step ends every beam")


def searched(
    model: LanguageModel, width: int, eos: frozenset[int], most: int, penalty: float, stops: tuple[str, ...] = ()
) -> tuple[BeamSearch, int]:
    """What `BeamSearch` makes of the alternatives that it asks for, and after how many steps it is over."""
    search = BeamSearch(width, eos, most, penalty, Spelt(stops) if stops else None)
    asked = BeamSearch.candidates(width, eos, bool(stops))
    for step in range(1, most + 1):
        before = list(search.live)
        tables = [model(tuple(beam.tokens)) for beam in before]
        candidates = [[(token, value, told_of(token, value)) for token, value in ranking(table)] for table in tables]
        parents = search.advance([found[:asked] for found in candidates], [ranking(table)[:2] for table in tables])
        assert [beam.tokens[:-1] for beam in search.live] == [before[parent].tokens for parent in parents]
        assert len(search.live) <= width
        if search.done:
            return search, step
    raise AssertionError("the search goes on beyond max_new_tokens")


def told_of(token: int, logprob: float) -> float:
    """What is reported in the place of what is searched."""
    return 10 * token + logprob


def ranking(logprobs: list[float]) -> list[tuple[int, float]]:
    """As a row reports its alternatives."""
    found = [pair for pair in enumerate(logprobs) if pair[1] != -float("inf")]
    return sorted(found, key=lambda pair: -pair[1])


def drawn_model(seed: int, vocab: int, steps_of: float, eos: frozenset[int], least: int) -> LanguageModel:
    """Another distribution behind every prefix. `steps_of`: what logits are multiples of, so that some are equal; 0:
    none are. Before `least` tokens there is no eos."""

    def model(tokens: Sequence) -> list[float]:
        source = random.Random(f"{seed} {tokens}")
        logits = [source.gauss(0, 1.5) for _ in range(vocab)]
        if steps_of:
            logits = [round(logit / steps_of) * steps_of for logit in logits]
        if len(tokens) + 1 < least:
            logits = [WORST if token in eos else logit for token, logit in enumerate(logits)]
        top = max(logits)
        total = top + log(sum(exp(logit - top) for logit in logits))
        return [logit - total for logit in logits]

    return model


def told(search: BeamSearch) -> list[Scored]:
    return [(tuple(one.tokens), one.score) for one in search.ended]


# --- the search by itself -----------------------------------------------------------------------------------------

SEARCHES = {
    "seed": st.integers(0, 2**32),
    "vocab": st.integers(2, 7),
    "width": st.integers(1, 6),
    "ends": st.sets(st.integers(0, 6), max_size=3),
    "most": st.integers(1, 5),
    "penalty": st.sampled_from([0.0, 0.5, 1.0, 2.0, -1.0]),
    "steps_of": st.sampled_from([0.0, 1.0, 3.0]),
    "least": st.integers(1, 4),
}


def added_up(logprobs: Iterable[float]) -> float:
    """As the search adds; `sum` compensates for rounding from Python 3.12 on."""
    return reduce(add, logprobs)


@settings(max_examples=3000, deadline=None)
@given(**SEARCHES)
def test_the_search_keeps_to_its_rules(
    seed: int, vocab: int, width: int, ends: set[int], most: int, penalty: float, steps_of: float, least: int
) -> None:
    eos = frozenset(ends)
    model = drawn_model(seed, vocab, steps_of, eos, least)
    search, steps = searched(model, width, eos, most, penalty)
    assert (told(search), steps) == by_the_rules(model, width, eos, most, penalty)


@settings(max_examples=1000, deadline=None)
@given(**SEARCHES, stops=st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=3))
def test_stops_end_hypotheses_inside_the_search(
    seed: int,
    vocab: int,
    width: int,
    ends: set[int],
    most: int,
    penalty: float,
    steps_of: float,
    least: int,
    stops: list[str],
) -> None:
    """Each with a text of its own, which ends with a stop, by eos or at the length."""
    eos, told_to_stop = frozenset(ends), tuple(stops)
    model = drawn_model(seed, vocab, steps_of, eos, least)
    search, steps = searched(model, width, eos, most, penalty, told_to_stop)
    assert (told(search), steps) == by_the_rules(model, width, eos, most, penalty, told_to_stop)
    readings = [Spelt(told_to_stop, tuple(one.tokens)) for one in search.ended]
    assert len({reading.text for reading in readings}) == len(readings)
    for one, reading in zip(search.ended, readings, strict=True):
        assert one.ended == (one.tokens[-1] in eos or reading.stopped)
        assert one.ended or len(one.tokens) == most
        assert not Spelt(told_to_stop, tuple(one.tokens[:-1])).stopped


@settings(max_examples=100, deadline=None)
@given(**SEARCHES)
def test_a_hypothesis_is_what_its_tokens_make_it(
    seed: int, vocab: int, width: int, ends: set[int], most: int, penalty: float, steps_of: float, least: int
) -> None:
    """Its log-probabilities, alternatives, score and reason are those of its own tokens, not of another beam's."""
    eos = frozenset(ends)
    model = drawn_model(seed, vocab, steps_of, eos, least)

    def check(one: Hypothesis) -> None:
        tables = [model(tuple(one.tokens[:at])) for at in range(len(one.tokens))]
        searched = [table[token] for table, token in zip(tables, one.tokens, strict=True)]
        assert one.logprobs == [told_of(*pair) for pair in zip(one.tokens, searched, strict=True)]
        assert one.alternatives == [ranking(table)[:2] for table in tables]
        assert one.total == added_up(searched)
        assert one.score == one.total / len(one.tokens) ** penalty
        assert one.ended == (one.tokens[-1] in eos)
        assert not eos.intersection(one.tokens[:-1])

    search, _ = searched(model, width, eos, most, penalty)
    for one in search.ended:
        check(one)
    assert len({tuple(one.tokens) for one in search.ended}) == len(search.ended)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    vocab=st.integers(2, 3),
    ends=st.sets(st.integers(0, 2), max_size=2),
    most=st.integers(1, 4),
    penalty=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
)
def test_a_search_that_drops_nothing_finds_all_there_is(
    seed: int, vocab: int, ends: set[int], most: int, penalty: float
) -> None:
    """The exhaustive optimum, and every runner-up behind it."""
    eos = frozenset(ends)
    model = drawn_model(seed, vocab, 0.0, eos, 1)
    whole = [
        tokens
        for length in range(1, most + 1)
        for tokens in product(range(vocab), repeat=length)
        if not eos.intersection(tokens[:-1]) and (tokens[-1] in eos or length == most)
    ]
    totals = [added_up(model(tokens[:at])[token] for at, token in enumerate(tokens)) for tokens in whole]
    scores = [total / len(tokens) ** penalty for tokens, total in zip(whole, totals, strict=True)]
    search, _ = searched(model, len(whole), eos, most, penalty)
    assert told(search) == sorted(zip(whole, scores, strict=True), key=lambda one: -one[1])


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), vocab=st.integers(2, 7), most=st.integers(1, 6), penalty=st.sampled_from([0.0, 1.0]))
def test_one_beam_is_greedy(seed: int, vocab: int, most: int, penalty: float) -> None:
    model = drawn_model(seed, vocab, 0.0, frozenset({1}), 1)
    greedy: list[int] = []
    while len(greedy) < most and 1 not in greedy:
        greedy.append(ranking(model(tuple(greedy)))[0][0])
    search, steps = searched(model, 1, frozenset({1}), most, penalty)
    assert [one.tokens for one in search.ended] == [greedy]
    assert steps == len(greedy)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("width", "ends"), [(32, 1), (32, 5), (20, 8)])
def test_as_many_alternatives_as_a_row_can_report_are_enough(width: int, ends: int, seed: int) -> None:
    """The widest searches would look at more of them; what lies beyond could not have been chosen."""
    eos = frozenset(range(0, 10 * ends, 10))
    assert BeamSearch.candidates(width, eos) == 64
    model = drawn_model(seed, 100, 0.0, eos, 1)
    search, steps = searched(model, width, eos, 4, 1.0)
    assert (told(search), steps) == by_the_rules(model, width, eos, 4, 1.0)


# --- through the engine -------------------------------------------------------------------------------------------

VOCAB, PROMPT_MOST, MOST = 24, 12, 7
ROOMY = {"max_total_token_num": 800, "running_max_req_size": 32}
ENGINES: dict[str, dict[str, Any]] = {
    "plain": ROOMY,
    "prompt cache": ROOMY | {"use_dynamic_prompt_cache": True, "logprobs": "processed"},
    "splitfuse and prompt cache": ROOMY
    | {"use_dynamic_prompt_cache": True, "splitfuse_mode": True, "splitfuse_block_size": 3},
    "hardly any room": {"max_total_token_num": 56, "running_max_req_size": 5, "use_dynamic_prompt_cache": True},
}
ASKED: list[dict[str, Any]] = [
    {},
    {"n": 2, "length_penalty": 0.0},
    {"n": 3, "length_penalty": 2.0, "min_new_tokens": 3},
    {"n": 5, "length_penalty": 0.5, "max_new_tokens": 5},
    {"n": 4, "ignore_eos": True},
    {"n": 4, "allowed_token_ids": [1, 2, 3, 5, 7, 11, 13]},
    {"n": 3, "logit_bias": {4: 2.0, 9: -3.0}},
    {"n": 4, "max_new_tokens": 1},
    {"n": 4, "bad_words": [[5], *([first, second] for first in range(0, 24, 2) for second in range(1, 24, 3))]},
    {"n": 3, "repetition_penalty": 1.5, "presence_penalty": 0.7, "frequency_penalty": 0.4},
    {"n": 2, "repetition_penalty": 1.3, "input_penalty": True, "length_penalty": 0.5},
    {"n": 3, "prompt_logprobs": 2, "top_logprobs": 3},
]
EOS = [2, 7, 20]


class Tiny:
    """A random model and transformers' opinion of it."""

    def __init__(self, folder: Path) -> None:
        changes = {"vocab_size": VOCAB, "eos_token_id": EOS, "max_position_embeddings": 64}
        self.folder = write_model(folder, changes)
        (self.folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))  # has to be there
        self._model = transformers_model(self.folder)
        self._known: dict[Sequence, torch.Tensor] = {}

    @torch.inference_mode()
    def logits(self, tokens: Sequence) -> torch.Tensor:
        if tokens not in self._known:
            self._known[tokens] = self._model(torch.tensor([tokens])).logits[0, -1].double()
        return self._known[tokens]

    def scores(self, prompt: list[int]) -> list[float]:
        """Log-probabilities of the prompt's tokens behind the first."""
        before = [self.logits((*prompt[:at],)).log_softmax(-1) for at in range(1, len(prompt))]
        return [logprobs[token].item() for logprobs, token in zip(before, prompt[1:], strict=True)]

    def best(self, prompt: list[int], asked: dict[str, Any]) -> list[Scored]:
        """By the rules."""
        eos = frozenset() if asked.get("ignore_eos") else frozenset(EOS)

        def model(tokens: Sequence) -> list[float]:
            logits = self.logits((*prompt, *tokens)).clone()
            for token, added in asked.get("logit_bias", {}).items():
                logits[token] += added
            for token, count in Counter([*prompt, *tokens] if asked.get("input_penalty") else tokens).items():
                factor = asked.get("repetition_penalty", 1.0)
                logits[token] *= factor if logits[token] < 0 else 1 / factor
                logits[token] -= asked.get("presence_penalty", 0) + count * asked.get("frequency_penalty", 0)
            if len(tokens) + 1 < asked.get("min_new_tokens", 1):
                logits[EOS] = WORST
            allowed = asked.get("allowed_token_ids", range(VOCAB))
            bad = [
                word[-1]
                for word in asked.get("bad_words", [])
                if tokens[len(tokens) + 1 - len(word) :] == (*word[:-1],)
            ]
            for token in {*bad, *range(VOCAB)}.difference(set(allowed).difference(bad)):
                logits[token] = -float("inf")
            return logits.log_softmax(-1).tolist()

        most, penalty = asked.get("max_new_tokens", MOST), asked.get("length_penalty", 1.0)
        return by_the_rules(model, asked.get("n", 1), eos, most, penalty)[0]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("beams") / "model")


@pytest.fixture(scope="module", params=ENGINES)
def llm(request: pytest.FixtureRequest, tiny: Tiny) -> Iterator[LLM]:
    sizes = {"max_req_input_len": PROMPT_MOST, "max_req_total_len": PROMPT_MOST + MOST + 1}
    quiet = {"device": "cpu", "threads": 1, "data_type": "float32", "progress": False}
    with LLM(tiny.folder, beam_mode=True, **sizes, **quiet, **ENGINES[request.param]) as opened:
        yield opened


def test_the_engines_beams_keep_to_the_rules(llm: LLM, tiny: Tiny) -> None:
    """All requests at once, each twice, with prompts that have beginnings in common: whatever is shared, cached,
    evicted or fed in blocks, each gets the hypotheses of the rules, best first."""
    draw = random.Random(5)
    common = draw.choices(range(VOCAB), k=PROMPT_MOST)
    prompts = [[*common[: draw.randrange(PROMPT_MOST)], number] for number in range(len(ASKED))] * 2
    asked = [{"max_new_tokens": MOST, **one} for one in ASKED] * 2
    outputs = llm.generate(prompt_token_ids=prompts, parameters=asked, detokenize=False, progress=False)
    for prompt, one, output in zip(prompts, asked, outputs, strict=True):
        truth = tiny.best(prompt, one)
        assert [tuple(branch.token_ids) for branch in output.branches] == [tokens for tokens, _ in truth], one
        penalty = one.get("length_penalty", 1.0)
        for branch, (tokens, score) in zip(output.branches, truth, strict=True):
            if llm.plan.config.engine.logprobs == "processed":
                assert sum(branch.logprobs) / len(tokens) ** penalty == pytest.approx(score, abs=1e-4)
            else:
                assert branch.logprobs == pytest.approx(tiny.scores([*prompt, *tokens])[len(prompt) - 1 :], abs=1e-4)
            eos = not one.get("ignore_eos") and tokens[-1] in EOS
            assert branch.finish_reason == ("stop" if eos else "length")
            assert [len(others) for others in branch.top_logprobs or ()] == [3] * len(tokens) * ("top_logprobs" in one)
        scored = output.prompt_logprobs or []
        assert scored == pytest.approx(tiny.scores(prompt) if "prompt_logprobs" in one else [], abs=1e-4)
    scheduler = llm._scheduler
    scheduler.check()
    assert scheduler.keys.used == 0
