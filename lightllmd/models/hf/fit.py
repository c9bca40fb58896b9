"""Whether the tensors of a checkpoint are those of a model, found out without reading them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from lightllmd.models.hf.attention import said
from lightllmd.weights.headers import SAFETENSORS_READABLE, TensorInfo


def head_of(module: Any, base: str) -> frozenset[str]:
    """The names of the parameters that are not of the module called `base`."""
    return frozenset(name for name, _ in module.named_parameters() if not name.startswith(f"{base}."))


def misfit(model: Any, tensors: Iterable[TensorInfo], unneeded: Collection[str] = ()) -> str:
    """In words; empty where they fit. `unneeded`: parameters that may be missing. Loads tensors without values into
    `model`, which is on the meta device: all that transformers renames, fuses or cuts apart is as it will be."""
    meta = torch.device("meta")
    stored = {one.name: torch.empty(one.shape, device=meta) for one in tensors if one.type in SAFETENSORS_READABLE}
    mapping = get_model_conversion_mapping(model)
    how = LoadStateDictConfig(device_map={"": meta}, dtype=torch.float32, weight_mapping=mapping)
    try:
        found, _ = convert_and_load_state_dict_in_model(model=model, state_dict=stored, load_config=how)
        model.tie_weights(missing_keys=found.missing_keys, recompute_mapping=False)
        model._adjust_missing_and_unexpected_keys(found)
    except Exception as error:  # whatever the operations make of such tensors
        return f"transformers can't load its tensors: {said(error)}"
    return unfit(
        set(found.missing_keys).difference(unneeded),
        found.mismatched_keys,
        [*found.conversion_errors.values(), *found.error_msgs],
    )


def unfit(missing: Iterable[str], mismatched: Iterable[Any], errors: Iterable[Any]) -> str:
    """What transformers says of a checkpoint that it has loaded, in words; empty where all is well."""
    absent = sorted(missing)
    if absent:
        more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
        return f"tensor {absent[0]}{more} is missing"
    for name, stored, wanted in sorted(mismatched):
        return f"tensor {name} has shape {list(stored)}, the config says {list(wanted)}"
    for error in errors:
        return f"its tensors are not those of its config: {' '.join(str(error).split())[:300]}"
    return ""
