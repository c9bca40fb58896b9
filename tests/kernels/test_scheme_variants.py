"""What checkpoints have beside the schemes that we quantise by ourselves: every device computes with it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightllmd.architecture.schemes import SCHEMES, Scheme
from lightllmd.kernels.dequantised_linear import DequantisedLinear
from lightllmd.kernels.eager import EagerKernels
from lightllmd.kernels.fused import FusedKernels
from lightllmd.kernels.linear import Linear
from lightllmd.kernels.quantised import QuantisedMatrix, quantise
from lightllmd.kernels.schemes import ANY, built

W8, W4 = SCHEMES["w8a16"], SCHEMES["w4a16"]
VARIANTS = {
    "8 bits in groups": replace(W8, group=32),
    "8 bits with zeros": replace(W8, values="uint8", group=32, symmetric=False),
    "4 bits, a scale for each row": replace(W4, group=0),
    "4 bits in an order of their own": replace(W4, group=32, ordered=True),
    "8 bits in an order of their own": replace(W8, values="uint8", group=32, symmetric=False, ordered=True),
    "float8 and whole inputs": replace(SCHEMES["fp8"], inputs=""),
    "static float8": replace(SCHEMES["fp8"], static=True),
    "static int8": replace(SCHEMES["w8a8"], static=True),
    "other blocks": replace(SCHEMES["fp8_block"], group=32, rows=64),
}


def matrix(scheme: Scheme, columns: int = 80) -> QuantisedMatrix:
    """Of 48 outputs, and inputs of which the last group has fewer; an order and a scale of inputs that show."""
    made = quantise(torch.randn(48, columns, generator=torch.Generator().manual_seed(0)), scheme)
    if scheme.ordered:
        made = replace(made, order=torch.randperm(columns, generator=torch.Generator().manual_seed(1)).int())
    return replace(made, input_scale=torch.tensor(0.01)) if scheme.static else made


def exact(weight: QuantisedMatrix, x: torch.Tensor) -> torch.Tensor:
    """Element by element in fp64, by the words of `Scheme`."""
    scheme, (rows, columns) = weight.scheme, weight.shape
    out = torch.zeros(len(x), rows, dtype=torch.float64)
    group = scheme.group or columns
    for k in range(columns):
        zero = 0.0 if weight.zeros is None else weight.zeros[:, k // group].double()
        numbers = (weight.values[:, k].double() - zero) * weight.scales[:, k // group].double()
        taken = x[:, k if weight.order is None else int(weight.order[k])].double()
        if weight.input_scale is not None:
            steps = taken / weight.input_scale.double()
            if scheme.inputs == "int8":
                steps = steps.round().clamp(-128, 127)
            else:
                steps = steps.clamp(-448, 448).float().to(torch.float8_e4m3fn).double()
            taken = steps * weight.input_scale.double()
        out += taken[:, None] * numbers[None]
    return out


@pytest.mark.parametrize("name", VARIANTS)
def test_a_linear_of_a_variant_multiplies_with_what_it_stands_for(name: str) -> None:
    scheme, weight = VARIANTS[name], matrix(VARIANTS[name])
    linear = DequantisedLinear(weight)
    x = torch.randn(5, 80, generator=torch.Generator().manual_seed(2))
    # Inputs that are rounded token by token are compared with themselves, unrounded, by the size of a step.
    tolerance = 0.05 if scheme.inputs and not scheme.static else 1e-5
    wanted = exact(weight, x)
    assert ((linear(x).double() - wanted).abs().max() / wanted.abs().max()).item() < tolerance
    assert linear.tensors().keys() == set(scheme.tensors)
    assert sum(held.nbytes for held in linear.tensors().values()) == scheme.nbytes((48, 80), 4)


@pytest.mark.parametrize("kind", ["eager", "fused"])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_device_has_a_linear_for_a_variant(name: str, kind: str, device: str) -> None:
    where = torch.device("cpu" if kind == "eager" else device)
    kernels = EagerKernels(where, torch.float32) if kind == "eager" else FusedKernels(where)
    columns = 80 if kind == "eager" else 192  # whole blocks, which a GPU packs
    scheme, weight = VARIANTS[name], matrix(VARIANTS[name], columns)
    if weight.zeros is not None:  # GPTQ's may be one more than a value
        weight.zeros[0] = 16 if scheme.values == "uint4" else 256
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(2))
    wanted = exact(weight, x)
    found = kernels.linear("down", weight.to(where), None)(x.to(where)).cpu().double()
    tolerance = 0.05 if scheme.inputs else 1e-4
    assert ((found - wanted).abs().max() / wanted.abs().max()).item() < tolerance


def test_zeros_beyond_the_values_are_kept() -> None:
    """GPTQ stores a zero less 1, so that the largest stands for one more than a value has."""
    scheme = VARIANTS["8 bits with zeros"]
    values, scales = torch.zeros(1, 32, dtype=torch.uint8), torch.ones(1, 1)
    weight = QuantisedMatrix(scheme, values, scales, torch.full((1, 1), 256, dtype=torch.int16))
    assert (DequantisedLinear(weight)(torch.eye(32)) == -256.0).all()


class OfPlainSchemes(DequantisedLinear):
    @staticmethod
    def takes(scheme: Scheme) -> bool:
        return scheme in SCHEMES.values()


def test_a_linear_that_does_not_take_a_variant_is_passed_over() -> None:
    kinds: dict[str, type[Linear]] = {"w8a16": OfPlainSchemes, "fp8": DequantisedLinear, ANY: DequantisedLinear}
    assert built("down", W8, kinds) is OfPlainSchemes
    assert built("down", VARIANTS["8 bits in groups"], kinds) is DequantisedLinear
    assert built("down", VARIANTS["static float8"], kinds) is DequantisedLinear
