"""From a plan to a model with its weights on the device."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePath

import torch

from lightllmd.architecture.family import Architecture
from lightllmd.architecture.outline import Outline
from lightllmd.architecture.ranks import ALONE, Rank, architecture_of_rank
from lightllmd.architecture.weight_schemes import WeightSchemes
from lightllmd.architecture.weights import WeightSpec
from lightllmd.config.plan import ModelFacts, Plan
from lightllmd.config.stamps import require_unchanged
from lightllmd.engine.kernel_cache import cache_root
from lightllmd.errors import EngineError, OutOfMemory, WeightsInvalid
from lightllmd.kernels.dispatch import Kernels
from lightllmd.models.decoder import Decoder
from lightllmd.models.language_model import LanguageModel
from lightllmd.weights import dummy, gguf_stream, place
from lightllmd.weights.gguf import GgufCheckpoint
from lightllmd.weights.index import open_checkpoint
from lightllmd.weights.kept_file import KeptDamaged
from lightllmd.weights.kept_models import KeptModel
from lightllmd.weights.loaded import LoadedWeight, Progress
from lightllmd.weights.quantised.form import NOTHING
from lightllmd.weights.quantised.formats import quantisation_of
from lightllmd.weights.quantised.stored import Matrices, matrices_of
from lightllmd.weights.quantising import quantised
from lightllmd.weights.rank_parts import as_read, cut
from lightllmd.weights.safetensors import SafetensorsCheckpoint
from lightllmd.weights.verify import verify

log = logging.getLogger(__name__)


def load_model(
    plan: Plan,
    kernels: Kernels,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
    head_dims: Sequence[int] = (),
    rank: Rank = ALONE,
) -> LanguageModel:
    """The plan's model with the weights of its checkpoint, or with random ones of DUMMY; of a `rank` of the kernels'
    group its part. `head_dims`: sizes of heads that `kernels` are made for; empty: all. Raises ModelChanged,
    WeightsInvalid, ConfigInvalid, OutOfMemory."""
    if plan.model is None:
        raise EngineError("the plan names no model")
    architecture = plan.model.architecture
    if isinstance(architecture, Outline):
        return _of_transformers(plan, plan.model, architecture.padded(head_dims), kernels, device, dtype, progress)
    mine = architecture_of_rank(architecture, plan.schemes, rank)
    kept = _kept(plan, plan.model, mine, dtype, rank)
    if kept is not None and os.path.exists(kept.path):
        try:
            log.info("the quantised weights are read from %s", kept.path)
            weights = _of_these_files(kept.read(device, progress), plan.model)
            return Decoder(mine.spec, kernels, weights, device)
        except KeptDamaged as damaged:
            log.warning("%s: it is made again", damaged)
            kept.discard()
    noted = _Noted(progress)
    stored = _stored_weights(plan, plan.model, architecture, mine.weights, device, dtype, noted)
    weights = cut(quantised(stored, plan.schemes, plan.model.path), mine.weights)
    if kept is not None:
        weights = kept.keep(weights, noted.again)
    return Decoder(mine.spec, kernels, weights, device)


class _Noted:
    """Progress that can be told once more."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._at = progress, (0, 1)

    def __call__(self, done: int, total: int) -> None:
        self._at = done, total
        self._progress(done, total)

    def again(self) -> None:
        self._progress(*self._at)


def _kept(
    plan: Plan, model: ModelFacts, architecture: Architecture, dtype: torch.dtype, rank: Rank
) -> KeptModel | None:
    """Where what quantising makes is kept, of each rank by itself; None where nothing is quantised, or it is not asked
    for."""
    whole = [weight.whole or weight for weight in architecture.weights]
    ours, theirs = [plan.schemes.of(weight) for weight in whole], [model.schemes.of(weight) for weight in whole]
    if not plan.config.engine.keep_quantised or ours == theirs or plan.schemes.dense or not model.weight_stamps:
        return None
    root = cache_root(os.environ)
    if root is None:
        log.warning("the quantised weights are not kept: there is no home directory")
        return None
    stamps, name = model.weight_stamps, PurePath(model.path).name
    name += f"-rank-{rank.index}-of-{rank.count}" if rank.count > 1 else ""
    return KeptModel(root / "quantised", name, stamps, architecture.weights, plan.schemes, dtype, rank.count)


def _stored_weights(
    plan: Plan,
    model: ModelFacts,
    architecture: Architecture,
    held: Sequence[WeightSpec],
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
) -> Iterator[LoadedWeight]:
    """What the plan's checkpoint holds, checked as a whole before the first is yielded, of what one rank holds as
    `as_read` says; random numbers of DUMMY. Its files are closed again at the end."""
    if plan.config.params.load_way == "DUMMY":
        weights = as_read(held, plan.schemes, (), columns=True)
        return dummy.stream(weights, dtype, device, progress, _passing(weights, plan.schemes))
    checkpoint = open_checkpoint(model)
    matrices: Matrices = {}
    ignored = NOTHING
    if model.quantisation:
        quantisation = quantisation_of(model.quantisation, model.path)
        matrices, ignored = matrices_of(architecture.weights, quantisation, checkpoint.tensors), quantisation.ignored
    verify(architecture, checkpoint.tensors, checkpoint.readable, model.path, matrices, ignored)
    is_gguf = isinstance(checkpoint, GgufCheckpoint)
    weights = as_read(held, plan.schemes, matrices, columns=not is_gguf)
    passing = [weight for weight in _passing(weights, plan.schemes) if weight.parts[0].name not in matrices]
    if isinstance(checkpoint, GgufCheckpoint):
        loaded = gguf_stream.stream(checkpoint, weights, plan.schemes, dtype, device, progress, passing)
    else:
        loaded = place.stream(checkpoint, weights, dtype, device, progress, passing, matrices, plan.schemes)
    return _of_these_files(loaded, model)


def _passing(weights: Sequence[WeightSpec], schemes: WeightSchemes) -> list[WeightSpec]:
    """Those that are quantised."""
    return [weight for weight in weights if not schemes.of(weight).dense]


def _of_transformers(
    plan: Plan,
    model: ModelFacts,
    outline: Outline,
    kernels: Kernels,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
) -> LanguageModel:
    from lightllmd.models.hf.loading import load  # which imports transformers
    from lightllmd.models.hf.model import TransformersModel

    dummy_weights = plan.config.params.load_way == "DUMMY"
    require_unchanged(model.stamps)
    checkpoint = None if dummy_weights else SafetensorsCheckpoint(model.files)
    module = load(
        model.path,
        checkpoint,
        bool(model.remote_code),
        dtype,
        device,
        progress,
        outline.base if outline.headless else None,
    )
    require_unchanged(model.stamps)
    return TransformersModel(outline, module, kernels.attention)


def _of_these_files(weights: Iterator[LoadedWeight], model: ModelFacts) -> Iterator[LoadedWeight]:
    """Raises ModelChanged where the files became others while they were read, whatever that did to reading."""
    try:
        yield from weights
    except WeightsInvalid:
        require_unchanged(model.weight_stamps)
        raise
    require_unchanged(model.weight_stamps)


@contextmanager
def memory_errors() -> Iterator[None]:
    """Memory that does not suffice becomes OutOfMemory, whatever torch calls it."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise OutOfMemory(str(error)) from error
    except RuntimeError as error:
        if "DefaultCPUAllocator" in str(error):  # torch has no class of its own for host memory
            raise OutOfMemory(str(error).splitlines()[0]) from error
        raise
