"""The embeddings of the fake engine: what is to be told of a prompt, in plain Python."""

from __future__ import annotations

from math import hypot

from lightllmd.engine.runners.fake_model import fake_state
from lightllmd.ipc.messages import PoolingParams

SIZE = 8  # values of a whole one


def fake_embedding(prompt: list[int], params: PoolingParams, model: str = "") -> list[float]:
    """As `params` asks for it. `model`: its model_dir."""
    places = range(len(prompt)) if params.mean else params.at or [len(prompt) - 1]
    rows = [[fake_state(at, prompt[at], element, model) for element in range(SIZE)] for at in places]
    vector = [sum(values) / len(rows) for values in zip(*rows, strict=True)][: params.size or SIZE]
    length = hypot(*vector) if params.unit else 1.0
    return [value / length for value in vector]
