"""What every operation means, in plain torch: the truth that eager and Triton versions are tested against.

Slow on purpose: one row at a time, fp32 inside, no fusion. Shapes: T tokens packed from all rows of a step, H query
heads, K key/value heads (H a multiple of K), D head_dim, S slots of the cache. One layer's cache is
``[S, 2K, D]``: keys in heads 0..K-1, values in K..2K-1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as functional
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """``x [T, in] @ weight[out, in].T + bias [out] + residual [T, out]``."""
    out = x.float() @ weight.float().T
    if bias is not None:
        out = out + bias.float()
    if residual is not None:
        out = out + residual.float()
    return out.to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Root mean square norm (Zhang and Sennrich 2019) over the last dimension of ``x [T, hidden]``."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * (offset + weight.float())).to(x.dtype)


def gated(gate_up: Tensor, activation: str) -> Tensor:
    """``act(gate) * up`` of ``gate_up [T, 2 * intermediate]``, gate first."""
    gate, up = gate_up.float().chunk(2, -1)
    return (ACTIVATIONS[activation](gate) * up).to(gate_up.dtype)


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """``cap * tanh(logits / cap)`` in fp32 (Bello et al. 2017; Gemma 2)."""
    return cap * torch.tanh(logits.float() / cap)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021), halves paired: element i of ``x [T, heads, D]`` turns with i + D/2.

    ``cos [T, 1, D]``; ``sin [T, 1, D]`` carries the minus sign of its first half.
    """
    first, second = x.float().chunk(2, -1)
    return (x.float() * cos.float() + torch.cat([second, first], -1) * sin.float()).to(x.dtype)


def write_kv(cache: Tensor, slots: Tensor, kv: Tensor) -> None:
    """Puts ``kv [T, 2K, D]`` into the cache at ``slots [T]``."""
    for slot, entry in zip(slots.tolist(), kv, strict=True):
        cache[slot] = entry


def rope_kv(
    qkv: Tensor,
    cos_sin: Tensor,
    angles: Tensor,
    slots: Tensor,
    cache: Tensor,
    heads: int,
    kv_heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    offset: float = 0.0,
) -> None:
    """Turns the queries and keys of ``qkv [T, H + 2K, D]`` in place, after an RMS norm of each head where there are
    weights ``[D]``, less `offset`, for one, and puts keys and values into the cache at ``slots [T]``. One rounding at
    the end.

    ``cos_sin [P, D]``: cosines, then sines, of the D/2 pairs; ``angles [T]`` is each token's row of it.
    """
    q, k = qkv[:, :heads].float(), qkv[:, heads : heads + kv_heads].float()
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm(q, q_norm, eps, offset), rms_norm(k, k_norm, eps, offset)
    cos, sin = cos_sin[angles.long(), None].chunk(2, -1)
    cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
    qkv[:, : heads + kv_heads] = rotate(torch.cat([q, k], 1), cos, sin).to(qkv.dtype)
    write_kv(cache, slots, qkv[:, heads:])


def embed(
    tokens: Tensor,
    rows: Tensor,
    positions: Tensor,
    slots: Tensor,
    last: Tensor,
    table: Tensor,
    embedding: Tensor,
    scale: float = 1.0,
) -> Tensor:
    """Puts ``slots [T]`` into the table and returns the embeddings of the tokens, times `scale`; a token below 0 is the
    newest of its row."""
    rows, positions = rows.long(), positions.long()
    table[rows, positions] = slots
    return (embedding[torch.where(tokens < 0, last[rows], tokens).long()].float() * scale).to(embedding.dtype)


