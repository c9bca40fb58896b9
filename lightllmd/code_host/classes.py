"""From the name of a checkpoint's class to the class."""

from __future__ import annotations

import inspect
from typing import Any


def class_of(directory: str, reference: str) -> type[Any]:
    """`reference`: "module.Class". Executes the module."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    found: type[Any] = get_class_from_dynamic_module(reference, directory, local_files_only=True)
    return found


def tokenizer_of(directory: str, reference: str) -> Any:
    """An object of the checkpoint's tokenizer class. Classes older than transformers 4.45, such as ChatGLM's, know no
    `padding_side` in `_pad`, which every encoding calls with it; nothing is padded here."""
    made = class_of(directory, reference).from_pretrained(directory, trust_remote_code=True, local_files_only=True)
    pad = getattr(made, "_pad", None)
    if pad is not None:
        taken = inspect.signature(pad).parameters
        if "padding_side" not in taken and all(one.kind is not one.VAR_KEYWORD for one in taken.values()):
            made._pad = lambda *arguments, padding_side=None, **rest: pad(*arguments, **rest)
    return made
