"""xgrammar's native part, without the Python around it, which imports torch and transformers: two seconds and 200 MB
that neither the api workers' helper processes nor an engine without a model have use for.

It is loaded as xgrammar itself loads it, by `apache-tvm-ffi`. The classes are those of
``xgrammar/tvm_ffi_binding/_ffi_api.py``, which xgrammar's own are thin wrappers of. Their calls let go of the
interpreter's lock.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

_LOADING = threading.Lock()


@cache
def _load() -> Any:
    with _LOADING, _without_torch():
        from tvm_ffi.libinfo import load_lib_module

        found = importlib.util.find_spec("xgrammar")
        if found is None or not found.submodule_search_locations:
            raise ImportError("xgrammar is not installed")
        folder = Path(found.submodule_search_locations[0])
        load_lib_module("xgrammar", "xgrammar_bindings", extra_lib_paths=[folder])
        place = folder / "tvm_ffi_binding" / "_ffi_api.py"
        spec = importlib.util.spec_from_file_location("lightllmd.grammar.xgrammar_ffi", place)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


def native() -> Any:
    """The module with GrammarCompiler, GrammarMatcher, TokenizerInfo and others; takes 0.2 s the first time."""
    return _load()


@contextmanager
def _without_torch() -> Iterator[None]:
    """tvm_ffi imports torch if it is there, for tensors that are none of ours. A process that has it already may."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # import torch: ImportError
    try:
        yield
    finally:
        del sys.modules["torch"]
