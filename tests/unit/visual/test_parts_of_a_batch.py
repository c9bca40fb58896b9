"""No more patches go through the tower together than memory is planned for."""

from __future__ import annotations

from types import SimpleNamespace

from lightllmd.architecture.vision.layout import ImageLayout
from lightllmd.visual.encoders import ModelEncoder


def test_a_batch_is_encoded_in_parts_of_as_many_patches_as_are_planned_for() -> None:
    encoder = ModelEncoder.__new__(ModelEncoder)
    encoder.spec = SimpleNamespace(patches=lambda layout: layout.tokens)  # type: ignore[assignment]
    encoder._vision = SimpleNamespace(patches=10)  # type: ignore[assignment]
    images = [SimpleNamespace(layout=ImageLayout(tokens)) for tokens in (4, 6, 1, 12, 9, 1)]
    parts = [[one.layout.tokens for one in part] for part in encoder._parts(images)]
    assert parts == [[4, 6], [1], [12], [9, 1]]
