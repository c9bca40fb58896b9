"""Collectives of several GPUs, each rank in a process of its own under Triton's interpreter: they really wait for each
other. On cards `tests/bench/all_reduce.py --check` does the same at speed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")


from forked_ranks import IN_FRESH_PROCESS, ForkedGroup, in_ranks, shared
from lightllmd.architecture import collectives_memory
from lightllmd.architecture.collectives_memory import LANES, Regions, limits_of
from lightllmd.kernels.collectives_one_shot import Mail, one_shot
from lightllmd.kernels.collectives_two_shot import ShareExchange, gather, two_shot

pytestmark = IN_FRESH_PROCESS

BLOCK, PROGRAMS = 32, 8  # of two shots


def mail_of(ranks: int, programs: int = 4) -> Callable[[int], Mail]:
    boxes = tuple(shared(2 * ranks * programs * LANES * 4, dtype=torch.int32) for _ in range(ranks))
    calls = [shared(programs, dtype=torch.int32) for _ in range(ranks)]
    return lambda rank: Mail(boxes, calls[rank], rank)


def exchange_of(ranks: int, blocks: int) -> Callable[[int], ShareExchange]:
    """`blocks` of the tests' size, in fp32, of each share."""
    parts, results = (
        tuple(shared(ranks * blocks * BLOCK * 4, dtype=torch.uint8) for _ in range(ranks)) for _ in range(2)
    )
    flags = tuple(shared(2 * PROGRAMS * ranks, dtype=torch.int32) for _ in range(ranks))
    calls = [shared(PROGRAMS, dtype=torch.int32) for _ in range(ranks)]
    return lambda rank: ShareExchange(parts, results, flags, calls[rank], rank, BLOCK)


