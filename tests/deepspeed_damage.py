"""Checkpoints of Megatron-DeepSpeed's pipeline with something wrong: each damage, and what the refusal says of it."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from deepspeed_layout import file_of, write_deepspeed
from model_folders import TOKENIZER

SMALL = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 32, "torch_dtype": "bfloat16"}
NUMBERS = {1: "embedding", 3: "decoder layer 0", 4: "decoder layer 1", 6: "last norm", 7: "head"}
LAYER = file_of(3, 0)  # the file that is damaged where any would do
Damage = Callable[[Path], object]
Case = tuple[Damage, tuple[str, ...]]  # what is done to the folder, and words of the refusal


def write_sound(folder: Path) -> Path:
    """What `CASES` damage: two layers on two ranks."""
    write_deepspeed(folder, SMALL, dtype=torch.bfloat16)
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return folder


# --- files ------------------------------------------------------------------------------------------------------------


def to_file(change: Callable[[Path], object], name: str = LAYER) -> Damage:
    return lambda folder: change(folder / name)


def instead(make: Callable[[Path], object], name: str = LAYER) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def content(body: bytes) -> Damage:
    return to_file(lambda path: path.write_bytes(body))


def cut(name: str, keep: Callable[[int], int]) -> Damage:
    return to_file(lambda path: os.truncate(path, keep(path.stat().st_size)), name)


def copied(name: str, source: str = LAYER) -> Damage:
    return lambda folder: (folder / name).write_bytes((folder / source).read_bytes())


def loop(path: Path) -> None:
    path.with_name("other").symlink_to(path)
    path.symlink_to(path.with_name("other"))


def configured(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return damage


def without(pattern: str) -> Damage:
    def damage(folder: Path) -> None:
        for path in folder.glob(pattern):
            path.unlink()

    return damage


def legacy(path: Path) -> None:
    torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)


def file_cases() -> Iterator[tuple[str, Case]]:
    for number, words in NUMBERS.items():
        for rank in (0, 1):
            name = file_of(number, rank)
            yield f"{name} gone", (to_file(Path.unlink, name), ("missing", name[: -len("-model_states.pt")], words))
            for how, keep in (("100 bytes", lambda size: 100), ("half", lambda size: size // 2)):
                yield f"{name} cut to {how}", (cut(name, keep), (name, "truncated"))
            yield f"{name} one byte short", (cut(name, lambda size: size - 1), (name, "truncated"))
            yield f"{name} without its directory's end", (cut(name, lambda size: size - 22), (name, "truncated"))
        yield f"module {number} gone", (without(f"layer_{number:02}-*"), (f"layer_{number:02}-model_00", words))
    for body, words in {
        b"": ("0 bytes are no file of torch.save",),
        b"PK\x03\x04": ("truncated",),
        b"\x7fELF" * 4000: ("16000 bytes are no file of torch.save",),
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 98362432\n": ("Git LFS pointer",),
        struct.pack("<Q", 2) + b"{}": ("no file of torch.save",),
        b"PK\x03\x04" + bytes(5000): ("truncated",),
        b"PK\x05\x06" + bytes(18): ("no file of torch.save",),
    }.items():
        yield f"begins with {body[:12]!r}", (content(body), (LAYER, *words))
    yield "the format before torch 1.6", (to_file(legacy), (LAYER, "before 1.6"))
    yield "a folder", (instead(Path.mkdir), (LAYER, "it is a directory"))
    yield "a pipe", (instead(lambda path: os.mkfifo(path)), (LAYER, "it is a pipe"))
    yield "a link to nowhere", (instead(lambda path: path.symlink_to("/nowhere")), (LAYER, "No such file"))
    yield "a loop of links", (instead(loop), (LAYER, "can't be read"))
    yield "endless", (instead(lambda path: path.symlink_to("/dev/zero")), (LAYER, "it is a device"))
    yield "1 TiB of nothing", (to_file(lambda path: os.truncate(path, 1 << 40)), (LAYER, "truncated"))
    for name, words in {
        "layer_08-model_00-model_states.pt": ("one too many", "num_hidden_layers = 2", "layer_07"),
        "layer_999999-model_00-model_states.pt": ("one too many",),
        "layer_03-model_02-model_states.pt": ("layer_01-model_02 (embedding)", "3 model-parallel ranks"),
        "layer_03-model_1023-model_states.pt": ("missing", "1024 model-parallel ranks"),
        "layer_03-model_1024-model_states.pt": ("rank 1024", "1023"),
        "layer_3-model_0-model_states.pt": ("the same numbers", LAYER),
        "layer_03-model_states.pt": ("the same numbers", LAYER),
        "layer_03-expert_00-model_00-model_states.pt": ("not of the form",),
        "layer_-1-model_00-model_states.pt": ("not of the form",),
        "layer_\u0663-model_00-model_states.pt": ("not of the form",),
        "layer_03-model_00-model_states (1).pt": ("not of the form",),
        "layers.pt": ("not of the form",),
    }.items():
        yield f"{name} beside the others", (copied(name), words)
    yield "none of the first rank", (without("layer_*-model_00-*"), ("missing", "layer_01-model_00"))
    yield "none of the last rank", (without("layer_*-model_01-*"), ("self_attn.q_proj.weight", "shape"))
    yield "no file at all", (without("layer_*"), ("no layer_NN-model_MM-model_states.pt",))
    for key, value, words in (
        ("num_hidden_layers", 1, ("one too many", "layer_06")),
        ("num_hidden_layers", 3, ("missing", "layer_05-model_00 (decoder layer 2)", "layer_08-model_00")),
        ("num_hidden_layers", 4000, ("missing", "and 7993 more", "num_hidden_layers = 4000")),
        ("vocab_size", 64, ("model.embed_tokens.weight", "[32, 16]", "[64, 16]", "the same values")),
        ("vocab_size", 31, ("model.embed_tokens.weight", "[32, 16]", "[31, 16]")),
        ("intermediate_size", 48, ("mlp.gate_proj.weight", "[16, 16]", "[48, 16]")),
        ("hidden_size", 32, ("[32, 16]", "[32, 32]")),
        ("num_key_value_heads", 4, ("self_attn.k_proj.weight", "[4, 16]", "[16, 16]")),
        ("head_dim", 8, ("self_attn.q_proj.weight", "[8, 16]", "[32, 16]")),
        ("attention_bias", True, ("self_attn.q_proj.bias", "missing")),
        ("mlp_bias", True, ("mlp.gate_proj.bias", "missing")),
        (
            "model_type",
            "gemma2",
            ("reads tensors with the names of Llama's (llama, mistral, qwen2, qwen3), not gemma2",),
        ),
    ):
        yield f"{key} = {value}", (configured(**{key: value}), words)


# --- tensors ----------------------------------------------------------------------------------------------------------


def state(change: Callable[[dict[str, Any]], object], number: int = 3, rank: int = 0) -> Damage:
    def damage(folder: Path) -> None:
        found = torch.load(folder / file_of(number, rank))
        change(found)
        torch.save(found, folder / file_of(number, rank))

    return damage


def both(change: Callable[[dict[str, Any]], object], number: int = 3) -> Damage:
    return lambda folder: [state(change, number, rank)(folder) for rank in (0, 1)]


def replaced(name: str, make: Callable[[torch.Tensor], Any]) -> Callable[[dict[str, Any]], object]:
    return lambda found: found.update({name: make(found[name])})


MATRICES = [f"self_attn.{one}_proj.weight" for one in "qkvo"] + [
    f"mlp.{one}_proj.weight" for one in ("gate", "up", "down")
]
NORMS = ["input_layernorm.weight", "post_attention_layernorm.weight"]
ODD = torch.arange(512, dtype=torch.bfloat16)


def tensor_cases() -> Iterator[tuple[str, Case]]:
    for name in MATRICES + NORMS:
        whole = f"model.layers.0.{name}"
        yield f"{name} missing", (both(lambda found, name=name: found.pop(name)), (whole, "missing"))
        yield (
            f"{name} missing on one rank",
            (
                state(lambda found, name=name: found.pop(name)),
                (LAYER, name, "missing", file_of(3, 1)),
            ),
        )
        yield (
            f"{name} in float32 on one rank",
            (
                state(replaced(name, torch.Tensor.float), rank=1),
                (whole, "F32 here and BF16", LAYER),
            ),
        )
        yield f"{name} of integers", (both(replaced(name, torch.Tensor.long)), (whole, "type I64"))
        yield f"{name} a row short", (state(replaced(name, lambda one: one[1:].clone())), (whole, "the config's"))
        yield f"{name} of no dimension", (both(replaced(name, lambda one: one.sum())), (whole, "[]"))
    for name in MATRICES:
        whole = f"model.layers.0.{name}"
        yield (
            f"{name} transposed",
            (both(replaced(name, lambda one: one.repeat(3, 1).t().clone())), (whole, "the config's")),
        )
        yield f"{name} flat", (both(replaced(name, lambda one: one.reshape(-1).clone())), (whole, "the config's"))
    for name, axis in (("self_attn.q_proj.weight", 0), ("mlp.down_proj.weight", 1)):
        yield (
            f"{name} whole on each rank",
            (
                both(replaced(name, lambda one, axis=axis: torch.cat([one, one], axis))),
                (name, f"joined along dimension {axis}"),
            ),
        )
    for number, word in ((1, "embedding"), (6, "last norm"), (7, "head")):
        file = file_of(number, 0)
        yield (
            f"{word} with another tensor",
            (
                state(lambda found: found.update(more=torch.ones(2)), number),
                (file, "2 tensors", word),
            ),
        )
        yield f"{word} empty", (state(lambda found: found.clear(), number), (file, "0 tensors", word))
        yield (
            f"{word} of integers",
            (
                both(lambda found: found.update({name: one.long() for name, one in found.items()}), number),
                ("I64",),
            ),
        )
        yield (
            f"{word} too long on one rank",
            (
                state(lambda found: found.update({name: torch.cat([one, one]) for name, one in found.items()}), number),
                (file, "the config's"),
            ),
        )
        yield (
            f"{word} too long on all",
            (
                both(lambda found: found.update({name: torch.cat([one, one]) for name, one in found.items()}), number),
                ("[32]" if number == 6 else "[64, 16]", "the config"),
            ),
        )
    for name in ("self_attn.q_proj.bias", "mlp.experts.0.weight", "model.layers.0.mlp.up_proj.weight", "\n\x1b[31m"):
        yield (
            f"a tensor {name!r} too many",
            (
                both(lambda found, name=name: found.update({name: torch.ones(2)})),
                (file_of(3, 1), "the config has no place for it"),
            ),
        )
    for kind in (torch.float8_e4m3fn, torch.complex64, torch.uint8, torch.bool, torch.int16, torch.uint16):
        yield (
            f"a norm of {kind}",
            (
                both(replaced(NORMS[0], lambda one, kind=kind: one.float().to(kind))),
                (NORMS[0], "is of type"),
            ),
        )
    for value in (3, None, "text", 2.5, True, [1], (1, 2), {"weight": torch.ones(2)}, torch.float16):
        yield (
            f"an entry {type(value).__name__}",
            (
                state(lambda found, value=value: found.update(iteration=value)),
                (LAYER, 'entry "iteration" is ', "not a tensor"),
            ),
        )
    for value in ([torch.ones(2)], torch.ones(2), 3, None, "text", (), {3: torch.ones(2)}):
        yield (
            f"a {type(value).__name__} instead of a state dict",
            (
                to_file(lambda path, value=value: torch.save(value, path)),
                (LAYER, "not a "),
            ),
        )
    for words, make in {
        "every other column": lambda one: one.repeat(1, 2)[:, ::2],
        "one row for all": lambda one: one[:1].expand(one.shape),
        "one element for all": lambda one: one[0, 0].expand(one.shape),
        "overlapping rows": lambda one: ODD.as_strided(one.shape, (8, 1)),
    }.items():
        yield f"strides: {words}", (state(replaced(MATRICES[0], make)), (LAYER, MATRICES[0], "save it contiguous"))
    yield (
        "a sparse tensor",
        (
            state(replaced(MATRICES[0], lambda one: one.float().to_sparse())),
            (LAYER, "torch._utils._rebuild_sparse_tensor"),
        ),
    )
    yield (
        "a whole module",
        (
            to_file(lambda path: torch.save(torch.nn.Linear(2, 2), path)),
            (LAYER, "torch.nn.modules.linear.Linear"),
        ),
    )


# --- archives ---------------------------------------------------------------------------------------------------------


def records_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {one.filename: archive.read(one) for one in archive.infolist()}


def repacked(change: Callable[[dict[str, bytes]], object], kind: int = zipfile.ZIP_STORED) -> Damage:
    """LAYER with other records."""

    def damage(folder: Path) -> None:
        records = records_of(folder / LAYER)
        change(records)
        with zipfile.ZipFile(folder / LAYER, "w", kind) as archive:
            for name, body in records.items():
                archive.writestr(name, body)

    return damage


def record(name: str, body: bytes) -> Damage:
    """`name` below the archive's top folder."""
    return repacked(lambda records: records.update({f"{top(records)}{name}": body}))


