"""What a generation of the fake engine is made of: functions of what is fed, and of nothing that a scheduler decides.

Tokens depend on prompt, seed, branch and position; alternatives, which beams are made of, on all tokens before them;
log-probabilities of a prompt on position, token and target. A mask changes a token and the candidates of its step.
Where a prompt has images, the ids of their tokens are `seen_tokens` of their embeddings in all of that.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

from lightllmd.engine.step import Alternatives

EMPTY = 0  # the key of a history without tokens
_FIRST, _COUNT = 32, 95  # printable ASCII
_PRINTABLE = ((1 << _COUNT) - 1) << _FIRST
_WORD = (1 << 64) - 1


def fake_token(prompt_ids: list[int], seed: int, branch: int, position: int, model: str = "", mask: bytes = b"") -> int:
    """The token that a fake generation has at `position`: a printable ASCII byte, never eos, unless a `mask` (as
    Step.masks) leads to another: the first allowed one from there, behind the last the lowest. ``seed = 0``: greedy.

    `model`: its model_dir, which no one opens; other names have other tokens.
    """
    return first_allowed(token_at(branch_key(prompt_ids, seed, branch, model), position), allowed_bits(mask))


def fake_alternatives(history: list[int], count: int, mask: bytes = b"") -> Alternatives:
    """The `count` best next tokens behind `history`, prompt and emitted tokens together; fewer where a `mask` allows no
    more. Printable ASCII bytes, or what the mask allows. Log-probabilities fall strictly, and
    their probabilities make no more than 1. The token that a row itself
    samples need not be among them."""
    return ranking(extended(EMPTY, history), count, allowed_bits(mask))


def fake_target(position: int, token: int, target: int) -> float:
    """Log-probability of the prompt token `target` behind `token`, which is the one at `position`."""
    return -(_mixed(extended(EMPTY, (position, token, target))) % 10_000) / 1000


def fake_target_alternatives(position: int, token: int, count: int) -> Alternatives:
    """The `count` best tokens behind `token` at `position` of a prompt."""
    return ranking(extended(EMPTY, (position, token)), count, 0)


def fake_score(prompt_ids: Sequence[int], label: int = 0, model: str = "") -> float:
    """The score of a prompt that ends with these ids, for one of the labels: fp32, between -8 and 8, in 1/1000."""
    key = extended(zlib.crc32(model.encode()), [*prompt_ids, label])
    return _single((_mixed(key) % 16_001 - 8000) / 1000)


def fake_state(position: int, token: int, element: int, model: str = "") -> float:
    """An element of the hidden state of the `token` at `position` of a prompt, which embeddings are made of: between -1
    and 1, in 1/1024, so that sums are exact in fp32."""
    key = extended(zlib.crc32(model.encode()), (position, token, element))
    return (_mixed(key) % 2049 - 1024) / 1024


def _single(value: float) -> float:
    """As fp32 has it."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def seen_tokens(values: bytes | memoryview, layers: int, tokens: int) -> list[int]:
    """What stands for the ids of an image's tokens: the CRC-32 of each one's embedding. `values`: as ImagePart's."""
    size = len(values) // (layers * tokens)
    found = [0] * tokens
    for first in range(0, len(values), size):
        token = first // size % tokens
        found[token] = zlib.crc32(values[first : first + size], found[token])
    return found


# --- what a runner keeps between steps ----------------------------------------------------------------------------


def branch_key(prompt_ids: list[int], seed: int, branch: int, model: str) -> int:
    """What the tokens of one branch depend on beside their position; 64 bits."""
    crc = zlib.crc32(repr((prompt_ids, seed, branch)).encode(), zlib.crc32(model.encode()))
    return crc * 0x9E3779B97F4A7C15 & _WORD


def token_at(key: int, position: int) -> int:
    """One of the 95 printable ASCII bytes."""
    return _FIRST + _mixed(key + position * 0xBF58476D1CE4E5B9) % _COUNT


def extended(history: int, tokens: Sequence[int]) -> int:
    """The key of a history that is `tokens` longer."""
    return zlib.crc32(struct.pack(f"<{len(tokens)}I", *tokens), history)


def allowed_bits(mask: bytes, vocab: int | None = None) -> int:
    """Bit t allows token t, none beyond `vocab`; 0: all are allowed."""
    bits = int.from_bytes(mask, "little")
    return bits if vocab is None else bits & (1 << vocab) - 1


def first_allowed(token: int, bits: int) -> int:
    """`token` or the next allowed one, cyclically."""
    if not bits:
        return token
    behind = bits >> token
    return token + _lowest(behind) if behind else _lowest(bits)


def ranking(history: int, count: int, bits: int) -> Alternatives:
    """As `fake_alternatives`, of a history's key and the bits of a mask."""
    bits = bits or _PRINTABLE
    drawn = _mixed(history)
    token, found, logprob = _FIRST + drawn % _COUNT, [], 0.0
    for _ in range(min(count, bits.bit_count())):
        drawn = _mixed(drawn)
        logprob -= 0.7 + drawn % 1000 / 1000
        token = first_allowed(token, bits)
        found.append((token, logprob))
        token += 1
    return found


def _lowest(bits: int) -> int:
    return (bits & -bits).bit_length() - 1


def _mixed(x: int) -> int:
    """The finaliser of SplitMix64."""
    x &= _WORD
    x = (x ^ x >> 30) * 0x94D049BB133111EB & _WORD
    return x ^ x >> 31
