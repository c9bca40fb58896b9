"""Reference counts of slots. That none is given twice is held beside the scheduler's state machine."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from lightllmd.engine.kv_cache.slots import MOST_REFERENCES, Slots


def test_shared_slot_is_free_after_its_last_release_only() -> None:
    slots = Slots(8)
    own = slots.take(3)
    slots.share(own[:2])
    assert slots.used == 3
    slots.release(own)
    assert (slots.used, [slots.references(slot) for slot in own]) == (2, [1, 1, 0])
    slots.check()
    slots.release(own[:2])
    assert slots.free == 8
    slots.check()


def test_grown_slot_has_one_owner() -> None:
    slots = Slots(8)
    own = slots.take(2)
    (grown,) = slots.grow([own])
    assert slots.references(grown) == 1
    slots.release([grown])
    with pytest.raises(RuntimeError, match=f"slot {grown} was released more often than taken"):
        slots.release([grown])


def test_shared_slot_is_given_to_nobody_else() -> None:
    slots = Slots(4)
    own = slots.take(2)
    slots.share(own)
    slots.release(own)
    assert not set(slots.take(2)) & set(own)
    with pytest.raises(RuntimeError, match="1 slots asked, 0 of 4 free"):
        slots.take(1)


def test_count_of_references_never_wraps() -> None:
    slots = Slots(2)
    (slot,) = slots.take(1)
    for _ in range(MOST_REFERENCES - 1):
        slots.share([slot])
    with pytest.raises(RuntimeError, match="slot 0 with 255 references can't be shared"):
        slots.share([slot])
    assert slots.references(slot) == MOST_REFERENCES
    slots.release([slot] * MOST_REFERENCES)
    assert slots.free == 2
    slots.check()


def test_free_slot_is_neither_shared_nor_released() -> None:
    slots = Slots(2)
    with pytest.raises(RuntimeError, match="slot 1 with 0 references can't be shared"):
        slots.share([1])
    with pytest.raises(RuntimeError, match="slot 1 was released more often than taken"):
        slots.release([1])


def test_check_finds_a_wrong_count_of_free_slots() -> None:
    slots = Slots(4)
    slots.take(2)
    slots.free += 1
    with pytest.raises(RuntimeError, match="3 slots are counted free, 2 are"):
        slots.check()


def test_references_equal_a_count_kept_beside_them() -> None:
    draw = random.Random(5)
    for total in (1, 9, 300):
        slots, counts = Slots(total), Counter[int]()
        held: list[list[int]] = []
        for _ in range(3000):
            operation = draw.random()
            if operation < 0.25 and slots.free:
                held.append(slots.take(draw.randint(1, slots.free), draw.choice([0, total])))
                counts.update(held[-1])
            elif operation < 0.45 and held and slots.free:
                counts.update(slots.grow([draw.choice(held)]))
            elif operation < 0.7 and 0 < len(held) < 40:
                own = draw.choice(held)
                held.append(draw.sample(own, draw.randint(1, len(own))))
                slots.share(held[-1])
                counts.update(held[-1])
            elif held:
                own = held.pop(draw.randrange(len(held)))
                slots.release(own)
                counts.subtract(own)
            slots.check()
            assert [slots.references(slot) for slot in range(total)] == [counts[slot] for slot in range(total)]
            assert slots.used == sum(count > 0 for count in counts.values())
