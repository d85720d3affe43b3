"""torch's pickles (.ckpt, .pt, .pth, .bin): which tensors they hold, told from their opcodes.

A pickle is a program that builds objects, and may call whatever it likes to do so. Here it is only
followed: values are noted, tensors are described, calls are never made. What calls something that
torch's own safe loader does not know is refused by the name of what it would call.

Two layouts: a ZIP with `data.pkl` and one entry per storage (torch 1.6 and later), and four pickles
one after the other with the storages behind them.
"""

from __future__ import annotations

import io
import os
import pickletools
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, cast

import msgspec
from picklescan.scanner import SafetyLevel, scan_pickle_bytes

from shared.weights import BrokenFile, UnsafeFile
from shared.weights.headers import BITS, Header, TensorSpec, check_names

MAX_PICKLE = 32 * 1024**2
"""Bytes of the program itself, without the tensors; those of large checkpoints have half a
million."""
MAX_ENTRIES = 100_000
MAX_DEPTH = 32
LARGE = 2**48
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

LEFT_BY_TRAINING = (
    "lightning.",
    "numpy.",
    "omegaconf.",
    "pytorch_lightning.",
    "torch.nn.modules.container.ParameterDict",
)
"""Objects that training leaves in a file beside its tensors: the worker puts empty ones there."""
_HARMLESS = {
    "__builtin__.set",
    "_codecs.encode",
    "argparse.Namespace",
    "builtins.bytearray",
    "builtins.complex",
    "builtins.set",
    "collections.Counter",
    "collections.OrderedDict",
    "torch.Size",
    "torch.Tensor",
    "torch._tensor._rebuild_from_type_v2",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch.device",
    "torch.nn.parameter.Parameter",
    "torch.serialization._get_layout",
    "torch.storage.TypedStorage",
    "torch.storage.UntypedStorage",
}
_DTYPES = {
    "Double": "F64",
    "Float": "F32",
    "Half": "F16",
    "BFloat16": "BF16",
    "Long": "I64",
    "Int": "I32",
    "Short": "I16",
    "Char": "I8",
    "Byte": "U8",
    "Bool": "BOOL",
    "ComplexFloat": "C64",
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
"""torch's names of storages (`torch.HalfStorage`) and types (`torch.float16`)."""


class StoredTensor(msgspec.Struct, frozen=True):
    """`storage`: the name of its bytes; `offset` and `stride` in numbers, not bytes."""

    spec: TensorSpec
    storage: str
    offset: int
    stride: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        expected = 1
        for side, step in reversed(list(zip(self.spec.shape, self.stride, strict=True))):
            if side != 1 and step != expected:
                return False
            expected *= side
        return True

    @property
    def extent(self) -> int:
        """How many numbers of the storage it reaches over, from its offset."""
        if not self.spec.count:
            return 0
        steps = zip(self.spec.shape, self.stride, strict=True)
        return 1 + sum((side - 1) * step for side, step in steps)


class Pickle(msgspec.Struct, frozen=True):
    """`called`: the names of all functions and classes in it. `prefix`: of the entries of the ZIP;
    None for the older layout."""

    tensors: dict[str, StoredTensor]
    called: set[str]
    prefix: str | None

    @property
    def header(self) -> Header:
        return Header({name: tensor.spec for name, tensor in self.tensors.items()}, {}, "pickle")


def read_pickle(file: BinaryIO) -> Pickle:
    """Reads the program alone, not the storages. Raises BrokenFile, or UnsafeFile where it would
    call something."""
    file.seek(0)
    if file.read(2) == b"PK":
        return _read_zip(file)
    file.seek(0)
    if _Program().follow(file) != LEGACY_MAGIC:
        raise BrokenFile("it is a pickle, but not one of tensors as torch writes them")
    for _ in range(2):  # the protocol, and what the system was like
        _Program().follow(file)
    program = _Program()
    tensors = _tensors(program.follow(file))
    _Program().follow(file)  # the storages, in the order in which they follow
    at = file.tell()
    file.seek(0)
    _scan(file.read(at))
    needed = sum(8 + storage.size for storage in program.storages)  # eight tell how many numbers
    if file.seek(0, os.SEEK_END) - at < needed:
        raise BrokenFile("it was cut off on the way, upload it again")
    return Pickle(tensors, program.called, None)


def _read_zip(file: BinaryIO) -> Pickle:
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if len(entries) > MAX_ENTRIES:
                raise BrokenFile(f"its ZIP has more than {MAX_ENTRIES} entries")
            if len({entry.filename for entry in entries}) != len(entries):
                raise BrokenFile("its ZIP has two entries of one name")
            sizes = {entry.filename: entry.file_size for entry in entries}
            pickles = [entry for entry in entries if entry.filename.endswith(".pkl")]
            if [entry.filename.rsplit("/", 1)[-1] for entry in pickles] != ["data.pkl"]:
                raise BrokenFile("it is a ZIP, but not one of tensors as torch writes them")
            for entry in entries:
                if entry.flag_bits & 1:
                    raise BrokenFile("its ZIP is encrypted")
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise BrokenFile("its ZIP is compressed; torch stores tensors as they are")
            if pickles[0].file_size > MAX_PICKLE:
                raise BrokenFile(f"its pickle is larger than {MAX_PICKLE} bytes")
            prefix = pickles[0].filename.removesuffix("data.pkl")
            code = archive.read(pickles[0])
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, ValueError) as error:
        raise BrokenFile(f"its ZIP can't be read: {error}") from error
    program = _Program()
    tensors = _tensors(program.follow(io.BytesIO(code)))
    _scan(code)
    for name, tensor in tensors.items():
        there = sizes.get(f"{prefix}data/{tensor.storage}", -1)
        width = tensor.spec.size // max(1, tensor.spec.count)
        if (tensor.offset + tensor.extent) * width > max(there, 0) or there < 0:
            raise BrokenFile(f"the bytes of its tensor {name[:100]!r} are not there")
    return Pickle(tensors, program.called, prefix)


