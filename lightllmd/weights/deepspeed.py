"""Pipeline-module checkpoints of Megatron-DeepSpeed: which files they are, and the weights in them by their Hugging
Face names. No torch.

``layer_NN-model_MM-model_states.pt``, each a state dict of torch.save (`torch_header`). NN counts the modules of the
pipeline, in whichever stage they ran: 1 is the embedding, 3 to N + 2 the N layers of the decoder, N + 4 the last norm,
N + 5 the head; 0, 2 and N + 3 hold no weights. MM is the rank of model parallelism; what the ranks hold of a matrix is
joined in their order. A checkpoint without model parallelism may leave ``-model_MM`` out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from lightllmd.architecture.families import FAMILIES, has_llama_names
from lightllmd.architecture.family import Architecture
from lightllmd.architecture.weights import Part, WeightSpec
from lightllmd.errors import WeightsInvalid, show
from lightllmd.weights.headers import TensorInfo
from lightllmd.weights.model_files import invalid
from lightllmd.weights.torch_header import read_torch_header

FORM = "layer_NN-model_MM-model_states.pt"
MAX_SHARDS = 1024
_NAME = re.compile(r"layer_([0-9]{1,6})-(?:model_([0-9]{1,6})-)?model_states\.pt")
_EMBED, _FIRST = 1, 3  # numbers of the embedding and of the first layer
_SHOWN = 3  # names in a message


def is_deepspeed_file(path: Path) -> bool:
    """Whether a file's name says that it belongs to such a checkpoint, in whichever form."""
    return path.name.startswith("layer") and path.suffix == ".pt"


def deepspeed_files(directory: Path, architecture: Architecture) -> list[Path]:
    """The files that hold weights, in the order of modules and ranks. Raises WeightsInvalid where one is missing, is
    one too many or has a name of another form, ConfigInvalid where there is none or the model is of another kind."""
    family = architecture.family
    if not has_llama_names(family):
        alone = (name for name, one in FAMILIES.items() if has_llama_names(one) and not name.endswith("_text"))
        known = ", ".join(alone)  # not those that are a part of a model with images
        fault = f"reads tensors with the names of Llama's ({known}), not {family.model_type}"
        raise invalid(f'{directory}: load_way = "DS" {fault}')
    if architecture.scored is not None:
        raise invalid(f'{directory}: load_way = "DS" has no place for the head of a model that scores')
    paths = sorted(path for path in directory.iterdir() if is_deepspeed_file(path))
    if not paths:
        below = next((path.parent for path in sorted(directory.glob("*/layer*.pt"))), None)
        hint = f"; {below} has: name it, with config.json and tokenizer in it" if below else ""
        raise invalid(f'{directory} has no {FORM}, which load_way = "DS" reads{hint}')
    modules = _Modules(architecture)
    found: dict[tuple[int, int], Path] = {}
    for path in paths:
        number, rank = _numbers(path)
        if modules.holds_weights(path, number):
            other = found.setdefault((number, rank), path)
            if other != path:
                raise WeightsInvalid(f"{path}: {other.name} has the same numbers")
    ranks = 1 + max((rank for _, rank in found), default=0)
    wanted = [(number, rank) for number in modules.numbers(found) for rank in range(ranks)]
    if missing := [one for one in wanted if one not in found]:
        raise WeightsInvalid(f"{directory}: {_missing(missing, modules, ranks)}")
    return [found[one] for one in wanted]


