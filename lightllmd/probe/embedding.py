"""How a checkpoint wants its hidden states to become an embedding. sentence-transformers writes that beside it (Reimers
and Gurevych 2019): modules.json, and a config.json in the folder of each module; a GGUF file has a number for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import msgspec

from lightllmd.config.plan import Pooling
from lightllmd.errors import show
from lightllmd.weights.gguf_header import GgufHeader
from lightllmd.weights.model_files import MAX_JSON, invalid, present, read_listed

MODULES = "modules.json"
MOST_MODULES = 16
GGUF_KINDS = {1: "mean", 2: "cls", 3: "last"}  # llama.cpp's numbers
KINDS = {"cls": "cls", "mean": "mean", "lasttoken": "last"}  # sentence-transformers' names


class Module(msgspec.Struct, frozen=True):
    """One of modules.json: they are applied one after the other."""

    type: str  # a class, such as "sentence_transformers.models.Pooling"
    path: str = ""  # its folder

    @property
    def name(self) -> str:
        """Of the class, without where it is."""
        return self.type.rpartition(".")[2]


class PoolingConfig(msgspec.Struct, frozen=True):
    """config.json of a Pooling module; releases since 5.4 name the mode, those before have a switch for each."""

    pooling_mode: str | list[str] | None = None
    pooling_mode_cls_token: bool = False
    pooling_mode_mean_tokens: bool = False
    pooling_mode_max_tokens: bool = False
    pooling_mode_mean_sqrt_len_tokens: bool = False
    pooling_mode_weightedmean_tokens: bool = False
    pooling_mode_lasttoken: bool = False

    @property
    def modes(self) -> list[str]:
        """Those that are on."""
        if self.pooling_mode is not None:
            return [self.pooling_mode] if isinstance(self.pooling_mode, str) else self.pooling_mode
        switches = {name: getattr(self, name) for name in self.__struct_fields__[1:]}
        shortened = {name: name.removeprefix("pooling_mode_").removesuffix("_tokens") for name in switches}
        return [shortened[name].removesuffix("_token") for name, on in switches.items() if on] or ["mean"]


def settings_files(directory: Path) -> list[Path]:
    """Those that are there and say how embeddings are made."""
    if not present(directory / MODULES):
        return []
    return [directory / MODULES, *sorted(directory.glob("*_Pooling/config.json"))]


def pooling_of(directory: Path) -> Pooling | str | None:
    """None: the checkpoint doesn't say; a text: why what it says can't be done. Raises ConfigInvalid where its files
    are damaged."""
    path = directory / MODULES
    if not present(path):
        return None
    modules = read_listed(path, list[Module], MAX_JSON)
    names = [module.name for module in modules]
    known = len(modules) <= MOST_MODULES and names[:1] == ["Transformer"] and names.count("Pooling") == 1
    if not known or names[2:] not in ([], ["Normalize"]):
        return f"{path} has the modules {show(names)}; Transformer, Pooling and perhaps Normalize are built"
    return _pooling(directory, modules[1], len(names) > 2)


def _pooling(directory: Path, module: Module, unit: bool) -> Pooling | str:
    inner = PurePosixPath(module.path)
    if inner.is_absolute() or ".." in inner.parts:
        raise invalid(f"{directory / MODULES}: {show(module.path)} is no folder of the model")
    path = directory / inner / "config.json"
    modes: Sequence[str] = read_listed(path, PoolingConfig, MAX_JSON).modes if present(path) else ["mean"]
    if len(modes) != 1 or modes[0] not in KINDS:
        return f"{path} pools by {show(list(modes))}; one of {', '.join(KINDS)} is built"
    return Pooling(KINDS[modes[0]], unit)


def gguf_pooling(header: GgufHeader) -> Pooling | str | None:
    """As `pooling_of`, of what llama.cpp's converter writes. It normalises every vector."""
    number = header.metadata.get(f"{header.architecture}.pooling_type", 0)
    if number == 0:
        return None
    if number not in GGUF_KINDS:
        known = ", ".join(f"{value} ({kind})" for value, kind in GGUF_KINDS.items())
        return f"{header.path}: metadata {header.architecture}.pooling_type is {show(number)}; {known} are built"
    return Pooling(GGUF_KINDS[number], unit=True)
