"""Runs that start from a GGUF file."""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from transformers import AutoModelForCausalLM

from lit_gpt.checkpoint import load_checkpoint
from lit_gpt.errors import UserError
from lit_gpt.generation.completion import encode_prompt
from lit_gpt.huggingface import gguf_file, gguf_import
from lit_gpt.huggingface.gguf_file import write_gguf
from lit_gpt.huggingface.gguf_import import as_folder
from lit_gpt.huggingface.importing import load_folder
from lit_gpt.huggingface.llama_cpp import LlamaCpp
from lit_gpt.huggingface.tokenizer import from_hf
from lit_gpt.text.patterns import CL100K, QWEN2
from lit_gpt.text.tokenizer import SINGLE_BYTES, Tokenizer
from tests.conftest import SMALL
from tests.huggingface.test_gguf import GPT2_KIND, LLAMA, MODERN, QWEN3, TEXT, bpe, make_model

LLAMA3 = {"rope_scaling": "llama3", "rope_factor": 32.0, "rope_original_context": 8192}
KINDS = {
    "qwen3": QWEN3,
    "qwen3, untied": QWEN3 | {"tie_embeddings": False},
    "qwen2": LLAMA | {"qkv_bias": True, "head_size": 8},
    "llama": LLAMA,
    "llama, biases": LLAMA | {"bias": True},
    "llama, scaled": LLAMA | LLAMA3,
    "gpt2": GPT2_KIND,
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user_cache"))
    return tmp_path / "user_cache"


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_exported_comes_back(kind, tmp_path):
    tokenizer = bpe()
    model = make_model(tokenizer.vocab_size, **KINDS[kind])
    write_gguf(tmp_path / "m.gguf", model, tokenizer, "", "f32")
    folder = as_folder(tmp_path / "m.gguf")
    found = load_folder(str(folder), 64)  # which compares it with transformers
    ids = torch.from_numpy(tokenizer.encode(TEXT)[:64].astype(np.int64))
    theirs = from_hf(folder)[0]
    assert theirs.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
    assert theirs.end_of_text == tokenizer.end_of_text
    with torch.inference_mode():
        torch.testing.assert_close(found(ids[None]), model(ids[None]), atol=1e-5, rtol=1e-5)
    assert vars(found.config) | {"dropout": 0.1} == vars(model.config)
    assert as_folder(tmp_path / "m.gguf") == folder  # made once


def test_a_quantized_file_is_what_transformers_reads(tmp_path):
    tokenizer = bpe()
    model = make_model(tokenizer.vocab_size, **LLAMA | {"head_size": 8})
    write_gguf(tmp_path / "m.gguf", model, tokenizer, "", "q8_0")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    ).eval()
    found = load_folder(str(as_folder(tmp_path / "m.gguf")), 64)
    ids = torch.from_numpy(tokenizer.encode(TEXT)[:64].astype(np.int64))[None]
    with torch.inference_mode():
        torch.testing.assert_close(found(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
        assert (found(ids) - model(ids)).abs().max() > 1e-3


def test_special_tokens_and_the_chat_template_come_along(tmp_path):
    tokenizer = Tokenizer("x", CL100K, SINGLE_BYTES)
    names = ["<|im_start|>", "<|im_end|>"]
    tokenizer = tokenizer.with_special(names, {}, [], names[1:]).with_end_of_text()
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
    write_gguf(
        tmp_path / "m.gguf", make_model(tokenizer.vocab_size, **MODERN), tokenizer, "", "f32"
    )
    found = from_hf(as_folder(tmp_path / "m.gguf"))[0]
    assert found.special == tokenizer.special
    assert found.end_ids == tokenizer.end_ids == {257, 258}
    assert found.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("pattern", [CL100K, QWEN2], ids=["llama-bpe", "qwen2"])
@pytest.mark.parametrize("is_told", [True, False])
def test_a_prompt_starts_as_in_llama_cpp(is_told, pattern, tmp_path):
    """How text is split decides what a file does not say."""
    pytest.importorskip("llama_cpp")
    plain = Tokenizer("x", pattern, SINGLE_BYTES)
    tokenizer = plain.with_special(["<|start|>"], {}, ["<|start|>"], []).with_end_of_text()
    model = make_model(tokenizer.vocab_size, **MODERN)
    write_gguf(tmp_path / "told.gguf", model, tokenizer, "", "f32")
    drop = "" if is_told else "tokenizer.ggml.add_bos_token"
    rewritten(tmp_path / "told.gguf", tmp_path / "m.gguf", {}, drop)
    llama = LlamaCpp(tmp_path / "m.gguf", 64)
    expected = llama.llama.tokenize(b"Hi", add_bos=True, special=False)
    llama.close()
    found = from_hf(as_folder(tmp_path / "m.gguf"))[0]
    assert encode_prompt(found, "Hi") == expected
    assert found.start_names == (["<|start|>"] if is_told or pattern == CL100K else [])


def test_a_run_starts_from_a_file_and_resumes_without_its_folder(train, tmp_path, cache):
    tokenizer = bpe()
    model = make_model(tokenizer.vocab_size, **QWEN3)
    write_gguf(tmp_path / "m.gguf", model, tokenizer, "", "f32")
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 3, encoding="utf-8")
    small = {name: value for name, value in SMALL.items() if not name.startswith("model.")}
    small |= {"data.path": text, "data.cache": tmp_path / "cache"}
    small |= {"trainer.default_root_dir": tmp_path / "logs"}
    start = {"model.init_from": tmp_path / "m.gguf", "trainer.max_steps": 2}
    result = train(defaults=small, **start)
    assert result.status == 0, result.err
    shutil.rmtree(cache)
    result = train("--ckpt_path=last", defaults=small | start, **{"trainer.max_steps": 3})
    assert result.status == 0, result.err
    path = next((tmp_path / "logs").rglob("last.ckpt"))
    tuned, theirs = load_checkpoint(path)
    assert tuned.config.num_kv_heads == 2
    assert theirs.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
    drift = (tuned.state_dict()["embedding.weight"] - model.embedding.weight).abs().max()
    assert 0 < drift < 0.1


def rewritten(
    source: Path, target: Path, changes: dict, drop: str = "", more: bool = False
) -> None:
    """A copy of a file with other texts and numbers in its head."""
    reader = GGUFReader(source)
    kind = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(target, changes.pop("general.architecture", kind))
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", drop):
            continue
        value = changes.pop(name, field.contents())
        writer.add_key_value(name, value, field.types[0], field.types[-1])
    for name, value in changes.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(name, value)
    for tensor in reader.tensors:
        if tensor.name != drop:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    if more:
        writer.add_tensor("blk.0.ffn_gate_inp.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("changes", "other", "message"),
    [
        ({"general.architecture": "gemma"}, {}, "its architecture is 'gemma', not one of gpt2"),
        (
            {"tokenizer.ggml.pre": "tekken"},
            {},
            "its tokenizer is 'gpt2', 'tekken', not",
        ),
        ({"tokenizer.ggml.model": "llama"}, {}, "its tokenizer is 'llama'"),
        ({"llama.rope.scaling.type": "yarn"}, {}, "its rope.scaling.type is 'yarn', which is not"),
        ({"llama.expert_count": 8}, {}, "its expert_count is 8"),
        ({"llama.attention.head_count": 0}, {}, "can't be read (ZeroDivisionError"),
        ({}, {"more": True}, "it has a tensor blk.0.ffn_gate_inp.weight, which is not supported"),
        ({}, {"drop": "token_embd.weight"}, "can't be read (KeyError: 'token_embd.weight')"),
    ],
)
def test_what_can_not_be_done_is_refused(changes, other, message, tmp_path, cache):
    tokenizer = bpe()
    model = make_model(tokenizer.vocab_size, **LLAMA)
    write_gguf(tmp_path / "right.gguf", model, tokenizer, "", "f32")
    rewritten(tmp_path / "right.gguf", tmp_path / "m.gguf", dict(changes), **other)
    with pytest.raises(UserError) as refused:
        load_folder(str(as_folder(tmp_path / "m.gguf")), 64)
    assert message in str(refused.value)
    assert not list(cache.rglob("*.safetensors"))


def test_unknown_scaling_is_refused(tmp_path):
    model = make_model(300, **LLAMA | LLAMA3 | {"rope_factor": 5.0})
    tensors = dict(gguf_file.tensors(model, "llama"))

    class Tensor:
        data = tensors["rope_freqs.weight"]
        tensor_type = 0

    with pytest.raises(gguf_import.Unsupported, match="scaled in an unknown way"):
        gguf_import.scaled(make_model(300, **LLAMA).config, {"rope_freqs.weight": Tensor})


LONG_LIST = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, 0, 1 << 60)


