"""Connectors between a tower and a decoder: their weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lightllmd.architecture.vision.spec import MlpConnector, PoolConnector
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


def pool_weights(spec: PoolConnector, prefix: str) -> Iterator[WeightSpec]:
    """As `mlp_weights`. The projection is ``[in, out]``."""
    make = WeightList(spec.names, prefix)
    yield replace(make.norm("norm", spec.inputs, bias=False), neutral=0.0)
    yield make.tensor("projection", (spec.inputs, spec.outputs))
