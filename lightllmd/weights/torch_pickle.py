"""The pickle in a file of torch.save, read without unpickling: what it says of tensors, and nothing else.

A pickle is a program that may call anything. This steps over its opcodes with a machine of its own, which looks up no
name and makes no object but tuples, dicts and descriptions of tensors; a pickle that names anything else is refused by
that name. Opcodes: the standard library's `pickletools`; what torch.save writes: torch/_tensor.py and torch/_utils.py.
No torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pickletools import genops
from typing import Any

from lightllmd.errors import show

MAX_PICKLE = 4 << 20  # bytes; of a decoder's layer it has some thousands
MAX_OPCODES = 200_000  # about 25 for each tensor
MAX_STACK = 10_000  # values, and so how deep they nest

# What torch calls each kind of storage and dtype, in the words of safetensors.
_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64", "ComplexDoubleStorage": "C128",
}  # fmt: skip
_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "complex64": "C64", "complex128": "C128",
}  # fmt: skip
_UNTYPED = "U8"
_KINDS = {"dict": "a dict", "list": "a list", "tuple": "a tuple", "str": "a string", "int": "an integer"}
_KINDS |= {
    "StoredTensor": "a tensor",
    "Storage": "a storage",
    "float": "a number",
    "bool": "a boolean",
    "NoneType": "None",
}


@dataclass(frozen=True, slots=True)
class Storage:
    """A record of the file: so many elements of one type."""

    type: str  # as safetensors say it
    key: str  # the record's name, below the archive's "data/"
    elements: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Elements of a storage; offset and strides count elements."""

    storage: Storage
    type: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_state(pickle: bytes) -> dict[str, StoredTensor]:
    """A state dict's tensors by key. Raises ValueError, which says why in words."""
    machine = _Machine()
    for count, (opcode, argument, _) in enumerate(genops(pickle)):
        if count >= MAX_OPCODES:
            raise ValueError(f"more than {MAX_OPCODES} opcodes")
        machine.step(opcode.name, argument)
    state = machine.result
    if not isinstance(state, dict):
        raise ValueError(f"holds {_kind(state)}, not a dict of tensors")
    for key, value in state.items():
        if not isinstance(value, StoredTensor):
            raise ValueError(f"entry {show(key)} is {_kind(value)}, not a tensor")
    return state


def _kind(value: object) -> str:
    if isinstance(value, _Name):
        return f"the name {value.path}"
    return _KINDS.get(type(value).__name__, "something else")


@dataclass(frozen=True, slots=True)
class _Name:
    """A global that the pickle names, not looked up."""

    path: str


class _Mark:
    """Where the elements of a tuple or dict begin on the stack."""


