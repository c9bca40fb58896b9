"""What is stored of weights and inputs is what the documented schemes say, bit for bit, by fp64 code of the tests."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fake_quantised import stored, stored_inputs
from lightllmd.architecture.schemes import SCHEMES, Scheme, scheme_of
from lightllmd.kernels.cpu.int8 import ZERO, W8A8Linear
from lightllmd.kernels.quantised import quantise, quantised_inputs

QUANTISED = [name for name, scheme in SCHEMES.items() if not scheme.dense]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(160, 576), (7, 131)]  # blocks and groups cut by neither, or by both


def numbers(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """With one row of zeros, one that is all positive, columns of other sizes, and ties when they are divided."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    made[:, ::17] *= 20
    made[0] = 0
    made[1] = made[1].abs() + 1
    made[2] = torch.arange(shape[1]).remainder(255).sub(127).float() / 2
    return made.to(dtype)


def schemes_of(name: str) -> list[Scheme]:
    return [scheme_of(name, group) for group in (32, 64, 128)] if name == "w4a16" else [SCHEMES[name]]


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stored_weights_are_the_schemes(name: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = numbers(shape, dtype, 0)
    for scheme in schemes_of(name):
        made, truth = quantise(weight, scheme), stored(weight.double().numpy(), scheme, dtype)
        assert np.array_equal(made.values.double().numpy(), truth.values)
        group = scheme.group or shape[1]
        assert np.array_equal(made.scales.double().numpy(), truth.scales[:, ::group])
        if made.zeros is not None:
            assert np.array_equal(made.zeros.double().numpy(), truth.zeros[:, ::group])
        exact = torch.from_numpy(truth.numbers)
        assert torch.equal(made.dense(torch.float32), exact.float())


@pytest.mark.parametrize("name", [name for name in QUANTISED if SCHEMES[name].inputs])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inputs_are_rounded_as_the_schemes_say(name: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, scheme = numbers(shape, dtype, 1), SCHEMES[name]
    values, scales = quantised_inputs(x, scheme)
    truth = stored_inputs(x.double().numpy(), scheme)
    assert np.array_equal(values.double().numpy(), truth.values)
    assert np.array_equal(scales.double().numpy(), truth.scales[:, :: scheme.group or shape[1]])


@pytest.mark.skipif(not W8A8Linear.supported(), reason="this CPU or torch has no matmul of 8-bit integers")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cpus_inputs_are_the_same(dtype: torch.dtype) -> None:
    x, scheme = numbers(SHAPES[0], dtype, 1), SCHEMES["w8a8"]
    values, scales = W8A8Linear(quantise(numbers(SHAPES[0], dtype, 0), scheme)).inputs(x)
    truth = stored_inputs(x.double().numpy(), scheme)
    assert np.array_equal(values.double().numpy() - ZERO, truth.values)
    assert np.array_equal(scales[1:].double().numpy(), truth.scales[1:, :1])  # a token of zeros has any scale
