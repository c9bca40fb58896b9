"""From logits to the next token of each row. The order of operations is that of LightLLM's `sample`, its biases before
and its masks where the others end:

logit bias; repetition, frequency and presence penalties; exponential decay on the eos logits; eos mask below
min_new_tokens; the row's mask; temperature; softmax; top-p, top-k, min-p and typical-p; draw. Log-probabilities
are of the softmax of the logits before all that, or, as LightLLM's, of the one before truncation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightllmd.engine.step import Alternatives, Candidate, SamplingRow
from lightllmd.kernels.philox import gumbel

LOGIT_MOST = 1e30  # a larger one would leave fp32, and infinite logits have no probabilities
EOS_MASKED = -1e6
GREEDY_BELOW = 1e-5  # temperature
CANDIDATES = 1024  # tokens that are sorted first; rows whose nucleus is larger are sorted whole

# Columns of the parameter table.
(GREEDY, TEMPERATURE, TOP_P, TOP_K, MIN_P, TYPICAL_P, PRESENCE, FREQUENCY, REPETITION, DECAY_START, DECAY_FACTOR,
 MIN_NEW, ALTERNATIVES, CANDIDATES) = range(14)  # fmt: skip


class Sampled(NamedTuple):
    """Of each row."""

    tokens: Tensor  # [B]
    logprobs: Tensor  # [B]
    alternatives: list[Alternatives | None]  # where the row asks for some
    candidates: list[list[Candidate] | None]  # of beams


class Sampler:
    """Sampling state of every row of the request table; a row's state is set by `enter` and `record` alone.

    A row's token depends on its own logits, parameters, history, seed, branch and position, and on nothing else in
    the batch.
    """

    def __init__(
        self, rows: int, width: int, vocab: int, eos_ids: list[int], device: torch.device, *, processed: bool = False
    ) -> None:
        """`processed`: log-probabilities are of the distribution that is drawn from, before truncation; else of the
        model's."""
        self.device, self.vocab, self._processed = device, vocab, processed
        self._parameters = torch.zeros((rows, 14), dtype=torch.float64)
        self._seeds = torch.zeros((rows, 2), dtype=torch.int64)  # seed, branch
        self._plain = [True] * rows  # greedy, and nothing changes or asks for more than the highest logit
        self._history = torch.zeros((rows, width), dtype=torch.int32)  # tokens that the penalties count
        self._lengths = [0] * rows  # of the history; stays 0 where there are no penalties
        self._penalised = [False] * rows
        self._biases: dict[int, tuple[Tensor, Tensor]] = {}  # row -> token ids, what is added to their logits
        self._masks: dict[int, bytes] = {}  # as Step.masks; a row that may sample any token has none
        self._eos = torch.tensor([eos for eos in eos_ids if 0 <= eos < vocab], dtype=torch.int64, device=device)

    def enter(self, row: int, sampling: SamplingRow, branch: int) -> None:
        """A row (re)enters: all that was known of the number is forgotten."""
        params = sampling.params
        greedy = not params.do_sample or params.temperature < GREEDY_BELOW
        start, factor = params.exponential_decay_length_penalty
        self._penalised[row] = (
            params.presence_penalty != 0 or params.frequency_penalty != 0 or params.repetition_penalty != 1
        )
        self._plain[row] = (
            greedy
            and not self._penalised[row]
            and factor == 1
            and params.min_new_tokens <= 1
            and params.top_logprobs == params.candidates == 0
            and not params.logit_bias
        )
        self._parameters[row] = torch.tensor(
            [
                greedy,
                1.0 if greedy else params.temperature,
                params.top_p,
                params.top_k if params.top_k > 0 else self.vocab,
                params.min_p,
                params.typical_p,
                params.presence_penalty,
                params.frequency_penalty,
                params.repetition_penalty,
                start,
                factor,
                params.min_new_tokens,
                params.top_logprobs,
                params.candidates,
            ],
            dtype=torch.float64,
        )
        self._seeds[row] = torch.tensor([params.seed, branch])
        counted = sampling.prompt_ids + sampling.emitted if params.input_penalty else sampling.emitted
        self._lengths[row] = len(counted) if self._penalised[row] else 0
        if self._lengths[row]:
            self._history[row, : len(counted)] = torch.tensor(counted, dtype=torch.int32)
        self._masks.pop(row, None)
        self._biases.pop(row, None)
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), device=self.device)
            added = torch.tensor(list(params.logit_bias.values()), dtype=torch.float64, device=self.device)
            self._biases[row] = ids, added.clamp(-LOGIT_MOST, LOGIT_MOST).float()

    def restrict(self, masks: Mapping[int, bytes]) -> None:
        """Sets the masks of some rows, as `Step.masks` gives them; an empty one lifts what was set."""
        for row, mask in masks.items():
            if mask:
                self._masks[row] = mask
            else:
                self._masks.pop(row, None)

    def record(self, rows: list[int], tokens: list[int]) -> None:
        """`tokens` were emitted; they count towards the penalties of the next step."""
        for row, token in zip(rows, tokens, strict=True):
            if self._penalised[row]:
                self._history[row, self._lengths[row]] = token
                self._lengths[row] += 1

    def sample(self, logits: Tensor, rows: list[int], positions: list[int]) -> Sampled:
        """``logits [B, V]`` fp32 of the given table rows; `positions` of the tokens to come. A row of which nothing can
        be drawn has a log-probability of NaN."""
        nothing: list[None] = [None] * len(rows)
        if all(self._plain[row] and row not in self._masks for row in rows):
            best, tokens = logits.max(-1)
            return Sampled(tokens, best - logits.logsumexp(-1), [*nothing], [*nothing])
        table = self._parameters[rows]
        shaped = self._shape(logits, rows, positions, table)
        shaped_total = shaped.logsumexp(-1, keepdim=True)
        tokens = shaped.argmax(-1)
        drawn = (table[:, GREEDY] == 0).nonzero()[:, 0]
        if len(drawn):
            noise = [
                gumbel(*self._seeds[rows[index]].tolist(), positions[index], self.vocab) for index in drawn.tolist()
            ]
            at = drawn.to(self.device)
            limits = table[drawn].to(self.device)
            logprobs, noises = shaped[at] - shaped_total[at], torch.stack(noise).to(self.device)
            tokens[at] = draw(
                logprobs, limits[:, TOP_P], limits[:, TOP_K], limits[:, MIN_P], noises, limits[:, TYPICAL_P]
            )
        told, total = (shaped, shaped_total) if self._processed else (logits, logits.logsumexp(-1, keepdim=True))
        chosen = (told.gather(-1, tokens[:, None]) - total)[:, 0]
        chosen[~shaped_total[:, 0].isfinite()] = float("nan")
        alternatives = _alternatives(told, total, table[:, ALTERNATIVES].int().tolist())
        wanted = table[:, CANDIDATES].int().tolist()
        return Sampled(tokens, chosen, alternatives, _candidates(shaped, shaped_total, told, total, wanted))

    def _shape(self, logits: Tensor, rows: list[int], positions: list[int], table: Tensor) -> Tensor:
        """A copy of the logits as they are drawn from."""
        logits = logits.clone()
        generated = torch.tensor(positions, dtype=torch.float64)
        self._add_bias(logits, rows)
        self._penalise(logits, rows, table)
        self._shape_eos(logits, table, generated)
        self._mask(logits, rows)
        hot = (table[:, TEMPERATURE] != 1).nonzero()[:, 0].to(self.device)
        if len(hot):
            logits[hot] /= table[:, TEMPERATURE].to(self.device, torch.float32)[hot, None]
        return logits

    def _add_bias(self, logits: Tensor, rows: list[int]) -> None:
        for index, row in enumerate(rows):
            if row in self._biases:
                ids, added = self._biases[row]
                logits[index, ids] += added

    def _mask(self, logits: Tensor, rows: list[int]) -> None:
        for index, row in enumerate(rows):
            if mask := self._masks.get(row):
                allowed = np.unpackbits(np.frombuffer(mask, np.uint8), count=self.vocab, bitorder="little")
                logits[index].masked_fill_(torch.from_numpy(allowed == 0).to(self.device), float("-inf"))

    def _penalise(self, logits: Tensor, rows: list[int], table: Tensor) -> None:
        at = [index for index, row in enumerate(rows) if self._lengths[row]]
        if not at:
            return
        lengths = torch.tensor([self._lengths[rows[index]] for index in at])
        longest = int(lengths.max())
        history = self._history[[rows[index] for index in at], :longest].long()
        counted = (torch.arange(longest) < lengths[:, None]).float()
        counts = torch.zeros((len(at), self.vocab), device=self.device)
        counts.scatter_add_(1, history.to(self.device), counted.to(self.device))
        of = table[at].to(self.device, torch.float32)
        some = logits[at]
        factor = torch.where(some > 0, 1 / of[:, REPETITION, None], of[:, REPETITION, None])
        changed = some * factor - counts * of[:, FREQUENCY, None] - of[:, PRESENCE, None]
        logits[at] = torch.where(counts > 0, changed.clamp_(max=LOGIT_MOST), some)

    def _shape_eos(self, logits: Tensor, table: Tensor, generated: Tensor) -> None:
        beyond = (generated - table[:, DECAY_START]).clamp(min=0)
        growth = (table[:, DECAY_FACTOR].pow(beyond) - 1).clamp(max=LOGIT_MOST)
        masked = generated < table[:, MIN_NEW] - 1
        at = ((growth != 0) | masked).nonzero()[:, 0]
        if not len(at) or not len(self._eos):
            return
        index = at.to(self.device)[:, None]
        eos = logits[index, self._eos]
        grown = (eos + eos.abs() * growth[at].to(self.device, torch.float32)[:, None]).clamp_(max=LOGIT_MOST)
        logits[index, self._eos] = grown.masked_fill(masked[at].to(self.device)[:, None], EOS_MASKED)


