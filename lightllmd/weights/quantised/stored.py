"""In which tensors of its files a quantised checkpoint stores each matrix of an architecture, and by which scheme each
weight is stored here. No torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lightllmd.architecture.schemes import Scheme
from lightllmd.architecture.weight_schemes import SchemeRule, WeightSchemes
from lightllmd.architecture.weights import Part, Role, WeightSpec
from lightllmd.weights.files import WeightFile
from lightllmd.weights.headers import TensorInfo
from lightllmd.weights.quantised.form import FLOATS, CheckpointQuantisation, Form, FormTensor, Kind

SHOWN_LAYERS = 4  # in a message
COMPARED: tuple[Kind, ...] = ("groups", "input_scale")  # what matrices that are stacked have in common


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix ``[rows, columns]`` of the files."""

    module: str
    form: Form
    shape: tuple[int, int]
    tensors: Mapping[Kind, TensorInfo]  # those that the files have

    @property
    def fields(self) -> tuple[FormTensor, ...]:
        """What it should have."""
        return self.form.fields(*self.shape)

    def name(self, field: FormTensor) -> str:
        """Of the tensor that is this field, or would be."""
        found = self.tensors.get(field.kind)
        return f"{self.module}.{field.names[0]}" if found is None else found.name


Matrices = Mapping[str, StoredMatrix]  # by the name of the part that it is, such as "….q_proj.weight"


def matrices_of(
    weights: Iterable[WeightSpec], quantisation: CheckpointQuantisation, tensors: Mapping[str, TensorInfo] | None
) -> dict[str, StoredMatrix]:
    """Those that are not dense. `tensors`: of all files; None: there are none, and what the settings say is believed.

    A matrix that the settings call quantised and the files have as it is, is as it is: settings name modules too many
    (AutoAWQ does not write down which it left out), and heads are meant or not as the tool had it.
    """
    found: dict[str, StoredMatrix] = {}
    for weight in weights:
        for part in weight.parts:
            if len(part.shape) != 2:
                continue
            module = part.name.removesuffix(".weight")
            form = quantisation.form(module, part.kind == "embed")
            if form is None:
                continue
            rows, columns = part.shape
            fields = form.fields(rows, columns)
            stored = {} if tensors is None else _stored(module, fields, tensors)
            if tensors is None or not _plain(part, stored, tensors):
                found[part.name] = StoredMatrix(module, form, (rows, columns), stored)
    return found


def _stored(module: str, fields: Sequence[FormTensor], tensors: Mapping[str, TensorInfo]) -> dict[Kind, TensorInfo]:
    found: dict[Kind, TensorInfo] = {}
    for field in fields:
        names = (f"{module}.{name}" for name in field.names)
        if present := next((name for name in names if name in tensors), None):
            found[field.kind] = tensors[present]
    return found


def _plain(part: Part, stored: Mapping[Kind, TensorInfo], tensors: Mapping[str, TensorInfo]) -> bool:
    itself = tensors.get(part.name)
    return itself is not None and itself.type in FLOATS and not {info.name for info in stored.values()} - {part.name}


# --- schemes ------------------------------------------------------------------------------------------------------


def schemes_of(weights: Sequence[WeightSpec], matrices: Matrices) -> tuple[WeightSchemes, list[str]]:
    """How each weight is stored here, and which are made dense while they are loaded, in words. Raises WeightsInvalid
    where a file can't be read.

    Parts of a weight, which are stacked (q, k and v; gate and up), have to be stored alike; else it is made dense.
    """
    layers: dict[tuple[Role, Scheme], list[int]] = defaultdict(list)
    dense: dict[str, list[int]] = defaultdict(list)
    for weight in weights:
        stored = [matrices[part.name] for part in weight.parts if part.name in matrices]
        if not stored:
            continue
        if not weight.quantisable:
            dense[f"{weight.role} is made dense while it is loaded"].append(-1)
        elif why := _unlike(weight, stored):
            dense[f"{_kinds(weight)} are made dense while they are loaded: {why}"].append(weight.layer or 0)
        else:
            layers[weight.role, stored[0].form.scheme].append(weight.layer or 0)
    said = [words if of == [-1] else f"{words} ({_layers(of)})" for words, of in dense.items()]
    return _rules(weights, layers), said


def _unlike(weight: WeightSpec, stored: Sequence[StoredMatrix]) -> str:
    """Why they can't be one matrix; nothing if they can."""
    if len(stored) < len(weight.parts):
        whole = [part.kind for part in weight.parts if part.name not in {f"{one.module}.weight" for one in stored}]
        return f"{' and '.join(whole)} not quantised"
    if len({one.form.scheme for one in stored}) > 1:
        return "they are quantised in different ways"
    for kind in COMPARED if len(stored) > 1 else ():
        if len({_bytes(one.tensors.get(kind)) for one in stored}) > 1:
            return "their inputs have " + ("different orders" if kind == "groups" else "scales of their own")
    return ""


def _bytes(info: TensorInfo | None) -> bytes:
    """Of a small tensor."""
    return b"" if info is None else bytes(read_bytes(info))


def read_bytes(info: TensorInfo) -> bytearray:
    """A small tensor's. Raises WeightsInvalid."""
    found = bytearray(info.nbytes)
    with WeightFile(info.file) as file:
        file.read(info.offset, found)
    return found


def _kinds(weight: WeightSpec) -> str:
    *most, last = [part.kind for part in weight.parts]
    return f"{', '.join(most)} and {last}" if most else last


def _layers(numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - SHOWN_LAYERS} more" if len(numbers) > SHOWN_LAYERS else ""
    return f"layers {', '.join(map(str, numbers[:SHOWN_LAYERS]))}{more}"


def _rules(weights: Sequence[WeightSpec], layers: Mapping[tuple[Role, Scheme], list[int]]) -> WeightSchemes:
    """As few as there can be: roles that are stored alike in the same layers are one rule."""
    of_role: dict[Role, int] = defaultdict(int)
    for weight in weights:
        of_role[weight.role] += 1
    alike: dict[tuple[Scheme, tuple[int, ...]], list[Role]] = defaultdict(list)
    for (role, scheme), numbers in layers.items():
        alike[scheme, () if len(numbers) == of_role[role] else tuple(numbers)].append(role)
    rules = [SchemeRule(scheme, tuple(roles), numbers) for (scheme, numbers), roles in alike.items()]
    return WeightSchemes(tuple(sorted(rules, key=lambda rule: bool(rule.layers))))


def zero_biases(matrices: Matrices, tensors: Mapping[str, TensorInfo]) -> set[str]:
    """Names of biases of quantised modules that are zeros: GPTQ's tools write them for modules that have none. Raises
    WeightsInvalid where a file can't be read."""
    names = {f"{one.module}.bias": one.shape[0] for one in matrices.values()}
    found = {name: tensors[name] for name, rows in names.items() if name in tensors and tensors[name].shape == (rows,)}
    return {name for name, info in found.items() if not any(read_bytes(info))}
