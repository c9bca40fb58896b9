"""What weights take by the schemes that store them, and what a step takes for reading those that are quantised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from lightllmd.architecture.cpu_storage import cpu_nbytes
from lightllmd.architecture.dtypes import ITEM_BYTES
from lightllmd.architecture.family import Architecture
from lightllmd.architecture.gpu_storage import DEQUANTISED_BYTES, scratch_nbytes
from lightllmd.architecture.outline import Outline
from lightllmd.architecture.schemes import Scheme
from lightllmd.architecture.storage import weight_bytes
from lightllmd.architecture.weight_schemes import WeightSchemes
from lightllmd.architecture.weights import WeightSpec
from lightllmd.config.amount import count, size
from lightllmd.config.plan import BudgetRow

# Of each input that torch's operations round: copies in fp32 of it, of what it is divided by and of the result.
ROUNDED_BYTES = 12


def weights_row(
    architecture: Architecture | Outline,
    data_type: str,
    schemes: WeightSchemes,
    packed_head: bool = False,
    on_cpu: bool = False,
) -> BudgetRow:
    """`packed_head`: a tied head is stored once more, in a form of its own. `on_cpu`: so are quantised weights."""
    item, how = ITEM_BYTES[data_type], f"{count(architecture.parameters)} parameters in {data_type}"
    if isinstance(architecture, Outline):
        return BudgetRow("weights", architecture.weight_bytes(item), how)
    weights = architecture.weights
    if architecture.held:
        whole = sum((weight.whole or weight).elements for weight in weights)
        how = f"{count(architecture.parameters)} of {count(whole)} parameters in {data_type}"
    how += "".join(_quantised(weights, schemes))
    if packed_head and architecture.spec.tied:
        weights += tuple(weight for weight in weights if weight.role == "embed")
        how += ", the tied embedding once more as packed head"
    nbytes = cpu_nbytes if on_cpu else Scheme.nbytes
    return BudgetRow("weights", weight_bytes(weights, item, schemes, nbytes=nbytes), how)


def _quantised(weights: Iterable[WeightSpec], schemes: WeightSchemes) -> Iterator[str]:
    """How many of the parameters are stored by which scheme, in words."""
    elements: Counter[Scheme] = Counter()
    for weight in weights:
        scheme = schemes.of(weight)
        if not scheme.dense:
            elements[scheme] += sum(part.elements for part in weight.parts)
    for number, (scheme, found) in enumerate(elements.items()):
        yield f", {count(found)} {'' if number else 'of them '}as {scheme.title}"


def dequantised_rows(architecture: Architecture | Outline, schemes: WeightSchemes) -> list[BudgetRow]:
    """For the largest matrix that is made dense while a step multiplies with it; none where none is quantised."""
    if isinstance(architecture, Outline):
        return []
    made = [
        sum(part.elements for part in weight.parts) for weight in architecture.weights if not schemes.of(weight).dense
    ]
    if not made:
        return []
    how = f"the largest quantised matrix made dense, {count(max(made))} elements x {DEQUANTISED_BYTES} B"
    return [BudgetRow("dequantised", max(made) * DEQUANTISED_BYTES, how)]


def scratch_rows(architecture: Architecture | Outline, data_type: str, schemes: WeightSchemes) -> list[BudgetRow]:
    """On a GPU, for the matmul with a quantised matrix that takes most beside it; none where none is quantised."""
    if isinstance(architecture, Outline):
        return []
    found = [
        scratch_nbytes(schemes.of(weight), _stacked(weight), ITEM_BYTES[data_type])
        for weight in architecture.weights
        if not schemes.of(weight).dense
    ]
    if not found:
        return []
    return [BudgetRow("dequantised", max(found), "the most that is made dense of a quantised matrix at a time")]


def input_rows(
    architecture: Architecture | Outline, schemes: WeightSchemes, tokens: int, on_cpu: bool = False
) -> list[BudgetRow]:
    """For the rounded inputs of the largest step, of so many tokens; none where no scheme rounds inputs."""
    if isinstance(architecture, Outline):
        return []
    each = ROUNDED_BYTES if on_cpu else 1
    found = [
        _stacked(weight)[1] * each + 4 * scheme.groups(_stacked(weight)[1])
        for weight in architecture.weights
        if (scheme := schemes.of(weight)).inputs
    ]
    if not found:
        return []
    how = f"inputs of the widest matrix, rounded for it: {tokens} tokens x {size(max(found))}"
    return [BudgetRow("quantised inputs", tokens * max(found), how)]


def _stacked(weight: WeightSpec) -> tuple[int, int]:
    """The shape of the matrix that its parts are, one below the other."""
    return sum(part.shape[0] for part in weight.parts), weight.parts[0].shape[1]