def attention(
    q: Tensor,
    cache: Tensor,
    slots: Tensor,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    bidirectional: Sequence[tuple[int, int]] = (),
) -> Tensor:
    """Causal attention of one row: ``q [t, H, D]`` are its newest t tokens, `slots` [length >= t] all of them.

    Returns ``[t, H, D]``. Grouped queries: head h reads key/value head ``h // (H / K)``. A token sees the last `window`
    tokens up to itself (Beltagy et al. 2020); scores s are capped to ``soft_cap * tanh(s / soft_cap)``. A token of a
    run (from first to behind the last one) that is `bidirectional` sees later tokens up to its end, too.
    """
    count, heads, _ = q.shape
    length, kv_heads = len(slots), cache.shape[1] // 2
    kept = cache[slots.long()].float()
    keys = kept[:, :kv_heads].repeat_interleave(heads // kv_heads, 1)
    values = kept[:, kv_heads:].repeat_interleave(heads // kv_heads, 1)
    scores = torch.einsum("qhd,khd->hqk", q.float(), keys) * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    newest = torch.arange(length - count, length, device=q.device)[:, None]
    keys_at = torch.arange(length, device=q.device)[None]
    hidden = keys_at > newest
    for begin, end in bidirectional:
        hidden = hidden & ~((newest >= begin) & (newest < end) & (keys_at < end))
    if window is not None:
        hidden = hidden | (keys_at <= newest - window)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)


def shape(
    logits: Tensor,
    counts: Tensor,
    repetition: float,
    frequency: float,
    presence: float,
    eos: list[int],
    growth: float,
    masked: bool,
    allowed: Tensor | None,
    inverse_temperature: float,
) -> Tensor:
    """One row's ``logits [V]`` as its softmax sees them: penalties for tokens of ``counts [V]`` above 0, then eos
    grows by `growth` times its magnitude or is masked, then all but ``allowed [V]`` go, then the temperature."""
    penalised = torch.where(logits > 0, logits / repetition, logits * repetition) - counts * frequency - presence
    x = torch.where(counts > 0, penalised.clamp(max=1e30), logits)
    for token in eos:
        if masked:
            x[token] = -1e6
        elif growth and x[token] > float("-inf"):
            x[token] = (x[token] + x[token].abs() * min(growth, 1e30)).clamp(max=1e30)
    if allowed is not None:
        x = x.masked_fill(~allowed, float("-inf"))
    return x * inverse_temperature


def kept(x: Tensor, top_p: float, top_k: int, min_p: float, typical_p: float = 1.0) -> Tensor:
    """Which tokens of ``x [V]`` are drawn from. They are ranked by logit, equal ones by id: those whose preceding mass
    exceeds `top_p` (above 1: none) go, those at rank `top_k` and beyond, and those of less than `min_p` times the
    highest probability (Nguyen et al. 2024). Of those that stay typical_p (1: off) keeps the ones that `typical`
    keeps of all tokens; where that leaves none, it does not count."""
    values, ids = x.double().softmax(-1).sort(descending=True, stable=True)
    stays = ((values.cumsum(-1) - values) <= top_p) & (torch.arange(len(x), device=x.device) < top_k)
    stays &= values >= min_p * values[0]
    ranked = torch.zeros_like(stays).scatter_(0, ids, stays)
    both = ranked & typical(x, typical_p) if typical_p < 1 else ranked
    return both if bool(both.any()) else ranked


def typical(x: Tensor, mass: float) -> Tensor:
    """Which tokens of ``x [V]`` locally typical sampling draws from (Meister et al. 2023): ordered by how far their
    surprise, the negative log-probability, is from the distribution's entropy, the fewest that have the `mass`, and
    what is as far as the last of them."""
    logprobs = x.double().log_softmax(-1)
    probabilities = logprobs.exp()
    entropy = -(probabilities * logprobs).nansum()
    distances = (-logprobs - entropy).abs()
    ordered, ids = distances.sort(stable=True)
    last = int((probabilities[ids].cumsum(-1) < mass).sum().clamp(max=len(x) - 1))
    return (distances <= ordered[last]) & (probabilities > 0)


def choose(
    x: Tensor,
    top_p: float,
    top_k: int,
    min_p: float,
    noise: Tensor | None,
    told: Tensor | None = None,
    typical_p: float = 1.0,
) -> tuple[int, float]:
    """One row's token and its log-probability among all tokens of ``told [V]``, which is `x` unless given: the highest
    of ``x [V]``, or of ``x + noise`` among the kept; the lowest id among equals."""
    key = x if noise is None else (x + noise).masked_fill(~kept(x, top_p, top_k, min_p, typical_p), float("-inf"))
    token = int(key.argmax())
    return token, float((x if told is None else told).double().log_softmax(-1)[token])