_MARK = _Mark()
_PUSHED = {"BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "BINFLOAT", "FLOAT"}
_PUSHED |= {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"}  # their argument is a value
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "MARK": _MARK}
_IGNORED = {"PROTO", "FRAME"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    """The stack machine that a pickle is written for, as far as torch.save needs it."""

    def __init__(self) -> None:
        self.result: Any = None
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any) -> None:
        """Raises ValueError."""
        stack = self._stack
        if opcode in _PUSHED:
            stack.append(argument)
        elif opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode])
        elif opcode in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if opcode == "EMPTY_DICT" else [])
        elif opcode in _TUPLES:
            count = _TUPLES[opcode]
            stack.append(tuple(self._pop() for _ in range(count))[::-1])
        elif opcode == "TUPLE":
            stack.append(tuple(self._pop_to_mark()))
        elif opcode in ("BINPUT", "LONG_BINPUT", "PUT"):
            self._memo[argument] = self._top()
        elif opcode == "MEMOIZE":
            self._memo[len(self._memo)] = self._top()
        elif opcode in ("BINGET", "LONG_BINGET", "GET"):
            if argument not in self._memo:
                raise ValueError("it recalls a value that it has not kept")
            stack.append(self._memo[argument])
        elif opcode not in _IGNORED:
            self._act(opcode, argument)
        if len(stack) > MAX_STACK:
            raise ValueError(f"more than {MAX_STACK} values at a time")

    def _act(self, opcode: str, argument: Any) -> None:
        if opcode == "GLOBAL":
            self._stack.append(_known(argument.replace(" ", ".", 1)))
        elif opcode == "STACK_GLOBAL":
            name, module = self._pop(), self._pop()
            if not isinstance(name, str) or not isinstance(module, str):
                raise ValueError("it names a global by what is no text")
            self._stack.append(_known(f"{module}.{name}"))
        elif opcode == "BINPERSID":
            self._stack.append(_storage(self._pop()))
        elif opcode == "REDUCE":
            arguments, called = self._pop(), self._pop()
            self._stack.append(_called(called, arguments))
        elif opcode == "BUILD":  # attributes, such as the versions of a state dict's modules
            self._pop()
            if not isinstance(self._top(), dict):
                raise ValueError("it sets attributes of what is no dict")
        elif opcode in ("APPEND", "APPENDS"):
            values = [self._pop()] if opcode == "APPEND" else self._pop_to_mark()
            if not isinstance(self._top(), list):
                raise ValueError("it appends to what is no list")
            self._top().extend(values)
        elif opcode in ("SETITEM", "SETITEMS"):
            pairs = [self._pop(), self._pop()][::-1] if opcode == "SETITEM" else self._pop_to_mark()
            self._set_items(pairs)
        elif opcode == "STOP":
            self.result = self._pop()
        else:
            raise ValueError(f"its opcode {opcode} is none that torch.save writes for tensors")

    def _set_items(self, pairs: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, dict) or len(pairs) % 2:
            raise ValueError("it sets entries of what is no dict")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, str):
                raise ValueError(f"a key is {_kind(key)}, not a string")
            if key in target:
                raise ValueError(f"entry {show(key)} is there twice")
            target[key] = value

    def _top(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise ValueError("it takes a value that is not there")
        return self._stack[-1]

    def _pop(self) -> Any:
        value = self._top()
        self._stack.pop()
        return value

    def _pop_to_mark(self) -> list[Any]:
        values: list[Any] = []
        while self._stack:
            value = self._stack.pop()
            if value is _MARK:
                return values[::-1]
            values.append(value)
        raise ValueError("it takes values from a mark that is not there")


# --- what torch.save names -------------------------------------------------------------------------------------------


def _storage(identity: Any) -> Storage:
    """What torch.save writes in a storage's place: ("storage", class, key, device, elements)."""
    if not isinstance(identity, tuple) or len(identity) != 5 or identity[0] != "storage":
        raise ValueError("it refers to something outside the pickle that is no storage")
    _, kind, key, _, elements = identity
    if not isinstance(kind, _Name) or kind.path not in _STORAGE_NAMES:
        raise ValueError(f"the type of a storage is {_kind(kind)}")
    if not isinstance(key, str) or not _is_count(elements):
        raise ValueError(f"storage {show(key)} has {show(elements)} elements")
    return Storage(_STORAGE_NAMES[kind.path], key, elements)


def _tensor(arguments: tuple[Any, ...], dtype: str | None = None) -> StoredTensor:
    storage, offset, shape, strides = arguments[:4]
    if not isinstance(storage, Storage):
        raise ValueError(f"a tensor lies in {_kind(storage)}, not in a storage")
    numbers = [shape, strides]
    if not _is_count(offset) or not all(isinstance(one, tuple) and all(map(_is_count, one)) for one in numbers):
        raise ValueError("a tensor's offset, shape or strides are no sizes")
    if len(shape) != len(strides):
        raise ValueError(f"a tensor has {len(shape)} dimensions and {len(strides)} strides")
    return StoredTensor(storage, dtype or storage.type, offset, shape, strides)


def _tensor_of_dtype(arguments: tuple[Any, ...]) -> StoredTensor:
    """As _rebuild_tensor_v3 has it: an untyped storage, and the dtype beside it."""
    dtype = arguments[6]
    if not isinstance(dtype, _Name) or dtype.path not in _DTYPE_NAMES:
        raise ValueError(f"the dtype of a tensor is {_kind(dtype)}")
    return _tensor(arguments, _DTYPE_NAMES[dtype.path])


def _parameter(arguments: tuple[Any, ...]) -> StoredTensor:
    if not isinstance(arguments[0], StoredTensor):
        raise ValueError(f"a parameter is made of {_kind(arguments[0])}, not of a tensor")
    return replace(arguments[0])


def _tensor_with_attributes(arguments: tuple[Any, ...]) -> Any:
    """As _rebuild_from_type_v2 has it: how the tensor is made, its class, and attributes, which are passed over."""
    made, _, inner = arguments[:3]
    if not isinstance(made, _Name) or made.path not in _PLAIN:
        raise ValueError(f"a tensor is made by {_kind(made)}")
    return _called(made, inner)


def _dict(arguments: tuple[Any, ...]) -> dict[str, Any]:
    return {}


def _shape(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    if not isinstance(arguments[0], tuple | list):
        raise ValueError(f"a shape is {_kind(arguments[0])}")
    return tuple(arguments[0])


_STORAGE_NAMES = {f"torch.{name}": kind for name, kind in _STORAGES.items()}
_STORAGE_NAMES["torch.storage.UntypedStorage"] = _UNTYPED
_DTYPE_NAMES = {f"torch.{name}": kind for name, kind in _DTYPES.items()}
# By name: how many arguments it takes at least, and what it means. None of these is called.
_MEANINGS: dict[str, tuple[int, Callable[[tuple[Any, ...]], Any]]] = {
    "collections.OrderedDict": (0, _dict),
    "torch.Size": (1, _shape),
    "torch._utils._rebuild_tensor": (4, _tensor),
    "torch._utils._rebuild_tensor_v2": (4, _tensor),
    "torch._utils._rebuild_tensor_v3": (7, _tensor_of_dtype),
    "torch._utils._rebuild_parameter": (1, _parameter),
    "torch._utils._rebuild_parameter_with_state": (1, _parameter),
    "torch._tensor._rebuild_from_type_v2": (3, _tensor_with_attributes),
}
_PLAIN = {name for name in _MEANINGS if name.startswith("torch._utils.")}
_CLASSES = ("torch.Tensor", "torch.nn.parameter.Parameter")
_KNOWN = {*_MEANINGS, *_STORAGE_NAMES, *_DTYPE_NAMES, *_CLASSES}


def _known(path: str) -> _Name:
    if path not in _KNOWN:
        raise ValueError(f"it names {show(path)}, which is no part of a tensor; code in checkpoints is never run")
    return _Name(path)


def _called(called: Any, arguments: Any) -> Any:
    if not isinstance(called, _Name) or called.path not in _MEANINGS:
        raise ValueError(f"it calls {_kind(called)}")
    least, meaning = _MEANINGS[called.path]
    if not isinstance(arguments, tuple) or len(arguments) < least:
        raise ValueError(f"it calls {called.path} with too few arguments")
    return meaning(arguments)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62