def top(records: dict[str, bytes]) -> str:
    return next(iter(records)).partition("/")[0] + "/"


def patched(change: Callable[[bytearray], object]) -> Damage:
    def damage(path: Path) -> None:
        body = bytearray(path.read_bytes())
        change(body)
        path.write_bytes(body)

    return to_file(damage)


def central(body: bytearray, name: bytes) -> int:
    """Where the directory's entry of a record begins."""
    at = body.rindex(b"PK\x05\x06")
    begin = struct.unpack_from("<I", body, at + 16)[0]
    return body.index(name, begin) - 46


def with_entry(name: bytes, offset: int, form: str, value: int) -> Damage:
    """A field of the directory's entry of a record."""
    return patched(lambda body: struct.pack_into(form, body, central(body, name) + offset, value))


def twice(folder: Path) -> None:
    with zipfile.ZipFile(folder / LAYER, "a") as archive:
        name = next(one.filename for one in archive.infolist() if one.filename.endswith("data/0"))
        archive.writestr(name, b"again")


def bomb(folder: Path) -> None:
    """A pickle of 128 MiB in 128 KiB."""
    with zipfile.ZipFile(folder / LAYER, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a/data.pkl", "w") as file:
        for _ in range(128):
            file.write(bytes(1 << 20))


def flipped(body: bytearray) -> None:
    at = body.index(b"self_attn.k_proj")
    body[at] ^= 1


def many(records: dict[str, bytes]) -> None:
    records |= {f"{top(records)}data/{number}": b"" for number in range(100, 22_000)}


def archive_cases() -> Iterator[tuple[str, Case]]:
    for kind in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        yield f"compressed by method {kind}", (repacked(lambda records: None, kind), (LAYER, "compressed"))
    yield "a zip bomb", (bomb, (LAYER, "compressed"))
    yield (
        "a bomb that says it is none",
        (
            with_entry(b"layer_03-model_00-model_states/data.pkl", 24, "<I", 1 << 31),
            (LAYER, "compressed"),
        ),
    )
    yield "no pickle", (repacked(lambda records: records.pop(f"{top(records)}data.pkl")), (LAYER, "data.pkl"))
    yield "two pickles", (repacked(lambda records: records.update({"b/data.pkl": b"."})), (LAYER, "2 records"))
    yield "no records", (repacked(dict.clear), (LAYER,))
    yield "TorchScript", (record("constants.pkl", b"."), (LAYER, "TorchScript"))
    yield "big-endian", (record("byteorder", b"big"), (LAYER, 'byte order is "big"'))
    yield "a byte order of another kind", (record("byteorder", b"\xff\n"), (LAYER, "byte order"))
    yield "a long byte order", (record("byteorder", b"little" * 100), (LAYER, "byteorder", "at most 16"))
    yield "a pickle of 5 MB", (record("data.pkl", bytes(5 << 20)), (LAYER, "data.pkl", "at most 4194304"))
    yield (
        "a storage gone",
        (repacked(lambda records: records.pop(f"{top(records)}data/0")), (LAYER, "data/0", "missing")),
    )
    yield "a storage too short", (record("data/0", bytes(10)), (LAYER, "data/0", "10 bytes"))
    yield "a storage too long", (record("data/0", bytes(10_000)), (LAYER, "data/0", "10000 bytes"))
    yield "a record twice", (twice, (LAYER, "data/0", "there twice"))
    yield "22,000 records", (repacked(many), (LAYER, "zip directory has"))
    yield "encrypted", (with_entry(b"layer_03-model_00-model_states/data/1", 8, "<H", 1), (LAYER, "encrypted"))
    yield (
        "a record that begins elsewhere",
        (
            with_entry(b"layer_03-model_00-model_states/data/1", 42, "<I", 5),
            (LAYER, "data/1", "no header"),
        ),
    )
    yield (
        "a record that begins behind the end",
        (
            with_entry(b"layer_03-model_00-model_states/data/1", 42, "<I", 1 << 31),
            (LAYER, "data/1", "no header"),
        ),
    )
    yield (
        "a record of 2 GiB",
        (
            patched(
                lambda body: [
                    struct.pack_into("<I", body, central(body, b"layer_03-model_00-model_states/data/1") + at, 1 << 31)
                    for at in (20, 24)
                ]
            ),
            (LAYER, "data/1"),
        ),
    )
    yield (
        "a record under another's header",
        (
            patched(
                lambda body: struct.pack_into(
                    "<I",
                    body,
                    central(body, b"layer_03-model_00-model_states/data/1") + 42,
                    struct.unpack_from("<I", body, central(body, b"layer_03-model_00-model_states/data/0") + 42)[0],
                )
            ),
            (LAYER, "data/1", "another name"),
        ),
    )
    yield "a pickle with a flipped bit", (patched(flipped), (LAYER, "data.pkl", "checksum"))
    yield (
        "a directory that is damaged",
        (
            patched(
                lambda body: struct.pack_into("<I", body, central(body, b"layer_03-model_00-model_states/data/1"), 0)
            ),
            (LAYER, "zip directory"),
        ),
    )
    yield (
        "a directory of 1 GiB",
        (
            patched(lambda body: struct.pack_into("<Q", body, body.rindex(b"PK\x06\x06") + 40, 1 << 30)),
            (LAYER, "zip directory"),
        ),
    )
    yield (
        "a directory that begins behind the end",
        (
            patched(lambda body: struct.pack_into("<Q", body, body.rindex(b"PK\x06\x06") + 48, 1 << 30)),
            (LAYER, "begins at byte -"),
        ),
    )
    yield (
        "bytes before the archive",
        (patched(lambda body: body.__setitem__(slice(0, 0), b"#!/bin/sh\n")), (LAYER, "no file")),
    )
    yield (
        "70,000 bytes behind the archive",
        (patched(lambda body: body.extend(bytes(70_000))), (LAYER, "zip directory")),
    )


# --- pickles ----------------------------------------------------------------------------------------------------------


class Calls:
    """Pickles as a call, which unpickling would make."""

    def __init__(self, called: Callable[..., Any], *arguments: Any) -> None:
        self._call = called, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self._call


def written(body: bytes) -> Damage:
    return record("data.pkl", body)


def named(name: str) -> bytes:
    """A pickle that calls a global, in protocol 2."""
    module, _, attribute = name.rpartition(".")
    return b"\x80\x02c" + f"{module}\n{attribute}\n".encode() + b"X\x02\x00\x00\x00id\x85R."


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return b"\x8a" + bytes([9]) + value.to_bytes(9, "little", signed=True)


STORAGE = b"(" + text("storage") + b"ctorch\nBFloat16Storage\n" + text("0") + text("cpu") + number(128) + b"tQ"


def tensor(
    storage: bytes = STORAGE,
    offset: bytes = number(0),
    shape: bytes = number(4) + b"\x85",
    strides: bytes = number(1) + b"\x85",
) -> bytes:
    """A state dict of one tensor, "weight"."""
    made = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + shape + strides + b"\x89}tR"
    return b"\x80\x02}" + text("weight") + made + b"s."


def persistent(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"tQ"


FOREIGN = (
    "os.system", "posix.system", "builtins.eval", "builtins.exec", "builtins.getattr", "builtins.__import__",
    "subprocess.Popen", "importlib.import_module", "operator.attrgetter", "collections.defaultdict", "_io.BytesIO",
    "numpy.core.multiarray._reconstruct", "torch.load", "torch.hub.load", "torch._utils._rebuild_qtensor", "a.b.c",
)  # fmt: skip


# What is told of those that get as far as a tensor.
WORDS = {
    "a storage outside": "data/../../secret",
    "a storage of another size": "has 256 bytes",
    "an offset behind the end": 'tensor "weight" [4] goes beyond its storage of 256 bytes',
    "an offset of 2^61": "goes beyond its storage",
    "a shape of 2^61": "goes beyond its storage",
    "a shape beyond the storage": "[129] goes beyond its storage",
    "a stride of 2^61": "goes beyond its storage",
    "20 dimensions": "20 dimensions, at most 16",
    "2^600 elements": "save it contiguous",
}


def pickle_cases() -> Iterator[tuple[str, Case]]:
    for name in FOREIGN:
        yield f"calls {name}", (written(named(name)), (LAYER, f'it names "{name}"', "never run"))
    for protocol in (0, 2, 4, 5):
        body = pickle.dumps({"weight": Calls(os.system, "touch hacked")}, protocol)
        yield f"os.system in protocol {protocol}", (written(body), (LAYER,))
    yield "a name with control characters", (written(b"\x80\x02ca\x1b[31m\nb\n."), (LAYER, "it names"))
    yield "a long name", (written(b"\x80\x02c" + b"x" * 100_000 + b"\nb\n."), (LAYER, "it names"))
    entry = b"\x80\x02}" + text("a")
    for words, body in {
        "empty": b"",
        "without an end": entry + b"K\x01s",
        "no pickle": b"<html>",
        "a text that ends too soon": b"\x80\x02X\xff\xff\xff\x7fabc",
        "a text of 2^60 bytes": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60),
        "bytes of 2^60": b"\x80\x05\x8e" + struct.pack("<Q", 1 << 60),
        "a byte array of 2^60": b"\x80\x05\x96" + struct.pack("<Q", 1 << 60),
        "a frame of 2^60": b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b".",
        "a number of -1 bytes": b"\x80\x02\x8b\xff\xff\xff\xff.",
        "a number of 5,000 digits": b"L" + b"1" * 5000 + b"L\n.",
        "protocol 200": b"\x80\xc8.",
        "an empty stack": b"\x80\x02.",
        "a mark as a value": b"\x80\x02(.",
        "a mark that is missing": b"\x80\x02t.",
        "a tuple of too little": b"\x80\x02\x87.",
        "a memo that is missing": b"\x80\x02h\x05.",
        "a memo of nothing": b"\x80\x02q\x05.",
        "an entry of no dict": b"\x80\x02]K\x01K\x02s.",
        "entries without a value": b"\x80\x02}(" + text("a") + b"u.",
        "an appendix to no list": b"\x80\x02}K\x01a.",
        "a build of no dict": b"\x80\x02K\x01}b.",
        "a call of a text": b"\x80\x02" + text("os.system") + b")R.",
        "a call without a tuple": b"\x80\x02ccollections\nOrderedDict\nK\x01R.",
        "a call of a storage": b"\x80\x02ctorch\nFloatStorage\n)R.",
        "a call of a dtype": b"\x80\x02ctorch\nfloat16\n)R.",
        "a tensor of no arguments": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        "a parameter of a number": b"\x80\x02ctorch._utils\n_rebuild_parameter\nK\x01\x85R.",
        "a tensor class of a call": b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n"
        + b"K\x01ctorch\nTensor\n)\x87R.",
        "a shape of a number": b"\x80\x02ctorch\nSize\nK\x01\x85R.",
        "a name that is a number": b"\x80\x04K\x01K\x02\x93.",
        "opcode INST": b"(ios\nsystem\n.",
        "opcode OBJ": b"(cos\nsystem\no.",
        "opcode NEWOBJ": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
        "opcode EXT1": b"\x80\x02\x82\x01.",
        "opcode PERSID": b"Pstorage\n.",
        "opcode DUP": b"\x80\x02}2.",
        "opcode NEXT_BUFFER": b"\x80\x05\x97.",
        "an unknown opcode": b"\x80\x02\xff.",
        "a key twice": entry + b"K\x01s" + text("a") + b"K\x02s.",
        "a key that is a number": b"\x80\x02}K\x01K\x02s.",
        "a dict in itself": b"\x80\x02}q\x00" + text("a") + b"h\x00s.",
        "50,000 levels": b"\x80\x02)" + b"\x85" * 50_000 + b".",
        "300,000 opcodes": b"\x80\x02" + b"K\x01\x85q\x00h\x00" * 75_000 + b".",
        "20,000 values at a time": b"\x80\x02" + b"K\x01" * 20_000 + b".",
        "a storage that is a text": b"\x80\x02" + text("storage") + b"Q.",
        "a storage of four parts": b"\x80\x02" + persistent(text("storage"), text("0"), text("cpu"), number(1)) + b".",
        "a storage of type text": b"\x80\x02"
        + persistent(text("storage"), text("FloatStorage"), text("0"), text("cpu"), number(1))
        + b".",
        "a storage of a dict": b"\x80\x02"
        + persistent(text("storage"), b"ccollections\nOrderedDict\n", text("0"), text("cpu"), number(1))
        + b".",
        "a storage with a number as its key": b"\x80\x02"
        + persistent(text("storage"), b"ctorch\nFloatStorage\n", number(0), text("cpu"), number(1))
        + b".",
        "a storage of -1 elements": b"\x80\x02"
        + persistent(text("storage"), b"ctorch\nFloatStorage\n", text("0"), text("cpu"), number(-1))
        + b".",
        "a storage of 2^63 elements": b"\x80\x02"
        + persistent(text("storage"), b"ctorch\nFloatStorage\n", text("0"), text("cpu"), number(1 << 63))
        + b".",
        "a storage outside": tensor(
            persistent(text("storage"), b"ctorch\nHalfStorage\n", text("../../secret"), text("cpu"), number(8))
        ),
        "a storage of another size": tensor(
            persistent(text("storage"), b"ctorch\nDoubleStorage\n", text("0"), text("cpu"), number(8))
        ),
        "a tensor of no storage": tensor(text("0")),
        "a negative offset": tensor(offset=number(-1)),
        "an offset behind the end": tensor(offset=number(125)),
        "an offset of 2^61": tensor(offset=number(1 << 61)),
        "an offset that is true": tensor(offset=b"\x88"),
        "a shape of -1": tensor(shape=number(-1) + b"\x85"),
        "a shape of 2^61": tensor(shape=number(1 << 61) + b"\x85"),
        "a shape beyond the storage": tensor(shape=number(129) + b"\x85"),
        "a shape that is a list": tensor(shape=b"]"),
        "a shape of texts": tensor(shape=text("4") + b"\x85"),
        "a negative stride": tensor(strides=number(-1) + b"\x85"),
        "a stride of 2^61": tensor(strides=number(1 << 61) + b"\x85"),
        "two strides": tensor(strides=number(1) + number(1) + b"\x86"),
        "20 dimensions": tensor(shape=b"(" + number(1) * 20 + b"t", strides=b"(" + number(1) * 20 + b"t"),
        "2^600 elements": tensor(shape=b"(" + number(1 << 60) * 10 + b"t", strides=b"(" + number(0) * 10 + b"t"),
    }.items():
        yield f"pickle: {words}", (written(body), (LAYER, WORDS.get(words, "its pickle can't be read: ")))


CASES: dict[str, Case] = dict([*file_cases(), *tensor_cases(), *archive_cases(), *pickle_cases()])
