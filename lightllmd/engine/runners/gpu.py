"""Computes steps on a GPU. Everything that the next step needs stays on the device, so that a step is launched while
the one before it computes: the host sends a few numbers per row and reads the tokens a step later.

Small steps are padded to one of a few shapes and replayed as CUDA graphs. Others are launched operation by operation.
Sampling is launched behind the forward, apart from the graph.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from subprocess import CalledProcessError

import torch
from torch import Tensor
from triton.runtime import driver

from lightllmd.architecture.collectives_memory import largest_message
from lightllmd.architecture.family import Architecture
from lightllmd.architecture.kv_layout import KvLayout
from lightllmd.config.bounds import (
    DEVICE_HEAD_DIMS,
    DEVICE_LOGIT_ROWS,
    FEW_ROWS,
    SPARE_WIDTH,
    graph_sizes,
    mixed_shapes,
    most_step_tokens,
    prefill_sizes,
    scored_rows,
)
from lightllmd.engine.ranks.member import Member
from lightllmd.engine.ranks.process_group import open_process_group
from lightllmd.engine.runners.base import BaseRunner, Beat, Progress
from lightllmd.engine.runners.gpu_batch import Packed, Packer
from lightllmd.engine.runners.graphs import StepGraphs
from lightllmd.engine.runners.loading import load_model, memory_errors
from lightllmd.engine.runners.memory_meter import MemoryMeter
from lightllmd.engine.runners.step_shapes import StepShape, StepShapes, first_tokens
from lightllmd.engine.runners.transfers import Download
from lightllmd.engine.runners.warmup import worst_steps
from lightllmd.engine.sampling.gpu_sampler import DeviceSampler
from lightllmd.engine.sampling.prompt_logprobs import PromptScores
from lightllmd.engine.step import Masks, Row, SamplingRow, Step, StepResult, no_decode
from lightllmd.errors import NoUsableDevice
from lightllmd.kernels import whole_prompts
from lightllmd.kernels.collectives import ALONE, Group
from lightllmd.kernels.collectives_device import DeviceGroup
from lightllmd.kernels.devices import fused_kernels
from lightllmd.kernels.embed import gather_rows
from lightllmd.kernels.kv_cache import LayerCache, allocate
from lightllmd.kernels.layout import Heads
from lightllmd.models.embeddings import vectors_of
from lightllmd.models.language_model import LanguageModel
from lightllmd.weights.host_copy import HostCopy, free_storage

log = logging.getLogger(__name__)


@dataclass
class _Pending:
    """A step whose tokens are on their way to the host."""

    sampler: DeviceSampler
    chunks: list[tuple[list[int], Download]]  # (table rows, what the sampler returned)
    scores: PromptScores | None
    pooled: list[int]  # how many vectors each row has that is asked for any
    vectors: Download | None  # of all of these; None: there are none
    end: Download | None  # where a step has nothing of that

    def wait(self, beat: Beat) -> StepResult:
        """See `base.PendingResult`."""
        result = StepResult([], [], [], [])
        for rows, download in self.chunks:
            tokens, logprobs, *reported = (tensor[: len(rows)].tolist() for tensor in download.wait(beat))
            result.tokens += tokens
            result.logprobs += logprobs
            alternatives, candidates = self.sampler.reports(rows, *reported)
            result.alternatives += alternatives
            result.candidates += candidates
        if self.scores is not None:
            result.targets = self.scores.take(beat)
        vectors = iter(self.vectors.wait(beat)[0] if self.vectors is not None else ())
        result.pooled = [[next(vectors).numpy().tobytes() for _ in range(count)] for count in self.pooled]
        if self.end is not None:
            self.end.wait(beat)
        return result


class GpuRunner(BaseRunner[Packed, Tensor, HostCopy]):
    """The `Runner` of a GPU. All launches come from one thread."""

    slots: int
    decoder: LanguageModel
    caches: list[LayerCache]  # one per layer; the last slot is padding's
    memory: MemoryMeter
    _group: Group = ALONE

    @contextmanager
    def _computing(self) -> Iterator[None]:
        with memory_errors(), torch.inference_mode():
            yield

    def _open(self) -> None:
        self._device = _usable(self._plan.device.kind, self._member)
        if self._member.rank.count > 1:  # the ranks share the cores
            torch.set_num_threads(max(1, self._plan.device.cpu_threads // self._member.rank.count))
        self.overlaps = self._plan.config.engine.overlap
        self.slots = self._plan.max_total_token_num
        self._rows = self._plan.config.params.running_max_req_size
        self._dtype: torch.dtype = getattr(torch, self._plan.data_type)
        self.memory = MemoryMeter(self._device)
        if self._member.rendezvous is not None:
            with self.memory.opening_group():
                self._group = self._open_group()

    def _open_group(self) -> DeviceGroup:
        """All ranks do it at the same time."""
        plan = self._plan
        assert plan.model is not None
        assert isinstance(plan.model.architecture, Architecture)  # others are no group's, see `rank_faults`
        spec = plan.model.architecture.spec
        tokens = most_step_tokens(plan.batch_max_tokens, self._rows)
        largest = largest_message(tokens, spec.hidden, spec.vocab, self._dtype.itemsize)
        group = DeviceGroup(open_process_group(self._member, self._device), self._device, largest)
        with self._computing():
            group.warm(spec.hidden, spec.vocab, self._dtype)
        return group

    def _load_weights(self, progress: Progress) -> None:
        kernels = fused_kernels(self._device, self._plan.decode_kernel, self._group)
        with ThreadPoolExecutor(1) as beside:  # libraries take about a second to load, as weights do
            loaded = beside.submit(_load_libraries, self._device, self._dtype)
            self.decoder = load_model(
                self._plan, kernels, self._device, self._dtype, progress, DEVICE_HEAD_DIMS, self._member.rank
            )
            loaded.result()

    def _allocate(self) -> None:
        """But for the graphs."""
        plan, device, params = self._plan, self._device, self._plan.config.params
        spec = self.decoder.spec
        heads = self.decoder.heads[0]
        self.caches = allocate(KvLayout.of(spec.attention, plan.data_type, plan.kv_scheme), self.slots + 1, device)
        for cache in self.caches:
            cache.clear(self.slots)
        self._last = torch.zeros(self._rows + 1, dtype=torch.int32, device=device)
        processed = plan.config.engine.logprobs == "processed"
        drawn = self._rows + 1 if spec.generates else 1  # rows: none where nothing is drawn
        self._sampler = DeviceSampler(drawn, spec.vocab, plan.eos_id, device, processed=processed)
        width = params.max_req_total_len + SPARE_WIDTH
        table = torch.zeros((self._rows + 1, width), dtype=torch.int32, device=device)
        most = most_step_tokens(plan.batch_max_tokens, self._rows)
        self._packer = Packer(table, self._last, self.slots, self.decoder.rope, heads, most, self._dtype)
        if device.type == "cuda":  # without graphs too: the same launches, so the same bits
            self._shapes = StepShapes(self._rows, prefill_sizes(plan.batch_max_tokens), mixed_shapes(params))
        else:
            self._shapes = StepShapes(self._rows, [], [])
        self._graphs: StepGraphs | None = None
        self.memory.mark_loaded()

    def prepare(self, beat: Beat) -> None:
        """Captures the graphs, then runs the worst admissible steps beside them. Raises OutOfMemory."""
        config, spec = self._plan.config, self.decoder.spec
        begun = time.monotonic()
        captured = graph_sizes(config) if self._device.type == "cuda" and self.decoder.capturable else []
        with self._computing():
            if captured:
                self._graphs = StepGraphs()
            blank = Step(0, "decode", no_decode(), [], [])
            for shape in self._shapes:
                packed = self._packer.pack(blank, shape, self._shapes.rows(shape.decode_tokens))
                hidden = self._warm_and_capture(packed, bool(captured) and shape.decode_tokens <= captured[-1])
                if spec.generates and not shape.prefill_tokens and shape.decode_tokens <= DEVICE_LOGIT_ROWS:
                    self.decoder.head.logits(hidden)
                beat()
            # No batch has these sizes, but a step of few named tokens may, and products have a kernel for each.
            for size in range(1, FEW_ROWS + 1):
                shape = StepShape(size, 0)
                if shape not in self._shapes:
                    self._warm_and_capture(self._packer.pack(blank, shape, size), False)
            self.memory.mark_graphs()
            captured_at = time.monotonic()
            longest = min(config.params.max_req_total_len, self._plan.batch_max_tokens)
            self._packer.longest_whole = whole_prompts.plan(self.decoder.heads, self._dtype, self._device, longest)
            for step in worst_steps(self._plan):
                self.run(step, beat)
            self.memory.mark_worst_steps()
            log.info(
                "graphs captured in %.1f s, worst steps run in %.1f s",
                captured_at - begun,
                time.monotonic() - captured_at,
            )

    # --- sleep ------------------------------------------------------------------------------------------------------
    def _stage_weights(self) -> HostCopy:
        return HostCopy(self.decoder.tensors(), self._device)

    def _free(self, weights_stay: bool) -> None:
        """Leaves the process's context on the device, with the kernels that it loaded."""
        if weights_stay:
            free_storage(self.decoder.tensors())
        else:
            del self.decoder
        del self.caches, self._last, self._sampler, self._packer, self._graphs
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()
        self.memory.mark_asleep()

    def _restore_weights(self, staged: HostCopy, progress: Progress) -> None:
        staged.restore(self.decoder.tensors(), progress)

    def _memory(self) -> dict[str, float]:
        return self.memory.stats()

    # --- steps ------------------------------------------------------------------------------------------------------
    def _pack(self, step: Step) -> Packed:
        count = len(step.decode.table_rows) + sum(row.sample for row in step.rows)
        return self._packer.pack(step, self._shapes.of(step), self._shapes.rows(count))

    def _forward(self, packed: Packed, beat: Beat) -> Tensor:
        """Hidden states: of all tokens, or of those that are sampled."""
        return self._hidden(packed, None if packed.whole else packed.sampled, beat)

    def _enter(self, row: Row, sampling: SamplingRow) -> None:
        self._sampler.enter(row.table_row, sampling, row.branch)

    def _restrict(self, masks: Masks) -> None:
        for table_row, mask in masks.items():
            self._sampler.restrict(table_row, mask)

    def _sample(self, step: Step, packed: Packed, hidden: Tensor, beat: Beat) -> _Pending:
        self._sampler.flush()
        rows = [*step.decode.table_rows, *(row.table_row for row in step.rows if row.sample)]
        chunks = self._draw(rows, self._sampled(hidden, packed) if packed.whole else hidden, packed)
        scores = None
        if any(row.targets is not None for row in step.rows):
            at_once = scored_rows(self._rows)
            where = packed.targets, packed.before
            scores = PromptScores(step.rows, *where, self.decoder.head, hidden, at_once)
        vectors = self._vectors(hidden, packed) if packed.pooled is not None else None
        if not self._member.leads:
            return _Pending(self._sampler, [], None, [], None, Download([], self._device))
        arriving = Download([vectors], self._device) if vectors is not None else None
        pooled = [row.pooling.vectors for row in step.rows if row.pooling is not None]
        end = None if chunks or scores or arriving else Download([], self._device)
        return _Pending(self._sampler, chunks, scores, pooled, arriving, end)

    def _vectors(self, hidden: Tensor, packed: Packed) -> Tensor:
        """fp32 ``[V, values]`` of a step that has some."""
        places, owners = packed.pooled, packed.owners
        assert places is not None
        assert owners is not None
        if self.decoder.spec.scores is not None:
            return self.decoder.scores(hidden, places)
        return vectors_of(self.decoder, hidden, places, owners, packed.owned)

    @torch.inference_mode()
    def every_logits(self, step: Step) -> Tensor:
        """Computes a step without sampling: fp32 logits ``[T, vocab]`` behind each of its tokens."""
        shape = self._shapes.of(step)
        packed = self._packer.pack(step, shape, self._shapes.rows(step.size))
        hidden = self._hidden(packed, None, _nothing)
        fed = list(range(len(step.decode.table_rows)))
        for row, first in zip(step.rows, first_tokens(step, shape), strict=True):
            fed += range(first, first + len(row.tokens))
        return self.decoder.head.logits(hidden[fed])

    def _hidden(self, packed: Packed, wanted: Tensor | None, beat: Beat) -> Tensor:
        # A graph embeds by ids alone, and its tokens see none behind them.
        plain = packed.batch.images is None and packed.causal
        if self._graphs is not None and plain and packed.shape in self._graphs:
            return self._graphs.replay(packed.shape)
        return self.decoder.forward(packed.batch, self.caches, beat, wanted)

    @staticmethod
    def _sampled(hidden: Tensor, packed: Packed) -> Tensor:
        """Out of the hidden states of all tokens."""
        if packed.sampled is None:
            return hidden
        sampled = hidden.new_empty(len(packed.sampled), hidden.shape[1])
        gather_rows(hidden, packed.sampled, sampled)
        return sampled

    def _warm_and_capture(self, packed: Packed, captured: bool) -> Tensor:
        """Runs a step once, so that all it needs is compiled and loaded, and captures it. Returns its hidden states."""

        def compute() -> Tensor:
            return self.decoder.forward(packed.batch, self.caches, _nothing)

        hidden = compute()
        if captured and self._graphs is not None:
            self._graphs.capture(packed.shape, compute)
        return hidden

    # --- sampling -----------------------------------------------------------------------------------------------
    def _draw(self, rows: list[int], hidden: Tensor, packed: Packed) -> list[tuple[list[int], Download]]:
        """`rows` are the table rows that count; `hidden` is padded as what is sampled. Nothing is downloaded where that
        is not asked for."""
        chunks = []
        for first in range(0, len(rows), DEVICE_LOGIT_ROWS):
            part = slice(first, first + DEVICE_LOGIT_ROWS)
            logits = self.decoder.head.logits(hidden[part])
            drawn = self._sampler.sample(
                logits, rows[part], packed.table_rows[part], packed.generated[part], self._last
            )
            if self._member.leads:
                chunks.append((rows[part], Download(drawn, self._device)))
        return chunks


