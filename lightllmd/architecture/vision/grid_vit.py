"""Vision transformers over patches of images of any size, read out of the ``vision_config`` of a config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lightllmd.architecture.entries import dimension, invalid, not_built
from lightllmd.architecture.vision.spec import GridVitSpec, MergerSpec
from lightllmd.architecture.vision.vit import WeightList, square
from lightllmd.architecture.weights import WeightSpec
from lightllmd.errors import show

NAMES = {
    "patch": "patch_embed.proj",
    "position": "pos_embed.weight",
    "norm1": "blocks.{layer}.norm1",
    "qkv": "blocks.{layer}.attn.qkv",
    "out": "blocks.{layer}.attn.proj",
    "norm2": "blocks.{layer}.norm2",
}


def sizes(config: Mapping[str, Any], width: str) -> dict[str, Any]:
    """Of a ``vision_config``, as `GridVitSpec` has them; `width`: the key of its hidden size. Raises ConfigInvalid."""
    hidden, heads = dimension(config, width), dimension(config, "num_heads")
    if hidden % heads or hidden // heads % 4:
        raise invalid(
            f"vision_config: {width} {hidden} and num_heads {heads} make no heads of a multiple of 4 elements"
        )
    if dimension(config, "in_channels", 3) != 3:
        raise not_built("vision_config: in_channels other than 3 is not available yet")
    return {
        "hidden": hidden,
        "heads": heads,
        "layers": dimension(config, "depth"),
        "patch": square(config, "patch_size"),
        "frames": dimension(config, "temporal_patch_size"),
        "merge": dimension(config, "spatial_merge_size"),
    }


def layers_named(config: Mapping[str, Any], key: str, layers: int) -> tuple[int, ...]:
    """A list of layers, each once. Raises ConfigInvalid naming the key."""
    value = config.get(key)
    listed = value if isinstance(value, list | tuple) else [None]
    if any(type(one) is not int or not 0 <= one < layers for one in listed) or len(set(listed)) != len(listed):
        raise invalid(f"vision_config: {key} is {show(value)}, layers from 0 to {layers - 1} are needed, each once")
    return tuple(listed)


def weights(tower: GridVitSpec, connector: MergerSpec, prefix: str) -> Iterator[WeightSpec]:
    """In the order in which they are needed. `prefix`: of all their names."""
    yield from _tower(tower, WeightList(tower.names, prefix))
    make, inner = WeightList(connector.names, prefix), connector.inner
    for tap in (None, *range(connector.taps)):
        role = "merger" if tap is None else "tap"
        yield make.norm(f"{role}.norm", connector.hidden if tap is None else inner, tap, connector.norm == "layer")
        yield make.matrix(f"{role}.fc1", (inner, inner), True, tap)
        yield make.matrix(f"{role}.fc2", (connector.outputs, inner), True, tap)


def _tower(spec: GridVitSpec, make: WeightList) -> Iterator[WeightSpec]:
    hidden, inner, biased = spec.hidden, spec.intermediate, spec.norm == "layer"
    yield make.matrix("patch", (hidden, 3, spec.frames, spec.patch, spec.patch), spec.patch_bias)
    if spec.table is not None:
        yield make.tensor("position", (spec.table**2, hidden))
    for layer in range(spec.layers):
        yield make.norm("norm1", hidden, layer, biased)
        yield make.matrix("qkv", (3 * hidden, hidden), True, layer)
        yield make.matrix("out", (hidden, hidden), True, layer)
        yield make.norm("norm2", hidden, layer, biased)
        if spec.gated:
            yield make.matrix("gate_up", (2 * inner, hidden), True, layer, ("gate", "up"))
        else:
            yield make.matrix("up", (inner, hidden), True, layer)
        yield make.matrix("down", (hidden, inner), True, layer)
