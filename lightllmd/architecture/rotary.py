"""Rotary positions, read out of a Hugging Face config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from lightllmd.architecture.entries import dimension, invalid, not_built, number, table, word
from lightllmd.architecture.spec import Rotary
from lightllmd.errors import show


def rope_words(config: Mapping[str, Any]) -> dict[str, Any]:
    """Both spellings as one: ``rope_theta`` and ``rope_scaling``, and ``rope_parameters`` of transformers 5. Raises
    ConfigInvalid where one of them is no object."""
    return {**table(config, "rope_scaling"), **table(config, "rope_parameters")}


def rotary(config: Mapping[str, Any], head_dim: int) -> Rotary:
    """Rotation of whole heads. Raises ConfigInvalid naming the key where it is not built or makes no sense."""
    words = rope_words(config)
    base = number(words if words.get("rope_theta") is not None else config, "rope_theta", 10000.0)
    if base <= 1:
        raise invalid(f"rope_theta is {base:g}, a number above 1 is needed")
    kind = word(words, "rope_type") or word(words, "type") or "default"
    context = dimension(config, "max_position_embeddings", 2048)
    for given in (words, config):
        if number(given, "partial_rotary_factor", 1.0) != 1.0:
            raise not_built(f"partial_rotary_factor {given['partial_rotary_factor']} is not available yet")
    scaling = partial(number, words, within="rope_scaling")
    if kind == "default":
        return Rotary("default", head_dim, base)
    if kind == "linear":
        return Rotary("linear", head_dim, base, scaling("factor"))
    if kind == "dynamic":
        if head_dim <= 2:
            raise invalid(f"head_dim {head_dim} is too small for rope type 'dynamic'")
        return Rotary("dynamic", head_dim, base, scaling("factor"), context)
    if kind == "llama3":
        original = dimension(words, "original_max_position_embeddings", context)
        low, high = scaling("low_freq_factor"), scaling("high_freq_factor")
        if high <= low:
            raise invalid(f"rope_scaling.high_freq_factor {high} must be above low_freq_factor {low}")
        return Rotary("llama3", head_dim, base, scaling("factor"), original, low, high)
    divisors = words.get("long_factor")
    constant = kind == "longrope" and divisors == words.get("short_factor") and words.get("attention_factor") == 1.0
    if constant and isinstance(divisors, list) and len(divisors) == head_dim // 2:
        factors = tuple(number({"long_factor": one}, "long_factor", within="rope_scaling") for one in divisors)
        return Rotary("divided", head_dim, base, divisors=factors)
    raise not_built(f"rope type {show(kind)} is not available yet (default, linear, dynamic and llama3 are)")


def grid_rotary(
    config: Mapping[str, Any], head_dim: int, sections: tuple[int, int, int], interleaved: bool = False
) -> Rotary:
    """As `rotary`, of positions in the grids of images. `sections`: how many frequencies frame, row and column have
    where the config names none (``mrope_section``): each of them the next so many or, `interleaved`, in turns, which
    begin with the frame's and go on until those of row and column are used up. Raises ConfigInvalid."""
    words = rope_words(config)
    kind = word(words, "rope_type") or word(words, "type")
    if kind in ("mrope", None):
        words |= {"rope_type": "default"}
    turned = rotary({**config, "rope_scaling": None, "rope_parameters": words}, head_dim)
    if turned.kind == "dynamic":
        raise not_built("rope type 'dynamic' is not available yet for positions in the grids of images")
    counts = words.get("mrope_section")
    counts = list(sections) if counts is None else counts
    if not isinstance(counts, list) or len(counts) != 3 or any(type(one) is not int or one < 0 for one in counts):
        raise invalid(f"mrope_section is {show(counts)}, three numbers of frequencies are needed")
    pairs = head_dim // 2
    if sum(counts) != pairs or (interleaved and 3 * max(counts[1:]) > pairs + 2):
        raise invalid(f"mrope_section {counts} is not made for head_dim {head_dim}: it has {pairs} frequencies")
    if interleaved:
        axes = [axis if pair < 3 * counts[axis] else 0 for pair in range(pairs) for axis in (pair % 3,)]
    else:
        axes = [axis for axis, count in enumerate(counts) for _ in range(count)]
    return replace(turned, axes=tuple(axes))
