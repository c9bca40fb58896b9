"""Requests wait for their images, whatever the visual worker does, and nothing stays mapped that none needs."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightllmd.engine.grammar_gate import Refused, Waiting
from lightllmd.engine.images.client import LAST_RETRY, EmbeddingClient
from lightllmd.engine.images.gate import ImageGate, WithImages
from lightllmd.ipc.messages import ImageSpan, SamplingParams, Submit
from stand_in_visual import VisualStandIn
from vision_plans import seeing_plan

HIDDEN = 4
SHAPE = (1, 3, HIDDEN)
VALUES = bytes(range(48))


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "engine.visual")


@pytest.fixture
def client(path: str) -> Iterator[EmbeddingClient]:
    made = EmbeddingClient(path, "float32", 4 * HIDDEN)
    yield made
    made.close()


@pytest.fixture
def visual(path: str) -> Iterator[VisualStandIn]:
    made = VisualStandIn(path)
    yield made
    made.die()


def request(number: int, *keys: bytes, **fields: object) -> Waiting:
    spans = [ImageSpan(1 + 4 * at, 3, key) for at, key in enumerate(keys)]
    prompt = [5] * (1 + 4 * len(keys))
    return Waiting(Submit(number, 0, 1, number, prompt, SamplingParams(), [0], [[]], images=spans, **fields), 0.0)


def test_a_request_waits_for_all_its_images_and_others_pass(client: EmbeddingClient, visual: VisualStandIn) -> None:
    gate = ImageGate(seeing_plan(), client)
    visual.known = {b"a": (SHAPE, VALUES), b"c": (SHAPE, VALUES[::-1])}
    assert gate.open(request(1, b"a", b"b"), 0.0) is None
    assert gate.open(request(2, b"c", b"c"), 0.0) is None
    visual.serve()
    (seen,) = gate.take(0.0)
    assert isinstance(seen, WithImages)
    assert seen.waiting.message.request == 2
    first, second = seen.images.parts(0, 9)
    assert (first.first, first.rows, bytes(first.values)) == (1, 3, VALUES[::-1])
    assert second.first == 5
    assert len(gate) == 1
    visual.known[b"b"] = (SHAPE, VALUES)
    visual.serve()
    assert gate.due <= LAST_RETRY
    assert gate.take(gate.due) == []  # asks again
    visual.serve()
    (seen,) = gate.take(gate.due)
    assert seen.waiting.message.request == 1
    assert sorted(visual.wanted) == [b"a", b"b", b"b", b"c"], "each is asked for once while it is here"
    del seen, first, second
    assert (client.mapped, client.wanted, len(gate)) == (0, 0, 0)


def test_what_is_held_is_not_asked_for_again(client: EmbeddingClient, visual: VisualStandIn) -> None:
    gate = ImageGate(seeing_plan(), client)
    visual.known = {b"a": (SHAPE, VALUES)}
    gate.open(request(1, b"a"), 0.0)
    visual.serve()
    (held,) = gate.take(0.0)
    assert isinstance(gate.open(request(2, b"a"), 0.0), WithImages)
    assert visual.wanted == [b"a"]
    del held
    assert client.mapped == 0


def test_a_visual_worker_that_dies_is_asked_again_when_it_is_back(client: EmbeddingClient, path: str) -> None:
    gate = ImageGate(seeing_plan(), client)
    assert gate.open(request(1, b"a"), 0.0) is None, "none is there yet"
    assert 0 < gate.due < LAST_RETRY
    first = VisualStandIn(path)
    first.silent = True
    now = gate.due
    assert gate.take(now) == []
    first.serve()
    assert first.wanted == [b"a"]
    first.die()
    gate.take(now)
    second = VisualStandIn(path)
    second.known = {b"a": (SHAPE, VALUES)}
    gate.take(gate.due)
    second.serve()
    assert [seen.waiting.message.request for seen in gate.take(now)] == [1]
    second.die()


def test_what_is_mapped_outlives_the_visual_worker(client: EmbeddingClient, path: str) -> None:
    gate = ImageGate(seeing_plan(), client)
    visual = VisualStandIn(path)
    visual.known = {b"a": (SHAPE, VALUES)}
    gate.open(request(1, b"a"), 0.0)
    visual.serve()
    (seen,) = gate.take(0.0)
    visual.die()
    gate.take(0.0)
    (part,) = seen.images.parts(2, 4)
    assert bytes(part.values) == VALUES[16:48]


def test_aborted_lost_and_late_requests_leave_nothing(client: EmbeddingClient, visual: VisualStandIn) -> None:
    plan = seeing_plan()
    gate = ImageGate(plan, client)
    visual.silent = True
    gate.open(request(1, b"a", b"b"), 0.0)
    gate.open(request(2, b"b"), 0.0)
    gate.open(request(3, b"c", replay=True), 0.0)
    assert client.wanted == 3
    gate.abort(1)
    assert client.wanted == 2
    gate.api_gone((0, 2))
    assert len(gate) == 2
    late = gate.expire(plan.config.http.hold_timeout)
    assert [message.request for message, _ in late] == [2, 3]
    assert "of its images to be encoded" in late[0][1]
    assert (len(gate), client.wanted, gate.due) == (0, 0, float("inf"))
    gate.open(request(4, b"d"), 0.0)
    gate.clear()
    assert (len(gate), client.wanted) == (0, 0)


def test_what_can_not_be_used_is_refused(client: EmbeddingClient, visual: VisualStandIn) -> None:
    gate = ImageGate(seeing_plan(), client)
    visual.known = {
        b"wide": ((1, 3, 8), VALUES * 2),
        b"short": (SHAPE, VALUES[:40]),
        b"other": ((1, 2, HIDDEN), VALUES[:32]),
        b"why": "it is cursed",
    }
    for number, key in enumerate(visual.known):
        assert gate.open(request(number, key), 0.0) is None
    visual.serve()
    refused = {one.message.request: one.why for one in gate.take(0.0) if isinstance(one, Refused)}
    assert len(refused) == 4
    assert refused[2] == "an image of 2 tokens has 3 in the prompt"
    assert refused[3] == "it is cursed"
    assert (client.mapped, client.wanted, len(gate)) == (0, 0, 0)


def test_a_file_that_may_change_is_not_mapped(client: EmbeddingClient, visual: VisualStandIn) -> None:
    gate = ImageGate(seeing_plan(), client)
    visual.known, visual.seals = {b"a": (SHAPE, VALUES)}, fcntl.F_SEAL_GROW
    gate.open(request(1, b"a"), 0.0)
    visual.serve()
    (refused,) = gate.take(0.0)
    assert isinstance(refused, Refused)
    assert client.mapped == 0


def test_images_that_are_not_in_place_or_not_served_are_refused(client: EmbeddingClient) -> None:
    gate = ImageGate(seeing_plan(), client)
    wrong = request(1, b"a")
    for span in (ImageSpan(3, 3, b"a"), ImageSpan(0, 0, b"a"), ImageSpan(-1, 2, b"a")):
        wrong.message.images = [span]
        assert isinstance(gate.open(wrong, 0.0), Refused)
    assert isinstance(ImageGate(seeing_plan(), None).open(request(2, b"a"), 0.0), Refused)


def test_a_placeholder_without_a_row_is_replaced(client: EmbeddingClient, visual: VisualStandIn) -> None:
    gate = ImageGate(seeing_plan(), client)
    visual.known = {b"a": (SHAPE, VALUES)}
    one = request(1, b"a")
    one.message.prompt_ids[1:4] = [1 << 30] * 3
    gate.open(one, 0.0)
    visual.serve()
    (seen,) = gate.take(0.0)
    assert seen.waiting.message.prompt_ids == [5, 0, 0, 0, 5]
