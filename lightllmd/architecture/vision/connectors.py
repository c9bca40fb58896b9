"""Connectors between a tower and a decoder: their weights."""

from __future__ import annotations

from collections.abc import Iterator

from lightllmd.architecture.vision.spec import MlpConnector
from lightllmd.architecture.vision.vit import WeightList
from lightllmd.architecture.weights import WeightSpec


def mlp_weights(spec: MlpConnector, prefix: str) -> Iterator[WeightSpec]:
    """In the order in which they are needed. `prefix`: of their names."""
    make = WeightList(spec.names, prefix)
    if spec.norm:
        yield make.norm("norm", spec.inputs)
    yield make.matrix("linear_1", (spec.inner, spec.inputs), spec.bias)
    yield make.matrix("linear_2", (spec.outputs, spec.inner), spec.bias)
    if spec.newline:
        yield make.tensor("newline", (spec.outputs,))
