"""Computes steps on a GPU. Everything that the next step needs stays on the device, so that a step is launched while
the one before it computes: the host sends a few numbers per row and reads the tokens a step later.

Small steps are padded to one of a few shapes and replayed as CUDA graphs. Others are launched operation by operation.
Sampling is launched behind the forward, apart from the graph.
"""

from __future__ import annotations

import gc
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from subprocess import CalledProcessError

import torch
from torch import Tensor
from triton.runtime import driver

from lightllmd.architecture.kv_layout import KvLayout
from lightllmd.config.bounds import (
    DEVICE_LOGIT_ROWS,
    FEW_ROWS,
    SPARE_WIDTH,
    graph_sizes,
    mixed_shapes,
    most_step_tokens,
    prefill_sizes,
    scored_rows,
)
from lightllmd.config.plan import Plan
from lightllmd.engine.runners.gpu_batch import Packed, Packer
from lightllmd.engine.runners.graphs import StepGraphs
from lightllmd.engine.runners.loading import build_decoder, memory_errors, stored_weights
from lightllmd.engine.runners.memory_meter import MemoryMeter
from lightllmd.engine.runners.step_shapes import StepShape, StepShapes, first_tokens
from lightllmd.engine.runners.transfers import Download
from lightllmd.engine.runners.warmup import worst_steps
from lightllmd.engine.sampling.gpu_sampler import DeviceSampler
from lightllmd.engine.sampling.prompt_logprobs import PromptScores
from lightllmd.engine.step import Step, StepResult, no_decode
from lightllmd.errors import NoUsableDevice
from lightllmd.kernels import whole_prompts
from lightllmd.kernels.dispatch import fused_kernels
from lightllmd.kernels.embed import gather_rows
from lightllmd.kernels.kv_cache import LayerCache, allocate
from lightllmd.kernels.layout import Heads
from lightllmd.models.decoder import Decoder
from lightllmd.weights.host_copy import HostCopy
from lightllmd.weights.loaded import LoadedWeight

log = logging.getLogger(__name__)


@dataclass
class _Out:
    """A step whose tokens are on their way to the host."""

    chunks: list[tuple[list[int], Download]]  # (table rows, what the sampler returned)
    scores: PromptScores | None
    end: Download | None  # where a step has neither