def _numbers(path: Path) -> tuple[int, int]:
    """Of the module and of the rank."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise WeightsInvalid(f"{path}: its name is not of the form {FORM}")
    number, rank = int(match[1]), int(match[2] or 0)
    if rank >= MAX_SHARDS:
        raise WeightsInvalid(f"{path}: model-parallel rank {rank}, the highest possible is {MAX_SHARDS - 1}")
    return number, rank


def _missing(numbers: Sequence[tuple[int, int]], modules: _Modules, ranks: int) -> str:
    shown = [f"layer_{number:02}-model_{rank:02} ({modules.words(number)})" for number, rank in numbers[:_SHOWN]]
    more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
    layers = f"num_hidden_layers = {modules.layers}"
    return (
        f"weight files are missing: {', '.join(shown)}{more}; the config says {layers}, and the files that are there "
        f"have {ranks} model-parallel rank{'s' if ranks > 1 else ''}"
    )


class _Modules:
    """What the number of a module means."""

    def __init__(self, architecture: Architecture) -> None:
        self.layers = len(architecture.spec.layers)
        self._tied = architecture.spec.tied
        self.norm = self.layers + 4
        self.head = self.layers + 5

    def holds_weights(self, path: Path, number: int) -> bool:
        """Raises WeightsInvalid for a number that is none."""
        if number > self.head:
            raise WeightsInvalid(
                f"{path}: is one too many: with num_hidden_layers = {self.layers} the last one is the head, "
                f"layer_{self.head:02}"
            )
        return number not in (0, _EMBED + 1, self.norm - 1)

    def numbers(self, found: dict[tuple[int, int], Path]) -> list[int]:
        """Of the modules that must be there; a tied head may be."""
        numbers = [_EMBED, *range(_FIRST, _FIRST + self.layers), self.norm]
        has_head = not self._tied or any(number == self.head for number, _ in found)
        return [*numbers, self.head] if has_head else numbers

    def words(self, number: int) -> str:
        """What it is."""
        named = {_EMBED: "embedding", self.norm: "last norm", self.head: "head"}
        return named.get(number, f"decoder layer {number - _FIRST}")


def deepspeed_tensors(files: Sequence[Path], architecture: Architecture) -> dict[str, TensorInfo]:
    """The weights by their Hugging Face names, out of what `deepspeed_files` found. Raises WeightsInvalid where a file
    is damaged, or ranks don't fit together or not to the config."""
    modules, joints = _Modules(architecture), dict(_joints(architecture))
    ranks: dict[int, list[Path]] = {}
    for path in files:
        ranks.setdefault(_numbers(path)[0], []).append(path)
    tensors: dict[str, TensorInfo] = {}
    for number, paths in ranks.items():
        shards = [_named(path, number, modules, architecture) for path in paths]
        for path, shard in zip(paths, shards, strict=True):
            if odd := shard.keys() ^ shards[0].keys():
                name = min(odd)
                here, other = (path, paths[0]) if name in shards[0] else (paths[0], path)
                raise WeightsInvalid(f"{here}: tensor {show(name)} is missing, which {other.name} has")
        for name in shards[0]:
            tensors[name] = _joined(name, [shard[name] for shard in shards], joints.get(name))
    return tensors


def _named(path: Path, number: int, modules: _Modules, architecture: Architecture) -> dict[str, TensorInfo]:
    """One file's tensors. Outside the decoder's layers a file has one, whatever it calls it."""
    names, found = architecture.family.names, read_torch_header(path)
    if _FIRST <= number < _FIRST + modules.layers:
        prefix = names["q"].partition("{layer}.")[0] + f"{number - _FIRST}."
        return {f"{prefix}{one.name}": one for one in found}
    if len(found) != 1:
        raise WeightsInvalid(f"{path}: holds {len(found)} tensors, the {modules.words(number)} alone is needed")
    kind = {_EMBED: "embed", modules.norm: "norm", modules.head: "head"}[number]
    return {f"{names[kind]}.weight": found[0]}


def _joints(architecture: Architecture) -> Iterator[tuple[str, tuple[Part, WeightSpec]]]:
    """Each tensor's name, its whole shape, and the weight that it is a part of."""
    for weight in architecture.weights:
        for part in weight.stored:
            yield part.name, (part, weight)


def _joined(name: str, shards: Sequence[TensorInfo], joint: tuple[Part, WeightSpec] | None) -> TensorInfo:
    """One tensor of all ranks. Norms, and biases of what is split along its inputs, are the same on all ranks, and the
    last one's are taken; so are embedding and head where each rank has them whole."""
    first, last = shards[0], shards[-1]
    shown = show(name).strip('"')
    for one in shards:
        if one.type != first.type:
            raise WeightsInvalid(f"{one.file}: tensor {shown} is {one.type} here and {first.type} in {first.file}")
    whole = replace(last, name=name)
    if joint is None or len(shards) == 1:
        return whole
    part, weight = joint
    axis = weight.shard_axis if part in weight.parts or weight.shard_axis == 0 else None
    axis = None if len(weight.parts[0].shape) == 1 else axis
    same, is_table = all(one.shape == last.shape for one in shards), weight.layer is None
    if same and (axis is None or (is_table and last.shape == part.shape)):
        return whole
    shapes = ", ".join(str(list(one.shape)) for one in shards[:_SHOWN]) + (", …" if len(shards) > _SHOWN else "")
    held = f"{first.file}: tensor {shown} has shapes {shapes} on {len(shards)} model-parallel ranks"
    fitting = axis is not None and all(_fits(one.shape, part.shape, axis) for one in shards)
    if axis is None or not fitting or sum(one.shape[axis] for one in shards) != part.shape[axis]:
        joined = f"joined along dimension {axis} they don't make the config's {list(part.shape)}"
        alike = f"the config's {list(part.shape)} is needed on each"
        raise WeightsInvalid(f"{held}; {alike if axis is None else joined}")
    if is_table and first.checksum and all(one.checksum == first.checksum for one in shards):
        raise WeightsInvalid(f"{held} with the same values on each, not parts of the config's {list(part.shape)}")
    nbytes = sum(one.nbytes for one in shards)
    return TensorInfo(
        name, part.shape, first.type, first.offset, nbytes, first.file, shards=tuple(shards), shard_axis=axis
    )


def _fits(shard: tuple[int, ...], whole: tuple[int, ...], axis: int) -> bool:
    """But for its extent along `axis`."""
    others = [at for at in range(len(whole)) if at != axis]
    return len(shard) == len(whole) and all(shard[at] == whole[at] for at in others)
