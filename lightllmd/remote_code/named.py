"""Which code of its own a checkpoint names, read from its JSON files alone; nothing is imported or executed here.

The words are those of transformers (https://huggingface.co/docs/transformers/custom_models): ``auto_map`` in a settings
file maps an auto class to ``module.Class`` of a .py file beside it, or to ``repo--module.Class`` of another repository;
``custom_generate/generate.py`` replaces the generation loop.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from lightllmd.errors import ConfigInvalid, Problem, show
from lightllmd.weights.model_files import MAX_CONFIG, invalid, present, read_file, read_json, read_text

CONFIG, TOKENIZER, GENERATE = "AutoConfig", "AutoTokenizer", "custom_generate"
CAUSAL_LM = "AutoModelForCausalLM"
KEY = "trust_remote_code"
MOST_FILES = 256  # .py files of a checkpoint; the largest known has 12
_MAX_SOURCE = 4 << 20  # bytes of one
_SETTINGS = (
    "config.json",
    "tokenizer_config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
)
_REFERENCE = re.compile(r"[A-Za-z0-9_-]{1,100}\.[A-Za-z_]\w{0,99}", re.ASCII)
_SHOWN = 4  # classes that a refusal lists
_OTHER_REPOSITORY = "--"


class NamedCode(msgspec.Struct, frozen=True):
    """One class that a settings file names."""

    said_by: str  # the settings file, without its folder
    role: str  # the auto class that it stands for, such as AutoTokenizer; GENERATE
    reference: str  # "module.Class", of module.py in the checkpoint's folder

    @property
    def file(self) -> str:
        """The .py file, without its folder."""
        return f"{self.reference.rpartition('.')[0]}.py"

    @property
    def class_name(self) -> str:
        """The class in it."""
        return self.reference.rpartition(".")[2]


def named_code(directory: Path, *, slow_tokenizer: bool = False) -> list[NamedCode]:
    """All code that the checkpoint names, each role once. `slow_tokenizer`: of two classes for the tokenizer the first
    one is meant, else the second.

    Raises ConfigInvalid for a reference that has no form, or that is to another repository: nothing is ever fetched.
    """
    found: dict[str, NamedCode] = {}
    settings: dict[str, dict[str, Any]] = {}
    for name in _SETTINGS:
        path = directory / name
        if present(path):
            settings[name] = read_json(path, MAX_CONFIG if name == "config.json" else _MAX_SOURCE)
    # What tokenizer_config.json says of the tokenizer counts before what config.json does.
    for name in sorted(settings, key=lambda one: one != "tokenizer_config.json"):
        for role, written in _auto_map(directory / name, settings[name]):
            reference = _chosen(written, slow_tokenizer and role == TOKENIZER)
            if reference is not None and role not in found:
                found[role] = NamedCode(name, role, _checked(directory / name, role, reference))
    if TOKENIZER not in found:
        own = _own_tokenizer_class(directory, settings)
        found |= {} if own is None else {TOKENIZER: own}
    if generate := _generation_code(directory, settings):
        found[GENERATE] = generate
    return list(found.values())


def refusal(directory: Path, code: list[NamedCode]) -> ConfigInvalid:
    """Of a checkpoint that names code while `trust_remote_code` is off: one sentence with file, class and switch."""
    said = [f"{one.class_name} of {one.file} ({one.said_by}: {one.role})" for one in code[:_SHOWN]]
    if len(code) > _SHOWN:
        said.append(f"{len(code) - _SHOWN} more")
    message = f"{directory} brings code of its own, {', '.join(said)}, which runs only with {KEY} = true"
    return ConfigInvalid([Problem(KEY, message)])


def require_files(directory: Path, code: list[NamedCode]) -> None:
    """Of what runs whatever the model is, config and tokenizer. Raises ConfigInvalid, naming what is not there."""
    for one in code:
        if one.role in (CONFIG, TOKENIZER) and not present(directory / one.file):
            raise invalid(
                f"{directory / one.said_by}: {one.role} is {one.class_name} of {one.file}, which is not in the folder"
            )


def code_files(directory: Path) -> list[Path]:
    """The .py files of the checkpoint and of its packages: any may be imported by another. Raises ConfigInvalid where
    there are too many."""
    files = []
    for form in ("*.py", "*/*.py"):
        for path in directory.glob(form):
            if path.is_dir():
                continue
            files.append(path)
            if len(files) > MOST_FILES:
                raise invalid(f"{directory} holds more than {MOST_FILES} .py files")
    return sorted(files)


# --- what the settings say ----------------------------------------------------------------------------------------


def _auto_map(path: Path, settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(auto class, what is written of it). Raises ConfigInvalid for what has no form."""
    written = settings.get("auto_map")
    if written is None or written == {}:
        return
    if isinstance(written, str | list):  # as tokenizers once wrote it
        written = {TOKENIZER: written}
    if not isinstance(written, dict):
        raise invalid(f"{path}: auto_map is {show(written)}, a table of classes is needed")
    for role, reference in written.items():
        if not role.isidentifier():
            raise invalid(f"{path}: auto_map: {show(role)} is no auto class")
        yield role, reference


