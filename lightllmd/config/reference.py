"""What is generated from the declarations: the sample file, the JSON schema, the table of features, lines of --help."""

from __future__ import annotations

import json
import textwrap
from typing import Any

from lightllmd.config import features, models
from lightllmd.config.check import bounds, expected
from lightllmd.config.modes import ALIASES, GROUPS, KINDS, MODES, NAMES, REFUSED, alike
from lightllmd.config.parameters import Config
from lightllmd.config.setting import SAME, Field, fields, tables

SCHEMA_FILE = "lightllmd.schema.json"

_HEAD = f"""\
#:schema ./{SCHEMA_FILE}
# lightllmd: every setting, commented out, at its default. Generated: lightllmd --print-config
#
# Flags override this file (--port 9000, --http.workers 2); the environment does not. lightllmd --check FILE tests it.
# The documented parameters stand at the top, above the first [table]. "reload" says what a new value replaces;
# live: nothing, restart: the daemon, so that lightllmctl reload refuses it."""


_MODEL = """\
# [models.llama-3-70b]
# model_dir = "/srv/models/llama-3-70b-instruct"
# max_req_input_len = 6144
# max_req_total_len = 8192"""


def toml_value(value: Any) -> str:
    """A default as TOML. None has no TOML form: the key is left out."""
    if isinstance(value, list):
        return "[" + ", ".join(toml_value(element) for element in value) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)


def facts(field: Field) -> list[str]:
    """Type, bounds, defaults and reload class of a setting, each in a few words."""
    setting = field.setting
    limits = bounds(field)
    kind = expected(field) + (f", {limits}" if limits else "") + (f" ({setting.unit})" if setting.unit else "")
    said = [kind, f"default {'unset' if field.default is None else toml_value(field.default)}"]
    if setting.page_default is not SAME:
        said.append(f"documented page: {toml_value(setting.page_default)}")
    said.append(f"reload: {setting.reload}")
    return said


def grouped() -> list[Field]:
    """The settings, those of one heading together."""
    headings = list(dict.fromkeys((field.table, field.setting.group) for field in fields(Config)))
    return sorted(fields(Config), key=lambda field: headings.index((field.table, field.setting.group)))


# --- the sample file ----------------------------------------------------------------------------------------


def sample() -> str:
    """The text of etc/lightllmd.toml."""
    parts = [_HEAD]
    group = ""
    table = ""
    for field in grouped():
        if field.table != table:
            table = field.table
            parts.append(f"[{table}]\n{_comment(tables(Config)[table])}")
        elif field.setting.group and field.setting.group != group:
            group = field.setting.group
            parts.append(_heading(group))
        parts.append(_entry(field))
    parts.append(_named_model())
    return "\n\n".join(parts) + "\n"


def _named_model() -> str:
    """Its header is commented out too: a table without model_dir would be refused."""
    names = ", ".join(field.key for field in models.allowed() if field.key != "model_dir")
    keys = f"It holds model_dir and any of {names}. Its name: {models.NAME_FORM}."
    return f"{_heading('Named models')}\n\n{_comment(models.DOC)}\n{_comment(keys)}\n{_MODEL}"


def _heading(title: str) -> str:
    return f"# ---- {title} " + "-" * (100 - len(title))


