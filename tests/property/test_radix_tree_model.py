"""The radix tree against a dictionary that has one entry per token in it, after each of many drawn operations.

The model states the order of eviction exactly: least recently used first, of one use the deepest first.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from lightllmd.engine.kv_cache.radix_tree import Node, RadixTree
from lightllmd.engine.kv_cache.slots import Slots
from long_run import LONG

OPERATIONS = 500_000 if LONG else 20_000
SEED = int(os.environ.get("LIGHTLLMD_SEED", "20261124"))
Key = tuple[int, ...]


@dataclass
class Token:
    """The last token of the beginning that is its key in the dictionary."""

    slot: int
    born: int
    used: int
    locks: int = 0


@dataclass
class Model:
    total: int
    known: dict[Key, Token] = field(default_factory=dict)
    locked: list[tuple[Node, Key]] = field(default_factory=list)
    now: int = 0

    def __post_init__(self) -> None:
        self.slots = Slots(self.total)
        self.tree = RadixTree(self.slots)

    def longest(self, key: Key, before: float = float("inf")) -> int:
        length = 0
        while length < len(key):
            token = self.known.get(key[: length + 1])
            if token is None or token.born >= before:
                break
            length += 1
        return length

    def match(self, key: Key, before: int) -> tuple[Node, Key]:
        node, length, fresh = self.tree.match(np.array(key, np.int32), before)
        assert length == self.longest(key, before)
        assert length + fresh == self.longest(key)
        self._use(key[:length])
        self.holds()
        assert self.tree.slots_of(node) == self._slots(key[:length])
        return node, key[:length]

    def insert(self, key: Key, born: int) -> Node | None:
        if self.slots.free < len(key):
            return None
        have = self.longest(key)
        own = self.slots.take(len(key))
        node, had = self.tree.insert(np.array(key, np.int32), own, born)
        assert had == have
        self.slots.release(own[:have])
        for end in range(have, len(key)):
            self.known[key[: end + 1]] = Token(own[end], born, self.now)
        self._use(key)
        self.holds()
        assert self.tree.slots_of(node) == self._slots(key)
        return node

    def lock(self, node: Node, key: Key) -> None:
        self.tree.lock(node)
        self.locked.append((node, key))
        for token in self._path(key):
            token.locks += 1
        self.holds()

    def unlock(self, index: int) -> None:
        node, key = self.locked.pop(index)
        self.tree.unlock(node)
        self.now += 1
        for token in self._path(key):
            token.locks -= 1
            token.used = self.now
        self.holds()

    def evict(self, count: int) -> None:
        order = sorted((token.used, -len(key), key) for key, token in self.known.items() if not token.locks)
        gone = [key for _, _, key in order[:count]]
        freed = [self.known.pop(key).slot for key in gone]
        assert self.tree.evict(count) == len(gone)
        assert not any(self.slots.references(slot) for slot in freed)
        self.holds()

    def clear(self) -> None:
        gone = [key for key, token in self.known.items() if not token.locks]
        assert self.tree.clear() == len(gone)
        for key in gone:
            del self.known[key]
        self.holds()

    def holds(self) -> None:
        self.slots.check()
        self.tree.check()
        assert self.tree.tokens == self.slots.used == len(self.known)
        assert self.tree.evictable == sum(not token.locks for token in self.known.values())
        for node, key in self.locked:
            assert self.tree.slots_of(node) == self._slots(key)

    def drain(self) -> None:
        while self.locked:
            self.unlock(len(self.locked) - 1)
        self.clear()
        assert self.slots.free == self.total

    def _path(self, key: Key) -> list[Token]:
        return [self.known[key[: end + 1]] for end in range(len(key))]

    def _slots(self, key: Key) -> list[int]:
        return [token.slot for token in self._path(key)]

    def _use(self, key: Key) -> None:
        self.now += 1
        for token in self._path(key):
            token.used = self.now


keys = st.lists(st.integers(0, 2), max_size=10).map(tuple)
ages = st.integers(0, 4)


class RadixTreeMachine(RuleBasedStateMachine):
    @initialize(total=st.integers(1, 60))
    def start(self, total: int) -> None:
        self.model = Model(total)

    @rule(key=keys, age=ages)
    def insert(self, key: Key, age: int) -> None:
        self.model.insert(key, age)

    @rule(key=keys, age=ages)
    def insert_and_lock(self, key: Key, age: int) -> None:
        node = self.model.insert(key, age)
        if node is not None:
            self.model.lock(node, key)

    @rule(key=keys, before=ages)
    def match(self, key: Key, before: int) -> None:
        self.model.match(key, before)

    @rule(key=keys, before=ages)
    def match_and_lock(self, key: Key, before: int) -> None:
        self.model.lock(*self.model.match(key, before))

    @precondition(lambda self: self.model.locked)
    @rule(data=st.data())
    def unlock(self, data: st.DataObject) -> None:
        self.model.unlock(data.draw(st.integers(0, len(self.model.locked) - 1)))

    @rule(count=st.integers(0, 20))
    def evict(self, count: int) -> None:
        self.model.evict(count)

    @rule()
    def clear(self) -> None:
        self.model.clear()

    def teardown(self) -> None:
        if hasattr(self, "model"):
            self.model.drain()


RadixTreeMachine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
TestRadixTreeMachine = RadixTreeMachine.TestCase


def test_tree_equals_its_model_over_many_operations() -> None:
    draw = random.Random(SEED)
    model, step = Model(150), 0
    for operation in range(OPERATIONS):
        if operation % 2000 == 0:
            model.drain()
            model = Model(draw.choice([20, 150, 400]))
        step += draw.random() < 0.3
        key: Key = draw.choice([*model.known, ()]) if draw.random() < 0.6 else ()
        key = key[: draw.randint(0, len(key))] + tuple(draw.choices(range(3), k=draw.choice([0, 1, 4, 20])))
        match draw.choices(["insert", "match", "unlock", "evict", "clear"], [40, 35, 15, 10, 0.2])[0]:
            case "insert":
                if len(key) > model.slots.free:
                    model.evict(len(key) - model.slots.free)
                node = model.insert(key, step)
                if node is not None and draw.random() < 0.3 and len(model.locked) < 8:
                    model.lock(node, key)
            case "match":
                found = model.match(key, step - draw.randint(-1, 2))
                if draw.random() < 0.3 and len(model.locked) < 8:
                    model.lock(*found)
            case "unlock" if model.locked:
                model.unlock(draw.randrange(len(model.locked)))
            case "evict":
                model.evict(draw.choice([0, 1, 2, 10, 1000]))
            case "clear":
                model.clear()
    model.drain()
