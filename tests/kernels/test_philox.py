"""The generator is Philox4x32-10 and nothing else: a change would make old seeds give new texts."""

from __future__ import annotations

import pytest
import torch

from lightllmd.kernels.philox import philox, uniform

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
    got = philox(tuple(torch.tensor([word]) for word in counter), tuple(torch.tensor([word]) for word in key))  # type: ignore[arg-type]
    assert [int(word) for word in got] == words


def test_vectors_give_what_single_elements_give() -> None:
    seeds = torch.tensor([0, 1, 2**63 - 1, 7, 2**40 + 3])
    branches, positions = torch.arange(5), torch.tensor([0, 5, 9, 2**31, 3])
    together = uniform(seeds, branches, positions)
    for index in range(5):
        one = slice(index, index + 1)
        assert uniform(seeds[one], branches[one], positions[one]) == together[one]


def test_seed_branch_and_position_each_matter_and_numbers_are_uniform() -> None:
    count = 20_000
    numbers = torch.arange(count)
    zero = torch.zeros(count, dtype=torch.int64)
    streams = [uniform(numbers, zero, zero), uniform(zero, numbers, zero), uniform(zero, zero, numbers)]
    for u in streams:
        assert bool(((u > 0) & (u < 1)).all())
        histogram = torch.histc(u.float(), 100, 0, 1)
        chi_square = ((histogram - count / 100) ** 2 / (count / 100)).sum().item()
        assert 50 < chi_square < 160  # 99 degrees of freedom
    assert len({stream[17].item() for stream in streams}) == 3
    assert uniform(torch.tensor([2**32]), zero[:1], zero[:1]) != uniform(zero[:1], zero[:1], zero[:1])
