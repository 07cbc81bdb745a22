"""Folders of a stranger: nothing is fetched, run or read outside, nothing hangs."""

from __future__ import annotations

import builtins
import json
import os
import shutil
import socket
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_gpt.errors import UserError
from lit_gpt.huggingface.importing import folder_fields, load_folder, read_model_config
from lit_gpt.huggingface.tokenizer import from_hf, to_hf
from lit_gpt.text.tokenizer import SINGLE_BYTES, Tokenizer

WEIGHTS = "model.safetensors"


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes))


@pytest.fixture
def quarantine(monkeypatch):
    """No network, no import of a stranger's module."""

    def refuse(*args, **kwargs):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in ("kernels", "peft"):  # which other tests import
        monkeypatch.delitem(os.sys.modules, name, raising=False)
    real = builtins.__import__

    def watched(name, *args, **kwargs):
        assert name.split(".")[0] not in ("kernels", "peft", "stranger"), name
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", watched)


HARMLESS = {  # by each of these transformers fetches, imports, runs or allocates something
    "attn_implementation": "kernels-community/stranger",
    "_attn_implementation": "kernels-community/stranger",
    "_attn_implementation_internal": "kernels-community/stranger",
    "experts_implementation": "kernels-community/stranger",
    "auto_map": {"AutoConfig": "stranger.Config", "AutoModelForCausalLM": "stranger--x.Model"},
    "custom_generate": "stranger",
    "custom_pipelines": {"x": {"impl": "stranger.P", "pt": ["AutoModel"]}},
    "fusion_config": {"x": "stranger"},
    "torch_dtype": "stranger",
    "dtype": "stranger",
    "num_labels": 10**9,
    "transformers_weights": "../outside.safetensors",
    "base_model_tp_plan": {"*": "stranger"},
    "_name_or_path": "stranger/stranger",
    "validate": 1,
    "kwargs": {"attn_implementation": "stranger/stranger"},
}


@pytest.mark.parametrize("key", HARMLESS)
def test_keys_that_make_transformers_run_something_are_not_passed_on(folder, key, quarantine):
    expected = load_folder(str(folder), 16).state_dict()
    edit(folder / "config.json", **{key: HARMLESS[key]})
    config, _ = read_model_config(folder)
    assert config._attn_implementation == "sdpa"
    assert "stranger" not in json.dumps(config.to_dict())
    found = load_folder(str(folder), 16).state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 10**9, "num_hidden_layers": 10**9}, "1000000000"),
        (
            {"n_layer": 9999, "num_hidden_layers": 9999, "layer_types": None},
            "9999 layers, but only",
        ),
        ({"n_positions": 10**9, "max_position_embeddings": 10**9, "vocab_size": 421}, "another sh"),
        ({"n_embd": 10**9 * 4, "hidden_size": 10**9}, "the weights can't be loaded"),
        ({"n_inner": 10**9, "intermediate_size": 10**9}, "has another shape"),
        ({"vocab_size": 10**12}, "has another shape"),
        ({"quantization_config": {"quant_method": "stranger"}}, "quantization_config"),
        ({"n_layer": "1" * 400, "num_hidden_layers": [1]}, "can't be read"),
    ],
    ids=str,
)
def test_a_gigantic_config_is_refused_at_once(folder, changes, message):
    start = time.perf_counter()
    edit(folder / "config.json", **changes)
    with pytest.raises(UserError) as error:
        folder_fields(folder)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert time.perf_counter() - start < 10


def deep_json(path: Path) -> None:
    path.write_text('{"a":' * 100_000 + "1" + "}" * 100_000)


def long_json(path: Path) -> None:
    path.write_text('{"a": "' + "x" * (1 << 20) + '"}')


FILES = {
    "deep json": (lambda f: deep_json(f / "config.json"), "config.json can't be read"),
    "long json": (lambda f: long_json(f / "config.json"), "larger than 1 MB"),
    "a number of 5,000 digits": (
        lambda f: (f / "config.json").write_text('{"model_type": ' + "1" * 5000 + "}"),
        "config.json",
    ),
    "only a pickle": (
        lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"),
        "the folder has no model.safetensors",
    ),
}


@pytest.mark.parametrize(("change", "message"), FILES.values(), ids=FILES)
def test_files_of_another_kind_are_one_line(folder, change, message):
    change(folder)
    with pytest.raises(UserError) as error:
        folder_fields(folder)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# The index


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "{outside}", "sub/x.safetensors", "..", "config.json", 7]
)
def test_an_index_names_only_files_of_the_folder(folder, name):
    outside = folder.parent / "outside.safetensors"
    (folder / WEIGHTS).rename(outside)
    (folder / "sub").mkdir()
    shutil.copy(outside, folder / "sub" / "x.safetensors")
    name = name.format(outside=outside) if isinstance(name, str) else name
    index = {"weight_map": dict.fromkeys(load_file(outside), name)}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="the weights can't be loaded") as error:
        load_folder(str(folder), 16)
    assert "\n" not in str(error.value)


