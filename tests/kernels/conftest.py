"""Triton kernels run on the GPU where there is one, else under Triton's interpreter: the same tests on both."""

from __future__ import annotations

import pytest
import torch

from covering import ALL

ON_CUDA = torch.cuda.is_available()
# The interpreter computes bf16 wrongly without a word, so there it is left out.
EVERY_DTYPE = [torch.float32, torch.float16, *([torch.bfloat16] if ON_CUDA else [])]
DTYPES = EVERY_DTYPE if ALL else [torch.float32]


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.fixture(scope="session")
def device() -> str:
    """Where the kernels of these tests run: "cuda", or "cpu" under the interpreter."""
    return "cuda" if ON_CUDA else "cpu"


@pytest.fixture(params=DTYPES, ids=name)
def dtypes(request: pytest.FixtureRequest) -> torch.dtype:
    """Runs the test once per dtype that this device computes rightly; in the interpreter in fp32."""
    return request.param


@pytest.fixture(params=EVERY_DTYPE, ids=name)
def every_dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """In 16 bits in the interpreter, too: for one test of each kernel, that of most of its paths."""
    return request.param
