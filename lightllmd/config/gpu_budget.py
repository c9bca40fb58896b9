"""What a GPU's memory holds beside the KV cache: weights, the worst step, its tables, and what runs the program.

All sizes in bytes. On the device nothing is gathered: the kernels read keys and values where they lie.
"""

from __future__ import annotations

from collections.abc import Iterator

from lightllmd.architecture.collectives_memory import group_bytes, largest_message
from lightllmd.architecture.dtypes import ITEM_BYTES
from lightllmd.architecture.family import Architecture
from lightllmd.architecture.outline import Outline
from lightllmd.architecture.ranks import ALONE, Rank, vocabulary_of
from lightllmd.architecture.spec import DecoderSpec, ScoreHead
from lightllmd.architecture.weight_schemes import WeightSchemes
from lightllmd.config.amount import size
from lightllmd.config.bounds import (
    POOLED_ROWS,
    SPARE_WIDTH,
    SPLIT_LINES,
    decode_parts,
    graph_sizes,
    mixed_shapes,
    most_step_tokens,
    prefill_sizes,
    scored_rows,
)
from lightllmd.config.parameters import Config
from lightllmd.config.plan import SPARE_ROW, BudgetRow
from lightllmd.config.weight_budget import input_rows, scratch_rows, weights_row

RUNTIME = 1_200_000_000  # CUDA context, cuBLAS, compiled kernels
# What a process with a CUDA context and nothing else takes: about 0.5 GB on an H100 with CUDA 13.
SPARE_CONTEXT = 600_000_000
CUBLAS_WORKSPACE = 64_000_000
# The driver's nodes and kernel arguments of one captured graph, for each layer of the model. Measured on an H100, with
# the kernels' own code: 170 kB (8B shape) and 275 kB (0.6B).
GRAPH_BYTES_PER_LAYER = 300_000
# Per logit: its shaped copy and a ranking of that, while tokens are drawn; or the softmax of a prompt's.
RANKING_BYTES = 8
COUNT_BYTES = 2  # per entry of the penalties' counts
ROW_PARAMETERS = 512  # sampling parameters of one table row
STEP_NUMBERS = 64  # of one token or row of a step: ids, positions, slots, tiles, 32 bits each, and spare ones
GRID_NUMBERS = 12  # the same, of a model whose tokens have positions in the grids of images


def rows(
    config: Config,
    architecture: Architecture | Outline,
    data_type: str,
    item: int,
    batch_max_tokens: int,
    schemes: WeightSchemes,
    rank: Rank = ALONE,
) -> list[BudgetRow]:
    """The rows of the budget that do not depend on the number of slots, weights first, `item` bytes an element; of one
    rank, whose `architecture` it is."""
    running = config.params.running_max_req_size
    spec = architecture if isinstance(architecture, Outline) else architecture.spec
    width = config.params.max_req_total_len + SPARE_WIDTH
    return [
        weights_row(architecture, data_type, schemes),
        *scratch_rows(architecture, data_type, schemes),
        *input_rows(architecture, schemes, most_step_tokens(batch_max_tokens, running)),
        _activations(spec, data_type, batch_max_tokens, running),
        _decode_workspace(spec, running),
        *_split_workspace(config, spec),
        *([_logits(spec, item, running, rank)] if spec.generates else []),
        embeddings(spec, item, running) if spec.scores is None else scores(spec, spec.scores, item),
        _sampling(spec, running if spec.generates else 0),
        _tables(spec, running, width, batch_max_tokens),
        *_communication(spec, item, batch_max_tokens, running, rank),
        _graphs(config, spec, data_type, batch_max_tokens),
        BudgetRow("runtime", RUNTIME, "CUDA context, libraries and compiled kernels"),
        *_spare_engine(config),
    ]


def scores(spec: DecoderSpec | Outline, head: ScoreHead, item: int) -> BudgetRow:
    """The head's fp32 copy of its weights, and of each row its normed hidden state, twice, and what is made of it."""
    elements = head.values * (head.inner or spec.hidden) + (head.inner or 0) * spec.hidden
    each = spec.hidden * (item + 4) + 2 * 4 * (head.inner or 0) + 2 * 4 * head.values
    how = f"the head in fp32, {size(4 * elements)}; {POOLED_ROWS} hidden states at a time x {size(each)}"
    return BudgetRow("scores", 4 * elements + POOLED_ROWS * each, how)


def embeddings(spec: DecoderSpec | Outline, item: int, running: int) -> BudgetRow:
    """Of each hidden state that is pooled it and its normed fp32 copy, which sums it is in, and fp32 results."""
    each, results = spec.hidden * (item + 4) + 2 * 4 * POOLED_ROWS, 2 * 4 * max(running, POOLED_ROWS) * spec.hidden
    how = f"{POOLED_ROWS} hidden states at a time x {size(each)}, and {size(results)} for their sums"
    return BudgetRow("embeddings", POOLED_ROWS * each + results, how)


def _spare_engine(config: Config) -> list[BudgetRow]:
    if not config.supervisor.spare_engine:
        return []
    return [BudgetRow(SPARE_ROW, SPARE_CONTEXT, "its CUDA context; none with supervisor.spare_engine = false")]


def _token_bytes(spec: DecoderSpec | Outline, data_type: str) -> int:
    """One token's share of a step: residual, its normed copy, q, k and v, attention, the MLP's two halves and their
    product, the result of a block where a norm stands behind it, and fp32 cosines and sines."""
    item, attention = ITEM_BYTES[data_type], max(2 * each.q_size + 2 * each.kv_size for each in spec.attention)
    if isinstance(spec, Outline):
        return spec.step[data_type].each + attention * item
    inner = 3 * max(layer.feed_forward.intermediate for layer in spec.layers)
    hidden = 3 if spec.norms_results else 2
    return (hidden * spec.hidden + attention + inner) * item + 4 * spec.rotated


