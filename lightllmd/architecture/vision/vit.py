"""Vision transformers over squares, read out of the ``vision_config`` of a Hugging Face config."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightllmd.architecture.entries import dimension, invalid, not_built, number, word
from lightllmd.architecture.vision.pixels import side
from lightllmd.architecture.vision.spec import TowerActivation, VitSpec
from lightllmd.architecture.weights import Part, WeightSpec
from lightllmd.errors import show

ACTIVATIONS: dict[str, TowerActivation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}
CLIP_NAMES = {
    "patch": "embeddings.patch_embedding",
    "class": "embeddings.class_embedding",
    "position": "embeddings.position_embedding.weight",
    "pre_norm": "pre_layrnorm",
    "norm1": "encoder.layers.{layer}.layer_norm1",
    "q": "encoder.layers.{layer}.self_attn.q_proj",
    "k": "encoder.layers.{layer}.self_attn.k_proj",
    "v": "encoder.layers.{layer}.self_attn.v_proj",
    "out": "encoder.layers.{layer}.self_attn.out_proj",
    "norm2": "encoder.layers.{layer}.layer_norm2",
    "fc1": "encoder.layers.{layer}.mlp.fc1",
    "fc2": "encoder.layers.{layer}.mlp.fc2",
    "post_norm": "post_layernorm",
}
# What the classes have where a config says nothing.
_CLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_SIGLIP = {**_CLIP, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}


def clip(config: Mapping[str, Any]) -> VitSpec:
    """Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision". Raises
    ConfigInvalid."""
    return replace(vit({**_CLIP, **config}, CLIP_NAMES), pre_norm=True)


def siglip(config: Mapping[str, Any]) -> VitSpec:
    """Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training": no class token. Raises ConfigInvalid."""
    return replace(vit({**_SIGLIP, **config}, CLIP_NAMES), class_token=False, drops_first=False, patch_bias=True)


