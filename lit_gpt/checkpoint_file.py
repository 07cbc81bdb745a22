"""The format of a checkpoint file, which is torch.save's, and a reader that a file can't misuse.

A file is a zip archive. Its member data.pkl is a pickle of plain values; where a tensor is due, it
names the member data/KEY that has its numbers. torch.load runs no code from such a file, but calls
functions with whatever arguments the file names: 400 bytes can ask for 3 GB. So this reader knows
only the few opcodes and the one function that plain values and tensors need. What it allocates is
at most a constant times the size of the file.
"""

from __future__ import annotations

import math
import pickletools
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 20  # bytes of a member read at a time
MAX_OPCODES = 2_000_000  # a model of 1000 blocks needs 1.2 million
MAX_DEPTH = 50  # of dicts, lists and tuples in each other
MAX_DIMS = 8  # of a tensor
MAX_KEY = 1 << 31  # of an int as a key: larger ones could be made to collide
SHARED_BYTES = 4096  # single numbers, such as a score, may be used more often
MAX_SHARING = 2  # how often tensors may use each number on average: tied embeddings use it twice

STORAGES = {
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}
TOO_MUCH = "too many parts, or nested too deeply"
PLAIN = (str, int, float, bool, type(None))

CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class Global:
    """A function or type that a pickle names."""

    name: str


@dataclass(frozen=True)
class Storage:
    """The numbers of one member of the archive."""

    numbers: Tensor  # (N,)


def read_file(path: Path) -> Any:
    """The content of a checkpoint file: dicts, lists, tuples, PLAIN values and tensors on the CPU.

    Each part that is read must have the CRC-32 that the archive gives.

    Raises:
        Exception: of any kind, for any other file.
    """
    with zipfile.ZipFile(path) as archive:
        members = Members(archive, path.stat().st_size)
        if members.read("byteorder").numpy().tobytes() != sys.byteorder.encode():
            raise ValueError("written on a machine of another byte order")
        content = Unpickler(members).load()
    num_bytes = sum(storage.numbers.nbytes for storage in members.storages.values())
    check_parts(content, max(MAX_SHARING * num_bytes, SHARED_BYTES))
    return content


class Members:
    """The members of an archive of `size` bytes."""

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        infos = archive.infolist()
        is_stored = all(info.compress_type == zipfile.ZIP_STORED for info in infos)
        if not is_stored or sum(info.file_size for info in infos) > size:
            raise ValueError("parts that are compressed or overlap")
        self.archive = archive
        self.infos = {info.filename.partition("/")[2]: info for info in infos}
        if len(self.infos) < len(infos):
            raise ValueError("two parts of one name")
        self.storages: dict[str, Storage] = {}

    def read(self, name: str, dtype: torch.dtype = torch.uint8) -> Tensor:
        """The numbers in a member, (N,)."""
        info = self.infos[name]
        count, rest = divmod(info.file_size, dtype.itemsize)
        if rest:
            raise ValueError(f"{name} is truncated")
        numbers = torch.empty(count, dtype=dtype)
        left = numbers.view(torch.uint8).numpy().data
        with self.archive.open(info) as member:
            while done := member.readinto(left[:CHUNK]):  # type: ignore[attr-defined]
                left = left[done:]
        if left:
            raise ValueError(f"{name} is truncated")
        return numbers

    def storage(self, identity: Any) -> Storage:
        """The numbers that a persistent id names by kind, member, device and count."""
        match identity:
            case ("storage", Global(kind), str(key), str(), int(count)):
                if key not in self.storages:
                    self.storages[key] = Storage(self.read(f"data/{key}", STORAGES[kind]))
                storage = self.storages[key]
                if (storage.numbers.dtype, len(storage.numbers)) == (STORAGES[kind], count):
                    return storage
        raise ValueError("numbers that don't match their description")