def _activations(spec: DecoderSpec | Outline, data_type: str, batch_max_tokens: int, running: int) -> BudgetRow:
    """The largest step that admission allows: a full prefill, and all other rows going on beside it."""
    tokens, each = most_step_tokens(batch_max_tokens, running), _token_bytes(spec, data_type)
    how = f"a step of {batch_max_tokens} + {running} tokens x {size(each)}, and {size(CUBLAS_WORKSPACE)} for cuBLAS"
    fixed = spec.step[data_type].fixed if isinstance(spec, Outline) else 0
    return BudgetRow("activations", fixed + tokens * each + CUBLAS_WORKSPACE, how)


def _decode_workspace(spec: DecoderSpec | Outline, running: int) -> BudgetRow:
    """Partial results of decode attention, fp32 ``[rows, heads, segments, head_dim + 1]`` at the worst row count."""
    parts = decode_parts(running, min(each.kv_heads for each in spec.attention))
    each = max(each.q_size + each.heads for each in spec.attention) * 4
    return BudgetRow("decode workspace", parts * each, f"{parts} segments of rows x {size(each)}")


def _split_workspace(config: Config, spec: DecoderSpec | Outline) -> list[BudgetRow]:
    """Partial results of prefill attention beside rows that go on, fp32 ``[lines, head_dim + 1]``."""
    if not mixed_shapes(config.params):
        return []
    each = (max(each.head_dim for each in spec.attention) + 1) * 4
    return [BudgetRow("prefill workspace", SPLIT_LINES * each, f"{SPLIT_LINES} parts of heads x {size(each)}")]


def _logits(spec: DecoderSpec | Outline, item: int, running: int, rank: Rank) -> BudgetRow:
    """Each rank has all of them, gathered, and in fp32 its own part before that."""
    chunk, each = scored_rows(running), 4 + item + RANKING_BYTES
    how = f"{chunk} rows at a time x {spec.vocab} x {each} B"
    if rank.count == 1:
        return BudgetRow("logits", chunk * spec.vocab * each, how)
    part, _ = vocabulary_of(spec.vocab, rank)
    return BudgetRow("logits", chunk * (spec.vocab * each + 4 * part), f"{how}, and {part} of its own x 4 B")


def _communication(
    spec: DecoderSpec | Outline, item: int, batch_max_tokens: int, running: int, rank: Rank
) -> Iterator[BudgetRow]:
    """What the ranks write to each other's devices through, and NCCL's buffers."""
    if rank.count == 1:
        return
    largest = largest_message(most_step_tokens(batch_max_tokens, running), spec.hidden, spec.vocab, item)
    how = f"NCCL, and memory that all {rank.count} ranks write to, for messages of {size(largest)}"
    yield BudgetRow("communication", group_bytes(rank.count, largest), how)


def _sampling(spec: DecoderSpec | Outline, running: int) -> BudgetRow:
    """A mask is there once more while it is brought."""
    each = spec.vocab * COUNT_BYTES + 2 * 4 * -(-spec.vocab // 32) + ROW_PARAMETERS
    how = f"counts of {running + 1} rows x {spec.vocab} x {COUNT_BYTES} B, their masks and parameters"
    return BudgetRow("sampling tables", (running + 1) * each, how)


def _tables(spec: DecoderSpec | Outline, running: int, width: int, batch_max_tokens: int) -> BudgetRow:
    rotated = spec.attention[0].head_dim if isinstance(spec, Outline) else spec.rotated
    rotations, tokens = width, batch_max_tokens + 2 * running
    numbers = tokens * STEP_NUMBERS
    if isinstance(spec, DecoderSpec) and spec.positions.axes:  # each token of a step may be an image's
        rotations, numbers = width + tokens, numbers + tokens * GRID_NUMBERS
    requests, rope = (running + 1) * width * 4, rotations * rotated * 4
    how = f"slots of {running + 1} rows x {width} x 4 B, rotations of {rotations} positions, a step's numbers"
    return BudgetRow("tables", requests + rope + numbers, how)


def _graphs(config: Config, spec: DecoderSpec | Outline, data_type: str, batch_max_tokens: int) -> BudgetRow:
    """Each keeps the hidden states that it ends with; all else that one computes is another's room too."""
    decode = graph_sizes(config)
    if isinstance(spec, Outline):
        return BudgetRow("graphs", 0, "none: transformers' modules are launched operation by operation")
    if not decode:
        return BudgetRow("graphs", 0, "none: cuda_graphs = false")
    shapes = mixed_shapes(config.params)
    mixed = [decode_tokens + prefill_tokens for decode_tokens, prefill_tokens in shapes if decode_tokens in decode]
    tokens = [*decode, *prefill_sizes(batch_max_tokens), *mixed]
    each, kept = len(spec.layers) * GRAPH_BYTES_PER_LAYER, sum(tokens) * spec.hidden * ITEM_BYTES[data_type]
    pool = max(tokens) * _token_bytes(spec, data_type) + _decode_workspace(spec, decode[-1]).bytes + kept
    if mixed:
        pool += sum(row.bytes for row in _split_workspace(config, spec))
    both = f", {len(mixed)} of both" if mixed else ""
    how = f"{len(decode)} of decode steps, {len(tokens) - len(decode) - len(mixed)} of short prefills{both}"
    return BudgetRow("graphs", len(tokens) * each + pool, f"{how} x {size(each)}; {size(pool)} for what they compute")
