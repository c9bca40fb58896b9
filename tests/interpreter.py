"""Triton's interpreter in half the time.

It replaces what `triton.language` offers by what numpy can compute, at each launch and at each call of a function of
kernels from another one, and looks at all the names there for that. Once is enough where nothing is compiled.
"""

from __future__ import annotations

import functools
import os
import sys
from types import SimpleNamespace
from typing import Any


def hasten() -> None:
    """Does nothing where kernels are compiled, before Triton is imported, and with a Triton that is made otherwise."""
    interpreter: Any = sys.modules.get("triton.runtime.interpreter")
    patch, scope = (getattr(interpreter, name, None) for name in ("_patch_lang", "_LangPatchScope"))
    if os.environ.get("TRITON_INTERPRET") != "1" or patch is None or scope is None or hasattr(patch, "once"):
        return
    import triton.language as tl

    @functools.cache
    def once() -> None:
        patch(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))

    def patched(_: object) -> Any:
        once()
        return scope()

    patched.once = once  # type: ignore[attr-defined]
    interpreter._patch_lang = patched
