"""From the name of a checkpoint's class to the class."""

from __future__ import annotations

from typing import Any


def class_of(directory: str, reference: str) -> type[Any]:
    """`reference`: "module.Class". Executes the module."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    found: type[Any] = get_class_from_dynamic_module(reference, directory, local_files_only=True)
    return found