def test_links_to_files_are_followed_as_in_the_cache_of_huggingface_hub(folder):
    expected = load_folder(str(folder), 16).state_dict()
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for i, path in enumerate(list(folder.iterdir())):
        path.rename(blobs / str(i))
        path.symlink_to(blobs / str(i))
    found = load_folder(str(folder), 16).state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_a_link_to_a_device_is_no_file(folder):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"the folder has no model\.safetensors"):
        folder_fields(folder)


def test_a_tensor_in_two_files_is_refused(folder):
    weights = load_file(folder / WEIGHTS)
    for name in ("a", "b"):
        save_file(weights, folder / f"{name}.safetensors")
    (folder / WEIGHTS).unlink()
    index = {
        "weight_map": dict(zip(weights, ["a.safetensors", "b.safetensors"] * 99, strict=False))
    }
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="is in two files"):
        folder_fields(folder)


# The headers of safetensors


def header(folder: Path, change) -> None:
    """Rewrites the header, keeping the data."""
    content = (folder / WEIGHTS).read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    head = json.loads(content[8 : 8 + size])
    new = change(head)
    new = new if isinstance(new, bytes) else json.dumps(new).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(new)) + new + content[8 + size :])


def changed(**parts):
    def change(head):
        name = next(name for name in head if name != "__metadata__")
        return head | {name: head[name] | parts}

    return change


HEADERS = {
    "a gigantic shape": changed(shape=[1 << 40, 1 << 40]),
    "a negative size": changed(shape=[-1]),
    "another type": changed(dtype="I32"),
    "an unknown type": changed(dtype="X"),
    "beyond the end": changed(data_offsets=[0, 1 << 50]),
    "the same place twice": lambda head: {
        name: part | {"data_offsets": [0, 128]} if "data_offsets" in part else part
        for name, part in head.items()
    },
    "deep": lambda head: b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "no object": lambda head: [],
    "half": lambda head: json.dumps(head).encode()[:-9],
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS)
def test_hostile_headers_are_one_line(folder, change):
    header(folder, change)
    with pytest.raises(UserError, match="the weights can't be loaded") as error:
        folder_fields(folder)
    assert "\n" not in str(error.value)


def test_a_header_longer_than_the_file(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 1 << 62) + content[8:])
    with pytest.raises(UserError, match="the weights can't be loaded"):
        folder_fields(folder)


# Tokenizers


@pytest.mark.parametrize(
    "regex",
    [
        r"(?:a|a)+b|(?m:.)",  # exponential in Oniguruma, linear in tiktoken's engine
        r"(?:a|a)+(?!b)c|(?s:.)",
        "",
        r"\p{L}+",
    ],
)
def test_hostile_patterns_are_refused_for_both_engines(folders, tmp_path, regex):
    spec = json.loads((folders / "qwen3" / "tokenizer.json").read_text(encoding="utf-8"))
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = regex
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    with pytest.raises(UserError, match="is not supported: its split pattern ") as error:
        from_hf(tmp_path)
    assert "\n" not in str(error.value)


def test_a_checkpoint_s_pattern_is_proved_before_its_export():
    pattern = r"(?:a|a)+b|(?s:.)"
    tokenizer = Tokenizer("x", pattern, [*SINGLE_BYTES, b"ab"])
    with pytest.raises(UserError, match="can't be exported"):
        to_hf(tokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab": {"a": -1}}, "ids that are not integers"),
        ({"vocab": {"a": "1"}}, "ids that are not integers"),
        ({"merges": [["", ""]], "vocab": {"": 999}}, "has an empty token"),
        ({"continuing_subword_prefix": "#"}, "continuing_subword_prefix"),  # panics in tokenizers
    ],
)
def test_a_vocabulary_that_makes_tokenizers_panic(folders, tmp_path, changes, message):
    spec = json.loads((folders / "gpt2" / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = spec["model"]["vocab"] | changes.pop("vocab", {})
    spec["model"] |= {"vocab": vocab} | changes
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    with pytest.raises(UserError) as error:
        from_hf(tmp_path)
    assert message in str(error.value)


def test_the_rest_of_tokenizer_json_is_not_used(folders, tmp_path):
    """A decoder or normalizer with a hostile pattern, an added token of a megabyte."""
    spec = json.loads((folders / "gpt2" / "tokenizer.json").read_text(encoding="utf-8"))
    replace = {"type": "Replace", "pattern": {"Regex": "(a|a)*$"}, "content": ""}
    spec |= {"decoder": replace, "post_processor": replace, "padding": 7, "truncation": "x"}
    spec["added_tokens"].append(spec["added_tokens"][0] | {"id": 10**6, "content": "x" * (1 << 20)})
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    found, plain = from_hf(tmp_path)[0], from_hf(folders / "gpt2")[0]
    assert (found.pattern, found.ranks) == (plain.pattern, plain.ranks)
    spec["normalizer"] = replace
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    with pytest.raises(UserError, match=r"normalizes text \(Replace\)"):
        from_hf(tmp_path)
