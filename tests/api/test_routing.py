"""Where requests go, of several groups that serve one model: the pure rule, and its index of prefixes."""

from __future__ import annotations

import random
import subprocess
import sys

from lightllmd.api.inflight.routing import (
    BLOCK,
    POLICY,
    GroupView,
    PrefixIndex,
    block_hashes,
    bound,
    choose,
    first_hash,
    load_of,
)


def test_longest_cached_prefix_wins_over_less_load():
    views = [GroupView(0, load=3.0, blocks=4), GroupView(1, load=1.0, blocks=2), GroupView(2, load=0.0)]
    assert choose(views, first=1).group == 0


def test_least_load_decides_among_equal_prefixes():
    assert choose([GroupView(0, 9.0, 2), GroupView(1, 4.0, 2), GroupView(2, 0.0, 0)], first=1).group == 1
    assert choose([GroupView(0, 9.0), GroupView(1, 4.0)], first=1).group == 1


def test_group_far_above_the_average_is_passed_over_even_with_the_prefix():
    """The bound: 1.25 times the average, plus two requests."""
    views = [GroupView(0, load=20.0, blocks=9), GroupView(1, load=10.0)]
    assert bound(views) == 1.25 * 15 + 2 == 20.75
    assert choose(views, first=1).group == 0
    assert choose([GroupView(0, load=23.0, blocks=9), GroupView(1, load=10.0)], first=1).group == 1


def test_some_group_is_always_below_the_bound():
    chance = random.Random(1)
    for _ in range(2000):
        views = [GroupView(n, chance.expovariate(0.02), chance.randrange(5)) for n in range(chance.randrange(1, 9))]
        assert choose(views, chance.getrandbits(60)) in views


def test_equally_busy_groups_share_first_blocks_evenly_and_alike_in_every_process():
    ask = (
        "from lightllmd.api.inflight.routing import *\n"
        "print([choose([GroupView(g, 1.0) for g in range(4)], first_hash([n, 7])).group for n in range(400)])"
    )
    told = [subprocess.check_output([sys.executable, "-c", ask]) for _ in range(2)]
    assert told[0] == told[1]
    groups = eval(told[0])
    assert all(60 <= groups.count(group) <= 140 for group in range(4))


def test_a_group_that_goes_takes_no_prompt_of_the_others_along():
    firsts = [first_hash([n, n * 7]) for n in range(300)]
    before = [choose([GroupView(g, 1.0) for g in range(4)], first).group for first in firsts]
    after = [choose([GroupView(g, 1.0) for g in range(3)], first).group for first in firsts]
    assert all(was == now for was, now in zip(before, after, strict=True) if was != 3)


def test_one_request_more_is_no_reason_to_part_what_begins_alike():
    first = next(n for n in range(100) if choose([GroupView(0, 1.0), GroupView(1, 1.0)], n).group == 0)
    assert choose([GroupView(0, 1.0 + POLICY.near), GroupView(1, 1.0)], first).group == 0
    assert choose([GroupView(0, 1.1 + POLICY.near), GroupView(1, 1.0)], first).group == 1


def test_prompt_tokens_that_wait_count_as_load():
    assert load_of(3, 2048) == 5.0


def test_hashes_are_of_whole_blocks_and_of_all_that_is_before_them():
    prompt = list(range(3 * BLOCK + 5))
    hashes = block_hashes(prompt)
    assert len(hashes) == 3
    assert block_hashes(prompt[: 2 * BLOCK]) == hashes[:2]
    other = [9, *prompt[1:]]
    assert not set(block_hashes(other)) & set(hashes)
    assert block_hashes(prompt[: BLOCK - 1]) == []
    assert len(block_hashes(list(range(1000)), block=4, most=10)) == 10


def test_index_tells_the_longest_known_prefix():
    index = PrefixIndex()
    prompt = list(range(4 * BLOCK))
    index.add(block_hashes(prompt))
    assert index.match(block_hashes(prompt[: 3 * BLOCK] + [0] * BLOCK)) == 3
    assert index.match(block_hashes([5] * 4 * BLOCK)) == 0


def test_index_is_bounded_and_forgets_ends_before_beginnings():
    index = PrefixIndex(room=4)
    old, new = block_hashes([1] * 3 * BLOCK), block_hashes([2] * 2 * BLOCK)
    index.add(old)
    index.add(new)
    assert len(index) == 4
    assert (index.match(old), index.match(new)) == (2, 2)
    index.add(old[:2])  # used again
    index.add(block_hashes([3] * BLOCK))
    assert (index.match(old), index.match(new)) == (2, 1)
