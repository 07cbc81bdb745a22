"""Special tokens in an export, and the programs that need them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

from lit_gpt.checkpoint import load_checkpoint
from lit_gpt.generation.sampling import Sampling, generate
from lit_gpt.huggingface.architectures import hf_weights
from lit_gpt.huggingface.gguf_import import as_folder
from lit_gpt.huggingface.importing import load_hf_model
from lit_gpt.huggingface.llama_cpp import LlamaCpp
from lit_gpt.huggingface.tokenizer import from_hf
from lit_gpt.text.vocabularies import load_tokenizer
from tests.huggingface.test_export import LINES, run_export, write_checkpoint

END = "<|endoftext|>"
IDS = torch.arange(32).reshape(2, 16)
ROLES = ("bos_token", "eos_token", "pad_token")
STYLES = {"gpt2": {}, "qwen3": {"style": "modern"}}


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(LINES[:9]), encoding="utf-8")
    return path


@pytest.fixture
def export(text, tmp_path, capsys):
    """`export("qwen3", tokenizer)`: the folder, the checkpoint, and what is printed."""

    def export(kind: str, tokenizer, **choices) -> tuple[Path, Path, str]:
        choices = STYLES[kind] | {"context_length": 32} | choices
        path = write_checkpoint(tmp_path, tokenizer, text, **choices)
        status, out, err = run_export(capsys, ckpt_path=path, out=tmp_path / "folder")
        assert (status, err) == (0, "")
        return tmp_path / "folder", path, out

    return export


@pytest.mark.parametrize("is_used", [True, False])
@pytest.mark.parametrize("kind", STYLES)
def test_the_end_of_text_begins_ends_and_pads(kind, is_used, export):
    tokenizer = load_tokenizer("bytes").with_end_of_text().with_end_used(is_used)
    folder, _, out = export(kind, tokenizer)
    assert "Missing" not in out
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert (", 256 ends a text" in card) == is_used
    auto = AutoTokenizer.from_pretrained(folder)
    assert [getattr(auto, role) for role in ROLES] == [END] * 3
    assert [getattr(auto, f"{role}_id") for role in ROLES] == [256] * 3
    config = AutoConfig.from_pretrained(folder)
    assert [getattr(config, f"{role}_id") for role in ROLES] == [256] * 3
    raw = json.loads((folder / "generation_config.json").read_text())
    assert [raw[f"{role}_id"] for role in ROLES] == [256] * 3
    assert "max_length" not in raw
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.temperature, generation.top_k) == (Sampling().temperature, 0)
    assert auto.encode(f"a {END}") == [*b"a ", 256]  # TRL writes it so
    assert auto.encode(END, split_special_tokens=True) == list(END.encode())
    batch = auto(["ab", "a"], padding=True)
    assert batch["input_ids"] == [[97, 98], [97, 256]]


def test_a_model_without_one_is_exported_with_a_line_that_says_so(export):
    folder, _, out = export("gpt2", load_tokenizer("bytes"))
    (line,) = [line for line in out.splitlines() if line.startswith("Missing")]
    assert "no end-of-text token, and with it bos, eos and pad" in line
    auto = AutoTokenizer.from_pretrained(folder)
    assert [getattr(auto, role) for role in ROLES] == [None] * 3
    config = json.loads((folder / "config.json").read_text())
    assert [config[f"{role}_id"] for role in ROLES] == [None] * 3


@pytest.mark.parametrize("kind", STYLES)
def test_a_pipeline_writes_our_text_and_no_more_than_is_asked_for(kind, export, recwarn):
    folder, path, _ = export(kind, load_tokenizer("bytes").with_end_of_text())
    write = pipeline("text-generation", str(folder))
    (found,) = write("The", max_new_tokens=8, do_sample=False, return_full_text=False)
    model, tokenizer = load_checkpoint(path)
    ids = torch.tensor([tokenizer.encode("The").astype(int)])
    ours = [int(i) for i in generate(model, ids, 8, Sampling(temperature=0))]
    written = tokenizer.decode(ours[: ours.index(256)] if 256 in ours else ours)
    assert found["generated_text"] == written
    assert not [warning for warning in recwarn if "max_length" in str(warning.message)]


def test_visible_tokens_are_shown_by_other_programs(text, tmp_path, capsys, monkeypatch):
    """Such as Qwen3's <think>, also where the text that is compared has it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user_cache"))
    names = ["<think>", "<|im_end|>"]
    plain = load_tokenizer("bytes").with_special(names, {}, [], names[1:], names[:1])
    tokenizer = plain.with_end_of_text()
    with text.open("a", encoding="utf-8") as file:
        file.write("a <think> b <|im_end|>\n")
    path = write_checkpoint(tmp_path, tokenizer, text, context_length=32, style="modern")
    out = tmp_path / "folder"
    status, _, err = run_export(capsys, ckpt_path=path, out=out)
    assert (status, err) == (0, "")
    ids = [256, 97, 257]
    auto = AutoTokenizer.from_pretrained(out)
    assert auto.decode(ids, skip_special_tokens=True) == "<think>a"
    assert from_hf(out)[0].visible_names == names[:1]
    pytest.importorskip("llama_cpp")
    out = tmp_path / "m.gguf"
    status, _, err = run_export(capsys, ckpt_path=path, out=out, format="gguf")
    assert (status, err) == (0, "")
    llama = LlamaCpp(out, 32)
    assert llama.decode_bytes(ids) == b"<think>a"
    llama.close()
    assert from_hf(as_folder(out))[0].visible_names == names[:1]


