"""Typical-p keeps the first so many tokens of another ranking than the other limits do: by how far their surprise is
from the entropy of the distribution (Meister et al. 2023). This kernel, which runs where some row has it, goes on from
the token that `sampling` left: if that is not kept, the next candidate is the best of those before it in the ranking
that it failed. Meaning: `reference.choose`.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lightllmd.kernels.sampling_rows import (
    CHUNK,
    COLUMNS,
    INVERSE_TEMPERATURE,
    MIN_P,
    MOST_COUNT,
    PENALISED,
    RUN,
    TOP_K,
    TOP_P,
    TYPICAL,
    best_of,
    better_of,
    gumbel,
    noise_words,
    real,
)


@triton.jit
def _distance(y, whole, entropy):
    """Of the surprise of tokens with scaled logits `y` from the entropy; infinite for what is not there."""
    return tl.abs(whole - y - entropy)


@triton.jit
def _entropy(logits, inverse, whole, VOCAB: tl.constexpr):
    """Of the distribution, in nats, and its highest scaled logit."""
    total, top = tl.zeros((RUN,), tl.float32), tl.full((RUN,), float("-inf"), tl.float32)
    for first in range(0, VOCAB, RUN):
        token = first + tl.arange(0, RUN)
        y = tl.load(logits + token, mask=token < VOCAB, other=float("-inf")) * inverse
        surprise = tl.where(y == float("-inf"), 0.0, whole - y)
        total += tl.exp(y - whole) * surprise
        top = tl.maximum(top, y)
    return tl.sum(total, 0), tl.max(top, 0)


@triton.jit
def _standing(logits, inverse, whole, entropy, x, limit, VOCAB: tl.constexpr):
    """Of token `limit` with the scaled logit `x`: count and mass of the tokens before it in the ranking by logit, and
    the mass of those whose surprise is nearer to the entropy."""
    count, before_mass = tl.zeros((RUN,), tl.int32), tl.zeros((RUN,), tl.float32)
    nearer_mass = before_mass
    own = _distance(x, whole, entropy)
    for first in range(0, VOCAB, RUN):
        token = first + tl.arange(0, RUN)
        y = tl.load(logits + token, mask=token < VOCAB, other=float("-inf")) * inverse
        mass = tl.exp(y - whole)
        before = (y > x) | ((y == x) & (token < limit))
        count += before.to(tl.int32)
        before_mass += tl.where(before, mass, 0.0)
        nearer_mass += tl.where(_distance(y, whole, entropy) < own, mass, 0.0)
    return tl.sum(count, 0), tl.sum(before_mass, 0), tl.sum(nearer_mass, 0)


@triton.jit
def _compete_within(
    logits, token, word, inverse, whole, entropy, x, limit, distance, key, best, best_x, VOCAB: tl.constexpr
):
    """As `_compete`, of the tokens that are nearer to the entropy than `distance` besides."""
    y = tl.load(logits + token, mask=token < VOCAB, other=float("-inf")) * inverse
    within = ((y > x) | ((y == x) & (token < limit))) & (_distance(y, whole, entropy) < distance)
    return better_of(key, best, best_x, tl.where(within, y + gumbel(word), float("-inf")), token, y)


@triton.jit
def _redraw_within(logits, parameters, position, inverse, whole, entropy, x, limit, distance, VOCAB: tl.constexpr):
    """As `_redraw`, and the key, which is -inf where no token is left."""
    key, best = tl.full((RUN,), float("-inf"), tl.float32), tl.full((RUN,), 0, tl.int32)
    best_x = key
    for first in range(0, VOCAB, CHUNK):
        token = first + tl.arange(0, RUN)
        w0, w1, w2, w3 = noise_words(parameters, position, first // 4 + tl.arange(0, RUN))
        key, best, best_x = _compete_within(
            logits, token, w0, inverse, whole, entropy, x, limit, distance, key, best, best_x, VOCAB
        )
        key, best, best_x = _compete_within(
            logits, token + RUN, w1, inverse, whole, entropy, x, limit, distance, key, best, best_x, VOCAB
        )
        key, best, best_x = _compete_within(
            logits, token + 2 * RUN, w2, inverse, whole, entropy, x, limit, distance, key, best, best_x, VOCAB
        )
        key, best, best_x = _compete_within(
            logits, token + 3 * RUN, w3, inverse, whole, entropy, x, limit, distance, key, best, best_x, VOCAB
        )
    return best_of(key, best, best_x, VOCAB)


@triton.jit(do_not_specialize_on_alignment=["rows", "generated"])
def _typical(
    logits,
    stride,
    ranked,
    ranked_stride,
    parameters,
    rows,
    generated,
    typical,
    counts,
    last,
    tokens,
    logprobs,
    totals,
    shaped_totals,
    VOCAB: tl.constexpr,
    RAW: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + at).to(tl.int64)
    parameters += row * COLUMNS
    flags, whole = tl.load(parameters), tl.load(shaped_totals + at)
    if ((flags & TYPICAL) != 0) & (tl.abs(whole) < float("inf")):
        ranked += at * ranked_stride
        position, inverse = tl.load(generated + at), real(parameters + INVERSE_TEMPERATURE)
        top_p, top_k, mass = real(parameters + TOP_P), tl.load(parameters + TOP_K), tl.load(typical + row)
        entropy, top = _entropy(ranked, inverse, whole, VOCAB)
        least = top + tl.log(real(parameters + MIN_P))
        drawn = tl.load(tokens + at)
        drawn_x = tl.load(ranked + drawn) * inverse
        token, x = drawn, drawn_x
        # What no candidate may be at or behind, in either ranking.
        border, limit, distance = whole - float("inf"), drawn * 0, whole * 0 + float("inf")
        searching = mass < 1
        while searching:
            count, before, nearer = _standing(ranked, inverse, whole, entropy, x, token, VOCAB)
            behind = (count > 0) & ((count >= top_k) | (before > top_p) | (x < least))
            far = nearer >= mass
            searching = behind | far
            if searching:
                distance = tl.where(far, _distance(x, whole, entropy), distance)
                border = tl.where(behind, x, border)
                limit = tl.where(behind, token, limit)
                key, token, x = _redraw_within(
                    ranked, parameters, position, inverse, whole, entropy, border, limit, distance, VOCAB
                )
                # Where the limits have no token in common, this one does not count.
                searching = key > float("-inf")
                token, x = tl.where(searching, token, drawn), tl.where(searching, x, drawn_x)
        if token != drawn:
            if (flags & PENALISED) != 0:
                counts += row * VOCAB
                wrong, right = tl.load(counts + drawn), tl.load(counts + token).to(tl.int32)
                tl.store(counts + drawn, tl.where(wrong < MOST_COUNT, wrong - 1, wrong).to(tl.int16))
                tl.store(counts + token, tl.minimum(right + 1, MOST_COUNT).to(tl.int16))
            if RAW:
                x = tl.load(logits + at * stride + token)
            tl.store(tokens + at, token)
            tl.store(logprobs + at, x - tl.load(totals + at))
            tl.store(last + row, token)


def redraw_typical(
    logits: Tensor,
    ranked: Tensor,
    parameters: Tensor,
    rows: Tensor,
    generated: Tensor,
    typical: Tensor,
    counts: Tensor,
    last: Tensor,
    drawn: tuple[Tensor, Tensor, Tensor, Tensor],
    raw: bool,
) -> None:
    """Changes what `sampling.sample` has `drawn`, and what it wrote of it, where typical-p does not keep it; the
    arguments are as there. ``ranked [B, V]`` fp32: the shaped logits, but for the temperature."""
    tokens, logprobs, totals, shaped_totals = drawn
    _typical[(len(tokens),)](
        logits,
        logits.stride(0),
        ranked,
        ranked.stride(0),
        parameters,
        rows,
        generated,
        typical,
        counts,
        last,
        tokens,
        logprobs,
        totals,
        shaped_totals,
        VOCAB=logits.shape[1],
        RAW=raw,
        num_warps=8,
        enable_fp_fusion=False,
    )
