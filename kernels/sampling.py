"""From logits to the next token of each row on a GPU, with nothing read by the host. Meaning: `reference.shape`
and `reference.choose`.

The first kernel reads every logit once, a program per row and chunk of the vocabulary: it shapes the logits, and
reduces each chunk to the softmax statistics of its logits before and after that, and to its best candidate: the highest
logit of a greedy row, the highest sum of logit and Gumbel noise of one that draws, which is a draw from the softmax
(Gumbel 1954, "Gumbel-max trick"). The second kernel merges a row's chunks. The logits themselves are never written.

Top-p, top-k and min-p keep the first so many tokens of a ranking. So the candidate among all tokens is the candidate
among the kept ones too if it is kept itself. For min-p its logit decides; if it is too low, the next candidate is the
best of those high enough. For top-p and top-k one reading decides: count and mass of the tokens ranked before it. If it
is not kept, nothing behind it is either, and the next candidate is the best of those before it. The reading tries three
higher borders as well, so that few readings are needed where the kept tokens have little mass.

Sums are formed chunk by chunk or by one program, in an order that depends on nothing but the vocabulary: a row's token
and log-probability do not depend on the rows beside it.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightllmd.kernels.sampling_rows import (
    ALTERNATIVES,
    CANDIDATES,
    CHUNK,
    COLUMNS,
    DECAY_FACTOR,
    DECAY_START,
    DRAWN,
    ENDING,
    EOS_MASKED,
    FREQUENCY,
    INVERSE_TEMPERATURE,
    LIMITED,
    MIN_NEW,
    MIN_P,
    MOST_COUNT,
    MOST_LOGIT,
    PENALISED,
    PRESENCE,
    REPETITION,
    RUN,
    STATISTICS,
    TOP_K,
    TOP_P,
    best_of,
    better_of,
    gumbel,
    noise_words,
    real,
)
from lightllmd.kernels.typical_sampling import redraw_typical


@triton.jit
def _growth(parameters, beyond):
    """decay_factor ** beyond - 1, by repeated squaring in double precision."""
    base = tl.load((parameters + DECAY_FACTOR).to(tl.pointer_type(tl.float64)))
    power = base * 0.0 + 1.0
    left = beyond
    while left > 0:
        power = tl.where(left % 2 == 1, power * base, power)
        base *= base
        left //= 2
    growth = power - 1.0
    return tl.where(growth > MOST_LOGIT, MOST_LOGIT, growth).to(tl.float32)


@triton.jit
def _shaped(
    source,
    token,
    parameters,
    flags,
    position,
    counts,
    eos,
    mask,
    shaped,
    stores,
    VOCAB: tl.constexpr,
    EOS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Logits of `token` (a tensor of ids; -inf beyond the vocabulary) before the division by the temperature; written
    to `shaped` if `stores` and the row needs them later."""
    inside = token < VOCAB
    x = tl.load(source + token, mask=inside, other=float("-inf"))
    if (flags & PENALISED) != 0:
        count = tl.load(counts + token, mask=inside, other=0).to(tl.float32)
        repetition = real(parameters + REPETITION)
        changed = tl.where(x > 0, x / repetition, x * repetition)
        changed = changed - count * real(parameters + FREQUENCY) - real(parameters + PRESENCE)
        changed = tl.where(changed > MOST_LOGIT, MOST_LOGIT, changed)
        x = tl.where(count > 0, changed, x)
    if (flags & ENDING) != 0:
        growth = _growth(parameters, position - tl.load(parameters + DECAY_START))
        masked = position < tl.load(parameters + MIN_NEW) - 1
        for index in tl.range(EOS):
            grown = x + tl.abs(x) * growth
            grown = tl.where(grown > MOST_LOGIT, MOST_LOGIT, grown)
            grown = tl.where(x == float("-inf"), x, grown)
            x = tl.where(token == tl.load(eos + index), tl.where(masked, EOS_MASKED, grown), x)
    if MASKED:
        allowed = tl.load(mask + token // 32, mask=inside, other=0) >> (token % 32)
        x = tl.where((allowed & 1) == 1, x, float("-inf"))
    if stores != 0 and (flags & (LIMITED | ALTERNATIVES | CANDIDATES)) != 0:
        tl.store(shaped + token, x, mask=inside)
    return x


@triton.jit
def _raw(logits, t0, t1, t2, t3, VOCAB: tl.constexpr):
    """A chunk's logits."""
    x0 = tl.load(logits + t0, mask=t0 < VOCAB, other=float("-inf"))
    x1 = tl.load(logits + t1, mask=t1 < VOCAB, other=float("-inf"))
    x2 = tl.load(logits + t2, mask=t2 < VOCAB, other=float("-inf"))
    x3 = tl.load(logits + t3, mask=t3 < VOCAB, other=float("-inf"))
    return x0, x1, x2, x3


@triton.jit
def _softmax(x0, x1, x2, x3):
    """The highest of a chunk's logits, and the sum of the exponentials of their distances to it."""
    highest = tl.max(tl.maximum(tl.maximum(x0, x1), tl.maximum(x2, x3)), 0)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    return highest, tl.sum((tl.exp(x0 - base) + tl.exp(x1 - base)) + (tl.exp(x2 - base) + tl.exp(x3 - base)), 0)


@triton.jit(do_not_specialize=["stores"], do_not_specialize_on_alignment=["rows", "generated"])
def _scan(
    logits,
    stride,
    source,
    source_stride,
    shaped,
    shaped_stride,
    stores,
    parameters,
    rows,
    generated,
    counts,
    eos,
    mask,
    mask_stride,
    statistics,
    candidates,
    VOCAB: tl.constexpr,
    EOS: tl.constexpr,
    PLAIN: tl.constexpr,
    MASKED: tl.constexpr,
    RAW: tl.constexpr,
):
    at, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    to = statistics + (at * tl.num_programs(1) + chunk) * STATISTICS
    logits += at * stride
    t0 = chunk * CHUNK + tl.arange(0, RUN)
    t1, t2, t3 = t0 + RUN, t0 + 2 * RUN, t0 + 3 * RUN
    if PLAIN:
        x0, x1, x2, x3 = _raw(logits, t0, t1, t2, t3, VOCAB)
    else:
        if RAW:
            r0, r1, r2, r3 = _raw(logits, t0, t1, t2, t3, VOCAB)
            raw_highest, raw_total = _softmax(r0, r1, r2, r3)
            tl.store(to + 4, raw_highest)
            tl.store(to + 5, raw_total)
        row = tl.load(rows + at).to(tl.int64)
        source += at * source_stride
        shaped += at * shaped_stride
        parameters += row * COLUMNS
        counts += row * VOCAB
        mask += row * mask_stride
        position = tl.load(generated + at)
        flags = tl.load(parameters)
        inverse = real(parameters + INVERSE_TEMPERATURE)
        x0 = _shaped(source, t0, parameters, flags, position, counts, eos, mask, shaped, stores, VOCAB, EOS, MASKED)
        x1 = _shaped(source, t1, parameters, flags, position, counts, eos, mask, shaped, stores, VOCAB, EOS, MASKED)
        x2 = _shaped(source, t2, parameters, flags, position, counts, eos, mask, shaped, stores, VOCAB, EOS, MASKED)
        x3 = _shaped(source, t3, parameters, flags, position, counts, eos, mask, shaped, stores, VOCAB, EOS, MASKED)
        x0, x1, x2, x3 = x0 * inverse, x1 * inverse, x2 * inverse, x3 * inverse
    highest, total = _softmax(x0, x1, x2, x3)
    k0, k1, k2, k3 = x0, x1, x2, x3
    if not PLAIN:
        if (flags & DRAWN) != 0:
            w0, w1, w2, w3 = noise_words(parameters, position, chunk * RUN + tl.arange(0, RUN))
            k0, k1, k2, k3 = x0 + gumbel(w0), x1 + gumbel(w1), x2 + gumbel(w2), x3 + gumbel(w3)
    k0, t0, x0 = better_of(k0, t0, x0, k1, t1, x1)
    k2, t2, x2 = better_of(k2, t2, x2, k3, t3, x3)
    k0, t0, x0 = better_of(k0, t0, x0, k2, t2, x2)
    key, token, x = best_of(k0, t0, x0, VOCAB)
    tl.store(to, highest)
    tl.store(to + 1, total)
    tl.store(to + 2, key)
    tl.store(to + 3, x)
    tl.store(candidates + at * tl.num_programs(1) + chunk, token)


@triton.jit
def _weigh(logits, token, inverse, whole, x, limit, b1, b2, b3, n0, n1, n2, n3, m0, m1, m2, m3, VOCAB: tl.constexpr):
    """Adds a run's tokens to counts and masses: ranked before token `limit` of logit `x`, and above three borders."""
    y = tl.load(logits + token, mask=token < VOCAB, other=float("-inf")) * inverse
    mass = tl.exp(y - whole)
    before = (y > x) | ((y == x) & (token < limit))
    n0 += before.to(tl.int32)
    m0 += tl.where(before, mass, 0.0)
    n1 += (y > b1).to(tl.int32)
    m1 += tl.where(y > b1, mass, 0.0)
    n2 += (y > b2).to(tl.int32)
    m2 += tl.where(y > b2, mass, 0.0)
    n3 += (y > b3).to(tl.int32)
    m3 += tl.where(y > b3, mass, 0.0)
    return n0, n1, n2, n3, m0, m1, m2, m3


@triton.jit
def _rank(logits, inverse, whole, x, limit, b1, b2, b3, VOCAB: tl.constexpr):
    """(count, mass) of the tokens before token `limit` of logit `x`, and of those above each border."""
    none, nothing = tl.zeros((RUN,), tl.int32), tl.zeros((RUN,), tl.float32)
    n0, n1, n2, n3, m0, m1, m2, m3 = none, none, none, none, nothing, nothing, nothing, nothing
    for first in range(0, VOCAB, CHUNK):
        for run in tl.static_range(4):
            token = first + run * RUN + tl.arange(0, RUN)
            n0, n1, n2, n3, m0, m1, m2, m3 = _weigh(
                logits, token, inverse, whole, x, limit, b1, b2, b3, n0, n1, n2, n3, m0, m1, m2, m3, VOCAB
            )
    n0, n1, n2, n3 = tl.sum(n0, 0), tl.sum(n1, 0), tl.sum(n2, 0), tl.sum(n3, 0)
    return n0, n1, n2, n3, tl.sum(m0, 0), tl.sum(m1, 0), tl.sum(m2, 0), tl.sum(m3, 0)


@triton.jit
def _compete(logits, token, word, inverse, x, limit, key, best, best_x, VOCAB: tl.constexpr):
    """Lane by lane the best candidate so far, or this run's among the tokens before token `limit` of logit `x`."""
    y = tl.load(logits + token, mask=token < VOCAB, other=float("-inf")) * inverse
    before = (y > x) | ((y == x) & (token < limit))
    return better_of(key, best, best_x, tl.where(before, y + gumbel(word), float("-inf")), token, y)


@triton.jit
def _redraw(logits, parameters, position, inverse, x, limit, VOCAB: tl.constexpr):
    """The best candidate of the tokens ranked before token `limit` of logit `x`, and its logit."""
    key, best = tl.full((RUN,), float("-inf"), tl.float32), tl.full((RUN,), 0, tl.int32)
    best_x = key
    for first in range(0, VOCAB, CHUNK):
        token = first + tl.arange(0, RUN)
        w0, w1, w2, w3 = noise_words(parameters, position, first // 4 + tl.arange(0, RUN))
        key, best, best_x = _compete(logits, token, w0, inverse, x, limit, key, best, best_x, VOCAB)
        key, best, best_x = _compete(logits, token + RUN, w1, inverse, x, limit, key, best, best_x, VOCAB)
        key, best, best_x = _compete(logits, token + 2 * RUN, w2, inverse, x, limit, key, best, best_x, VOCAB)
        key, best, best_x = _compete(logits, token + 3 * RUN, w3, inverse, x, limit, key, best, best_x, VOCAB)
    _, token, y = best_of(key, best, best_x, VOCAB)
    return token, y


@triton.jit
def _merged(of, inside):
    """The highest logit of a row, and the log of the sum of exponentials, of the statistics ``of [LANES]``."""
    highest = tl.load(of, mask=inside, other=float("-inf"))
    top = tl.max(highest, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    scale = tl.where(highest == float("-inf"), 0.0, tl.exp(highest - base))
    return top, base + tl.log(tl.sum(tl.load(of + 1, mask=inside, other=0.0) * scale, 0))


@triton.jit(do_not_specialize_on_alignment=["rows", "generated"])
def _choose(
    logits,
    stride,
    ranked,
    ranked_stride,
    parameters,
    rows,
    generated,
    counts,
    statistics,
    candidates,
    last,
    tokens,
    logprobs,
    totals,
    shaped_totals,
    VOCAB: tl.constexpr,
    PLAIN: tl.constexpr,
    SEARCH: tl.constexpr,
    RAW: tl.constexpr,
    LANES: tl.constexpr,
):
    CHUNKS: tl.constexpr = (VOCAB + CHUNK - 1) // CHUNK
    at = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, LANES)
    inside = chunk < CHUNKS
    of = statistics + (at * CHUNKS + chunk) * STATISTICS
    top, whole = _merged(of, inside)
    key = tl.load(of + 2, mask=inside, other=float("-inf"))
    candidate = tl.load(candidates + at * CHUNKS + chunk, mask=inside, other=VOCAB)
    _, token, x = best_of(key, candidate, tl.load(of + 3, mask=inside, other=float("-inf")), VOCAB)
    row = tl.load(rows + at).to(tl.int64)
    if not PLAIN:
        parameters += row * COLUMNS
        flags = tl.load(parameters)
        if SEARCH:
            position, inverse = tl.load(generated + at), real(parameters + INVERSE_TEMPERATURE)
            top_p, top_k = real(parameters + TOP_P), tl.load(parameters + TOP_K)
            ranked += at * ranked_stride
            # A row of NaN or of nothing but -inf has no ranking: its log-probability tells.
            limited = ((flags & LIMITED) != 0) & (tl.abs(whole) < float("inf"))
            least = top + tl.log(real(parameters + MIN_P))  # -inf where it is off
            if limited & (x < least):
                token, x = _redraw(ranked, parameters, position, inverse, least, VOCAB, VOCAB)
            searching = limited & ((top_p < 1) | (top_k < VOCAB))
            while searching:
                b1, b2, b3 = x + (top - x) * 0.25, x + (top - x) * 0.5, x + (top - x) * 0.75
                n0, n1, n2, n3, m0, m1, m2, m3 = _rank(ranked, inverse, whole, x, token, b1, b2, b3, VOCAB)
                # The first of the ranking is always kept.
                searching = (n0 > 0) & ((n0 >= top_k) | (m0 > top_p))
                if searching:
                    # All at or below a border go when what is above it fills the limits.
                    full1, full2 = (n1 >= top_k) | (m1 > top_p), (n2 >= top_k) | (m2 > top_p)
                    full3 = (n3 >= top_k) | (m3 > top_p)
                    x = tl.where(full3, b3, tl.where(full2, b2, tl.where(full1, b1, x)))
                    token = tl.where(full1 | full2 | full3, 0, token)
                    token, x = _redraw(ranked, parameters, position, inverse, x, token, VOCAB)
        if (flags & PENALISED) != 0:
            counter = counts + row * VOCAB + token
            count = tl.load(counter).to(tl.int32)
            tl.store(counter, tl.minimum(count + 1, MOST_COUNT).to(tl.int16))
    logprob, total = x - whole, whole
    if RAW and not PLAIN:
        _, total = _merged(of + 4, inside)
        # What has no softmax tells so, even where the model's logits have one.
        logprob = tl.where(tl.abs(whole) < float("inf"), tl.load(logits + at * stride + token) - total, logprob)
    tl.store(tokens + at, token)
    tl.store(logprobs + at, logprob)
    tl.store(totals + at, total)
    tl.store(shaped_totals + at, whole)
    tl.store(last + row, token)


def sample(
    logits: Tensor,
    parameters: Tensor,
    rows: Tensor,
    generated: Tensor,
    counts: Tensor,
    eos: Tensor,
    masks: Tensor | None,
    last: Tensor,
    plain: bool,
    search: bool,
    *,
    biased: Tensor | None = None,
    shaped: Tensor | None = None,
    raw: bool = True,
    typical: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens ``[B]`` int32, their log-probabilities ``[B]``, and each row's log of the sum of exponentials ``[B]`` of
    what log-probabilities are of and of the shaped logits.

    ``logits [B, V]`` fp32 are the model's; `biased`: the same with what requests add, where some does.
    ``parameters [R, 16]`` int32 (`PARAMETERS`) and ``counts [R, V]`` int16 are per table row; ``rows [B]`` int32 says
    which; ``generated [B]`` int32 are the positions of the tokens to come; ``eos [E]`` int32, distinct; ``last [R]``
    int32 gets the tokens. ``masks [R, ceil(V / 32)]`` int32: bit t % 32 of word t // 32 allows token t.
    ``shaped [B, V]`` fp32 gets the shaped logits of the rows that have a limit, alternatives or candidates; it may be
    `biased`, and can be left out where no such row shapes them but by its temperature.
    `plain`: no row has a flag, and there are neither masks nor biases. `search`: some row has a limit.
    `raw`: log-probabilities are of `logits`; else of the shaped ones.
    ``typical [R]`` fp32 is the mass that typical-p keeps of TYPICAL rows; None: no row is one.
    Where the shaped logits of a row have no softmax, its log-probability is NaN and its token any.
    """
    batch, vocab = logits.shape
    # Both kernels are compiled without fused multiply-add: with it the highest logit differs from itself by the
    # rounding of its division by the temperature, and for large logits the exponential of that is 0 or infinite.
    chunks = triton.cdiv(vocab, CHUNK.value)
    device = logits.device
    source = logits if biased is None else biased
    ranked = logits if shaped is None else shaped
    statistics = torch.empty((batch, chunks, STATISTICS.value), dtype=torch.float32, device=device)
    candidates = torch.empty((batch, chunks), dtype=torch.int32, device=device)
    tokens = torch.empty(batch, dtype=torch.int32, device=device)
    # Each by itself: rows of one tensor would be aligned for some batches only, for which Triton compiles anew.
    logprobs, totals, shaped_totals = (torch.empty(batch, dtype=torch.float32, device=device) for _ in range(3))
    _scan[(batch, chunks)](
        logits,
        logits.stride(0),
        source,
        source.stride(0),
        ranked,
        ranked.stride(0),
        int(shaped is not None),
        parameters,
        rows,
        generated,
        counts,
        eos,
        eos if masks is None else masks,
        0 if masks is None else masks.stride(0),
        statistics,
        candidates,
        VOCAB=vocab,
        EOS=len(eos),
        PLAIN=plain,
        MASKED=masks is not None,
        RAW=raw,
        num_warps=8,
        enable_fp_fusion=False,
    )
    _choose[(batch,)](
        logits,
        logits.stride(0),
        ranked,
        ranked.stride(0),
        parameters,
        rows,
        generated,
        counts,
        statistics,
        candidates,
        last,
        tokens,
        logprobs,
        totals,
        shaped_totals,
        VOCAB=vocab,
        PLAIN=plain,
        SEARCH=search,
        RAW=raw,
        LANES=triton.next_power_of_2(chunks),
        num_warps=8,
        enable_fp_fusion=False,
    )
    drawn = tokens, logprobs, totals, shaped_totals
    if typical is not None:
        redraw_typical(logits, ranked, parameters, rows, generated, typical, counts, last, drawn, raw)
    return drawn