def _chosen(written: Any, first: bool) -> Any:
    """One reference of what may be a pair (slow class, fast class), of which either may be null."""
    if not isinstance(written, list):
        return written
    given = [one for one in written if one is not None]
    return None if not given else given[0] if first else given[-1]


def _checked(path: Path, role: str, reference: Any) -> str:
    if isinstance(reference, str) and _OTHER_REPOSITORY in reference:
        repository, _, local = reference.partition(_OTHER_REPOSITORY)
        raise invalid(
            f"{path}: {role} is {show(reference)}, a class of another repository, and nothing is fetched from one; put "
            f"the .py files of {show(repository)} into the folder and write {show(local)}"
        )
    if not isinstance(reference, str) or not _REFERENCE.fullmatch(reference):
        raise invalid(f'{path}: {role} is {show(reference)}, no "module.Class"')
    return reference


def _own_tokenizer_class(directory: Path, settings: dict[str, dict[str, Any]]) -> NamedCode | None:
    """A tokenizer_class that transformers doesn't have, and that a .py file of the folder defines."""
    for name in ("tokenizer_config.json", "config.json"):
        wanted = settings.get(name, {}).get("tokenizer_class")
        if not isinstance(wanted, str) or not wanted.isidentifier():
            continue
        for path in sorted(directory.glob("*.py")):
            if _defines(path, wanted) and not _in_transformers(wanted):
                return NamedCode(name, TOKENIZER, f"{path.stem}.{wanted}")
        return None
    return None


def _defines(path: Path, class_name: str) -> bool:
    """Of a file that nothing names: one that can't be read defines nothing."""
    try:
        source = read_file(path, _MAX_SOURCE).decode("utf-8", "replace")
    except ConfigInvalid:
        return False
    return re.search(rf"^class[ \t]+{re.escape(class_name)}\b", source, re.MULTILINE) is not None


def _in_transformers(class_name: str) -> bool:
    """By the text of its table, since importing it takes seconds."""
    spec = importlib.util.find_spec("transformers")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        table = Path(folder, "models", "auto", "tokenization_auto.py")
        if present(table):
            return f'"{class_name.removesuffix("Fast")}"' in read_text(table, _MAX_SOURCE)
    return False


def _generation_code(directory: Path, settings: dict[str, dict[str, Any]]) -> NamedCode | None:
    if present(directory / GENERATE / "generate.py"):
        return NamedCode("the folder", GENERATE, f"{GENERATE}/generate.generate")
    written = settings.get("generation_config.json", {}).get(GENERATE)
    if isinstance(written, str):
        raise invalid(
            f"{directory / 'generation_config.json'}: {GENERATE} is {show(written)}, code of another repository, and "
            "nothing is fetched from one"
        )
    return None