@pytest.mark.parametrize("kind", STYLES)
def test_the_libraries_below_transformers_read_it(kind, export):
    folder, path, _ = export(kind, load_tokenizer("bytes").with_end_of_text())
    model, tokenizer = load_checkpoint(path)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert theirs.encode(LINES[0]).ids == tokenizer.encode(LINES[0]).tolist()
    assert theirs.encode(f"a{END}").ids == [97, 256]
    found, expected = load_file(folder / "model.safetensors"), hf_weights(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def their_trainer(folder: Path, out: Path, **choices: Any) -> Any:
    """TRL's, of two steps on texts, for the model in a folder."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    options = trl.SFTConfig(
        output_dir=str(out),
        max_steps=2,
        per_device_train_batch_size=2,
        max_length=16,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    rows = datasets.Dataset.from_dict({"text": ["a cat", "the dog sat"] * 4})
    auto = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    return trl.SFTTrainer(model, args=options, train_dataset=rows, processing_class=auto, **choices)


@pytest.mark.parametrize("kind", STYLES)
def test_trl_trains_it(kind, export, tmp_path):
    folder, _, _ = export(kind, load_tokenizer("bytes").with_end_of_text().with_end_used(False))
    trainer = their_trainer(folder, tmp_path / "trl")
    model = trainer.model
    before = model.get_input_embeddings().weight.detach().clone()
    assert trainer.train().global_step == 2
    # Rows are trained from the first character to the end of text, which TRL puts there.
    moved = (model.get_input_embeddings().weight.detach() - before).abs().amax(dim=1)
    assert moved[ord("a")] > 1e-3
    assert trainer.train_dataset[0]["input_ids"] == [*b"a cat", 256]


@pytest.mark.parametrize("kind", STYLES)
def test_trl_trains_adapters_of_peft_which_we_read(kind, export, tmp_path):
    peft = pytest.importorskip("peft")
    folder, _, _ = export(kind, load_tokenizer("bytes").with_end_of_text())
    before = load_hf_model(folder)(IDS).logits
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = their_trainer(folder, tmp_path / "trl", peft_config=config)
    assert trainer.train().global_step == 2
    trainer.save_model(str(folder))
    theirs = trainer.model.eval()(IDS).logits
    assert (theirs - before).abs().max() > 1e-3
    assert torch.allclose(load_hf_model(folder)(IDS).logits, theirs, atol=1e-4)


@pytest.mark.parametrize("kind", STYLES)
def test_ctranslate2_writes_the_same_text(kind, export, tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2")
    folder, path, _ = export(kind, load_tokenizer("bytes").with_end_of_text())
    out = tmp_path / "ct2"
    ctranslate2.converters.TransformersConverter(str(folder)).convert(str(out))
    auto = AutoTokenizer.from_pretrained(folder)
    generator = ctranslate2.Generator(str(out))
    prompt = auto.convert_ids_to_tokens(auto.encode("The"))
    (found,) = generator.generate_batch(
        [prompt], max_length=12, sampling_topk=1, include_prompt_in_result=False
    )
    model, _ = load_checkpoint(path)
    ids = torch.tensor([list(b"The")])
    ours = [int(i) for i in generate(model, ids, 12, Sampling(temperature=0))]
    ours = ours[: ours.index(256)] if 256 in ours else ours
    assert found.sequences_ids[0] == ours