def _comment(text: str) -> str:
    return textwrap.fill(text, 116, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


def _entry(field: Field) -> str:
    shown = field.setting.example if field.default in (None, "", []) else ""
    text = f"{_comment(field.setting.doc)}\n{_comment('; '.join(facts(field)) + '.')}\n"
    return text + f"#{field.name} = {shown or toml_value(field.default)}"


# --- the table of features --------------------------------------------------------------------------------------


def feature_table() -> str:
    """In Markdown: which features of generation go together."""
    made = features.table()
    letters = [letter for letter, _, _ in made.rows[:-1]]
    lines = [["", *letters], ["---"] * (len(letters) + 1)]
    for letter, name, cells in made.rows:
        said = [("works" if cell.works else "refused") + (f" ({cell.remark})" if cell.remark else "") for cell in cells]
        lines.append([f"{letter} `{name}`", *said, *[""] * (len(letters) - len(said))])
    rows = [" ".join(["|", *(f"{cell} |" if cell else "|" for cell in line)]) for line in lines]
    return "\n".join([*rows, "", *(f"{number}. {said}" for number, said in enumerate(made.remarks, 1))]) + "\n"


# --- the table of modes -----------------------------------------------------------------------------------------


def mode_table() -> str:
    """In Markdown: what `mode` takes, aliases and what is refused included."""
    lines = ["| kind | modes | what they do |", "|---|---|---|"]
    for does, names in alike().items():
        alias = [f"`{other}`" for other, name in ALIASES.items() if name in names]
        listed = ", ".join(f"`{name}`" for name in names) + (f" (aliases {', '.join(alias)})" if alias else "")
        lines.append(f"| {KINDS[MODES[names[0]].kind]} | {listed} | {does} |")
    lines += [f"| refused | `{name}` | {reason} |" for name, reason in REFUSED.items()]
    return "\n".join(lines)


# --- the schema -------------------------------------------------------------------------------------------------

_JSON_TYPES = {"boolean": "boolean", "integer": "integer", "number": "number", "string": "string"}


def schema() -> dict[str, Any]:
    """JSON Schema (draft 7) of the configuration file, for editors."""
    root = _object("lightllmd configuration")
    nodes = {"": root}
    for table, doc in tables(Config).items():
        parent, _, name = table.rpartition(".")
        nodes[table] = nodes[parent]["properties"][name] = _object(doc)
    for field in fields(Config):
        nodes[field.table]["properties"][field.name] = _property(field)
    nodes[""]["properties"][models.TABLE] = _models_schema()
    return {"$schema": "http://json-schema.org/draft-07/schema#", **root}


def schema_text() -> str:
    """The text of etc/lightllmd.schema.json."""
    return json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"


def _object(doc: str) -> dict[str, Any]:
    return {"type": "object", "description": doc, "additionalProperties": False, "properties": {}}


def _models_schema() -> dict[str, Any]:
    entry = _object(models.DOC) | {"required": ["model_dir"]}
    nodes = {"": entry}
    for field in models.allowed():
        if field.table not in nodes:
            nodes[field.table] = entry["properties"][field.table] = _object(tables(Config)[field.table])
        nodes[field.table]["properties"][field.name] = {
            name: value
            for name, value in _property(field).items()
            if name != "default"  # it is the top of the file
        }
    return {"type": "object", "propertyNames": {"pattern": f"^({models.NAME})$"}, "additionalProperties": entry}


def _property(field: Field) -> dict[str, Any]:
    setting = field.setting
    value = _value_schema(field)
    options: list[dict[str, Any]] = [{"enum": list(field.words)}] if field.words else []
    if field.optional and (field.choices or field.kind != "string"):
        options.append({"enum": ["None"]})
    if setting.pairs:
        options.append({"type": "object", "additionalProperties": {"type": "string"}})
    entry: dict[str, Any] = {"description": f"{setting.doc} ({'; '.join(facts(field))}.)"}
    entry |= {"anyOf": [value, *options]} if options else value
    if field.default is not None:
        entry["default"] = field.default
    return entry


def _value_schema(field: Field) -> dict[str, Any]:
    setting = field.setting
    item: dict[str, Any] = {"type": _JSON_TYPES[field.kind.removesuffix("s")]}
    if field.choices:
        item["enum"] = list(field.choices)
    if setting.minimum is not None:
        item["minimum"] = setting.minimum
    if setting.maximum is not None:
        item["maximum"] = setting.maximum
    if setting.above is not None:
        item["exclusiveMinimum"] = setting.above
    if setting.pattern:
        item["pattern"] = f"^({setting.pattern})$"
    if field.key == "mode":
        item["enum"] = [*(name for name in NAMES if name not in REFUSED), *(f"g{size}" for size in GROUPS)]
    if field.kind in ("integers", "strings"):
        return {"type": "array", "items": item} | ({"minItems": 1} if setting.filled else {})
    return item | ({"minLength": 1} if setting.filled else {})
