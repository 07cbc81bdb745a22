"""Odd checkpoints and run folders: read as they are, or refused in one line, in bounded memory.

More with `pytest -m fuzz`.
"""

from __future__ import annotations

import pickletools
import random
import struct
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_gpt.checkpoint import load_checkpoint, read_checkpoint
from lit_gpt.errors import UserError
from lit_gpt.training.resume import open_checkpoint
from tests.conftest import limited_memory, train_apart
from tests.core.test_checkpoint import equal
from tests.fuzz.examples import examples, nested, numbers

MORE = 500_000_000  # bytes that reading a checkpoint of 200 KB may take

plain = nested(
    st.sampled_from([10**18, -1, 1 << 40, "rotary", "x" * 1000, b"\0"])
    | st.sampled_from([torch.zeros(0), torch.ones(3), torch.zeros(2, 2, dtype=torch.bool)]),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The checkpoint of a run."""
    return train_apart(tmp_path_factory.mktemp("fuzz"), 2)


def places_in(content: Any, path: tuple = ()) -> list[tuple]:
    """The keys that lead to each part of a nested dict or list."""
    keys = content if isinstance(content, dict) else range(len(content))
    found = []
    for key in keys:
        found.append((*path, key))
        if isinstance(content[key], dict | list) and content[key]:
            found += places_in(content[key], (*path, key))
    return found


def replaced(content: Any, path: tuple, value: Any) -> Any:
    """A copy with another value at that place; the rest is shared."""
    if not path:
        return value
    copy = dict(content) if isinstance(content, dict) else list(content)
    copy[path[0]] = replaced(content[path[0]], path[1:], value)
    return copy


def check(path: Path) -> None:
    """Both ways to read a checkpoint succeed, or raise a UserError that names the file."""
    for read in (load_checkpoint, open_checkpoint):
        try:
            read(path)
        except UserError as error:
            assert path.name in str(error)  # noqa: PT017
            assert len(str(error)) < 2000  # noqa: PT017


@numbers(60, 1500)
def test_any_part_may_be_anything(whole, tmp_path, number):
    content, path = read_checkpoint(whole), tmp_path / "odd.ckpt"
    places = places_in(content)

    @examples(number)
    @given(st.lists(st.tuples(st.sampled_from(places), plain), min_size=1, max_size=2))
    def try_changes(changes: list[tuple[tuple, Any]]) -> None:
        changed = content
        for place, value in changes:
            try:
                changed = replaced(changed, place, value)
            except (KeyError, IndexError, TypeError, ValueError):
                continue  # an earlier change took the place away
        torch.save(changed, path)
        check(path)

    try_changes()


@numbers(60, 1500)
def test_bytes_may_be_anything(whole, tmp_path, number):
    """Stretches of the file overwritten, left out, doubled or moved."""
    content, path = whole.read_bytes(), tmp_path / "odd.ckpt"
    expected = load_checkpoint(whole)[0].state_dict()
    for seed in range(number):
        rng, changed = random.Random(seed), bytearray(content)
        for _ in range(rng.randint(1, 3)):
            start, length = rng.randrange(len(changed)), rng.choice([1, 2, 8, 64, 4096])
            part = bytes(changed[start : start + length])
            replacement = rng.choice([b"", part * 2, rng.randbytes(len(part)), bytes(len(part))])
            changed[start : start + length] = replacement
        path.write_bytes(changed)
        check(path)
        try:
            weights = load_checkpoint(path)[0].state_dict()
        except UserError:
            continue
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


def opcodes_of(pickled: bytes) -> list[bytes]:
    """A pickle in its opcodes, each with its argument."""
    starts = [start for _, _, start in pickletools.genops(pickled)]
    return [pickled[start:end] for start, end in pairwise([*starts, len(pickled)])]


def odd_opcode(rng: random.Random, opcodes: list[bytes]) -> bytes:
    """An opcode of that pickle, of any pickle, or one that asks for much."""
    large = struct.pack("<I", rng.choice([0, 1, 2**16, 2**31 - 1, 2**32 - 1]))
    names = ["builtins\nbytearray", "torch\nTensor", "_codecs\nencode", "os\nsystem", "torch\nSize"]
    names += ["collections\nOrderedDict", "torch._utils\n_rebuild_tensor_v2", "torch\nLongStorage"]
    return rng.choice(
        [
            rng.choice(opcodes),
            rng.choice(pickletools.opcodes).code.encode("latin-1"),
            rng.choice([b"J", b"j", b"r", b"X", b"B", b"\x8b"]) + large,
            rng.choice([b"h", b"q", b"K"]) + rng.randbytes(1),
            b"\x96" + struct.pack("<Q", 10**9),
            b"c" + rng.choice(names).encode() + b"\n",
            b"c" + rng.choice(names).encode() + b"\n" + b"J" + large + b"\x85R",
        ]
    )


def with_odd_opcodes(pickled: bytes, rng: random.Random) -> bytes:
    """A pickle with opcodes replaced, added, left out, repeated or exchanged."""
    opcodes = opcodes_of(pickled)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(opcodes))
        length = rng.choice([1, 1, 2, 10])
        part = opcodes[at : at + length]
        odd = [odd_opcode(rng, opcodes) for _ in part]
        opcodes[at : at + length] = rng.choice([odd, odd + part, [], part * 50, part[::-1]])
    return b"".join(opcodes)


@numbers(150, 5000)
def test_opcodes_may_be_anything(whole, tmp_path, number):
    """What is read is what PyTorch reads, where it reads anything."""
    path = tmp_path / "odd.ckpt"
    with zipfile.ZipFile(whole) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    (name,) = (name for name in members if name.endswith("/data.pkl"))
    num_read = 0
    for seed in range(number):
        odd = with_odd_opcodes(members[name], random.Random(seed))
        with zipfile.ZipFile(path, "w") as archive:
            for member, content in members.items():
                archive.writestr(member, odd if member == name else content)
        with limited_memory(MORE):
            check(path)
            try:
                contents = read_checkpoint(path)
            except UserError as error:
                assert not isinstance(error.__cause__, MemoryError)  # noqa: PT017
                continue
        num_read += 1
        try:
            expected = torch.load(path, weights_only=True)
        except Exception:  # it is stricter about what has no effect
            continue
        assert equal(contents["state_dict"], expected["state_dict"])
    assert num_read > number / 50
