"""The store of encoded images: references, capacity, eviction and descriptors, whatever happens in whatever order."""

from __future__ import annotations

import os
import random

from lightllmd.visual.image_file import new_memory
from lightllmd.visual.store import ImageRecord, ImageStore, StoredEmbedding


def _open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _embedding() -> StoredEmbedding:
    return StoredEmbedding(new_memory("test"), 8, (1, 1, 2))


def _encode_all(store: ImageStore) -> int:
    records = store.waiting(1000)
    for record in records:
        store.encoded(record, _embedding())
    return len(records)


def _key(number: int) -> bytes:
    return number.to_bytes(16)


def _images(*numbers: int) -> list[tuple[bytes, object]]:
    return [(_key(number), f"pixels {number}") for number in numbers]


def test_ten_thousand_random_operations_leak_neither_references_nor_descriptors() -> None:
    before, chance = _open_descriptors(), random.Random(17)
    store = ImageStore(capacity=12, reserved=6)
    holders: set[int] = set()
    encoding: list[ImageRecord] = []
    for turn in range(10_000):
        what = chance.random()
        if what < 0.4:
            images = _images(*(chance.randrange(40) for _ in range(chance.randint(1, 6))))
            referenced = {key for key, _ in images} | {record.key for record in encoding}
            if store.hold(turn, images):
                holders.add(turn)
                assert all(key in store for key, _ in images)
            else:
                assert len(store) > 12 - len(referenced)  # nothing was refused for want of a little eviction
        elif what < 0.75 and holders:
            gone = chance.choice(sorted(holders))  # answered, aborted, or its api worker was killed
            holders.discard(gone)
            store.release(gone)
            store.release(gone)
        elif what < 0.9:
            encoding += store.waiting(chance.randint(1, 4))
        elif encoding:
            record = encoding.pop(chance.randrange(len(encoding)))
            failed = chance.random() < 0.3
            store.encoded(record, None if failed else _embedding(), "the encoder failed" if failed else "")
        assert len(store) <= 12
        assert store.references <= 6 * len(holders)
    for holder in holders:
        store.release(holder)
    for record in encoding:
        store.encoded(record, None, "the end")
    assert store.references == 0
    assert store.queued == 0
    store.close()
    assert _open_descriptors() == before


def test_a_hundred_requests_of_twenty_images_are_twenty_encodings() -> None:
    store, encodings = ImageStore(capacity=40, reserved=20), 0
    for request in range(100):
        assert store.hold(request, _images(request % 20))
        encodings += _encode_all(store)
        store.release(request)
    assert encodings == 20
    assert store.hits == 80
    store.close()


def test_a_full_store_of_released_images_keeps_the_reserved_ones_that_were_used_last() -> None:
    store = ImageStore(capacity=10, reserved=5)
    for number in range(10):
        assert store.hold(number, _images(number))
        _encode_all(store)
        store.release(number)
    assert store.hold("new", _images(10))
    assert [number for number in range(11) if _key(number) in store] == [5, 6, 7, 8, 9, 10]
    store.close()


def test_an_image_that_a_request_holds_is_never_evicted_and_a_request_takes_all_or_nothing() -> None:
    store = ImageStore(capacity=3, reserved=1)
    assert store.hold("a", _images(1, 2))
    _encode_all(store)
    assert not store.hold("b", _images(2, 3, 4))
    assert len(store) == 2
    assert store.references == 2
    assert store.hold("c", _images(2, 3))
    store.release("a")
    assert store.hold("b", _images(2, 4))
    assert _key(1) not in store
    store.close()


def test_an_image_that_none_waits_for_any_more_is_not_encoded() -> None:
    store = ImageStore(capacity=3, reserved=1)
    assert store.hold("a", _images(1))
    store.release("a")
    assert store.waiting(9) == []
    assert len(store) == 0


def test_a_failed_image_is_tried_again_with_the_next_request() -> None:
    store = ImageStore(capacity=3, reserved=1)
    assert store.hold("a", _images(1))
    store.encoded(store.waiting(9)[0], None, "out of memory")
    assert store.waiting(9) == []
    assert store.hold("b", _images(1))
    assert [record.prepared for record in store.waiting(9)] == ["pixels 1"]
    store.close()
