"""Computes steps with torch's own operations on a CPU, one after another. Owns weights, KV cache, request->slot table
and sampling state."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, groupby

import torch
from torch import Tensor

from lightllmd.architecture.kv_layout import KvLayout
from lightllmd.config.bounds import LOGIT_ROWS, SPARE_WIDTH
from lightllmd.engine.ranks.process_group import open_process_group
from lightllmd.engine.runners.base import BaseRunner, Beat, KeptWeights, Progress, ReadyResult
from lightllmd.engine.runners.cpu_batch import SlotTable
from lightllmd.engine.runners.image_rows import image_rows
from lightllmd.engine.runners.loading import load_model, memory_errors
from lightllmd.engine.runners.memory_meter import MemoryMeter
from lightllmd.engine.sampling.cpu_sampler import Sampler, highest
from lightllmd.engine.step import Alternatives, Masks, PoolingRow, Row, SamplingRow, Step, StepResult, TargetLogprobs
from lightllmd.kernels.collectives import ALONE, Group
from lightllmd.kernels.collectives_gloo import GlooGroup
from lightllmd.kernels.devices import kernels_for
from lightllmd.kernels.kv_cache import LayerCache, allocate
from lightllmd.kernels.layout import Batch, GatheredRows
from lightllmd.models.embeddings import owners_of, vectors_of
from lightllmd.models.language_model import LanguageModel

_CPU = torch.device("cpu")


@dataclass
class _Kept:
    """The tokens whose logits are asked for: the last layer keeps the hidden states of these alone, in their order."""

    tokens: list[int] = field(default_factory=list)  # among the packed ones, ascending
    sampled: list[int] = field(default_factory=list)  # among `tokens`, of each row that samples
    scored: list[int] = field(default_factory=list)  # the same, of each token before a target
    pooled: list[int] = field(default_factory=list)  # the same, of each token that becomes a vector

    @staticmethod
    def of(rows: list[Row], ahead: int) -> _Kept:
        """`ahead` of the rows stand before Step.rows."""
        kept, end = _Kept(), 0
        lasts: list[int] = []  # of each row among `tokens`
        for row in rows:
            begin, end = end, end + len(row.tokens)
            if row.pooling is not None:
                kept.pooled += range(len(kept.tokens), len(kept.tokens) + len(row.pooling.at))
                kept.tokens += [begin + at for at in row.pooling.at]
            named = range(begin, begin + len(row.targets or ()))
            kept.scored += range(len(kept.tokens), len(kept.tokens) + len(named))
            kept.tokens += named
            if row.sample and row.sibling_of is None and end != named.stop:
                kept.tokens.append(end - 1)
            lasts.append(len(kept.tokens) - 1 if row.sibling_of is None else lasts[ahead + row.sibling_of])
            if row.sample:
                kept.sampled.append(lasts[-1])
        return kept

    def wanted(self, fed: int) -> Tensor | None:
        """For `Decoder.forward`: never none at all, which products are not made for."""
        return None if len(self.tokens) == fed else torch.tensor(self.tokens or [fed - 1])


@dataclass
class _Packed:
    rows: list[Row]  # decode rows, then those of the step
    batch: Batch[GatheredRows]
    kept: _Kept
    wanted: Tensor | None  # for `Decoder.forward`
    begun: int  # bytes that were taken before the step


class CpuRunner(BaseRunner[_Packed, Tensor, KeptWeights]):
    """The `Runner` of a CPU."""

    overlaps = False
    slots: int
    decoder: LanguageModel
    caches: list[LayerCache]  # one per layer
    table: SlotTable
    sampler: Sampler
    memory: MemoryMeter
    _group: Group = ALONE

    @contextmanager
    def _computing(self) -> Iterator[None]:
        with memory_errors(), torch.inference_mode():
            yield

    def _open(self) -> None:
        torch.set_num_threads(self._plan.threads)
        self.slots = self._plan.max_total_token_num
        self.memory = MemoryMeter(_CPU)
        if self._member.rendezvous is not None:
            self._group = GlooGroup(open_process_group(self._member, _CPU))

    def _load_weights(self, progress: Progress) -> None:
        dtype = getattr(torch, self._plan.data_type)
        kernels = kernels_for(_CPU, dtype, self._group)
        self.decoder = load_model(self._plan, kernels, _CPU, dtype, progress, rank=self._member.rank)

    def _allocate(self) -> None:
        plan, spec, params = self._plan, self.decoder.spec, self._plan.config.params
        dtype = getattr(torch, plan.data_type)
        self.caches = allocate(KvLayout.of(spec.attention, plan.data_type, plan.kv_scheme), self.slots, _CPU)
        rows, width = params.running_max_req_size + 1, params.max_req_total_len + SPARE_WIDTH
        self.table = SlotTable(rows, width, self.slots, _CPU, dtype)
        processed = plan.config.engine.logprobs == "processed"
        self.sampler = Sampler(rows, width, spec.vocab, plan.eos_id, _CPU, processed=processed)
        self._newest = [0] * rows  # each table row's newest token
        self._shifts = [0] * rows  # of each table row, see `Row.shift`
        self.memory.mark_loaded()

    def prepare(self, beat: Beat) -> None:
        """Nothing is compiled here, and a step takes no memory before it runs."""

    # --- sleep ------------------------------------------------------------------------------------------------------
    def _stage_weights(self) -> KeptWeights:
        """The weights are in host memory, so this only says that they are to stay there."""
        return KeptWeights(sum(tensor.nbytes for tensor in self.decoder.tensors().values()))

    def _free(self, weights_stay: bool) -> None:
        del self.caches, self.table, self.sampler, self._newest, self._shifts
        if not weights_stay:
            del self.decoder
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # smaller blocks come from the heap, which keeps what is free
        self.memory.mark_asleep()

    def _restore_weights(self, staged: KeptWeights, progress: Progress) -> None:
        """They are where they were."""

    def _memory(self) -> dict[str, float]:
        return self.memory.stats()

    # --- steps ------------------------------------------------------------------------------------------------------
    def _pack(self, step: Step) -> _Packed:
        begun = self.memory.begin_step()
        rows = self._rows(step)
        kept = _Kept.of(rows, len(step.decode.table_rows))
        return _Packed(rows, self._batch(rows), kept, kept.wanted(step.fed), begun)

    def _batch(self, rows: list[Row]) -> Batch[GatheredRows]:
        batch = self.table.pack(rows, self.decoder.rope)
        if any(row.images for row in rows):
            firsts = [0, *accumulate(len(row.tokens) for row in rows)][:-1]
            batch.images = image_rows(rows, firsts, getattr(torch, self._plan.data_type), _CPU)
        return batch

    def _forward(self, packed: _Packed, beat: Beat) -> Tensor:
        return self.decoder.forward(packed.batch, self.caches, beat, packed.wanted)

    def _enter(self, row: Row, sampling: SamplingRow) -> None:
        self.sampler.enter(row.table_row, sampling, row.branch)

    def _restrict(self, masks: Masks) -> None:
        self.sampler.restrict(masks)

    def _sample(self, step: Step, packed: _Packed, hidden: Tensor, beat: Beat) -> ReadyResult:
        rows, kept = packed.rows, packed.kept
        result = self._draw([row for row in rows if row.sample], kept.sampled, hidden, beat)
        result.pooled = self._pool([row.pooling for row in rows if row.pooling is not None], kept.pooled, hidden)
        result.targets = self._score([row for row in rows if row.targets is not None], kept.scored, hidden, beat)
        self.memory.end_step(packed.begun)
        return ReadyResult(result)

    @torch.inference_mode()
    def every_logits(self, step: Step) -> Tensor:
        """Computes a step without sampling: fp32 logits ``[T, vocab]`` behind each of its tokens."""
        batch = self._batch(self._rows(step))
        return self.decoder.head.logits(self.decoder.forward(batch, self.caches, lambda: None))

    def _rows(self, step: Step) -> list[Row]:
        decode = step.decode
        for row in step.rows:
            self._shifts[row.table_row] = row.shift
        going_on = zip(decode.table_rows, decode.starts, decode.slots, decode.positions, strict=True)
        return [
            Row(
                table_row,
                0,
                0,
                start,
                [self._newest[table_row]],
                [slot],
                True,
                position,
                None,
                shift=self._shifts[table_row],
            )
            for table_row, start, slot, position in going_on
        ] + step.rows

    def _draw(self, rows: list[Row], places: list[int], hidden: Tensor, beat: Beat) -> StepResult:
        """`places` among the hidden states of each row's last token; siblings share one."""
        count = len(rows)
        result = StepResult([0] * count, [0.0] * count, [None] * count, [None] * count)
        for some, logits in self._logits(places, hidden):
            table_rows = [rows[index].table_row for index in some]
            sampled = self.sampler.sample(logits, table_rows, [rows[index].position for index in some])
            for index, token, logprob in zip(some, sampled.tokens.tolist(), sampled.logprobs.tolist(), strict=True):
                result.tokens[index], result.logprobs[index] = token, logprob
            for index, alternatives, candidates in zip(some, sampled.alternatives, sampled.candidates, strict=True):
                result.alternatives[index], result.candidates[index] = alternatives, candidates
            beat()
        self.sampler.record([row.table_row for row in rows], result.tokens)
        for row, token in zip(rows, result.tokens, strict=True):
            self._newest[row.table_row] = token
        return result

    def _logits(self, places: list[int], hidden: Tensor) -> Iterator[tuple[list[int], Tensor]]:
        """Parts of `places` and their logits ``[B <= LOGIT_ROWS, V]``. The logits of a place
        are the same numbers wherever it is named: a product of other rows beside it might round them otherwise."""
        in_order = sorted(range(len(places)), key=places.__getitem__)
        shared = [list(same) for _, same in groupby(in_order, places.__getitem__)]
        for first in range(0, len(shared), LOGIT_ROWS):
            part = shared[first : first + LOGIT_ROWS]
            logits = self.decoder.head.logits(hidden[[places[same[0]] for same in part]])
            named = [(index, at) for at, same in enumerate(part) for index in same]
            if len(named) == len(part):
                yield [index for index, _ in named], logits
                continue
            for begin in range(0, len(named), LOGIT_ROWS):
                some = named[begin : begin + LOGIT_ROWS]
                yield [index for index, _ in some], logits[[at for _, at in some]]

    def _pool(self, rows: list[PoolingRow], places: list[int], hidden: Tensor) -> list[list[bytes]]:
        """`places` among the hidden states of the tokens that the rows name, row by row."""
        if not places:
            return [[] for _ in rows]
        where = torch.tensor(places)
        if self.decoder.spec.scores is not None:
            vectors = self.decoder.scores(hidden, where)
        else:
            owners = owners_of([(len(row.at), row.summed) for row in rows])
            vectors = vectors_of(self.decoder, hidden, where, torch.tensor(owners), owners)
        told = iter(vectors)
        return [[next(told).numpy().tobytes() for _ in range(row.vectors)] for row in rows]

    def _score(self, rows: list[Row], places: list[int], hidden: Tensor, beat: Beat) -> list[TargetLogprobs]:
        """`places` among the hidden states of the tokens before the rows' targets, row by row."""
        targets = [target for row in rows for target in row.targets or ()]
        wanted = [row.top_targets for row in rows for _ in row.targets or ()]
        logprobs: list[float] = []
        alternatives: list[Alternatives] = []
        for first in range(0, len(places), LOGIT_ROWS):
            part = slice(first, first + LOGIT_ROWS)
            logits = self.decoder.head.logits(hidden[places[part]])
            total = logits.logsumexp(-1, keepdim=True)
            logprobs += (logits.gather(-1, torch.tensor(targets[part])[:, None]) - total)[:, 0].tolist()
            if most := max(wanted[part]):
                alternatives += highest(logits, total, most)
            else:
                alternatives += [[]] * len(total)
            beat()
        scores, end = [], 0
        for row in rows:
            begin, end = end, end + len(row.targets or ())
            best = [found[: row.top_targets] for found in alternatives[begin:end]] if row.top_targets else None
            scores.append(TargetLogprobs(logprobs[begin:end], best))
        return scores
