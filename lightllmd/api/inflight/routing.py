"""Which group of ranks a request goes to, of those that serve one model side by side. Pure functions and one index.

The rule: of the groups that are not far busier than the average, those that have the longest part of the prompt in
their prompt cache; of these the least busy one. Where several are about as busy, a hash of the prompt's first block
decides (rendezvous hashing: Thaler and Ravishankar 1998), so that api workers which know nothing of each other send
prompts that begin alike to the same group.

How busy a group is counts in requests: sequences that run or wait, and the prompt tokens that are still to be computed,
`TOKENS` of which cost about what a sequence does.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

BLOCK = 64  # tokens that are hashed together: prompts have whole blocks in common, or nothing
MOST_BLOCKS = 256  # of a prompt that are looked at; all but the first 16,384 tokens change nothing
MOST_KEPT = 1 << 16  # blocks of one group that are remembered: 4 million tokens, about 8 MB
_64_BITS = (1 << 64) - 1
TOKENS = 1024  # prompt tokens to be computed that weigh as much as one sequence


@dataclass(frozen=True)
class Policy:
    """What "far busier" and "about as busy" mean."""

    excess: float = 1.25  # times the average of all groups' loads, plus
    slack: float = 2.0  # requests, are the most with which a group still gets requests for its prompt cache
    near: float = 1.0  # requests that one group may have more than another and count as equally busy


POLICY = Policy()


class GroupView(NamedTuple):
    """What is known of one group when a request is routed."""

    group: int  # its number, the same in all api workers
    load: float  # requests, see `load_of`
    blocks: int = 0  # of the prompt's first blocks, as many as are in its prompt cache


def load_of(sequences: float, tokens: float) -> float:
    """How busy a group is, in requests. `sequences`: that run or wait; `tokens`: of prompts, still to be computed."""
    return sequences + tokens / TOKENS


def block_hashes(prompt: Sequence[int], block: int = BLOCK, most: int = MOST_BLOCKS) -> list[int]:
    """One for each whole block in front, each of which covers all tokens up to its end: equal hashes stand for equal
    prefixes. The same in every process, since hashes of integers aren't salted."""
    hashes, before = [], 0
    for end in range(block, min(len(prompt), block * most) + 1, block):
        before = hash((before, *prompt[end - block : end]))
        hashes.append(before)
    return hashes


def first_hash(prompt: Sequence[int], block: int = BLOCK) -> int:
    """Of a prompt's beginning, a block at the most: what begins alike has the same."""
    return hash((0, *prompt[:block]))


def choose(views: Sequence[GroupView], first: int, policy: Policy = POLICY) -> GroupView:
    """The group that the request goes to, of one at least. `first`: as `first_hash`."""
    if len(views) == 1:
        return views[0]
    most = bound(views, policy)
    able = [view for view in views if view.load <= most]  # the least busy one at the least
    longest = max(view.blocks for view in able)
    best = [view for view in able if view.blocks == longest]
    least = min(view.load for view in best) + policy.near
    near = [view for view in best if view.load <= least]
    return max(near, key=lambda view: _mixed(first, view.group))


def _mixed(first: int, group: int) -> int:
    """64 bits that look random, by the finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    mixed = first + (group + 1) * 0x9E3779B97F4A7C15 & _64_BITS
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & _64_BITS
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & _64_BITS
    return mixed ^ mixed >> 31


def bound(views: Sequence[GroupView], policy: Policy = POLICY) -> float:
    """The load up to which a group gets requests because of its prompt cache."""
    return policy.excess * sum(view.load for view in views) / len(views) + policy.slack


class PrefixIndex:
    """The prefixes of the prompts that one process sent to one group, at most `room` blocks: what was not asked for
    the longest goes first, the ends of prompts before their beginnings, as in the group's own prompt cache."""

    def __init__(self, room: int = MOST_KEPT) -> None:
        self.room = max(1, min(room, MOST_KEPT))
        self._known: OrderedDict[int, None] = OrderedDict()  # the least recently used first

    def __len__(self) -> int:
        return len(self._known)

    def match(self, hashes: Iterable[int]) -> int:
        """How many of a prompt's first blocks are there."""
        count = 0
        for each in hashes:
            if each not in self._known:
                break
            count += 1
        return count

    def add(self, hashes: Sequence[int]) -> None:
        """A prompt went there: its blocks are the most recently used ones."""
        known = self._known
        for each in reversed(hashes):
            known[each] = None
            known.move_to_end(each)
        while len(known) > self.room:
            known.popitem(last=False)
