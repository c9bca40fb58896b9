"""What the kernels of sampling share: a row's parameters, its random numbers, and which of two candidates is better."""

# mypy: allow-untyped-defs

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl

from lightllmd.kernels import philox

# What a table row's parameters are: 64 bytes on the host, 16 int32 of ``parameters [R, 16]`` on the device.
PARAMETERS = np.dtype(
    [
        ("flags", np.int32),  # the sum of those below
        ("inverse_temperature", np.float32),  # 1 where greedy
        ("top_p", np.float32),  # above 1: off
        ("top_k", np.int32),
        ("presence", np.float32),
        ("frequency", np.float32),
        ("repetition", np.float32),
        ("decay_start", np.int32),
        ("decay_factor", np.float64),
        ("min_new", np.int32),
        ("branch", np.int32),
        ("seed", np.int64),
        ("alternatives", np.int32),
        ("min_p", np.float32),
    ]
)


_FIELDS = dict(PARAMETERS.fields or {})


def _column(name: str) -> tl.constexpr:
    return tl.constexpr(_FIELDS[name][1] // 4)


COLUMNS = tl.constexpr(PARAMETERS.itemsize // 4)
INVERSE_TEMPERATURE = _column("inverse_temperature")
TOP_P, TOP_K, MIN_P = _column("top_p"), _column("top_k"), _column("min_p")
PRESENCE, FREQUENCY, REPETITION = _column("presence"), _column("frequency"), _column("repetition")
DECAY_START, DECAY_FACTOR, MIN_NEW = _column("decay_start"), _column("decay_factor"), _column("min_new")
SEED, BRANCH = _column("seed"), _column("branch")
ALTERNATIVES_WANTED = _column("alternatives")

# A row without any flag takes its highest logit.
DRAWN = tl.constexpr(1)
PENALISED = tl.constexpr(2)
ENDING = tl.constexpr(4)  # the logits of eos are changed, at some positions at least
LIMITED = tl.constexpr(8)  # top-p, top-k or min-p
ALTERNATIVES = tl.constexpr(16)  # the best tokens are asked for beside the one that is chosen
CANDIDATES = tl.constexpr(32)  # the best tokens of the shaped logits are, which a beam search goes on from
TYPICAL = tl.constexpr(64)  # typical-p; such a row is LIMITED, too, whatever other limits it has

MOST_COUNT = tl.constexpr(32767)
MOST_LOGIT = tl.constexpr(1e30)  # penalties and decay make none larger: an infinite one has no probability
EOS_MASKED = tl.constexpr(-1e6)
RUN = tl.constexpr(philox.RUN)
CHUNK = tl.constexpr(4 * philox.RUN)  # tokens; the four runs of a chunk share the calls of the generator
STATISTICS = tl.constexpr(6)  # of a chunk: highest, total, key and logit of its candidate; raw highest, raw total


@triton.jit
def real(parameter):
    """A parameter that is fp32; `parameter` points to it among int32."""
    return tl.load(parameter).to(tl.float32, bitcast=True)


@triton.jit
def gumbel(word):
    """Standard Gumbel noise from 32 random bits. Its largest values, which decide, are the finest grained."""
    u = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    series = u + u * u * (0.5 + u * (0.3333333333333333 + u * 0.25))  # of -log(1 - u), where 1 - u loses digits of u
    return -tl.log(tl.where(u < 0.015625, series, -tl.log(1.0 - u)))


@triton.jit
def noise_words(parameters, position, index):
    """Four words for tokens that lie RUN apart; `index` counts the calls."""
    seed = tl.load((parameters + SEED).to(tl.pointer_type(tl.int64)))
    return tl.philox(seed, position, tl.load(parameters + BRANCH), index, 1)


@triton.jit
def better_of(key, token, x, other_key, other_token, other_x):
    """Lane by lane the higher key, the earlier one among equals."""
    better = other_key > key
    return tl.where(better, other_key, key), tl.where(better, other_token, token), tl.where(better, other_x, x)


@triton.jit
def best_of(key, token, x, VOCAB: tl.constexpr):
    """The highest key of all lanes, its token and its logit; the lowest token among equals, any where none is equal."""
    highest = tl.max(key, 0)
    best = tl.min(tl.where(key == highest, token, VOCAB - 1), 0)
    return highest, best, tl.max(tl.where(token == best, x, float("-inf")), 0)