def expected(parts: list[Tensor], residual: Tensor | None) -> Tensor:
    """In fp32, one rank after the other, rounded once."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    if residual is not None:
        total = total + residual.float()
    return total.to(parts[0].dtype)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_come_at_any_time_get_the_same_sums(ranks: int) -> None:
    """Calls of many sizes and kinds one after the other, each rank held up at random: what a fast one sends is never
    lost to a slow one, and the sums are those of one order, rounded once."""
    source = torch.Generator().manual_seed(ranks)
    wholes = [(1, 2), (3, 64), (1, 1), (2, 512), (5, 8), (1, 1026), (2, 512), (1, 2), (4, 96), (1, 2)]
    calls = []
    for at, (rows, columns) in enumerate(wholes):
        dtype = torch.float16 if columns % 2 == 0 and at % 2 == 0 else torch.float32
        parts = [(100 * torch.randn(rows, columns, generator=source)).to(dtype) for _ in range(ranks)]
        residual = torch.randn(rows, columns, generator=source).to(dtype) if at % 3 else None
        calls.append((parts, residual, at % 4 == 3))
    found = [[shared(*parts[0].shape, dtype=parts[0].dtype) for parts, _, _ in calls] for _ in range(ranks)]
    mails = mail_of(ranks)

    def work(rank: int) -> None:
        delays = random.Random(rank)
        for (parts, residual, largest), out in zip(calls, found[rank], strict=True):
            time.sleep(delays.choice([0, 0, 0.02]))
            if residual is not None and not largest:
                out.copy_(residual)
                one_shot(parts[rank], out, out, mails(rank))  # the residual stream is updated in place
            else:
                one_shot(parts[rank], None, out, mails(rank), largest=largest)

    in_ranks(ranks, work)
    for at, (parts, residual, largest) in enumerate(calls):
        wanted = torch.stack(parts).amax(0) if largest else expected(parts, residual)
        for rank in range(ranks):
            assert torch.equal(found[rank][at], wanted), (rank, at)


def test_the_largest_of_what_is_no_number_is_none() -> None:
    parts = [torch.tensor([[1.0, float("nan"), 2.0]]), torch.tensor([[3.0, 1.0, float("inf")]])]
    found, mails = [shared(1, 3), shared(1, 3)], mail_of(2)
    in_ranks(2, lambda rank: one_shot(parts[rank], None, found[rank], mails(rank), largest=True))
    wanted = torch.tensor([[3.0, float("nan"), float("inf")]])
    assert all(torch.equal(each.nan_to_num(-1), wanted.nan_to_num(-1)) for each in found)


@pytest.mark.parametrize("ranks", [2, 3])
def test_larger_messages_are_summed_by_shares_and_gathered_beside_them(ranks: int) -> None:
    """Whole shares, uneven ones, some that have less than a block, and messages in several parts; rows that are
    gathered stand between them and use the same memory."""
    source = torch.Generator().manual_seed(ranks)
    sizes = [(1, 16), (3, 48), (7, 80), (4, 64), (2, 16)][: 5 if ranks == 2 else 3]
    sums = []
    for at, size in enumerate(sizes):
        dtype = torch.float16 if at % 2 else torch.float32
        parts = [torch.randn(size, generator=source).to(dtype) for _ in range(ranks)]
        sums.append((parts, torch.randn(size, generator=source).to(dtype) if at % 3 else None))
    wide = [torch.randn(5, 70, generator=source) for _ in range(ranks)]
    columns = 70 * ranks - 9  # the last rank's part is padded
    found = [[shared(*parts[0].shape, dtype=parts[0].dtype) for parts, _ in sums] for _ in range(ranks)]
    rows = [[shared(5, columns) for _ in sums] for _ in range(ranks)]
    exchanges = exchange_of(ranks, blocks=4)

    def work(rank: int) -> None:
        delays = random.Random(rank)
        for (parts, residual), out, row in zip(sums, found[rank], rows[rank], strict=True):
            time.sleep(delays.choice([0, 0, 0.02]))
            if residual is not None:
                out.copy_(residual)
            two_shot(parts[rank], None if residual is None else out, out, exchanges(rank))
            gather(wide[rank], row, exchanges(rank))

    in_ranks(ranks, work)
    whole = torch.cat(wide, 1)[:, :columns]
    for at, (parts, residual) in enumerate(sums):
        for rank in range(ranks):
            assert torch.equal(found[rank][at], expected(parts, residual)), (rank, at)
            assert torch.equal(rows[rank][at], whole), (rank, at)


def test_a_row_that_is_too_wide_to_gather_is_refused() -> None:
    with pytest.raises(ValueError, match="a row of 1000 columns"):
        gather(torch.zeros(1, 1000), torch.zeros(1, 2000), exchange_of(2, blocks=4)(0))


def test_a_group_chooses_by_size_and_all_ways_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message at each limit and one past it, maxima and sums of more numbers than go at once, columns beside them."""
    monkeypatch.setattr(collectives_memory, "ONE_SHOT", {2: 1024})
    monkeypatch.setattr(collectives_memory, "TWO_SHOT", 4096)
    monkeypatch.setattr(collectives_memory, "BLOCK", BLOCK)
    limits = limits_of(2, 1 << 20)
    memories = [shared(Regions.of(2, limits).bytes, dtype=torch.uint8) for _ in range(2)]
    source = torch.Generator().manual_seed(0)
    sizes = [limits.one_shot // 4, limits.one_shot // 4 + 16, limits.two_shot // 4, limits.two_shot // 4 + 16]
    parts = [[torch.randn(1, size, generator=source) for size in sizes] for _ in range(2)]
    residual = [torch.randn(1, size, generator=source) for size in sizes]
    many = [torch.rand(3, 100, generator=source) for _ in range(2)]
    found = [[shared(1, size) for size in sizes] for _ in range(2)]
    small = [(shared(3, 100), shared(3, 100), shared(3, 195)) for _ in range(2)]

    def work(rank: int) -> None:
        group = ForkedGroup(rank, memories, 1 << 20)
        for part, before, out in zip(parts[rank], residual, found[rank], strict=True):
            out.copy_(group.sum_(part, before.clone()))
            small[rank][0].copy_(group.max_(many[rank].clone()))
            small[rank][1].copy_(group.sum_small(many[rank]))
            small[rank][2].copy_(group.gather_columns(many[rank], 195))
        assert group.by_nccl == 1

    in_ranks(2, work)
    for rank in range(2):
        for at in range(3):
            assert torch.equal(found[rank][at], expected([parts[0][at], parts[1][at]], residual[at])), (rank, at)
        assert torch.equal(found[rank][3], residual[3] + 2 * parts[rank][3])
        assert torch.equal(small[rank][0], torch.maximum(*many))
        assert torch.equal(small[rank][1], many[0] + many[1])
        assert torch.equal(small[rank][2], torch.cat(many, 1)[:, :195])