def draw(
    logprobs: Tensor, top_p: Tensor, top_k: Tensor, min_p: Tensor, noise: Tensor, typical_p: Tensor | None = None
) -> Tensor:
    """One token of each row of ``logprobs [B, V]``: the highest sum with its Gumbel ``noise [B, V]``, which is a draw
    from the softmax (Gumbel 1954, "Gumbel-max trick"). Rounding changes it only where two sums are as good as equal, so
    a sequence that is replayed goes on as it would have.

    Tokens are ranked by probability, equal ones by id; those whose preceding mass exceeds top_p go, those at rank
    top_k and beyond, and those of less than min_p times the highest probability (Nguyen et al. 2024). Of the rest
    typical_p (below 1) keeps those that `typical` keeps of all tokens, if there are such.
    """
    vocab = logprobs.shape[1]
    limited = (top_p < 1) | (top_k < vocab) | (min_p > 0)
    tokens = (logprobs + noise).argmax(-1)
    if typical_p is not None and len(rows := (typical_p < 1).nonzero()[:, 0]):
        limited[rows] = False
        kept = _all_kept(logprobs[rows], top_p[rows], top_k[rows], min_p[rows])
        both = kept & typical(logprobs[rows], typical_p[rows])
        kept = torch.where(both.any(-1, keepdim=True), both, kept)
        tokens[rows] = (logprobs[rows] + noise[rows]).masked_fill(~kept, float("-inf")).argmax(-1)
    left = limited.nonzero()[:, 0]
    for width in (min(CANDIDATES, vocab), vocab):
        if not len(left):
            break
        values, ids = _ranked(logprobs[left].exp(), width)
        before = values.double().cumsum(-1) - values.double()
        rank = torch.arange(width, device=values.device)
        kept = (before <= top_p[left, None]) & (rank < top_k[left, None])
        kept &= values >= min_p[left, None] * values[:, :1]
        # Equal values at the end of a partial ranking may go on behind it, with lower ids: not yet decided.
        sure = ~kept[:, -1] & ((values > values[:, -1:]) | ~kept).all(-1) if width < vocab else kept[:, 0]
        done = sure.nonzero()[:, 0]
        sums = (logprobs[left[done]] + noise[left[done]]).gather(-1, ids[done]).masked_fill(~kept[done], float("-inf"))
        tokens[left[done]] = ids[done].gather(-1, sums.argmax(-1, keepdim=True))[:, 0]
        left = left[~sure]
    return tokens


