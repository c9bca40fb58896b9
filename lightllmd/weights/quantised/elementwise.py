"""Matrices that are stored with one value an element, in 8 bits, and scales beside them: what several formats share."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lightllmd.architecture.schemes import SCHEMES, Scheme
from lightllmd.weights.quantised.form import FLOATS, ONE, Form, FormTensor, scale_shapes

TYPES = {"int8": "I8", "float8_e4m3fn": "F8_E4M3"}
SCALES = FLOATS | {"F8_E8M0"}
INPUTS = ("input_scale", "activation_scale")


@dataclass(frozen=True)
class ElementwiseForm(Form):
    """Of one module."""

    scheme: Scheme
    scale_names: tuple[str, ...] = ("weight_scale", "weight_scale_inv")

    def fields(self, rows: int, columns: int) -> tuple[FormTensor, ...]:
        """As the module's head has them."""
        scheme = self.scheme
        groups, blocks = scheme.groups(columns), -(-rows // scheme.rows)
        shapes = scale_shapes(blocks, groups, scheme.group > 0)
        stored = "int8" if scheme.values == "uint8" else scheme.values
        fields = [
            FormTensor("values", ("weight",), frozenset({TYPES[stored]}), ((rows, columns),)),
            FormTensor("scales", self.scale_names, SCALES, shapes),
        ]
        if stored == "int8":  # symmetric ones may be stored with zeros that are 0
            integers = frozenset({"I8", "I32", "I64"})
            fields.append(FormTensor("zeros", ("weight_zero_point",), integers, shapes, optional=scheme.symmetric))
        if scheme.static:
            fields.append(FormTensor("input_scale", INPUTS, FLOATS, ONE))
            integers = frozenset({"I8", "I32", "I64", "F8_E4M3"}) | FLOATS
            fields.append(FormTensor("input_zero", ("input_zero_point",), integers, ONE, optional=True))
        return tuple(fields)


def float8(group: int = 0, rows: int = 1, inputs: bool = True, static: bool = False) -> Scheme:
    """A scale for each row (or for all of them), or for blocks of `rows` outputs and `group` inputs."""
    scheme = SCHEMES["fp8_block" if group else "fp8"]
    return replace(scheme, group=group, rows=rows, static=static, inputs=scheme.inputs if inputs else "")


def int8(group: int = 0, symmetric: bool = True, inputs: bool = True, static: bool = False) -> Scheme:
    """A scale for each row (or for all of them), or for each `group` of its inputs."""
    scheme = replace(SCHEMES["w8a8" if inputs else "w8a16"], group=group, static=static)
    return scheme if symmetric else replace(scheme, values="uint8", symmetric=False)
