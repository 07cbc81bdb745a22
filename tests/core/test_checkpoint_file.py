"""Hostile checkpoint files: each is refused for what it is, at once and without its memory."""

from __future__ import annotations

import re
import struct
import time
import zipfile
from pathlib import Path

import pytest
import torch

from lit_gpt.checkpoint_file import read_file
from tests.conftest import limited_memory

MORE = 300_000_000  # bytes that a reader may take for any of these small files

NESTED = b"]q\x00(" + b"h\x00" * 10 + b"e"  # a list that has itself ten times


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def storage(key: str = "0", count: int = 4, kind: str = "torch\nFloatStorage") -> bytes:
    """Pickles what stands for the numbers of a member."""
    parts = [text("storage"), b"c%b\n" % kind.encode(), text(key), text("cpu"), number(count)]
    return b"(" + b"".join(parts) + b"tQ"


def tensor(offset: int = 0, size: tuple = (4,), strides: tuple = (1,)) -> bytes:
    """Pickles a tensor of the four numbers."""
    shapes = (b"(" + b"".join(map(number, shape)) + b"t" for shape in (size, strides))
    no_hooks = b"ccollections\nOrderedDict\n)R"
    arguments = (storage(), number(offset), *shapes, b"\x89", no_hooks)
    return call("torch._utils\n_rebuild_tensor_v2", *arguments)


def call(function: str, *arguments: bytes) -> bytes:
    return b"c%b\n(" % function.encode() + b"".join(arguments) + b"tR"


def laughs(count: int) -> bytes:
    """A tuple of lists, each of which has the one before twice."""
    lists = (b"]q%c(h%ch%ce" % (i + 1, i, i) for i in range(count))
    return b"(]q\x00" + b"".join(lists) + b"t"


def in_file(pickled: bytes, path: Path, **members: bytes) -> Path:
    """A file that torch.load would take, of this pickle and a storage of four numbers."""
    contents = {"data.pkl": pickled, "byteorder": b"little", "data/0": bytes(16), "version": b"3\n"}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (contents | members).items():
            archive.writestr(f"archive/{name}", content)
    return path


