"""Weights on their way from a checkpoint to a decoder, each stored by its scheme as soon as it has come, so that never
more than the quantised model and one weight as the checkpoint has it are there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from lightllmd.architecture.weight_schemes import WeightSchemes
from lightllmd.errors import WeightsInvalid
from lightllmd.kernels.quantised import quantise
from lightllmd.weights.loaded import LoadedWeight


def quantised(weights: Iterable[LoadedWeight], schemes: WeightSchemes, place: str) -> Iterator[LoadedWeight]:
    """Those that don't come in a scheme get theirs. Raises WeightsInvalid at the end, naming the weights of `place`
    whose scales are no numbers: before, a GPU would have to be waited for."""
    finite: dict[str, Tensor] = {}

    def stored(loaded: LoadedWeight) -> LoadedWeight:
        tensor, scheme = loaded.tensor, schemes.of(loaded.spec)
        if isinstance(tensor, Tensor):
            if scheme.dense:
                return loaded
            tensor = quantise(tensor, scheme)
        finite[loaded.spec.key] = tensor.scales.isfinite().all()
        return loaded._replace(tensor=tensor)

    yield from map(stored, weights)  # which keeps none while the next is read
    broken = [key for key, whole in finite.items() if not whole]
    if broken:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise WeightsInvalid(f"{place}: the scales of weight {broken[0]}{more} are no numbers")
