"""Beam search over the candidates that a model gives to each of its beams. It knows neither slots nor steps.

The rules are those of transformers' generate (Wolf et al. 2020), with early_stopping = False: of all continuations of
the live beams the best ``(1 + ends) * width`` are looked at, where `ends` counts the eos tokens; those among the first
`width` of them that end become hypotheses, the best others live on. A hypothesis scores its log-probability divided by
``length ** length_penalty``, its eos counted; the best `width` are kept. The search ends when the best live beam,
scored as if it ended now, is no better than the worst of `width` hypotheses, or at max_new_tokens.

Scores are of the distribution that is searched, which biases, penalties and masks have changed; the log-probabilities
that are reported may be of another one.

A stop ends a hypothesis as an eos does. It is found in the text, which other tokens may write too: of hypotheses with
the same text the best one is kept. As any number of tokens may end one, all candidates of a beam are looked at then.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from lightllmd.engine.step import Alternatives, Candidate

MOST_CANDIDATES = 64  # that a row can report


class HypothesisText(Protocol):
    """The text of a hypothesis. See `engine.scheduling.hypothesis_text`."""

    @property
    def stopped(self) -> bool:
        """A stop was found, which ends the hypothesis."""

    @property
    def text(self) -> str | None:
        """None where no text is made."""

    def after(self, token: int) -> HypothesisText:
        """With one token more; this one stays as it is."""


@dataclass(slots=True)
class Hypothesis:
    """A sequence of tokens that a search follows, or that ended."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # of each token, as they are reported
    alternatives: list[Alternatives | None] = field(default_factory=list)  # of each token
    total: float = 0.0  # sum of the tokens' log-probabilities in the distribution that is searched
    ended: bool = False  # by eos or a stop
    reading: HypothesisText | None = None
    score: float = 0.0  # once it is one of `BeamSearch.ended`


class BeamSearch:
    """`live` are the beams, best first; `ended` the hypotheses, best first."""

    def __init__(
        self,
        width: int,
        eos_ids: Collection[int],
        max_new_tokens: int,
        length_penalty: float,
        reading: HypothesisText | None = None,
    ) -> None:
        """`reading`: of no token yet, where stops end a hypothesis; None: nothing but an eos does."""
        self.live = [Hypothesis(reading=reading)]
        self.ended: list[Hypothesis] = []
        self._width, self._eos_ids = width, eos_ids
        self._max_new_tokens, self._length_penalty = max_new_tokens, length_penalty
        self._candidates = self.candidates(width, eos_ids, reading is not None)

    @staticmethod
    def candidates(width: int, eos_ids: Collection[int], stops: bool = False) -> int:
        """How many each beam has to report."""
        return MOST_CANDIDATES if stops else min(MOST_CANDIDATES, max(2, 1 + len(eos_ids)) * width)

    @property
    def done(self) -> bool:
        """No beam is live."""
        return not self.live

    def advance(
        self, candidates: Sequence[Sequence[Candidate]], alternatives: Sequence[Alternatives | None]
    ) -> list[int]:
        """Takes each live beam's candidates, best first, and what is reported beside its next token. Returns the
        parents of the beams that are live now, as indices into those that were."""
        # Equal ones in the order of their beams.
        continuations = sorted(
            (-(beam.total + logprob), parent, token, reported)
            for parent, (beam, found) in enumerate(zip(self.live, candidates, strict=True))
            for token, logprob, reported in found[: self._candidates]
        )
        length = len(self.live[0].tokens) + 1
        last = length >= self._max_new_tokens
        live: list[Hypothesis] = []
        parents: list[int] = []
        rank = 0
        for negative, parent, token, reported in continuations:
            if rank >= self._width and (last or len(live) == self._width):
                break
            beam = self.live[parent]
            reading = None if beam.reading is None else beam.reading.after(token)
            ended = token in self._eos_ids or (reading is not None and reading.stopped)
            continued = partial(
                self._continued, parent, token, -negative, reported, alternatives[parent], ended, reading
            )
            if ended or last:
                rank += rank < self._width and self._end(continued())
                continue
            rank += 1
            if len(live) < self._width:
                live.append(continued())
                parents.append(parent)
        if not live or self._is_decided(live[0], length):
            live, parents = [], []
        self.live = live
        return parents

    def _is_decided(self, best: Hypothesis, length: int) -> bool:
        return len(self.ended) == self._width and best.total / length**self._length_penalty <= self.ended[-1].score

    def _continued(
        self,
        parent: int,
        token: int,
        total: float,
        reported: float,
        alternatives: Alternatives | None,
        ended: bool,
        reading: HypothesisText | None,
    ) -> Hypothesis:
        beam = self.live[parent]
        tokens, logprobs = [*beam.tokens, token], [*beam.logprobs, reported]
        return Hypothesis(tokens, logprobs, [*beam.alternatives, alternatives], total, ended, reading=reading)

    def _end(self, hypothesis: Hypothesis) -> bool:
        """False: there is one with its text, of which the better one stays."""
        hypothesis.score = hypothesis.total / len(hypothesis.tokens) ** self._length_penalty
        text = None if hypothesis.reading is None else hypothesis.reading.text
        same = [one for one in self.ended if text is not None and one.reading is not None and one.reading.text == text]
        if same:
            if same[0].score >= hypothesis.score:
                return False
            self.ended.remove(same[0])
        self.ended.append(hypothesis)
        self.ended.sort(key=lambda one: -one.score)  # stable: of equals the earlier one first
        del self.ended[self._width :]
        return not same
