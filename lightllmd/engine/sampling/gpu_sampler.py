"""The sampling state of a GPU's request table, and the launch of a step's sampling. The host writes what a row asks for
when it enters; all that changes afterwards stays on the device. The order of operations is that of `sampler`.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from lightllmd.engine.runners.transfers import send
from lightllmd.engine.sampling.cpu_sampler import GREEDY_BELOW
from lightllmd.engine.step import Alternatives, Candidate, SamplingRow
from lightllmd.ipc.messages import SamplingParams
from lightllmd.kernels import sampling, sampling_rows

MOST_ALTERNATIVES, MOST_CANDIDATES = 20, 64  # what requests may ask for, and what beams do
FLUSH_IDS = 1 << 16  # counted or biased tokens that are uploaded at a time: bounds the memory that takes
MOST_REAL = 1e30  # penalties are kept below it: an infinite one times zero would be no number
LEAST_REAL = 1e-30

DRAWN, PENALISED, ENDING = sampling_rows.DRAWN.value, sampling_rows.PENALISED.value, sampling_rows.ENDING.value
LIMITED, ALTERNATIVES = sampling_rows.LIMITED.value, sampling_rows.ALTERNATIVES.value
CANDIDATES, TYPICAL = sampling_rows.CANDIDATES.value, sampling_rows.TYPICAL.value
MASKED, BIASED = 1 << 8, 1 << 9  # of the host's copy alone: what they ask for is launched where some row has it


class DeviceSampler:
    """Sampling state of `rows` table rows. A row is that of its last `enter`; before any it is plain greedy, which is
    what padding should be.

    A row's token depends on its own logits, parameters, history, seed, branch and position, and on nothing else in the
    batch. The caller guarantees that all launches go to one stream, and `flush` comes before a row's first `sample`.
    """

    def __init__(
        self, rows: int, vocab: int, eos_ids: list[int], device: torch.device, *, processed: bool = False
    ) -> None:
        """`processed`: log-probabilities are of the distribution that is drawn from, before limits; else of the
        model's."""
        self._vocab, self._device, self._processed = vocab, device, processed
        self._flags = np.zeros(rows, np.int32)  # the host's copy
        unentered = np.zeros(rows, sampling_rows.PARAMETERS)
        unentered["inverse_temperature"] = 1
        self._parameters = torch.from_numpy(unentered.view(np.int32).reshape(rows, -1)).to(device)
        self._typical = torch.ones(rows, dtype=torch.float32, device=device)  # of rows that are TYPICAL
        self._counts = torch.zeros((rows, vocab), dtype=torch.int16, device=device)
        eos = sorted({eos for eos in eos_ids if 0 <= eos < vocab})
        self._eos = torch.tensor(eos, dtype=torch.int32, device=device)
        self._entered: dict[int, tuple[np.void, list[int]]] = {}  # since the last flush
        self._typical_entered: dict[int, float] = {}  # likewise; few rows have it
        words = -(-vocab // 32)
        self._free = np.full(words, -1, np.int32)  # the mask that allows all
        self._masks = torch.full((rows, words), -1, dtype=torch.int32, device=device)
        self._restricted: dict[int, np.ndarray] = {}  # since the last flush
        self._biases: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # of rows that are BIASED: token ids, what is added

    def enter(self, row: int, sampling_row: SamplingRow, branch: int) -> None:
        """A row (re)enters: all that was known of the number is forgotten."""
        params = sampling_row.params
        packed = _pack(params, branch, self._vocab)
        self.restrict(row, b"")
        self._flags[row] = flags = packed["flags"]
        self._biases.pop(row, None)
        if params.logit_bias:
            self._flags[row] |= BIASED
            added = np.fromiter(params.logit_bias.values(), np.float64, len(params.logit_bias))
            ids = np.fromiter(params.logit_bias, np.int64, len(added))
            self._biases[row] = ids, added.clip(-MOST_REAL, MOST_REAL).astype(np.float32)
        history = sampling_row.prompt_ids + sampling_row.emitted if params.input_penalty else sampling_row.emitted
        if flags & TYPICAL:
            self._typical_entered[row] = params.typical_p
        self._entered[row] = packed, history if flags & PENALISED else []

    def restrict(self, row: int, mask: bytes) -> None:
        """From now on the row samples from these tokens alone (as in `Step.masks`); empty: from all."""
        if mask:
            self._restricted[row] = np.frombuffer(mask, "<i4")
            self._flags[row] |= MASKED
        elif self._flags[row] & MASKED:
            self._restricted[row] = self._free
            self._flags[row] &= ~MASKED

    def flush(self) -> None:
        """Brings to the device what entered and was restricted since the last call."""
        if self._restricted:
            rows = np.fromiter(self._restricted, np.int64, len(self._restricted))
            masks = np.stack(list(self._restricted.values()))
            self._masks.index_copy_(0, send(rows, self._device), send(masks, self._device))
            self._restricted.clear()
        if not self._entered:
            return
        rows = np.fromiter(self._entered, np.int64, len(self._entered))
        parameters = np.array([packed for packed, _ in self._entered.values()], sampling_rows.PARAMETERS)
        penalised = rows[(parameters["flags"] & PENALISED) != 0]
        words = parameters.view(np.int64)
        there = self._upload(rows, words, penalised)
        self._send_typical()
        self._parameters.index_copy_(0, there[0], there[1].view(torch.int32).view(len(rows), -1))
        if len(penalised):
            self._counts.index_fill_(0, there[2], 0)
            self._count()
        self._entered.clear()

    def sample(
        self,
        logits: Tensor,
        table_rows: list[int],
        rows: Tensor,
        generated: Tensor,
        last: Tensor,
    ) -> tuple[Tensor, ...]:
        """One token for each row of ``logits [B, V]`` fp32, which stay as they are; each row's also goes to `last`.

        `table_rows` are those that count; ``rows [B]`` int32 are the same on the device, behind them padding that
        points at a row which never enters. ``generated [B]`` int32: positions of the tokens to come.
        Returns tokens ``[B]`` int32 and log-probabilities ``[B]``, then what `reports` reads. The log-probability of
        logits that are no numbers is none.
        """
        flags = int(np.bitwise_or.reduce(self._flags[table_rows], initial=0))
        biased = self._biased(logits, table_rows) if flags & BIASED else None
        shaped = biased
        needs = LIMITED | CANDIDATES | (ALTERNATIVES if self._processed else 0)
        if shaped is None and flags & (PENALISED | ENDING | MASKED) and flags & needs:
            shaped = torch.empty(logits.shape, dtype=logits.dtype, device=self._device)
        tokens, logprobs, totals, shaped_totals = sampling.sample(
            logits,
            self._parameters,
            rows,
            generated,
            self._counts,
            self._eos,
            self._masks if flags & MASKED else None,
            last,
            plain=flags == 0,
            search=bool(flags & LIMITED),
            biased=biased,
            shaped=shaped,
            raw=not self._processed,
            typical=self._typical if flags & TYPICAL else None,
        )
        found = [tokens, logprobs]
        if not flags & (ALTERNATIVES | CANDIDATES):
            return tuple(found)
        ranked = logits if shaped is None else shaped
        of = self._parameters.index_select(0, rows.long())
        if flags & ALTERNATIVES:
            of_processed = (ranked, shaped_totals, _inverse_temperature(of))
            found += self._alternatives(of, *(of_processed if self._processed else (logits, totals, None)))
        if flags & CANDIDATES:
            found += self._candidates(of, ranked, shaped_totals, None if self._processed else (logits, totals))
        return tuple(found)

    @staticmethod
    def reports(
        table_rows: list[int], *columns: list[list[Any]]
    ) -> tuple[list[Alternatives | None], list[list[Candidate] | None]]:
        """What `sample` returned behind its first two tensors, as lists, in the form of a StepResult. Two are of
        alternatives, three of candidates; five of both."""
        alternatives: list[Alternatives | None] = [None] * len(table_rows)
        candidates: list[list[Candidate] | None] = [None] * len(table_rows)
        if len(columns) in (2, 5):
            for at, pairs in enumerate(zip(*columns[:2], strict=True)):
                alternatives[at] = [pair for pair in zip(*pairs, strict=True) if _is_there(*pair)] or None
        if len(columns) in (3, 5):
            for at, triples in enumerate(zip(*columns[-3:], strict=True)):
                candidates[at] = [triple for triple in zip(*triples, strict=True) if _is_there(*triple[:2])] or None
        return alternatives, candidates

    def _biased(self, logits: Tensor, table_rows: list[int]) -> Tensor:
        """A copy of the logits with what the rows add to theirs."""
        logits = logits.clone(memory_format=torch.contiguous_format)
        self._add_biases(logits, table_rows)
        return logits

    def _add_biases(self, logits: Tensor, table_rows: list[int]) -> None:
        """A row has an id once, so nothing is added in an order of the device's choice."""
        places, numbers = [], []
        for at, row in enumerate(table_rows):
            if row in self._biases:
                ids, added = self._biases[row]
                places.append(at * self._vocab + ids)
                numbers.append(added)
        place, number = np.concatenate(places), np.concatenate(numbers)
        for first in range(0, len(place), FLUSH_IDS):
            part = slice(first, first + FLUSH_IDS)
            logits.view(-1).index_add_(0, send(place[part], self._device), send(number[part], self._device))

    def _alternatives(
        self, of: Tensor, logits: Tensor, totals: Tensor, inverse: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Ids and log-probabilities ``[B, <= 20]`` of the best tokens. An id is -1 from each row's wanted number on:
        the row may have another owner when the host reads them. ``of [B, 16]``: the rows' parameters."""
        values, ids = logits.topk(min(MOST_ALTERNATIVES, self._vocab), -1)
        wanted = of[:, sampling_rows.ALTERNATIVES_WANTED.value, None]
        beyond = torch.arange(ids.shape[1], device=self._device) >= wanted
        if inverse is not None:
            values.mul_(inverse)
        return ids.int().masked_fill_(beyond, -1), values.sub_(totals[:, None])

    def _candidates(
        self, of: Tensor, ranked: Tensor, shaped_totals: Tensor, raw: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Ids of the best tokens ``[B, <= 64]`` of the shaped logits, -1 in rows that are no beams, their
        log-probabilities there, and those that are reported: of the model's logits and their totals, where `raw`."""
        values, ids = ranked.topk(min(MOST_CANDIDATES, self._vocab), -1)
        values.mul_(_inverse_temperature(of)).sub_(shaped_totals[:, None])
        reported = values
        if raw is not None:
            logits, totals = raw
            reported = logits.gather(-1, ids).sub_(totals[:, None])
        others = of[:, :1] & CANDIDATES == 0  # flags are the first column
        return ids.int().masked_fill_(others, -1), values, reported

    def _count(self) -> None:
        """Sets the counts of the rows that entered with a history; they are zero before."""
        places, numbers = [], []
        for row, (_, history) in self._entered.items():
            ids, times = np.unique(np.asarray(history, np.int64), return_counts=True)
            places.append(row * self._vocab + ids)
            numbers.append(np.minimum(times, sampling_rows.MOST_COUNT.value))
        place, number = np.concatenate(places), np.concatenate(numbers)
        for first in range(0, len(place), FLUSH_IDS):
            part = slice(first, first + FLUSH_IDS)
            at, counted = self._upload(place[part], number[part])
            self._counts.view(-1).index_copy_(0, at, counted.short())

    def _send_typical(self) -> None:
        if self._typical_entered:
            rows = np.fromiter(self._typical_entered, np.int64, len(self._typical_entered))
            masses = np.fromiter(self._typical_entered.values(), np.float32, len(rows))
            self._typical.index_copy_(0, send(rows, self._device), send(masses, self._device))
            self._typical_entered.clear()

    def _upload(self, *arrays: np.ndarray) -> list[Tensor]:
        """int64 arrays in one copy."""
        return list(send(np.concatenate(arrays), self._device).split([len(array) for array in arrays]))


def _pack(params: SamplingParams, branch: int, vocab: int) -> np.void:
    """A row of `sampling_rows.PARAMETERS`."""
    hot = params.do_sample and params.temperature >= GREEDY_BELOW
    top_k = params.top_k if params.top_k > 0 else vocab
    drawn = hot and top_k > 1  # one kept token is the highest
    start, factor = params.exponential_decay_length_penalty
    typical = drawn and params.typical_p < 1
    penalised = params.presence_penalty != 0 or params.frequency_penalty != 0 or params.repetition_penalty != 1
    flags = (
        DRAWN * drawn
        | PENALISED * penalised
        | ENDING * (factor != 1 or params.min_new_tokens > 1)
        | LIMITED * (typical or (drawn and (params.top_p < 1 or top_k < vocab or params.min_p > 0)))
        | ALTERNATIVES * (params.top_logprobs > 0)
        | CANDIDATES * (params.candidates > 0)
        | TYPICAL * typical
    )
    packed = np.zeros((), sampling_rows.PARAMETERS)
    packed["flags"] = flags
    packed["inverse_temperature"] = max(1 / params.temperature, LEAST_REAL) if hot else 1
    packed["top_p"] = params.top_p if params.top_p < 1 else 2  # no rounding of a sum may exceed it
    packed["top_k"] = min(top_k, vocab)
    packed["min_p"] = params.min_p
    packed["presence"] = _bounded(params.presence_penalty)
    packed["frequency"] = _bounded(params.frequency_penalty)
    packed["repetition"] = max(_bounded(params.repetition_penalty), LEAST_REAL)
    packed["decay_start"] = _whole(start)
    packed["decay_factor"] = factor
    packed["min_new"] = _whole(params.min_new_tokens)
    packed["branch"] = branch
    packed["seed"] = params.seed
    packed["alternatives"] = params.top_logprobs
    return cast(np.void, packed[()])


def _inverse_temperature(of: Tensor) -> Tensor:
    """``[B, 1]``, of the rows' parameters."""
    return of.view(torch.float32)[:, sampling_rows.INVERSE_TEMPERATURE.value, None]


def _is_there(token: int, logprob: float) -> bool:
    """A row's list is as long as that of the row that asks for most, and a mask may allow fewer."""
    return token >= 0 and logprob != float("-inf")


def _bounded(number: float) -> float:
    return min(max(number, -MOST_REAL), MOST_REAL)


def _whole(number: int) -> int:
    """No sequence is that long, and the largest leaves room for one less."""
    return min(max(number, -(2**30)), 2**30)
