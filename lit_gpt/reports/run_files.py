"""Reads the files of a run's folder, which may be a stranger's: in bounded memory and time."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from lit_gpt.command import check_parts

MAX_OPTIONS = 1_000_000  # bytes of a config.yaml; a run's own has 2,000
MAX_NAME = 1000  # characters of the names that lead to a value
MAX_NUMBER = 100  # characters of a number in it
MAX_RECORD = 1 << 20  # bytes of an event; those of curves have 100
EVENTS = "events.out.tfevents.*"


def load_tree(text: bytes) -> Any:
    """What a stranger's YAML holds.

    Raises:
        yaml.YAMLError, or one of the errors of unexpected types: it is not what a run writes.
        RecursionError: it is nested too deeply.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Without merge keys, which can double what they merge without end, and long numbers."""

        def flatten_mapping(self, node: Any) -> None:
            pass

        def construct_scalar(self, node: Any) -> Any:
            value = super().construct_scalar(node)
            if node.tag != "tag:yaml.org,2002:str" and len(value) > MAX_NUMBER:
                raise ValueError(f"a number of {len(value):,} characters")
            return value

    tree = yaml.load(text, Loader)
    check_parts(tree)
    return tree


def load_options(text: bytes) -> dict[str, str]:
    """The values in YAML by their full names, `model.d_model`, as typed in a shell.

    Raises: as `load_tree` does.
    """
    return flatten(load_tree(text) or {})


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """{"model": {"d_model": 80}} to {"model.d_model": "80"}, with values as typed in a shell."""
    options: dict[str, str] = {}
    if len(prefix) > MAX_NAME:
        raise ValueError("the name of a value is too long")
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            options |= flatten(value, f"{prefix}{name}.")
        else:
            text = json.dumps(value, ensure_ascii=False, default=str)
            options[f"{prefix}{name}"] = value if isinstance(value, str) else text
    return options


def read_curves(folder: Path, names: Collection[str]) -> dict[str, dict[int, float]]:
    """The curves in a folder's TensorBoard events: values by step, the newest of each.

    TensorBoard's own reader takes as much memory as a damaged file says a record has.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    curves: dict[str, dict[int, float]] = {}
    for path in sorted(folder.glob(EVENTS)):
        try:
            for record in records(path):
                event = Event.FromString(record)
                for value in event.summary.value:
                    if value.tag in names and value.HasField("simple_value"):
                        curves.setdefault(value.tag, {})[event.step] = value.simple_value
        except (OSError, DecodeError):  # what came before it is of use
            continue
    return curves


def records(path: Path) -> Iterator[bytes]:
    """The records of an event file (TFRecord), up to one that is damaged; large ones are left out.

    Each has its length (8 bytes) with a checksum (4), its content, and a checksum of that.
    """
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    if not path.is_file():
        return
    with path.open("rb") as file:
        while len(head := file.read(12)) == 12:
            length, checksum = struct.unpack("<QI", head)
            if masked_crc32c(head[:8]) != checksum:
                return
            if length > MAX_RECORD:
                if file.tell() + length > path.stat().st_size:
                    return
                file.seek(length + 4, os.SEEK_CUR)
                continue
            content = file.read(length)
            end = file.read(4)
            if len(end) < 4 or masked_crc32c(content) != struct.unpack("<I", end)[0]:
                return
            yield content