def _usable(kind: str, member: Member) -> torch.device:
    """The member's GPU, the current one of this thread from now on; a CPU is taken where Triton interprets its kernels,
    which tests do. Raises NoUsableDevice."""
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise NoUsableDevice("no CUDA device can be used by this build of torch")
        if member.device >= torch.cuda.device_count():
            raise NoUsableDevice(f"GPU {member.device} is planned with, but {torch.cuda.device_count()} can be used")
        torch.cuda.set_device(member.device)
        try:
            driver.active.get_current_device()
        except (RuntimeError, OSError, CalledProcessError) as error:
            message = f"Triton can't reach the GPU: {error}; it needs a C compiler and Python's headers"
            raise NoUsableDevice(f"{message} (Debian: gcc, python3-dev)") from error
        return torch.device(kind, member.device)
    return torch.device(kind)


@torch.inference_mode()
def _load_libraries(device: torch.device, dtype: torch.dtype) -> None:
    """cuBLAS and cuDNN begin with their first use. In a thread of its own, whose current device is the first one."""
    if device.index is not None:
        torch.cuda.set_device(device)
    square = torch.zeros((128, 128), dtype=dtype, device=device)
    torch.mm(square, square)
    heads = Heads(query=1, kv=1, dim=128, scale=1.0, norm_eps=0.0)
    whole_prompts.plan([heads], dtype, device, whole_prompts.LEAST)


def _nothing() -> None:
    pass
