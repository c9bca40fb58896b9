"""The prompt cache's radix tree: which slots hold the keys and values of which beginnings of sequences.

An edge is a run of tokens with one slot each, both packed as int32 in `bytes`: memcmp follows it, a slice of it keeps
no more memory than its own, and a join of slices is a list of slots in one go. An edge belongs to the node it leads
to, so a node stands for the tokens on the path from the root.

Order of use: every node without locks is in one ordered dictionary, least recently used first and *each node behind
all of its descendants*. That holds because a use marks a whole path, deepest node first, because a split is part of
such a use, and because a lock protects the whole path above it, so that nothing below an unlocked node is locked. The
first entry is therefore always a leaf that may go: eviction searches nothing. There is no clock.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightllmd.engine.kv_cache.slots import Slots

ITEM = 4  # bytes of a packed token or slot


class Node:
    """Where a run of tokens ends. Opaque to the tree's users, who may hold it as long as they hold a lock on it: one
    without locks may be trimmed or dropped by the next `evict`."""

    __slots__ = ("born", "children", "locks", "parent", "slots", "tokens")

    def __init__(self, parent: Node | None, tokens: bytes, slots: bytes, born: int) -> None:
        self.parent = parent  # None: the root, or no longer in the tree
        self.tokens = tokens  # of the edge from the parent; empty in the root only
        self.slots = slots
        self.born = born  # number of the step that computes them
        self.locks = 0  # on this node and on all below it
        self.children: dict[bytes, Node] = {}  # by their first token, packed

    @property
    def length(self) -> int:
        """Tokens of the edge."""
        return len(self.tokens) // ITEM


class Match(NamedTuple):
    """How far a key is known."""

    node: Node
    length: int  # tokens of the key that lead to `node`
    fresh: int  # how many more of them lead on through younger nodes


class RadixTree:
    """Owns the one reference of each slot in it: `insert` takes them over, `evict` releases them."""

    def __init__(self, slots: Slots) -> None:
        self.root = Node(None, b"", b"", 0)
        self.tokens = 0  # in the tree
        self.evictable = 0  # of those, in nodes without locks
        self._slots = slots
        self._unlocked: OrderedDict[Node, None] = OrderedDict()  # in order of use, see above; never the root

    def match(self, key: NDArray[np.int32], before: int) -> Match:
        """The longest beginning of `key` [n] made of nodes that were born before step `before`, which counts as used
        now. An edge is split where it ends inside."""
        packed = _pack(key)
        node, end = self._reach(packed, before)
        self._use(node)
        _, further, _, common = self._descend(node, packed, end, math.inf)
        return Match(node, end // ITEM, (further + common - end) // ITEM)

    def slots_of(self, node: Node) -> list[int]:
        """Of the whole path from the root, in order."""
        return _unpack([part.slots for part in _upwards(node)][::-1])

    def lock(self, node: Node) -> None:
        """Protects the path to `node`, once more, until `unlock`. Raises RuntimeError for a node that was evicted."""
        if node.parent is None and node is not self.root:
            raise RuntimeError("a lock is asked on a node that is no longer in the tree")
        for part in _upwards(node):
            if not part.locks:
                del self._unlocked[part]
                self.evictable -= part.length
            part.locks += 1

    def unlock(self, node: Node) -> None:
        """Takes one lock back. What none protects any more was used until now. Raises RuntimeError without a lock."""
        for part in _upwards(node):
            if not part.locks:
                raise RuntimeError("a node was unlocked more often than locked")
            part.locks -= 1
            if not part.locks:
                self._unlocked[part] = None
                self.evictable += part.length

    def insert(self, key: NDArray[np.int32], slots: Sequence[int], born: int) -> tuple[Node, int]:
        """Puts `key` [n] in, whose tokens have `slots`, and counts it as used now. Returns the node where it ends and
        `have`, how many of its tokens were there before: the tree takes over ``slots[have:]`` only, in a node of the
        age `born`. Raises RuntimeError for another number of slots."""
        if len(slots) != len(key):
            raise RuntimeError(f"{len(slots)} slots for {len(key)} tokens")
        packed = _pack(key)
        node, end = self._reach(packed, math.inf)
        have = end // ITEM
        if have < len(key):
            node = Node(node, packed[end:], _pack(slots[have:]), born)
            self._attach(node)
            self.tokens += node.length
            self.evictable += node.length
            self._unlocked[node] = None
        self._use(node)
        return node, have

    def evict(self, count: int) -> int:
        """Releases the slots of the `count` least recently used tokens that no lock protects, or of all such. Of a
        leaf with more than are needed only the tail goes. Returns how many."""
        dropped: list[bytes] = []
        left = min(count, self.evictable)
        freed = 0
        while freed < left:
            leaf = next(iter(self._unlocked))
            kept = max(0, leaf.length - (left - freed)) * ITEM
            dropped.append(leaf.slots[kept:])
            freed += len(dropped[-1]) // ITEM
            if kept:
                leaf.tokens, leaf.slots = leaf.tokens[:kept], leaf.slots[:kept]
            else:
                del self._unlocked[leaf]
                self._detach(leaf)
        self.tokens -= freed
        self.evictable -= freed
        self._slots.release(_unpack(dropped))
        return freed

    def clear(self) -> int:
        """Evicts all that no lock protects; returns how many tokens."""
        return self.evict(self.evictable)

    def every_slot(self) -> list[int]:
        """Of all that is in the tree, in no order."""
        edges, nodes = [], [self.root]
        while nodes:
            node = nodes.pop()
            edges.append(node.slots)
            nodes += node.children.values()
        return _unpack(edges)

    def check(self) -> None:
        """Raises RuntimeError unless structure, counts, locks, order of use and references hold by an actual walk."""
        rank = {node: place for place, node in enumerate(self._unlocked)}
        tokens = evictable = unlocked = 0
        edges: list[bytes] = []
        nodes = [self.root]
        while nodes:
            node = nodes.pop()
            for first, child in node.children.items():
                if child.parent is not node or not child.tokens or child.tokens[:ITEM] != first:
                    raise RuntimeError(f"an edge of {child.length} tokens is not where its first token says")
                if len(child.slots) != len(child.tokens):
                    raise RuntimeError(f"{len(child.slots) // ITEM} slots on an edge of {child.length} tokens")
                if (child.locks == 0) != (child in rank):
                    raise RuntimeError(f"a node with {child.locks} locks is on the wrong side of the order of use")
                if child.locks == 0:
                    unlocked += 1
                    evictable += child.length
                    if node in rank and rank[node] < rank[child]:
                        raise RuntimeError("a node would be evicted before one below it")
                tokens += child.length
                edges.append(child.slots)
                nodes.append(child)
            if node is not self.root and node.locks < sum(child.locks for child in node.children.values()):
                raise RuntimeError(f"a node has {node.locks} locks, fewer than those below it")
        if (tokens, evictable, unlocked) != (self.tokens, self.evictable, len(self._unlocked)):
            raise RuntimeError(
                f"{self.tokens} tokens, {self.evictable} evictable in {len(self._unlocked)} nodes are counted;"
                f" there are {tokens}, {evictable} in {unlocked}"
            )
        owned = _unpack(edges)
        if len(set(owned)) != len(owned):
            raise RuntimeError(f"{len(owned) - len(set(owned))} slots are in the tree twice")
        for slot in owned:
            if self._slots.references(slot) != 1:
                raise RuntimeError(f"slot {slot} of the tree has {self._slots.references(slot)} references")

    def _reach(self, packed: bytes, before: float) -> tuple[Node, int]:
        """The node at the end of the longest beginning in nodes born before `before`, after a split where it takes
        one, and its length in bytes. The caller then uses it, which gives the new node its place in the order."""
        node, end, child, common = self._descend(self.root, packed, 0, before)
        if child is None:
            return node, end
        return self._split(child, common), end + common

    @staticmethod
    def _descend(node: Node, packed: bytes, end: int, before: float) -> tuple[Node, int, Node | None, int]:
        """From `node`, which ends at byte `end` of `packed`, down whole edges to nodes born before `before`: the last
        node, where it ends, and of the edge that only begins alike its node and how many bytes of it agree."""
        while end < len(packed):
            child = node.children.get(packed[end : end + ITEM])
            if child is None or child.born >= before:
                break
            if not packed.startswith(child.tokens, end):
                return node, end, child, _common(child.tokens, packed, end)
            node = child
            end += len(child.tokens)
        return node, end, None, 0

    def _split(self, node: Node, at: int) -> Node:
        """A new node at byte `at` of the edge to `node`, which stays the deeper part, so that who holds it holds the
        same path as before."""
        assert node.parent is not None
        upper = Node(node.parent, node.tokens[:at], node.slots[:at], node.born)
        upper.locks = node.locks
        if not upper.locks:
            self._unlocked[upper] = None
        self._attach(upper)
        node.parent, node.tokens, node.slots = upper, node.tokens[at:], node.slots[at:]
        self._attach(node)
        return upper

    def _use(self, node: Node) -> None:
        for part in _upwards(node):
            if not part.locks:
                self._unlocked.move_to_end(part)

    @staticmethod
    def _attach(node: Node) -> None:
        assert node.parent is not None
        node.parent.children[node.tokens[:ITEM]] = node

    @staticmethod
    def _detach(node: Node) -> None:
        assert node.parent is not None
        del node.parent.children[node.tokens[:ITEM]]
        node.parent = None


def _upwards(node: Node) -> Iterator[Node]:
    """`node` and those above it, without the root."""
    while node.parent is not None:
        yield node
        node = node.parent


def _common(edge: bytes, packed: bytes, end: int) -> int:
    """Bytes of the tokens that `edge` and ``packed[end:]`` have in common; they are not all of `edge`."""
    size = min(len(edge), len(packed) - end)
    differ = np.frombuffer(edge, np.int32, size // ITEM) != np.frombuffer(packed, np.int32, size // ITEM, end)
    return (int(differ.argmax()) if differ.any() else len(differ)) * ITEM


def _pack(numbers: NDArray[np.int32] | Sequence[int]) -> bytes:
    return np.asarray(numbers, np.int32).tobytes()


def _unpack(edges: list[bytes]) -> list[int]:
    return np.frombuffer(b"".join(edges), np.int32).tolist()