GLOBAL = "a call that is not of a checkpoint"
TOO_MANY = "too many parts, or nested too deeply"
DIFFERS = "numbers that don't match their description"
LARGER = "a tensor larger than its data"
HOSTILE = {
    # What torch.load(weights_only=True) calls with any arguments.
    "3 GB of zeros": (call("builtins\nbytearray", number(2**31 - 1)), GLOBAL),
    "text doubled 40 times": (call("_codecs\nencode", text("x"), text("hex")), GLOBAL),
    "uninitialised weights": (call("torch\nTensor", number(30_000), number(27_000)), GLOBAL),
    "a weight of another class": (call("torch\nFloatTensor", number(2**31 - 1)), GLOBAL),
    "a list copied": (call("collections\nOrderedDict", laughs(1)), GLOBAL),
    "code": (call("os\nsystem", text("touch sprung")), GLOBAL),
    "a method of a tensor": (tensor() + b")R", GLOBAL),
    "a function by itself": (b"cos\nsystem\n", "a Global"),
    "numbers by themselves": (storage(), "a Storage"),
    "an opcode for bytes": (b"\x96" + struct.pack("<Q", 3 * 10**9), ""),
    "an opcode for objects": (b"cos\nsystem\n)\x81", "the opcode NEWOBJ"),
    "an old opcode for objects": (b"(ios\nsystem\n", "the opcode INST"),
    "a global by its name": (text("os") + text("system") + b"\x93", "the opcode STACK_GLOBAL"),
    "attributes of a dict": (b"}}b", "the opcode BUILD"),
    "a place far away": (b"Nr\xff\xff\xff\xff0", "the opcode POP"),
    "a number of a million digits": (b"I" + b"9" * 10**6 + b"\n", ""),
    # What takes forever later.
    "a billion laughs": (laughs(60), TOO_MANY),
    "a list in itself": (NESTED, TOO_MANY),
    "a deep list": (b"]" * 10**4 + b"a" * (10**4 - 1), TOO_MANY),
    "nested keys": (b"}" + b")\x85\x85Ns", "a key that is neither a string nor a small integer"),
    "colliding keys": (
        b"}\x8a\x08" + struct.pack("<q", 2**61 - 1) + b"Ns",
        "a key that is neither a string nor a small integer",
    ),
    # Tensors that are not what they say.
    "no such member": (storage("9"), "'data/9'"),
    "a member of another size": (storage(count=10**9), DIFFERS),
    "a member cut through": (storage("1"), "data/1 is truncated"),
    "a member of two types": (storage() + storage(kind="torch\nIntStorage") + b"\x86", DIFFERS),
    "no type": (storage(kind="os\nsystem"), "'os system'"),
    "larger than its numbers": (tensor(size=(5,)), LARGER),
    "expanded": (tensor(size=(10**6, 10**6), strides=(0, 0)), LARGER),
    "behind its numbers": (tensor(offset=1), LARGER),
    "before its numbers": (tensor(offset=-1), LARGER),
    "of negative size": (tensor(size=(-2, -2), strides=(1, 1)), LARGER),
    "backwards": (tensor(offset=3, strides=(-1,)), LARGER),
    "too large for a number": (tensor(size=(2**31 - 1,) * 3, strides=(0,) * 3), LARGER),
    "of a thousand dimensions": (tensor(size=(1,) * 1000, strides=(0,) * 1000), LARGER),
    "seen a thousand times": (b"]" + tensor() + b"q\x00a(" + b"h\x00" * 1000 + b"e", TOO_MANY),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_is_refused(tmp_path, name):
    """The reason is exact: running out of memory would be another."""
    pickled, reason = HOSTILE[name]
    path = in_file(b"\x80\x02" + pickled + b".", tmp_path / "x.ckpt", **{"data/1": bytes(15)})
    start = time.perf_counter()
    with limited_memory(MORE), pytest.raises(Exception) as refusal:  # noqa: PT011
        read_file(path)
    assert str(refusal.value) == reason or (not reason and isinstance(refusal.value, ValueError))
    assert time.perf_counter() - start < 20


def test_the_bricks_of_these_files_make_a_good_one(tmp_path):
    pickled = b"\x80\x02" + tensor(1, (3, 1), (1, 4)) + laughs(3) + text("x") + b"\x87."
    numbers = struct.pack("<4f", 1, 2, 3, 4)
    path = in_file(pickled, tmp_path / "good.ckpt", **{"data/0": numbers})
    weight, (*_, lists), name = read_file(path)
    assert weight.tolist() == [[2], [3], [4]]
    assert (lists, name) == ([[[[], []], [[], []]], [[[], []], [[], []]]], "x")
    assert torch.load(path, weights_only=True)[0].tolist() == weight.tolist()


def test_the_number_of_opcodes_is_limited(tmp_path, monkeypatch):
    path = in_file(b"\x80\x02]" + b"Na" * 500 + b".", tmp_path / "x.ckpt")
    assert read_file(path) == [None] * 500
    monkeypatch.setattr("lit_gpt.checkpoint_file.MAX_OPCODES", 1000)
    with pytest.raises(ValueError, match="too many parts"):
        read_file(path)


def zip_of(path: Path, name: str) -> None:
    """A file that differs from a good one in one way."""
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in (("data.pkl", b"\x80\x02N."), ("byteorder", b"little")):
            if name == "compressed" and member == "data.pkl":
                archive.writestr(f"a/{member}", content, zipfile.ZIP_DEFLATED)
            elif name == "another byte order" and member == "byteorder":
                archive.writestr(f"a/{member}", b"big")
            else:
                archive.writestr(f"a/{member}", content)
        if name == "two folders":
            archive.writestr("b/data.pkl", b"\x80\x02N.")
        if name == "longer than the file":
            archive.infolist()[0].file_size = 10**9
            archive.infolist()[0].compress_size = 10**9
        if name == "shorter than its bytes":
            archive.infolist()[0].file_size = 2
        if name == "longer than its bytes":
            archive.infolist()[0].file_size = 5
        if name == "encrypted":
            archive.infolist()[0].flag_bits |= 1
        if name == "another CRC":
            archive.infolist()[0].CRC ^= 1


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("compressed", "parts that are compressed or overlap"),
        ("longer than the file", "parts that are compressed or overlap"),
        ("two folders", "two parts of one name"),
        ("another byte order", "written on a machine of another byte order"),
        ("longer than its bytes", "data.pkl is truncated"),
        ("shorter than its bytes", "Bad CRC-32 for file 'a/data.pkl'"),
        ("encrypted", "is encrypted, password required for extraction"),
        ("another CRC", "Bad CRC-32 for file 'a/data.pkl'"),
    ],
)
def test_an_odd_archive_is_refused(tmp_path, name, reason):
    zip_of(tmp_path / "good.ckpt", "")
    assert read_file(tmp_path / "good.ckpt") is None
    zip_of(tmp_path / "odd.ckpt", name)
    with pytest.raises(Exception, match=re.escape(reason)):
        read_file(tmp_path / "odd.ckpt")