class DeviceRunner:
    """The `Runner` of a GPU. Nothing is read before `load` has set it. All launches come from one thread."""

    overlaps: bool
    slots: int
    decoder: Decoder
    caches: list[LayerCache]  # one per layer; the last slot is padding's
    memory: MemoryMeter

    def load(self, plan: Plan, progress: Callable[[int, int], None]) -> None:
        """Raises WeightsInvalid, OutOfMemory, NoUsableDevice, ConfigInvalid."""
        self._plan, self._device, params = plan, self._open(plan.device.kind), plan.config.params
        self.overlaps = plan.config.engine.overlap
        self.slots = plan.max_total_token_num
        self._rows = params.running_max_req_size
        self._out: deque[_Out] = deque()
        self._copy: HostCopy | None = None  # made by `stage`
        with memory_errors(), torch.inference_mode():
            self.memory = MemoryMeter(self._device)
            with ThreadPoolExecutor(1) as beside:  # libraries take about a second to load, as weights do
                loaded = beside.submit(_load_libraries, self._device, getattr(torch, plan.data_type))
                self._fill(progress)
                loaded.result()
            self.memory.mark_loaded()

    def _fill(self, progress: Callable[[int, int], None]) -> None:
        """Makes everything that lies on the device, but for the graphs."""
        plan, device, params = self._plan, self._device, self._plan.config.params
        dtype = getattr(torch, plan.data_type)
        if self._copy is not None:
            weights = self._copy.stream(progress)
        else:
            weights = stored_weights(plan, device, dtype, progress)
        # As they came, for `stage`. They are those of the decoder, whose products take them over as they are.
        self._weights: list[LoadedWeight] = []
        kernels = fused_kernels(device, plan.decode_kernel)
        self.decoder = build_decoder(plan, kernels, _noted(weights, self._weights), device)
        spec = self.decoder.spec
        heads = self.decoder.layers[0].attention.heads
        self.caches = allocate(KvLayout.of(spec, plan.data_type), self.slots + 1, device)
        for cache in self.caches:
            cache.clear(self.slots)
        self._last = torch.zeros(self._rows + 1, dtype=torch.int32, device=device)
        processed = plan.config.engine.logprobs == "processed"
        self._sampler = DeviceSampler(self._rows + 1, spec.vocab, plan.eos_id, device, processed=processed)
        width = params.max_req_total_len + SPARE_WIDTH
        table = torch.zeros((self._rows + 1, width), dtype=torch.int32, device=device)
        most = most_step_tokens(plan.batch_max_tokens, self._rows)
        self._packer = Packer(table, self._last, self.slots, self.decoder.rope, heads, most)
        if device.type == "cuda":  # without graphs too: the same launches, so the same bits
            self._shapes = StepShapes(self._rows, prefill_sizes(plan.batch_max_tokens), mixed_shapes(params))
        else:
            self._shapes = StepShapes(self._rows, [], [])
        self._graphs: StepGraphs | None = None

    def prepare(self, beat: Callable[[], None]) -> None:
        """Captures the graphs, then runs the worst admissible steps beside them. Raises OutOfMemory."""
        config = self._plan.config
        begun = time.monotonic()
        captured = graph_sizes(config) if self._device.type == "cuda" else []
        with memory_errors(), torch.inference_mode():
            if captured:
                self._graphs = StepGraphs()
            blank = Step(0, "decode", no_decode(), [], [])
            for shape in self._shapes:
                packed = self._packer.pack(blank, shape, self._shapes.rows(shape.decode_tokens))
                hidden = self._settle(shape, packed, bool(captured) and shape.decode_tokens <= captured[-1])
                if not shape.prefill_tokens and shape.decode_tokens <= DEVICE_LOGIT_ROWS:
                    self.decoder.head.logits(hidden)
                beat()
            # No batch has these sizes, but a step of few named tokens may, and products have a kernel for each.
            for size in range(1, FEW_ROWS + 1):
                shape = StepShape(size, 0)
                if shape not in self._shapes:
                    self._settle(shape, self._packer.pack(blank, shape, size), False)
            self.memory.mark_graphs()
            captured_at = time.monotonic()
            longest = min(config.params.max_req_total_len, self._plan.batch_max_tokens)
            heads = [layer.attention.heads for layer in self.decoder.layers]
            dtype = getattr(torch, self._plan.data_type)
            self._packer.longest_whole = whole_prompts.plan(heads, dtype, self._device, longest)
            for step in worst_steps(self._plan):
                self.run(step, beat)
            self.memory.mark_worst_steps()
            log.info(
                "graphs captured in %.1f s, worst steps run in %.1f s",
                captured_at - begun,
                time.monotonic() - captured_at,
            )

    # --- sleep ------------------------------------------------------------------------------------------------------
    def stage(self) -> None:
        if self._copy is None or self._copy.refused:
            self._copy = HostCopy(self._weights, self._device)

    def unstage(self) -> None:
        if self._copy is not None:
            self._copy.give_up()
            self._copy = None

    def release(self, progress: Callable[[int, int], None]) -> None:
        """Leaves the process's context on the device, with the kernels that it loaded."""
        if self._copy is not None:
            self._copy.wait(progress)
        self._out.clear()
        del self.decoder, self.caches, self._weights, self._last, self._sampler, self._packer, self._graphs
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()
        self.memory.mark_asleep()

    def restore(self, progress: Callable[[int, int], None]) -> None:
        if self._copy is not None and not self._copy.whole:
            self._copy = None
        with memory_errors(), torch.inference_mode():
            self._fill(progress)
        self._copy = None
        self.memory.mark_loaded()

    # --- steps ------------------------------------------------------------------------------------------------------
    def launch(self, step: Step, beat: Callable[[], None]) -> None:
        """A row whose logits are no numbers gets a log-probability that is none either. Raises OutOfMemory."""
        with memory_errors(), torch.inference_mode():
            shape = self._shapes.of(step)
            rows = [*step.decode.table_rows, *(row.table_row for row in step.rows if row.sample)]
            packed = self._packer.pack(step, shape, self._shapes.rows(len(rows)))
            whole = shape.padded or packed.targets is not None
            hidden = self._forward(shape, packed, whole, beat)
            # What sampling needs to know can come while the forward computes.
            for row in step.rows:
                if row.sampling is not None:
                    self._sampler.enter(row.table_row, row.sampling, row.branch)
            for table_row, mask in step.masks.items():
                self._sampler.restrict(table_row, mask)
            self._sampler.flush()
            chunks = self._sample(rows, self._sampled(hidden, packed) if whole else hidden, packed)
            scores = None
            if any(row.targets is not None for row in step.rows):
                at_once = scored_rows(self._rows)
                where = packed.targets, packed.before
                scores = PromptScores(step.rows, *where, self.decoder.head, hidden, at_once)
            end = None if chunks or scores else Download([], self._device)
            self._out.append(_Out(chunks, scores, end))

    def collect(self, beat: Callable[[], None]) -> StepResult:
        with memory_errors():
            result, out = StepResult([], [], [], []), self._out.popleft()
            for rows, download in out.chunks:
                tokens, logprobs, *reported = (tensor[: len(rows)].tolist() for tensor in download.wait(beat))
                result.tokens += tokens
                result.logprobs += logprobs
                alternatives, candidates = self._sampler.reports(rows, *reported)
                result.alternatives += alternatives
                result.candidates += candidates
            if out.scores is not None:
                result.targets = out.scores.take(beat)
            if out.end is not None:
                out.end.wait(beat)
            return result

    def run(self, step: Step, beat: Callable[[], None]) -> StepResult:
        """One step, launched and waited for."""
        self.launch(step, beat)
        return self.collect(beat)

    @torch.inference_mode()
    def every_logits(self, step: Step) -> Tensor:
        """Computes a step without sampling: fp32 logits ``[T, vocab]`` behind each of its tokens."""
        shape = self._shapes.of(step)
        packed = self._packer.pack(step, shape, self._shapes.rows(step.size))
        hidden = self._forward(shape, packed, True, _nothing)
        fed = list(range(len(step.decode.table_rows)))
        for row, first in zip(step.rows, first_tokens(step, shape), strict=True):
            fed += range(first, first + len(row.tokens))
        return self.decoder.head.logits(hidden[fed])

    def memory_stats(self) -> dict[str, float]:
        stats = self.memory.stats()
        if self._copy is not None:
            stats["staged_bytes"] = -1.0 if self._copy.refused else float(self._copy.done)
            stats["staged_total"] = float(self._copy.total)
        return stats

    # --- the forward ----------------------------------------------------------------------------------------------
    def _forward(self, shape: StepShape, packed: Packed, whole: bool, beat: Callable[[], None]) -> Tensor:
        """Hidden states: of all tokens, or of those that are sampled."""
        if self._graphs is not None and shape in self._graphs:
            return self._graphs.replay(shape)
        return self.decoder.forward(packed.batch, self.caches, beat, None if whole else packed.sampled)

    @staticmethod
    def _sampled(hidden: Tensor, packed: Packed) -> Tensor:
        """Out of the hidden states of all tokens."""
        if packed.sampled is None:
            return hidden
        sampled = hidden.new_empty(len(packed.sampled), hidden.shape[1])
        gather_rows(hidden, packed.sampled, sampled)
        return sampled

    def _settle(self, shape: StepShape, packed: Packed, captured: bool) -> Tensor:
        """Runs a step once, so that all it needs is compiled and loaded, and captures it. Returns its hidden states."""

        def compute() -> Tensor:
            return self.decoder.forward(packed.batch, self.caches, _nothing)

        hidden = compute()
        if captured and self._graphs is not None:
            self._graphs.capture(shape, compute)
        return hidden

    # --- sampling -----------------------------------------------------------------------------------------------
    def _sample(self, rows: list[int], hidden: Tensor, packed: Packed) -> list[tuple[list[int], Download]]:
        """`rows` are the table rows that count; `hidden` is padded as what is sampled."""
        chunks = []
        for first in range(0, len(rows), DEVICE_LOGIT_ROWS):
            part = slice(first, first + DEVICE_LOGIT_ROWS)
            logits = self.decoder.head.logits(hidden[part])
            drawn = self._sampler.sample(
                logits, rows[part], packed.table_rows[part], packed.generated[part], self._last
            )
            chunks.append((rows[part], Download(drawn, self._device)))
        return chunks

    def _open(self, kind: str) -> torch.device:
        """A GPU; a CPU is taken where Triton interprets its kernels, which tests do. Raises NoUsableDevice."""
        if kind == "cuda":
            if not torch.cuda.is_available():
                raise NoUsableDevice("no CUDA device can be used by this build of torch")
            try:
                driver.active.get_current_device()
            except (RuntimeError, OSError, CalledProcessError) as error:
                message = f"Triton can't reach the GPU: {error}; it needs a C compiler and Python's headers"
                raise NoUsableDevice(f"{message} (Debian: gcc, python3-dev)") from error
        return torch.device(kind)


def _noted(weights: Iterable[LoadedWeight], into: list[LoadedWeight]) -> Iterator[LoadedWeight]:
    for weight in weights:
        into.append(weight)
        yield weight


@torch.inference_mode()
def _load_libraries(device: torch.device, dtype: torch.dtype) -> None:
    """cuBLAS and cuDNN begin with their first use."""
    square = torch.zeros((128, 128), dtype=dtype, device=device)
    torch.mm(square, square)
    heads = Heads(query=1, kv=1, dim=128, scale=1.0, norm_eps=0.0)
    whole_prompts.plan([heads], dtype, device, whole_prompts.LEAST)


def _nothing() -> None:
    pass
