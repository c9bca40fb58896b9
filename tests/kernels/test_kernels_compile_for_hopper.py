"""Every kernel compiles for an H100 with its default tiles, fits into shared memory and keeps its numbers in registers.

A new kernel: one more function below that calls its wrapper, and its entries in `CASES`. This file is also read by
`compiling.py`, where Triton compiles instead of interpreting.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
SHARED_MEMORY = 227 * 1024  # bytes that one program may have on an H100


def norms(dtype: torch.dtype) -> None:
    from lightllmd.kernels.norm import add_rms_norm, rms_norm

    x, weight = torch.empty(2, 4096, dtype=dtype), torch.empty(4096, dtype=dtype)
    rms_norm(x, weight, 1e-5, x)
    add_rms_norm(x, x.clone(), weight, 1e-5, x)


def decode_attention(dtype: torch.dtype, dim: int, segments: int, merged_at_once: bool = False) -> None:
    from lightllmd.kernels.decode_attention import decode_attention, workspace_size

    q, cache, table, index = attended(dtype, dim)
    out, partial = torch.empty(4, 32, dim, dtype=dtype), torch.empty(workspace_size(4, 32, dim, segments))
    arrived = torch.zeros(4 * 32, dtype=torch.int32) if merged_at_once else None
    decode_attention(
        q, cache, table, index, index, 0.1, out, partial if segments > 1 else None, segments=segments, arrived=arrived
    )


def prefill_attention(dtype: torch.dtype, dim: int, tokens: int) -> None:
    from lightllmd.kernels.prefill_attention import prefill_attention

    q, cache, table, index = attended(dtype, dim)
    tiles, out = torch.zeros(4, 2, dtype=torch.int32), torch.empty(4, 32, dim, dtype=dtype)
    prefill_attention(q, cache, table, tiles, index, index, index, index, 0.1, out, tokens=tokens)


def attended(dtype: torch.dtype, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, cache and table of 32 query and 8 key/value heads, and indices."""
    table, index = torch.zeros(5, 64, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    return torch.empty(4, 48, dim, dtype=dtype)[:, :32], torch.empty(64, 16, dim, dtype=dtype), table, index


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES: dict[str, Callable[[], None]] = {
    "norms bf16": partial(norms, BF16),
    "decode attention bf16, one segment": partial(decode_attention, BF16, 128, 1),
    "decode attention bf16": partial(decode_attention, BF16, 128, 16),
    "decode attention bf16, one launch": partial(decode_attention, BF16, 128, 64, True),
    "decode attention bf16, small heads": partial(decode_attention, BF16, 64, 16),
    "decode attention fp16": partial(decode_attention, FP16, 128, 16),
    "decode attention fp32": partial(decode_attention, FP32, 128, 16),
    "decode attention fp32, small heads": partial(decode_attention, FP32, 64, 16),
    "prefill attention bf16": partial(prefill_attention, BF16, 128, 8192),
    "prefill attention bf16, few tokens": partial(prefill_attention, BF16, 128, 16),
    "prefill attention bf16, small heads": partial(prefill_attention, BF16, 64, 8192),
    "prefill attention bf16, small heads, few tokens": partial(prefill_attention, BF16, 64, 16),
    "prefill attention fp16": partial(prefill_attention, FP16, 128, 8192),
    "prefill attention fp32": partial(prefill_attention, FP32, 128, 8192),
    "prefill attention fp32, small heads": partial(prefill_attention, FP32, 64, 8192),
}


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("compiling.py")), __file__]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("case", CASES)
def test_default_tiles_fit(case: str, compiled: list[dict[str, Any]]) -> None:
    kernels = [kernel for kernel in compiled if kernel["case"] == case]
    assert kernels
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_MEMORY, kernel
        assert kernel["spilled"] == 0, kernel


def test_attention_reads_two_tiles_ahead(compiled: list[dict[str, Any]]) -> None:
    """The pipeline needs five stages for that, since slots come before keys and values; with fewer it has one tile."""
    kernels = {(kernel["case"], kernel["kernel"]): kernel for kernel in compiled}
    assert kernels["decode attention bf16", "_decode"]["shared"] >= 2 * 2 * 64 * 128 * 2
    assert kernels["prefill attention bf16", "_prefill"]["shared"] >= 3 * 2 * 128 * 128 * 2


def test_prefill_attention_multiplies_by_warp_groups(compiled: list[dict[str, Any]]) -> None:
    kernels = [kernel for kernel in compiled if kernel["case"].startswith("prefill attention bf16")]
    assert all(kernel["wgmma"] for kernel in kernels)
