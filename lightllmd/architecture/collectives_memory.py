"""What the collectives of several GPUs exchange messages in, and which way a message of some size takes. No torch: the
budget is planned with it.

Each rank owns one allocation that all ranks can write to (symmetric memory), laid out alike on all of them:

* mail of `one_shot`: int32 ``[2, ranks, MAIL_PROGRAMS, LANES, 4]``, by turn and by the rank that sent it;
* flags of `two_shot`: int32 ``[2, PROGRAMS, ranks]``, by phase and by the rank that set it;
* parts of `two_shot`: what the other ranks have of this rank's share, by rank and program;
* results of `two_shot`: what the other ranks have made of their shares, likewise.
"""

from __future__ import annotations

from dataclasses import dataclass

LANES = 128  # threads of a program of `one_shot`; each sends 8 bytes of a message, and 8 that say of which call
LANE_BYTES, LETTER_BYTES = 8, 16
BLOCK = 4096  # elements that a program of `two_shot` moves to each rank
PROGRAMS = 4096  # the most that `two_shot` and `gather` launch at a time
MOST_RANKS = 64
ALIGNMENT = 256  # bytes

# The largest message, in bytes, that each way is taken for, by the number of ranks.
#
# One shot: every rank sends all it has to every other one, twice as many bytes as the message has, and waits once: the
# time of a store to a peer and of a look at one's own memory. It sends 2 (n - 1) times the message where two shots send
# 2 (n - 1) / n times, and these cost a second wait and two fences, 3 to 4 us together; at 390 GB/s to a peer they
# break even near 1 MiB of two ranks, 200 KiB of four, 80 KiB of eight.
# Two shots take memory for two messages; beyond their limit latency is nothing and NCCL is at the links' bandwidth.
# Reckoned from NVLink's figures of an H200 (a peer copy: 394 GB/s), not measured: `tests/bench/all_reduce.py` is.
ONE_SHOT = {2: 512 << 10, 3: 256 << 10, 4: 128 << 10, 8: 64 << 10}
TWO_SHOT = 32 << 20


@dataclass(frozen=True)
class MessageLimits:
    """The largest messages, in bytes: up to `one_shot` in one shot, up to `two_shot` in two, then NCCL's."""

    one_shot: int
    two_shot: int


def largest_message(tokens: int, hidden: int, vocab: int, item: int) -> int:
    """Bytes of the largest message of steps of up to so many tokens: hidden states of `item` bytes an element, or the
    fp32 logits of a row, each rank's padded."""
    return max(tokens * hidden * item, 4 * (vocab + MOST_RANKS))


def limits_of(ranks: int, largest: int = TWO_SHOT) -> MessageLimits:
    """`largest`: see `largest_message`."""
    one_shot = min(limit for count, limit in ONE_SHOT.items() if count <= max(2, ranks))
    two_shot = min(TWO_SHOT, _aligned(max(largest, one_shot)))
    return MessageLimits(min(one_shot, two_shot), two_shot)


@dataclass(frozen=True)
class Regions:
    """Where the regions of a rank's symmetric memory begin, in bytes, and what they hold."""

    ranks: int
    mail_programs: int  # the most that `one_shot` launches
    share: int  # bytes of `parts` and of `results` that each rank has
    flags: int
    parts: int
    results: int
    bytes: int  # of all

    @classmethod
    def of(cls, ranks: int, limits: MessageLimits) -> Regions:
        """For messages up to these limits."""
        mail_programs = -(-limits.one_shot // (LANES * LANE_BYTES))
        flags = _aligned(2 * ranks * mail_programs * LANES * LETTER_BYTES)
        parts = flags + _aligned(2 * PROGRAMS * ranks * 4)
        # Whole blocks of fp32, so that there is room for whole ones of any dtype.
        share = -(-limits.two_shot // (ranks * BLOCK * 4)) * BLOCK * 4
        results = parts + ranks * share
        return cls(ranks, mail_programs, share, flags, parts, results, results + ranks * share)

    def blocks(self, item: int) -> int:
        """Blocks of elements of `item` bytes that a rank's share holds."""
        return min(PROGRAMS, self.share // (BLOCK * item))


# What NCCL takes of each device beside it: buffers of its channels to each other rank, and its kernels.
NCCL_BYTES, NCCL_BYTES_PER_PEER = 250_000_000, 50_000_000


def group_bytes(ranks: int, largest: int) -> int:
    """Bytes of a device that a group of `ranks` takes: its symmetric memory, its counters and what NCCL has.
    `largest`: see `largest_message`."""
    if ranks == 1:
        return 0
    regions = Regions.of(ranks, limits_of(ranks, largest))
    counters = 4 * (regions.mail_programs + PROGRAMS)
    # An allocation that is mapped into other processes is a multiple of 2 MiB, and has a page of signals behind it.
    symmetric = -(-(regions.bytes + (1 << 20)) // (2 << 20)) * (2 << 20)
    return symmetric + counters + NCCL_BYTES + (ranks - 1) * NCCL_BYTES_PER_PEER


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT
