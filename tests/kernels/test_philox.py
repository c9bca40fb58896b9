"""The generator is Philox4x32-10 and nothing else: a change would make old seeds give new texts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightllmd.kernels.philox import gumbel, philox

ONES = 0xFFFFFFFF
# Known answers of Random123 (kat_vectors, philox4x32 10): counter, key, words.
KNOWN = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([ONES] * 4, [ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter: list[int], key: list[int], words: list[int]) -> None:
    got = philox(tuple(np.array([word], np.uint64) for word in counter), (key[0], key[1]))  # type: ignore[arg-type]
    assert [int(word[0]) for word in got] == words


def test_noise_is_the_same_whatever_the_size_of_the_vocabulary() -> None:
    assert torch.equal(gumbel(2**62 + 5, 3, 7, 50_000)[:999], gumbel(2**62 + 5, 3, 7, 999))


def test_seed_branch_and_position_each_matter() -> None:
    numbers = [(0, 0, 0), (1, 0, 0), (2**32, 0, 0), (2**62, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 4096)]
    assert len({tuple(gumbel(*number, 8).tolist()) for number in numbers}) == len(numbers)