def _all_kept(logprobs: Tensor, top_p: Tensor, top_k: Tensor, min_p: Tensor) -> Tensor:
    """Which tokens of ``logprobs [B, V]`` the three limits keep."""
    values, ids = _ranked(logprobs.exp(), logprobs.shape[1])
    before = values.double().cumsum(-1) - values.double()
    rank = torch.arange(values.shape[1], device=values.device)
    kept = (before <= top_p[:, None]) & (rank < top_k[:, None]) & (values >= min_p[:, None] * values[:, :1])
    return torch.zeros_like(kept).scatter_(1, ids, kept)


def typical(logprobs: Tensor, mass: Tensor) -> Tensor:
    """Which tokens of ``logprobs [B, V]`` locally typical sampling draws from (Meister et al. 2023): ordered by how far
    their surprise, the negative log-probability, is from the distribution's entropy, the fewest that have the
    ``mass [B]``, and what is as far as the last of them."""
    probabilities = logprobs.exp()
    entropy = -(probabilities * logprobs).nansum(-1, keepdim=True)
    distances = (-logprobs - entropy).abs()
    ordered, ids = distances.sort(dim=-1)
    masses = probabilities.gather(-1, ids).double().cumsum(-1)
    last = (masses < mass[:, None]).sum(-1, keepdim=True).clamp_(max=logprobs.shape[1] - 1)
    return (distances <= ordered.gather(-1, last)) & (probabilities > 0)