def vit(config: Mapping[str, Any], names: Mapping[str, str]) -> VitSpec:
    """Its sizes, with the last layer's hidden states as features. Raises ConfigInvalid naming the key."""
    hidden, heads = dimension(config, "hidden_size"), dimension(config, "num_attention_heads")
    if hidden % heads:
        raise invalid(f"vision_config: hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    if dimension(config, "num_channels", 3) != 3:
        raise not_built("vision_config: num_channels other than 3 is not available yet")
    image, patch = square(config, "image_size"), square(config, "patch_size")
    if patch > image:
        raise invalid(f"vision_config: patch_size {patch} is larger than image_size {image}")
    layers = dimension(config, "num_hidden_layers")
    return VitSpec(
        hidden=hidden,
        intermediate=dimension(config, "intermediate_size"),
        heads=heads,
        layers=layers,
        image=image,
        patch=patch,
        activation=activation(config, "hidden_act"),
        norm="layer",
        norm_eps=number(config, "layer_norm_eps", 1e-6, most=1.0),
        names=names,
        features=(layers,),
    )


TOWERS: dict[str, Callable[[Mapping[str, Any]], VitSpec]] = {
    "clip_vision_model": clip,
    "siglip_vision_model": siglip,
}  # by the model_type of a vision_config


def tower(config: Mapping[str, Any], usual: str) -> VitSpec:
    """Of a ``vision_config``; `usual`: its type where it names none. Raises ConfigInvalid, by name for a type that is
    not built."""
    kind = word(config, "model_type") or usual
    if kind not in TOWERS:
        raise invalid(f"vision towers of type {show(kind)} are not available yet ({', '.join(TOWERS)} are)")
    return TOWERS[kind](config)


def reading(spec: VitSpec, layers: Any, strategy: Any) -> VitSpec:
    """The tower with what ``vision_feature_layer`` and ``vision_feature_select_strategy`` say of its features. Raises
    ConfigInvalid."""
    listed = layers if isinstance(layers, Sequence) and not isinstance(layers, str) else [layers]
    found = []
    for one in listed:
        if isinstance(one, bool) or not isinstance(one, int) or not -spec.layers - 1 <= one <= spec.layers:
            raise invalid(
                f"vision_feature_layer is {show(layers)}, the tower's hidden states are 0 to {spec.layers}, or -1 to "
                f"{-spec.layers - 1} from behind"
            )
        found.append(one % (spec.layers + 1))
    if not found:
        raise invalid("vision_feature_layer is empty")
    if strategy not in ("default", "full"):
        raise invalid(f"vision_feature_select_strategy is {show(strategy)}, default or full is needed")
    return replace(spec, features=tuple(found), layers=max(found), drops_first=strategy == "default")


def square(config: Mapping[str, Any], key: str) -> int:
    """A side in pixels: a number, or a list of two equal ones. Raises ConfigInvalid."""
    value = config.get(key)
    sides = {side(key, one) for one in value} if isinstance(value, list | tuple) and value else {side(key, value)}
    if len(sides) > 1:
        raise not_built(f"vision_config: {key} {show(value)}, which is no square, is not available yet")
    return sides.pop()


def activation(config: Mapping[str, Any], key: str) -> TowerActivation:
    """Raises ConfigInvalid."""
    name = word(config, key) or "gelu"
    if name not in ACTIVATIONS:
        raise not_built(f"{key} {show(name)} is not available yet ({', '.join(ACTIVATIONS)} are)")
    return ACTIVATIONS[name]


# --- weights ------------------------------------------------------------------------------------------------------


class WeightList:
    """Makes the weights of towers and connectors: `names` behind one prefix."""

    def __init__(self, names: Mapping[str, str], prefix: str) -> None:
        self._names, self._prefix = names, prefix

    def tensor(self, kind: str, shape: tuple[int, ...], layer: int | None = None, neutral: float = 0.0) -> WeightSpec:
        """One that is named as a whole."""
        part = Part(_kind(kind, layer), self._name(kind, layer), shape)
        return WeightSpec("vision", layer, (part,), neutral=neutral)

    def matrix(
        self, kind: str, shape: tuple[int, ...], bias: bool, layer: int | None = None, kinds: Sequence[str] = ()
    ) -> WeightSpec:
        """``[out, …]``; where there are `kinds` the checkpoint has these, each with a part of the rows."""
        rows = shape[0] // max(1, len(kinds))
        parts, biases = [], []
        for one in kinds or (kind,):
            name = self._name(one, layer)
            parts.append(Part(_kind(kind, layer), f"{name}.weight", (rows, *shape[1:])))
            biases.append(Part(_kind(kind, layer), f"{name}.bias", (rows,)))
        return WeightSpec("vision", layer, tuple(parts), tuple(biases) if bias else ())

    def norm(self, kind: str, size: int, layer: int | None = None, bias: bool = True) -> WeightSpec:
        """``[size]``, varying around 1."""
        return replace(self.matrix(kind, (size,), bias, layer), neutral=1.0)

    def _name(self, kind: str, layer: int | None) -> str:
        return self._prefix + self._names[kind].format(layer=layer)


def _kind(kind: str, layer: int | None) -> str:
    return kind if layer is None else f"{layer}.{kind}"


def vit_weights(spec: VitSpec, prefix: str) -> Iterator[WeightSpec]:
    """In the order in which they are needed. `prefix`: of their names."""
    make, hidden = WeightList(spec.names, prefix), spec.hidden
    biased = spec.norm == "layer"
    ones = (1,) * spec.leading
    yield make.matrix("patch", (hidden, 3, spec.patch, spec.patch), spec.patch_bias)
    if spec.class_token:
        yield make.tensor("class", (*ones, *ones, hidden) if ones else (hidden,))
    yield make.tensor("position", (*ones, spec.positions, hidden))
    if spec.pre_norm:
        yield make.norm("pre_norm", hidden)
    for layer in range(spec.layers):
        yield make.norm("norm1", hidden, layer, biased)
        kinds = () if spec.fused_qkv else ("q", "k", "v")
        yield make.matrix("qkv", (3 * hidden, hidden), spec.qkv_bias, layer, kinds)
        if spec.qk_norm:
            yield make.norm("q_norm", hidden, layer, False)
            yield make.norm("k_norm", hidden, layer, False)
        yield make.matrix("out", (hidden, hidden), True, layer)
        if spec.layer_scale:
            yield make.tensor("scale1", (hidden,), layer, neutral=1.0)
        yield make.norm("norm2", hidden, layer, biased)
        yield make.matrix("fc1", (spec.intermediate, hidden), True, layer)
        yield make.matrix("fc2", (hidden, spec.intermediate), True, layer)
        if spec.layer_scale:
            yield make.tensor("scale2", (hidden,), layer, neutral=1.0)
    if spec.post_norm:
        yield make.norm("post_norm", hidden)
