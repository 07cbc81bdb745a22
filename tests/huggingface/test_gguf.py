"""GGUF files: what they hold, and what transformers and llama.cpp make of them."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from transformers import AutoConfig, AutoModelForCausalLM

from lit_gpt.errors import UserError
from lit_gpt.generation.sampling import Sampling, generate
from lit_gpt.huggingface import gguf_check, gguf_file
from lit_gpt.huggingface.config import hf_config
from lit_gpt.huggingface.gguf_file import end_ids, pre_tokenizer, write_gguf
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.text import patterns
from lit_gpt.text.patterns import CL100K, GPT2, QWEN2
from lit_gpt.text.tokenizer import SINGLE_BYTES, Tokenizer
from lit_gpt.text.vocabularies import load_tokenizer
from tests.huggingface.test_export import LINES, run_export, write_checkpoint

TEXT = "".join(LINES) + "It's 12345 <|endoftext|> and </s>\r\n\t 🦊 é DON'T\n\n  x = [1,  2]\n"
MODERN = {"style": "modern"}
QWEN3 = MODERN | {"num_heads": 4, "num_kv_heads": 2, "head_size": 12, "hidden_size": 40}
LLAMA = QWEN3 | {"qk_norm": False, "norm_eps": 1e-5, "rotary_base": 5e5}
GPT2_KIND = {"position": "learned", "activation": "gelu_tanh"}
KINDS = {
    "qwen3": QWEN3,
    "qwen3, untied": QWEN3 | {"tie_embeddings": False},
    "gpt2": GPT2_KIND,
    "gpt2, no biases, tied": GPT2_KIND | {"bias": False, "tie_embeddings": True},
    "gpt2, sinusoids": {"activation": "gelu_tanh"},
    "llama": LLAMA,
}


def bpe() -> Tokenizer:
    """cl100k_base, as far as TEXT needs it, with an end of text."""
    full = load_tokenizer("cl100k_base")
    return full.compact(full.encode(TEXT))[0].with_end_of_text()


def make_model(vocab_size: int, **choices: Any) -> GPT:
    """Random weights, larger than at the start of training, norms and biases too."""
    torch.manual_seed(0)
    sizes = {"context_length": 64, "d_model": 32, "num_blocks": 2, "num_heads": 4}
    model = GPT(GPTConfig(vocab_size, **sizes | choices)).eval()
    for name, weight in model.named_parameters():
        around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        torch.nn.init.normal_(weight, around, 0.15)
    return model


def write(path: Path, choices: dict, kind: str = "f32") -> tuple[GPT, Tokenizer, GGUFReader]:
    tokenizer = bpe()
    model = make_model(tokenizer.vocab_size, **choices)
    write_gguf(path, model, tokenizer, "a name", kind)
    return model, tokenizer, GGUFReader(path)


def fields(reader: GGUFReader) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


def windows(tokenizer: Tokenizer) -> torch.Tensor:
    ids = tokenizer.encode(TEXT)[: 5 * 64].astype(np.int64)
    return torch.from_numpy(ids).view(5, 64)


# What is in the file


def test_sizes_and_choices_are_named_as_in_gguf(tmp_path):
    _, _, reader = write(tmp_path / "m.gguf", QWEN3 | {"rotary_base": 5e5})
    found = fields(reader)
    expected = {
        "general.architecture": "qwen3",
        "general.name": "a name",
        "general.file_type": 0,
        "qwen3.context_length": 64,
        "qwen3.embedding_length": 32,
        "qwen3.block_count": 2,
        "qwen3.feed_forward_length": 40,
        "qwen3.attention.head_count": 4,
        "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.key_length": 12,
        "qwen3.attention.value_length": 12,
        "qwen3.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "qwen3.rope.freq_base": 5e5,
        "qwen3.rope.dimension_count": 12,
        "general.sampling.temp": pytest.approx(Sampling().temperature),
    }
    assert {name: found[name] for name in expected} == expected
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert shapes["blk.1.attn_k.weight"] == [32, 24]  # innermost first
    assert "output.weight" not in shapes  # it is the embedding


def test_the_tokenizer_is_complete(tmp_path):
    _, tokenizer, reader = write(tmp_path / "m.gguf", MODERN)
    found = fields(reader)
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    end = tokenizer.end_of_text
    assert len(tokens) == tokenizer.vocab_size == end + 1
    assert tokens[end] == "<|endoftext|>"
    assert types == [1] * end + [3]  # normal ones, and a control token
    assert tokens[tokenizer.ranks[b" sat"]] == "Ġsat"
    assert "Ġs at" in found["tokenizer.ggml.merges"]
    names = ("model", "pre", "eos_token_id", "bos_token_id", "padding_token_id")
    assert [found[f"tokenizer.ggml.{name}"] for name in names] == [
        "gpt2", "llama-bpe", end, end, end
    ]  # fmt: skip
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert "tokenizer.chat_template" not in found


def test_a_chat_models_ends_and_template_come_along(tmp_path):
    tokenizer = Tokenizer("x", CL100K, SINGLE_BYTES)
    names = ["<|im_start|>", "<|im_end|>"]
    tokenizer = tokenizer.with_special(names, {}, names[:1], names[1:])
    tokenizer = tokenizer.with_end_of_text()
    tokenizer.chat_template = "{{ messages }}"
    model = make_model(tokenizer.vocab_size, **MODERN)
    write_gguf(tmp_path / "m.gguf", model, tokenizer, "chat", "f32")
    found = fields(GGUFReader(tmp_path / "m.gguf"))
    assert found["tokenizer.ggml.tokens"][256:] == ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    assert found["tokenizer.ggml.token_type"][255:] == [1, 3, 3, 3]
    ends = {found["tokenizer.ggml.eos_token_id"], found["tokenizer.ggml.eot_token_id"]}
    assert ends == {257, 258}
    assert found["tokenizer.ggml.bos_token_id"] == 256
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.chat_template"] == "{{ messages }}"


def test_without_an_end_of_text_a_byte_that_no_text_has_ends_it():
    tokenizer = load_tokenizer("bytes")
    assert end_ids(tokenizer) == [0xFF]
    assert end_ids(tokenizer.with_end_of_text()) == [256]


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_the_same_model(kind, tmp_path):
    model, tokenizer, reader = write(tmp_path / "m.gguf", KINDS[kind])
    config = AutoConfig.for_model(**hf_config(model.config))  # it does not read all of the file's
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", config=config)
    assert fields(reader)["general.architecture"] == kind.split(",")[0]
    ids = windows(tokenizer)
    with torch.inference_mode():
        torch.testing.assert_close(theirs.eval()(ids).logits, model(ids), atol=1e-4, rtol=1e-4)


def test_types_of_weights(tmp_path):
    model, _, _ = write(tmp_path / "f32.gguf", MODERN | {"hidden_size": 40})
    weight = model.blocks[0].attention.out.weight.detach().numpy()
    sizes = []
    for kind in ("f32", "f16", "q8_0"):
        write(tmp_path / f"{kind}.gguf", MODERN | {"hidden_size": 40}, kind)
        reader = GGUFReader(tmp_path / f"{kind}.gguf")
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        sizes.append((tmp_path / f"{kind}.gguf").stat().st_size)
        assert tensors["output_norm.weight"].tensor_type == GGMLQuantizationType.F32
        found = tensors["blk.0.attn_output.weight"]
        assert found.tensor_type == GGMLQuantizationType[kind.upper()]
        if kind == "f16":
            np.testing.assert_array_equal(found.data, weight.astype(np.float16))
        if kind == "q8_0":  # blocks of 32: a scale in 2 bytes, and 32 signed bytes
            rows = found.data.reshape(len(weight), 1, 34)
            scale = np.ascontiguousarray(rows[..., :2]).view(np.float16).astype(np.float32)
            steps = np.ascontiguousarray(rows[..., 2:]).view(np.int8)
            values = (scale * steps).reshape(weight.shape)
            largest = np.abs(weight).max(axis=1, keepdims=True)
            np.testing.assert_allclose(scale[:, 0], largest / 127, rtol=1e-3)
            assert (np.abs(values - weight) <= largest / 127 * 0.51 + 1e-4).all()
            # Its rows of 40 are not whole blocks.
            assert tensors["blk.0.ffn_down.weight"].tensor_type == GGMLQuantizationType.F16
    assert sizes == sorted(sizes, reverse=True)


def test_gpt2_names_its_context_as_older_programs_do():
    assert hf_config(GPTConfig(10, context_length=48, **GPT2_KIND))["n_ctx"] == 48


# llama.cpp itself


@pytest.fixture
def llama_cpp():
    return pytest.importorskip("llama_cpp")


@pytest.mark.parametrize("kind", [*KINDS, "llama, scaled", "llama, linear", "qwen2"])
def test_llama_cpp_computes_the_same(kind, tmp_path, llama_cpp):
    scaled = {
        "rope_scaling": "llama3",
        "rope_factor": 8.0,
        "rope_original_context": 16,
    }
    more = {
        "llama, scaled": LLAMA | scaled,
        "llama, linear": LLAMA | {"rope_scaling": "linear", "rope_factor": 3.0},
        "qwen2": LLAMA | {"qkv_bias": True, "norm_eps": 1e-6},
    }
    model, tokenizer, _ = write(tmp_path / "m.gguf", (KINDS | more)[kind])
    llama = llama_cpp.Llama(
        str(tmp_path / "m.gguf"), n_ctx=64, logits_all=True, verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
    )  # fmt: skip
    ids = windows(tokenizer)[0]
    llama.eval(ids.tolist())
    with torch.inference_mode():
        ours = model(ids[None])[0].numpy()
    atol = 5e-3 if "gpt2" in kind else 1e-4  # it looks GELU up in a table of half precision
    np.testing.assert_allclose(llama.scores[:64], ours, atol=atol)
    prompt = ids[None, :4]
    expected = torch.cat(list(generate(model, prompt, 60, Sampling(temperature=0)))).tolist()
    llama.reset()
    found = [
        token
        for _, token in zip(range(60), llama.generate(ids[:4].tolist(), temp=0.0), strict=False)
    ]
    if "gpt2" not in kind:
        assert found == expected


PIECES = [
    TEXT,
    "a \n b\n\n\n  c\t\t d",
    "don't DON'T 'S we'LL x'y",
    "x\u00a0y\u3000z ١٢٣٤ ½Ⅷ 1234567",
    "😀👍🏽 e\u0301 ǅ ʰ \ud7ff\ue000\0\x7f",
    "a" * 300 + " " * 50 + "." * 40,
    "ends \n  ",
]


@pytest.mark.parametrize(
    "name", ["bytes", "cl100k_base", "o200k_base", "GPT2", "R50K", "QWEN2", "LLAMA3", "SMOLLM"]
)
def test_llama_cpp_gives_the_same_ids(name, tmp_path, llama_cpp):
    is_pattern = name.isupper()
    tokenizer = load_tokenizer("cl100k_base" if is_pattern else name)
    if name != "bytes":
        tokenizer = tokenizer.compact(tokenizer.encode("".join(PIECES)))[0]
    if is_pattern:
        tokenizer = Tokenizer("x", getattr(patterns, name), tokenizer.tokens)
    tokenizer = tokenizer.with_end_of_text()
    write_gguf(
        tmp_path / "m.gguf", make_model(tokenizer.vocab_size, **MODERN), tokenizer, "", "f32"
    )
    llama = llama_cpp.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    for text in PIECES:
        found = llama.tokenize(text.encode(), add_bos=True, special=False)  # it adds none
        assert found == tokenizer.encode(text).tolist(), text
    assert llama.token_eos() == tokenizer.end_of_text


# Refusals


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({}, "llama.cpp's GPT-2 computes gelu_tanh whatever the file says, not relu"),
        ({"activation": "gelu"}, "whatever the file says, not gelu, so it would silently"),
        ({"style": "fast"}, "what the one before it says"),
        ({"norm": "rms"}, "GPT-2 needs norm layer instead of rms"),
        ({"position": "rotary"}, "a GPT-NeoX can't be written as GGUF, only gpt2, llama"),
        (
            MODERN | {"qk_norm": False, "sliding_window": 8},
            "llama.cpp's Mistral has no sliding window (here of 8 tokens)",
        ),
    ],
)
def test_what_llama_cpp_runs_differently_is_refused(choices, message, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    path = write_checkpoint(tmp_path, bpe(), text, **choices)
    before = sorted(tmp_path.iterdir())
    status, out, err = run_export(capsys, ckpt_path=path, out=tmp_path / "m.gguf", format="gguf")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert sorted(tmp_path.iterdir()) == before


def test_splits_and_tokens_that_llama_cpp_lacks_are_refused():
    with pytest.raises(UserError, match="does not split text as this tokenizer does"):
        pre_tokenizer(Tokenizer("x", r"\w+|\W+", SINGLE_BYTES))
    assert pre_tokenizer(Tokenizer("x", GPT2, [*SINGLE_BYTES, b"ab", b"abc"])) == "gpt-2"
    alone = [*SINGLE_BYTES, "猫".encode()]
    for pattern in (GPT2, QWEN2, load_tokenizer("bytes").pattern):
        with pytest.raises(UserError, match=r"no token that merges don't lead to, as 1 .*'猫'"):
            pre_tokenizer(Tokenizer("x", pattern, alone))
    assert pre_tokenizer(Tokenizer("x", CL100K, alone)) == "llama-bpe"  # finds whole pieces


def test_a_special_token_with_the_name_of_an_ordinary_one_is_refused(tmp_path):
    name = b"<|endoftext|>"
    parts = [name[:end] for end in range(2, len(name) + 1)]
    tokenizer = Tokenizer("x", CL100K, [*SINGLE_BYTES, *parts]).with_end_of_text()
    model = make_model(tokenizer.vocab_size, **MODERN)
    with pytest.raises(UserError, match=r"has <\|endoftext\|> as an ordinary and as a special"):
        write_gguf(tmp_path / "m.gguf", model, tokenizer, "", "f32")


# The command


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    return write_checkpoint(tmp_path, bpe(), text, context_length=64, **MODERN)


def test_the_command_runs_llama_cpp_before_the_file_gets_its_name(
    checkpoint, tmp_path, capsys, llama_cpp
):
    out = tmp_path / "my-model.gguf"
    status, printed, err = run_export(capsys, ckpt_path=checkpoint, out=out, format="gguf")
    assert (status, err) == (0, "")
    size, logits, ids, text, made, use = printed.splitlines()
    assert size == f"Size: {out.stat().st_size:,} bytes"
    assert re.fullmatch(r"Logits on 8 windows of 64 tokens: largest .*, below 1e-0\d", logits)
    num_tokens = len(bpe().encode(TEXT))
    assert ids == f"llama.cpp: {num_tokens:,} tokens of the text identical"
    assert re.fullmatch(r"llama.cpp: greedy text after 5 prompts, \d+ tokens, identical.*", text)
    assert made == f"Exported as Qwen3: {out}"
    python, option, code = shlex.split(use.removeprefix("Use it:  "))
    assert (python, option) == ("python", "-c")
    exec(code, {})
    assert capsys.readouterr().out.strip()
    assert fields(GGUFReader(out))["general.name"] == "my-model"


def test_without_llama_cpp_it_says_so(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    options = {"ckpt_path": checkpoint, "out": tmp_path / "m.gguf", "format": "gguf"}
    status, out, _ = run_export(capsys, **options, type="q8_0")
    assert status == 0
    assert "llama.cpp: not run, because llama-cpp-python is not installed" in out
    found = re.search(r"largest difference (\S+)\n", out)
    assert 1e-3 < float(found[1]) < 1


def test_smaller_types_say_how_much_text_is_the_same(checkpoint, tmp_path, capsys, llama_cpp):
    options = {"ckpt_path": checkpoint, "out": tmp_path / "m.gguf", "format": "gguf"}
    status, out, _ = run_export(capsys, **options, type="q8_0")
    assert status == 0
    assert re.search(r"after 5 prompts, \d+ of \d+ tokens as in f32 before the first other", out)
    # The embedding, and seven in each of two blocks, have rows of 16 or 48.
    assert "bytes; 15 of 15 matrices are f16, as their rows are no multiple of 32\n" in out


def other_weight(as_gguf: Any) -> Any:
    return lambda *args: as_gguf(*args) + (0.01 if "attn_norm" in args[2] else 0)


def wrong_base(add: Any) -> Any:
    return lambda writer, config, kind: add(
        writer, GPTConfig(**vars(config) | {"rotary_base": 100.0}), kind
    )


def without_merge(add: Any) -> Any:
    def changed(writer: Any, tokenizer: Tokenizer) -> None:
        original = writer.add_token_merges
        writer.add_token_merges = lambda merges: original(merges[:-40])
        writer.add_tokenizer_pre = lambda _: type(writer).add_tokenizer_pre(writer, "gpt-2")
        add(writer, tokenizer)

    return changed


def other_end(add: Any) -> Any:
    def changed(writer: Any, tokenizer: Tokenizer) -> None:
        writer.add_eos_token_id = lambda _: type(writer).add_eos_token_id(writer, 11)
        add(writer, tokenizer)

    return changed


@pytest.mark.parametrize(
    ("name", "change", "message", "needs_llama"),
    [
        ("as_gguf", other_weight, "the exported model's logits differ by up to", False),
        ("add_config", wrong_base, "the exported model's greedy text differs from token", True),
        ("add_tokenizer", without_merge, "llama.cpp splits the text differently, near", True),
        ("add_tokenizer", other_end, "llama.cpp treats the token", True),
    ],
)
def test_each_comparison_can_fail(
    name, change, message, needs_llama, checkpoint, tmp_path, capsys, monkeypatch
):
    if needs_llama:
        pytest.importorskip("llama_cpp")
    monkeypatch.setattr(gguf_file, name, change(getattr(gguf_file, name)))
    before = sorted(tmp_path.iterdir())
    status, out, err = run_export(
        capsys, ckpt_path=checkpoint, out=tmp_path / "m.gguf", format="gguf"
    )
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("is_special", [True, False])
def test_llama_cpp_may_not_end_at_an_ordinary_token(is_special, tmp_path, capsys, llama_cpp):
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    words = [] if is_special else [b"</", b"</s", b"</s>"]
    tokenizer = Tokenizer("x", CL100K, [*SINGLE_BYTES, *words])
    names = ["</s>"] if is_special else []  # which llama.cpp takes for an end by its name
    tokenizer = tokenizer.with_special(names, {}, [], []).with_end_of_text()
    path = write_checkpoint(tmp_path, tokenizer, text, **MODERN)
    status, _, err = run_export(capsys, ckpt_path=path, out=tmp_path / "m.gguf", format="gguf")
    if is_special:
        assert status == 0
    else:
        assert (status, err.count("\n")) == (2, 1)
        assert "llama.cpp treats the token '</s>' as end of generation, unlike the model" in err


def test_other_text_of_llama_cpp_is_refused(checkpoint, tmp_path, capsys, monkeypatch, llama_cpp):
    original = gguf_check.LlamaCpp.greedy
    monkeypatch.setattr(
        gguf_check.LlamaCpp, "greedy", lambda *args: [i ^ 1 for i in original(*args)]
    )
    status, _, err = run_export(
        capsys, ckpt_path=checkpoint, out=tmp_path / "m.gguf", format="gguf"
    )
    assert (status, err.count("\n")) == (2, 1)
    assert "greedy text differs from token 1 of" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": "model", "format": "gguf"}, "is not the name of a GGUF file; end the name in"),
        ({"out": "m.gguf"}, "names a GGUF file, but a folder is written; add --format=gguf"),
        ({"out": "m", "type": "f16"}, "--type 'f16': only GGUF files have types of weights"),
        ({"out": "there.gguf", "format": "gguf"}, "already exists; name a new file"),
        ({"out": "empty.gguf", "format": "gguf"}, "already exists; name a new file"),
        ({"out": "m.gguf", "format": "gguf", "type": "q4_0"}, "q4_0"),
        ({"out": "m.gguf", "format": "onnx"}, "onnx"),
    ],
)
def test_wrong_options_are_one_line(options, message, checkpoint, tmp_path, capsys):
    (tmp_path / "there.gguf").touch()
    (tmp_path / "empty.gguf").mkdir()
    options = options | {"out": tmp_path / options["out"], "ckpt_path": checkpoint}
    status, out, err = run_export(capsys, **options)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_without_the_package_it_says_what_to_install(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    status, _, err = run_export(
        capsys, ckpt_path=checkpoint, out=tmp_path / "m.gguf", format="gguf"
    )
    assert (status, err.count("\n")) == (2, 1)
    assert 'GGUF files need the package gguf; install it with pip install -e ".[hf]"' in err


def test_a_model_without_an_end_of_text_is_exported(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    path = write_checkpoint(tmp_path, load_tokenizer("bytes"), text, **MODERN)
    out = tmp_path / "m.gguf"
    status, printed, _ = run_export(capsys, ckpt_path=path, out=out, format="gguf")
    assert status == 0
    assert "no end-of-text token: llama.cpp writes until its limit\n" in printed
    assert fields(GGUFReader(out))["tokenizer.ggml.eos_token_id"] == 0xFF
