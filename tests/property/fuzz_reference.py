"""What requests generate when nothing is scheduled, shared, paused or replayed: straight from their definitions."""

from __future__ import annotations

from typing import NamedTuple

from lightllmd.engine.runners.fake_model import fake_alternatives, fake_token
from lightllmd.engine.scheduling.beam_search import MOST_CANDIDATES
from lightllmd.engine.scheduling.grammar_rows import CompiledGrammars
from lightllmd.engine.scheduling.hypothesis_text import DetokenizedHypothesis, HypothesisTexts
from lightllmd.engine.scheduling.restriction import Restrictions
from lightllmd.engine.step import Alternatives
from lightllmd.grammar.compiler import GrammarCompiler
from lightllmd.ipc.messages import FINISH_LENGTH, FINISH_NONE, FINISH_STOP, SamplingParams
from lightllmd.text import ByteTokenizer

EOS = ord("e")  # a byte that fake tokens do hit, so that generations end by eos too
# Bytes, and behind them tokens of several, so that prompts have something to heal.
VOCABULARY = [bytes([byte]) for byte in range(128)] + [b"ab", b"abc", b"bc", b"cab", b"aa"]
_GRAMMARS = CompiledGrammars(lambda: GrammarCompiler(VOCABULARY, len(VOCABULARY), [EOS]))
RESTRICTIONS = Restrictions(len(VOCABULARY), [EOS], lambda: VOCABULARY, _GRAMMARS)
READINGS = HypothesisTexts(ByteTokenizer)


# Total, tokens, log-probabilities, text.
_Beam = tuple[float, list[int], list[float], DetokenizedHypothesis | None]


class Output(NamedTuple):
    """Of one branch, an entry per token."""

    tokens: list[int]
    logprobs: list[float]
    alternatives: list[Alternatives | None]
    finish: int  # of the last; the others have none


def outputs(prompt: list[int], params: SamplingParams, beams: bool) -> list[Output]:
    """Of all branches. `beams`: n > 1 is a search for the best of them."""
    if beams and params.n > 1:
        return _searched(prompt, params)
    return [_drawn(prompt, params, branch) for branch in range(params.n)]


def _mask(params: SamplingParams, tokens: list[int]) -> bytes:
    restriction = RESTRICTIONS.of(params)
    return restriction.mask(tokens) if restriction is not None else b""


def _drawn(prompt: list[int], params: SamplingParams, branch: int) -> Output:
    seed = params.seed if params.do_sample else 0
    output = Output([], [], [], FINISH_LENGTH)
    tokens = output.tokens
    while len(tokens) < params.max_new_tokens:
        mask = _mask(params, tokens)
        top = params.top_logprobs
        output.alternatives.append(fake_alternatives(prompt + tokens, top) if top else None)
        output.logprobs.append(0.0)
        tokens.append(fake_token(prompt, seed, branch, len(tokens), mask=mask))
        ends = params.grammar is not None or (not params.ignore_eos and len(tokens) >= params.min_new_tokens)
        if tokens[-1] == EOS and ends:
            return output._replace(finish=FINISH_STOP)
    return output


def _searched(prompt: list[int], params: SamplingParams) -> list[Output]:
    """The rules that engine/scheduling/beam_search.py states, as lists of beams."""
    width, ends = params.n, set() if params.ignore_eos and params.grammar is None else {EOS}
    count = max(2, 1 + len(ends)) * width if params.stops is None else MOST_CANDIDATES
    live: list[_Beam] = [(0.0, [], [], READINGS.open(prompt, params))]
    ended: list[tuple[float, bool, list[int], list[float], str | None]] = []  # (score, by its end, ...), best first
    while live:
        found = [
            (-(total + logprob), beam, token, logprob)
            for beam, (total, tokens, *_) in enumerate(live)
            for token, logprob in fake_alternatives(prompt + tokens, count, _mask(params, tokens))
        ]
        found.sort()
        last = len(live[0][1]) + 1 == params.max_new_tokens
        following: list[_Beam] = []
        rank = 0
        for negative, beam, token, logprob in found:
            if rank >= width and len(following) == width:
                break
            tokens, logprobs = [*live[beam][1], token], [*live[beam][2], logprob]
            before = live[beam][3]
            said = None if before is None else before.after(token)
            ends_here = token in ends or (said is not None and said.stopped)
            if not ends_here and not last:
                rank += 1
                if len(following) < width:
                    following.append((-negative, tokens, logprobs, said))
            elif rank < width:
                score, text = -negative / len(tokens) ** params.length_penalty, said.text if said else None
                same = [one for one in ended if text is not None and one[-1] == text]
                if not same or same[0][0] < score:
                    ended = [one for one in ended if one not in same]
                    ended.append((score, ends_here, tokens, logprobs, text))
                    ended = sorted(ended, key=lambda one: -one[0])[:width]
                rank += not same
        live = following
        if live and len(ended) == width and live[0][0] / len(live[0][1]) ** params.length_penalty <= ended[-1][0]:
            live = []
    ended += [ended[-1]] * (width - len(ended))
    found_outputs = []
    for _, by_its_end, tokens, logprobs, _ in ended:
        shown: list[Alternatives | None] = [None] * len(tokens)
        if params.top_logprobs:
            shown = [fake_alternatives(prompt + tokens[:at], params.top_logprobs) for at in range(len(tokens))]
        found_outputs.append(Output(tokens, logprobs, shown, FINISH_STOP if by_its_end else FINISH_LENGTH))
    return found_outputs


def finishes(output: Output) -> list[int]:
    return [FINISH_NONE] * (len(output.tokens) - 1) + [output.finish]