def _ranked(probabilities: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The `width` largest of each row, descending, equal ones by ascending id."""
    if width == probabilities.shape[1]:
        return probabilities.sort(dim=-1, descending=True, stable=True)
    ids = probabilities.topk(width, -1, sorted=False).indices.sort(-1).values
    values, order = probabilities.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order)


def _alternatives(logits: Tensor, total: Tensor, wanted: list[int]) -> list[Alternatives | None]:
    """Those of a row are fewer than `wanted` where its mask allows no more."""
    most = max(wanted)
    if most == 0:
        return [None] * len(wanted)
    found = highest(logits, total, most)
    return [
        [pair for pair in pairs[:count] if pair[1] != float("-inf")] if count else None
        for pairs, count in zip(found, wanted, strict=True)
    ]


def _candidates(
    shaped: Tensor, shaped_total: Tensor, told: Tensor, total: Tensor, wanted: list[int]
) -> list[list[Candidate] | None]:
    """The best tokens of ``shaped [B, V]``, no more than a mask allows; what is reported of them is of `told`."""
    most = max(wanted)
    if most == 0:
        return [None] * len(wanted)
    values, ids = shaped.topk(min(most, shaped.shape[1]), -1)
    logprobs, reported = (values - shaped_total).tolist(), (told.gather(-1, ids) - total).tolist()
    rows = zip(ids.tolist(), logprobs, reported, wanted, strict=True)
    return [
        [one for one in zip(*columns, strict=True) if one[1] != float("-inf")][:count] if count else None
        for *columns, count in rows
    ]


def highest(logits: Tensor, total: Tensor, count: int) -> list[Alternatives]:
    """Of each row of ``logits [B, V]`` the `count` best tokens with their log-probabilities; ``total [B, 1]`` is the
    log of the sum of their exponentials."""
    values, ids = logits.topk(min(count, logits.shape[1]), -1)
    pairs = zip(ids.tolist(), (values - total).tolist(), strict=True)
    return [list(zip(of, at, strict=True)) for of, at in pairs]
