"""Beam search over the candidates that a model gives to each of its beams. It knows neither slots nor steps.

The rules are those of transformers' generate (Wolf et al. 2020), with early_stopping = False: of all continuations of
the live beams the best ``(1 + ends) * width`` are looked at, where `ends` counts the eos tokens; those among the first
`width` of them that end become hypotheses, the best others live on. A hypothesis scores its log-probability divided by
``length ** length_penalty``, its eos counted; the best `width` are kept. The search ends when the best live beam,
scored as if it ended now, is no better than the worst of `width` hypotheses, or at max_new_tokens.

Scores are of the distribution that is searched, which biases, penalties and masks have changed; the log-probabilities
that are reported may be of another one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from lightllmd.engine.batch import Alternatives, Candidate

MOST_CANDIDATES = 64  # that a row can report


@dataclass(slots=True)
class Hypothesis:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # of each token, as they are reported
    alternatives: list[Alternatives | None] = field(default_factory=list)  # of each token
    total: float = 0.0  # sum of the tokens' log-probabilities in the distribution that is searched
    ended: bool = False  # by eos
    score: float = 0.0  # once it is one of `BeamSearch.ended`


class BeamSearch:
    """`live` are the beams, best first; `ended` the hypotheses, best first."""

    def __init__(self, width: int, eos_ids: Collection[int], max_new_tokens: int, length_penalty: float) -> None:
        self.live = [Hypothesis()]
        self.ended: list[Hypothesis] = []
        self._width, self._eos_ids = width, eos_ids
        self._max_new_tokens, self._length_penalty = max_new_tokens, length_penalty

    @staticmethod
    def candidates(width: int, eos_ids: Collection[int]) -> int:
        """How many each beam has to report."""
        return min(MOST_CANDIDATES, max(2, 1 + len(eos_ids)) * width)

    @property
    def done(self) -> bool:
        return not self.live

    def advance(
        self, candidates: Sequence[Sequence[Candidate]], alternatives: Sequence[Alternatives | None]
    ) -> list[int]:
        """Takes each live beam's candidates, best first, and what is reported beside its next token. Returns the
        parents of the beams that are live now, as indices into those that were."""
        kept = max(2, 1 + len(self._eos_ids)) * self._width
        # Equal ones in the order of their beams.
        continuations = sorted(
            (-(beam.total + logprob), parent, token, reported)
            for parent, (beam, found) in enumerate(zip(self.live, candidates, strict=True))
            for token, logprob, reported in found[:kept]
        )[:kept]
        length = len(self.live[0].tokens) + 1
        last = length >= self._max_new_tokens
        live: list[Hypothesis] = []
        parents: list[int] = []
        for rank, (negative, parent, token, reported) in enumerate(continuations):
            eos = token in self._eos_ids
            ends = eos or last
            if rank >= self._width if ends else len(live) == self._width:
                continue
            continued = self._continued(parent, token, -negative, reported, alternatives[parent], eos)
            if ends:
                self._end(continued)
            else:
                live.append(continued)
                parents.append(parent)
        if not live or self._hopeless(live[0], length):
            live, parents = [], []
        self.live = live
        return parents

    def _hopeless(self, best: Hypothesis, length: int) -> bool:
        return len(self.ended) == self._width and best.total / length**self._length_penalty <= self.ended[-1].score

    def _continued(
        self, parent: int, token: int, total: float, reported: float, alternatives: Alternatives | None, ended: bool
    ) -> Hypothesis:
        beam = self.live[parent]
        return Hypothesis(
            [*beam.tokens, token], [*beam.logprobs, reported], [*beam.alternatives, alternatives], total, ended
        )

    def _end(self, hypothesis: Hypothesis) -> None:
        hypothesis.score = hypothesis.total / len(hypothesis.tokens) ** self._length_penalty
        self.ended.append(hypothesis)
        self.ended.sort(key=lambda one: -one.score)  # stable: of equals the earlier one first
        del self.ended[self._width :]