class Unpickler:
    """Interprets data.pkl: see pickletools for what each opcode does to stack and memo."""

    def __init__(self, members: Members) -> None:
        self.members = members
        self.stack: list[Any] = []
        self.marks: list[int] = []  # where in the stack
        self.memo: dict[int, Any] = {}

    def load(self) -> Any:
        pickled = self.members.read("data.pkl").numpy().tobytes()
        value: Any
        for number, (opcode, value, _) in enumerate(pickletools.genops(pickled)):
            if number == MAX_OPCODES:
                raise ValueError("too many parts")
            name = opcode.name
            if name in CONSTANTS:
                self.stack.append(CONSTANTS[name]())
            elif name in LITERALS:
                self.stack.append(value)
            elif name in ("BINPUT", "LONG_BINPUT"):
                self.memo[value] = self.stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                self.stack.append(self.memo[value])
            elif name == "MARK":
                self.marks.append(len(self.stack))
            elif name == "GLOBAL":
                self.stack.append(Global(value))
            elif name not in ("PROTO", "STOP"):
                self.combine(name)
        (content,) = self.stack
        return content

    def combine(self, name: str) -> None:
        """Replaces the top of the stack with something made of it."""
        if name == "TUPLE":
            self.stack.append(tuple(self.pop_to_mark()))
        elif name in TUPLES:
            self.stack[-TUPLES[name] :] = [tuple(self.stack[-TUPLES[name] :])]
        elif name in ("APPEND", "APPENDS"):
            items = self.pop(1) if name == "APPEND" else self.pop_to_mark()
            extend(self.stack[-1], items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self.pop(2) if name == "SETITEM" else self.pop_to_mark()
            update(self.stack[-1], items)
        elif name == "BINPERSID":
            self.stack.append(self.members.storage(*self.pop(1)))
        elif name == "REDUCE":
            self.stack.append(result_of(*self.pop(2)))
        elif name == "BUILD" and type(self.stack[-2]) is OrderedDict:
            self.pop(1)  # a state_dict's versions of modules: ours have none
        else:
            raise ValueError(f"the opcode {name}")

    def pop(self, count: int) -> list[Any]:
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def pop_to_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items


def extend(target: Any, items: list[Any]) -> None:
    if type(target) is not list:
        raise TypeError("appends to something other than a list")
    target.extend(items)


def update(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict):
        raise TypeError("sets keys of something other than a dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not (type(key) is str or (type(key) is int and abs(key) < MAX_KEY)):
            raise TypeError("a key that is neither a string nor a small integer")
        target[key] = value


def result_of(function: Any, arguments: Any) -> Any:
    """The only two calls that the pickle of a checkpoint consists of."""
    match function, arguments:
        case Global("collections OrderedDict"), ():
            return OrderedDict()
        case Global("torch._utils _rebuild_tensor_v2"), (Storage() as storage, *where):
            offset, size, strides, _, _ = where  # whether it needs a gradient, and hooks: not here
            return tensor(storage.numbers, offset, size, strides)
    raise ValueError("a call that is not of a checkpoint")


def tensor(numbers: Tensor, offset: int, size: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """Some of the numbers (N,), as a tensor of this size; it must not have more than these."""
    count = math.prod(size)
    steps = sum((n - 1) * stride for n, stride in zip(size, strides, strict=True))
    is_inside = offset + steps < len(numbers) if count else offset == steps == 0
    is_valid = len(size) <= MAX_DIMS and min((offset, *size, *strides)) >= 0
    if not is_valid or count > len(numbers) or not is_inside:
        raise ValueError("a tensor larger than its data")
    empty = torch.empty(0, dtype=numbers.dtype)
    return empty.set_(numbers.untyped_storage(), offset, size, strides)


def check_parts(content: Any, max_bytes: float = math.inf) -> None:
    """Checks that a content is plain, and small however often its parts refer to each other.

    Args:
        content: whatever a checkpoint is to hold.
        max_bytes: of its tensors, each counted as often as it occurs.

    Raises:
        TypeError: it has something else than dicts, lists, tuples, PLAIN values and tensors.
        ValueError: it has too much, is nested too deeply or contains itself.
    """
    num_bytes = 0
    for part in parts_of(content):
        if type(part) is Tensor:
            num_bytes += part.nbytes
        elif type(part) not in (dict, OrderedDict, list, tuple, *PLAIN):
            raise TypeError(f"a {type(part).__name__}")
        if num_bytes > max_bytes:
            raise ValueError(TOO_MUCH)


def parts_of(content: Any) -> Iterator[Any]:
    """A content and everything in it except keys, as often as it occurs.

    Raises:
        ValueError: as for `check_parts`.
    """
    todo = [(content, 0)]
    num_parts = 1
    while todo:
        part, depth = todo.pop()
        yield part
        inner = part.values() if isinstance(part, dict) else part
        if isinstance(part, dict | list | tuple):
            num_parts += len(inner)
            if num_parts > MAX_OPCODES or depth == MAX_DEPTH:
                raise ValueError(TOO_MUCH)
            todo += [(value, depth + 1) for value in inner]
