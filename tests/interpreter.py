"""Triton's interpreter in half the time.

It replaces what `triton.language` offers by what numpy can compute, at each launch and at each call of a function of
kernels from another one, and looks at all the names there for that. Once is enough where nothing is compiled. And it
makes the types of values anew with each value; there are few different ones.
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
    _remember_types(interpreter, tl.core)


def _remember_types(interpreter: Any, core: Any) -> None:
    """What a type makes of itself depends on its name alone; most operands have one shape, which is one object then."""
    semantic = type(interpreter.interpreter_semantic)
    numpy_type, broadcast = interpreter._get_np_dtype, semantic.broadcast_impl_value
    make_block, make_tensor = core.block_type.__init__, core.tensor.__init__
    numpy_types: dict[str, Any] = {}
    shapes: dict[tuple[int, ...], Any] = {}
    blocks: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    tensors: dict[str, tuple[Any, ...]] = {}

    def known_numpy_type(of: Any) -> Any:
        name = (of.element_ty if isinstance(of, core.block_type) else of).name
        if name not in numpy_types:
            numpy_types[name] = numpy_type(of)
        return numpy_types[name]

    def known_block(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple(getattr(size, "value", size) for size in shape)
        key = (element_ty.name, sizes)
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = shapes.setdefault(sizes, self.shape), self.numel, self.name
        self.element_ty = element_ty
        self.shape, self.numel, self.name = blocks[key]

    def known_tensor(self: Any, handle: Any, of: Any) -> None:
        if of.name not in tensors:
            make_tensor(self, handle, of)
            tensors[of.name] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, of, of.scalar
        self.shape, self.numel = tensors[of.name]

    def known_shapes(self: Any, left: Any, right: Any) -> Any:
        ours, theirs = getattr(left.type, "shape", None), getattr(right.type, "shape", None)
        return (left, right) if ours is theirs else broadcast(self, left, right)

    interpreter._get_np_dtype = known_numpy_type
    core.block_type.__init__ = known_block
    core.tensor.__init__ = known_tensor
    semantic.broadcast_impl_value = known_shapes