@pytest.mark.parametrize(
    "content", [LONG_LIST, b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 16, b"x" * 5000]
)
def test_damaged_files_are_one_line(content, tmp_path):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(UserError, match="can't be read") as refused:
        as_folder(tmp_path / "m.gguf")
    assert "\n" not in str(refused.value)


@pytest.fixture
def file(tmp_path) -> Path:
    tokenizer = bpe()
    model = make_model(tokenizer.vocab_size, **QWEN3)
    write_gguf(tmp_path / "m.gguf", model, tokenizer, "", "f32")
    return tmp_path / "m.gguf"


def test_another_process_may_convert_the_file_at_the_same_time(file, monkeypatch):
    """The first one's folder stays."""
    rename = Path.rename

    def overtaken(made: Path, folder: Path) -> Path:
        shutil.copytree(made, folder)
        return rename(made, folder)

    monkeypatch.setattr(Path, "rename", overtaken)
    folder = as_folder(file)
    assert load_folder(str(folder), 64)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_what_a_killed_process_left_is_removed(file, tmp_path):
    root = as_folder(file).parent
    (root / "unfinished-x").mkdir()
    for name in ("lock", "model.safetensors"):
        (root / "unfinished-x" / name).touch()
    os.utime(root / "unfinished-x", (0, 0))
    other = Path(shutil.copy(file, tmp_path / "other.gguf"))
    assert {as_folder(file), as_folder(other)} == {*root.iterdir()}


def test_a_shortage_is_not_the_file_s_fault(file, monkeypatch, small_disk):
    def no_memory(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(gguf_import, "weights_of", no_memory)
        with pytest.raises(UserError, match="out of memory"):
            as_folder(file)
    monkeypatch.setenv("XDG_CACHE_HOME", str(small_disk(40)))
    with pytest.raises(UserError, match="no space left on the disk"):
        as_folder(file)