def _scan(program: bytes) -> None:
    """A second opinion, of a scanner that knows what attackers use. Raises UnsafeFile."""
    try:
        found = scan_pickle_bytes(io.BytesIO(program), "")
    except Exception as error:  # it walks whatever bytes a stranger wrote
        raise UnsafeFile(f"can't be scanned ({type(error).__name__})") from error
    for called in found.globals:
        if called.safety == SafetyLevel.Dangerous:
            raise UnsafeFile(f"would run {called.module}.{called.name} when it is opened")


# Following a program.


class _Called(msgspec.Struct, frozen=True):
    """A function or class, by name."""

    name: str


class _Storage(msgspec.Struct, frozen=True):
    dtype: str
    key: str
    count: int

    @property
    def size(self) -> int:
        return self.count * BITS[self.dtype] // 8


class _Inert(msgspec.Struct):
    """In place of an object that is of no interest: what it was given."""

    name: str
    state: Any = None


class _Mark:
    pass


_MARK = _Mark()


class _Bounded:
    """A file of which no more than MAX_PICKLE bytes are read."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._left = MAX_PICKLE

    def read(self, count: int = -1) -> bytes:
        return self._counted(count, self._file.read)

    def readline(self) -> bytes:
        return self._counted(-1, self._file.readline)

    def _counted(self, count: int, read: Callable[[int], bytes]) -> bytes:
        if count < 0 or count > self._left:
            count = self._left + 1
        data = read(count)
        self._left -= len(data)
        if self._left < 0:
            raise BrokenFile(f"its pickle is larger than {MAX_PICKLE} bytes")
        return data


class _Program:
    """One pickle. `storages`, `called`: all that it speaks of."""

    def __init__(self) -> None:
        self.storages: set[_Storage] = set()
        self.called: set[str] = set()
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def follow(self, file: Any) -> Any:
        """What it builds, with descriptions in place of objects."""
        try:
            for opcode, argument, _ in pickletools.genops(cast(BinaryIO, _Bounded(file))):
                if opcode.name == "STOP":
                    return self.pop()
                self.step(opcode.name, argument)
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
            raise BrokenFile(f"its pickle can't be followed: {str(error)[:100]}") from error
        raise BrokenFile("its pickle does not end")

    def pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise ValueError("a mark is no value")
        return value

    def _pop_to_mark(self) -> list[Any]:
        items: list[Any] = []
        while (value := self._stack.pop()) is not _MARK:
            items.append(value)
        return items[::-1]

    def step(self, opcode: str, argument: Any) -> None:
        push = self._stack.append
        if opcode in _VALUES:
            push(argument)
            return
        match opcode:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                push(_MARK)
            case "POP":
                self._stack.pop()
            case "POP_MARK":
                self._pop_to_mark()
            case "DUP":
                push(self._stack[-1])
            case "NONE":
                push(None)
            case "NEWTRUE" | "NEWFALSE":
                push(opcode == "NEWTRUE")
            case "EMPTY_LIST" | "EMPTY_SET":
                push([])
            case "EMPTY_TUPLE":
                push(())
            case "EMPTY_DICT":
                push({})
            case "LIST" | "FROZENSET":
                push(self._pop_to_mark())
            case "TUPLE":
                push(tuple(self._pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [self.pop() for _ in range(int(opcode[-1]))]
                push(tuple(items[::-1]))
            case "DICT":
                push(_pairs(self._pop_to_mark()))
            case "APPEND":
                item = self.pop()
                self._extend([item])
            case "APPENDS" | "ADDITEMS":
                self._extend(self._pop_to_mark())
            case "SETITEM":
                value, key = self.pop(), self.pop()
                self._set([key, value])
            case "SETITEMS":
                self._set(self._pop_to_mark())
            case "MEMOIZE":
                self._memo[len(self._memo)] = self._stack[-1]
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self._memo[int(argument)] = self._stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                push(self._memo[int(argument)])
            case "GLOBAL":
                module, _, name = argument.partition(" ")
                self._call_by_name(module, name)
            case "STACK_GLOBAL":
                name, module = self.pop(), self.pop()
                self._call_by_name(module, name)
            case "REDUCE" | "NEWOBJ":
                arguments, function = self.pop(), self.pop()
                push(_call(function, arguments))
            case "NEWOBJ_EX":
                self.pop()
                arguments, function = self.pop(), self.pop()
                push(_call(function, arguments))
            case "BUILD":
                state = self.pop()
                if isinstance(self._stack[-1], _Inert):
                    self._stack[-1].state = state
            case "BINPERSID":
                storage = _storage(self.pop())
                self.storages.add(storage)
                push(storage)
            case _:
                raise UnsafeFile(f"uses {opcode}, which no file of tensors needs")

    def _call_by_name(self, module: Any, name: Any) -> None:
        called = _called(module, name)
        self.called.add(called.name)
        self._stack.append(called)

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target += items

    def _set(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, dict):
            target.update(_pairs(items))


_VALUES = {
    "INT",
    "BININT",
    "BININT1",
    "BININT2",
    "LONG",
    "LONG1",
    "LONG4",
    "FLOAT",
    "BINFLOAT",
    "STRING",
    "BINSTRING",
    "SHORT_BINSTRING",
    "UNICODE",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
    "BINBYTES",
    "SHORT_BINBYTES",
    "BINBYTES8",
    "BYTEARRAY8",
}


def _pairs(items: list[Any]) -> dict[Any, Any]:
    if len(items) % 2:
        raise ValueError("a key without a value")
    return {
        key: value
        for key, value in zip(items[::2], items[1::2], strict=True)
        if isinstance(key, str | int)
    }


def _called(module: Any, name: Any) -> _Called:
    if not isinstance(module, str) or not isinstance(name, str):
        raise ValueError("a function without a name")
    called = f"{module}.{name}"
    if called in _HARMLESS or called.startswith(LEFT_BY_TRAINING) or _dtype_of(called):
        return _Called(called)
    raise UnsafeFile(f"would run {called[:200]} when it is opened")


def _dtype_of(called: str) -> str | None:
    """Of `torch.HalfStorage`, `torch.cuda.HalfStorage`, `torch.float16`."""
    name = called.removeprefix("torch.").removeprefix("cuda.")
    return _DTYPES.get(name.removesuffix("Storage")) if called.startswith("torch.") else None


def _storage(persistent_id: Any) -> _Storage:
    match persistent_id:
        case ("storage", _Called(name=name), str(key), str(), int(count), *_) if 0 <= count < LARGE:
            return _Storage(_dtype_of(name) or "U8", key, count)
    raise ValueError("a storage of another form")


def _call(function: Any, arguments: Any) -> Any:
    name = function.name if isinstance(function, _Called) else ""
    match name.rsplit(".", 1)[-1], arguments:
        case (
            "_rebuild_tensor" | "_rebuild_tensor_v2",
            (_Storage() as of, offset, shape, stride, *_),
        ):
            return _tensor(of, of.dtype, offset, shape, stride)
        case "_rebuild_tensor_v3", (
            _Storage() as of,
            offset,
            shape,
            stride,
            _,
            _,
            _Called() as kind,
            *_,
        ):
            return _tensor(of, _dtype_of(kind.name) or "", offset, shape, stride)
        case (
            "_rebuild_parameter" | "_rebuild_parameter_with_state",
            (StoredTensor() as tensor, *_),
        ):
            return tensor
        case "_rebuild_from_type_v2", (_, _, tuple(inner), *_) if inner:
            return next((each for each in inner if isinstance(each, StoredTensor)), _Inert(name))
        case "OrderedDict", _:
            return _pairs([part for pair in arguments[0] for part in pair]) if arguments else {}
        case "set", _:
            return []
    return _Inert(name)


def _tensor(storage: _Storage, dtype: str, offset: Any, shape: Any, stride: Any) -> StoredTensor:
    numbers = (offset, *shape, *stride)
    if len(shape) != len(stride) or not all(
        isinstance(number, int) and 0 <= number < LARGE for number in numbers
    ):
        raise ValueError("a tensor of an impossible shape")
    return StoredTensor(TensorSpec(dtype, tuple(shape)), storage.key, offset, tuple(stride))


# From what a pickle built to tensors by name.


def flatten(loaded: Any, is_tensor: Callable[[Any], bool]) -> dict[str, Any] | None:
    """`{"state_dict": {name: tensor}}`, `{"string_to_param": {"*": tensor}}`, `{name: tensor}` ->
    `{name: tensor}`; None where there are no names."""
    for _ in range(MAX_DEPTH):
        inner = loaded.get("state_dict") if isinstance(loaded, Mapping) else None
        if not isinstance(inner, Mapping):
            break
        loaded = inner
    for wrapper in ("params_ema", "params-ema", "params"):  # of upscalers
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping):
        return None
    return dict(_named(loaded, is_tensor))


def _named(
    loaded: Mapping[Any, Any], is_tensor: Callable[[Any], bool]
) -> Iterator[tuple[str, Any]]:
    for key, value in loaded.items():
        state = getattr(value, "state", None)
        if isinstance(state, Mapping):  # a ParameterDict: embeddings from before torch 1.12
            value = state.get("_parameters")
        if is_tensor(value):
            yield str(key), value
        elif isinstance(value, Mapping):
            for part, inner in value.items():
                if is_tensor(inner):
                    yield f"{key}.{part}", inner


def _tensors(loaded: Any) -> dict[str, StoredTensor]:
    found = flatten(loaded, lambda value: isinstance(value, StoredTensor))
    if found is None:
        raise BrokenFile("it holds no tensors by name")
    check_names(found)
    return found
