"""Triton kernels run on the GPU where there is one, else under Triton's interpreter: the same tests on both."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch


def _let_scalars_bound_loops() -> None:
    """Triton 3.6's interpreter holds a scalar as an array of one element, which numpy >= 2.4 refuses as an index."""
    try:
        from triton.runtime import interpreter
    except ModuleNotFoundError:
        return  # the tests that need Triton skip themselves
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


ON_CUDA = torch.cuda.is_available()
if not ON_CUDA:  # read by @triton.jit when it decorates, so it is set before any test here imports a kernel
    os.environ["TRITON_INTERPRET"] = "1"
    _let_scalars_bound_loops()

# The interpreter computes bf16 wrongly without a word, so there it is left out.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_CUDA else [])]


@pytest.fixture(scope="session")
def device() -> str:
    """Where the kernels of these tests run: "cuda", or "cpu" under the interpreter."""
    return "cuda" if ON_CUDA else "cpu"


@pytest.fixture(params=DTYPES, ids=[str(dtype).removeprefix("torch.") for dtype in DTYPES])
def dtypes(request: pytest.FixtureRequest) -> torch.dtype:
    """Runs the test once per dtype that this device computes rightly."""
    return request.param
