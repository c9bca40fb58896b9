"""Triton kernels run on the GPU where there is one, else under Triton's interpreter: the same tests on both."""

from __future__ import annotations

import pytest
import torch

ON_CUDA = torch.cuda.is_available()
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
