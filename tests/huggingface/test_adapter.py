"""LoRA adapters in peft's format: written for peft, trained as by peft, and read from peft."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from lit_gpt.__main__ import main
from lit_gpt.checkpoint import Checkpoint, load_checkpoint
from lit_gpt.errors import UserError
from lit_gpt.huggingface.adapter_export import base_folder, write_adapter
from lit_gpt.huggingface.architectures import hf_weights
from lit_gpt.huggingface.config import hf_config
from lit_gpt.huggingface.importing import folder_fields, load_folder, load_hf_model
from lit_gpt.huggingface.tokenizer import from_hf
from lit_gpt.lora import LoraConfig, add_adapters
from lit_gpt.model import GPT, GPTConfig
from tests.conftest import SMALL, command_line, write_text
from tests.huggingface.folders import make_folder

peft = pytest.importorskip("peft")
from transformers import AutoModelForCausalLM  # noqa: E402 - after the skip

SIZES = {"vocab_size": 60, "context_length": 16, "d_model": 24, "num_blocks": 2, "num_heads": 4}
LLAMA = {"style": "modern", "qk_norm": False, "num_kv_heads": 2}
NEOX = {"position": "rotary", "activation": "gelu", "parallel_residual": True}
ARCHITECTURES = {
    "gpt2": {"position": "learned", "activation": "gelu_tanh", "tie_embeddings": True},
    "qwen3": {"style": "modern", "num_kv_heads": 2},
    "llama": LLAMA,
    "qwen2": LLAMA | {"qkv_bias": True},
    "gpt_neox": NEOX | {"rotary_fraction": 1 / 3},
}
IDS = torch.arange(32).reshape(2, 16) * 7 % 60


def adapted(config: LoraConfig, folder: Path, **choices: Any) -> GPT:
    """A model with adapters; the model that they adapt is in the folder, as transformers has it."""
    torch.manual_seed(1)
    gpt = GPT(GPTConfig(**SIZES | {"dropout": 0.0} | choices))
    for weight in gpt.parameters():
        torch.nn.init.normal_(weight, 0.1, 0.2)
    add_adapters(gpt, config)
    for name, weight in gpt.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(weight, 0, 0.2)
    (folder / "config.json").write_text(json.dumps(hf_config(gpt.config)))
    save_file(hf_weights(gpt), folder / "model.safetensors", metadata={"format": "pt"})
    return gpt.eval()


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((ours - theirs).abs().max() < 1e-4 * max(1.0, theirs.abs().max().item()))


@pytest.mark.parametrize("layers", ["all", "attention", "feed_forward"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
@torch.inference_mode()
def test_peft_computes_the_same(kind, layers, tmp_path):
    config = LoraConfig(3, alpha=5.0, layers=layers)
    gpt = adapted(config, tmp_path, **ARCHITECTURES[kind])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert plain.config.model_type == kind
    assert not close(gpt(IDS), plain(IDS).logits)
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_adapter(folder, gpt, config, None)
    theirs = peft.PeftModel.from_pretrained(plain, folder)
    assert close(gpt(IDS), theirs(IDS).logits)
    merged = theirs.merge_and_unload()
    assert close(gpt(IDS), merged(IDS).logits)
    fields = json.loads((folder / "adapter_config.json").read_text())
    # One layer for query, key and value has three times the rank, at the same scale.
    is_one = kind in ("gpt2", "gpt_neox") and layers != "feed_forward"
    assert list(fields["rank_pattern"].values()) == [9] * is_one
    assert list(fields["alpha_pattern"].values()) == [15] * is_one


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_it_trains_as_peft_does(kind, tmp_path):
    """From the same matrices, on the same batches: the same losses and matrices."""
    layers = "feed_forward" if kind == "gpt2" else "all"
    config = LoraConfig(3, alpha=5.0, layers=layers)
    gpt = adapted(config, tmp_path, **ARCHITECTURES[kind])
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", gpt, config, None)
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    theirs.eval()  # its config has GPT-2's dropout

    def train(model: torch.nn.Module, logits: Any) -> list[float]:
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=0.01, weight_decay=0.1)
        losses = []
        for step in range(6):
            ids = (IDS * (step + 1)) % 60
            loss = F.cross_entropy(logits(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    expected = train(theirs, lambda ids: theirs(ids).logits)
    assert train(gpt, gpt) == pytest.approx(expected, rel=1e-4)
    write_adapter(tmp_path / "adapter", gpt, config, None)
    ours = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    state = peft.get_peft_model_state_dict(theirs)
    torch.testing.assert_close(ours, dict(state), atol=1e-4, rtol=1e-3)


THEIRS = {
    "alpha": {"r": 4, "lora_alpha": 12},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "patterns": {"r": 4, "lora_alpha": 4},
}


@pytest.mark.parametrize("options", THEIRS.values(), ids=THEIRS)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_an_adapter_of_peft_is_read(kind, options, tmp_path):
    adapted(LoraConfig(1), tmp_path, **ARCHITECTURES[kind])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    before = plain(IDS).logits.detach()
    names = {"gpt2": ["c_attn", "mlp.c_proj"], "gpt_neox": ["query_key_value", "dense"]}
    given = dict(options)
    if options is THEIRS["patterns"]:
        name = names.get(kind, ["self_attn.q_proj"])[0]
        given |= {"alpha_pattern": {name: 9}, "rank_pattern": {name: 2}}
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=names.get(kind, ["q_proj", "o_proj", "up_proj"]),
        fan_in_fan_out=kind == "gpt2",
        **given,
    )
    model = peft.get_peft_model(plain, config)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, 0, 0.3)
    model.eval().save_pretrained(tmp_path)
    expected = model(IDS).logits.detach()
    assert not close(before, expected)
    assert close(load_hf_model(tmp_path)(IDS).logits, expected)


def test_it_is_a_model_to_start_from(tmp_path):
    """In the folder of its model, tokenizer and all."""
    folder = make_folder(tmp_path / "folder", "qwen3")
    plain = load_folder(str(folder), 16)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    config = peft.LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(theirs, config)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, 0, 0.5)
    model.eval().save_pretrained(folder)
    gpt = load_folder(str(folder), 16)
    ids = torch.arange(16)
    rows = torch.from_numpy(from_hf(folder)[1])
    expected = model(rows[ids][None]).logits[:, :, rows]
    assert close(gpt(ids[None]), expected)
    assert not close(plain(ids[None]), expected)
    alone = tmp_path / "alone"
    model.save_pretrained(alone)
    with pytest.raises(UserError, match=r"has no config.json: copy its adapter_config.json and"):
        folder_fields(alone)


ODD: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "it uses use_dora, which lit_gpt does not implement"),
    "unknown": ({"use_new": 1}, "it uses use_new"),
    "biases": ({"bias": "all"}, "bias is 'all', not 'none'"),
    "kind": ({"peft_type": "IA3"}, "peft_type is 'IA3', not 'LORA'"),
    "pissa": ({"init_lora_weights": "pissa"}, "which changes the model itself"),
    "whole": ({"modules_to_save": ["lm_head"]}, "it uses modules_to_save"),
    "pattern": ({"alpha_pattern": {"(a+)+$": 3}}, "alpha_pattern has"),
    "list": ({"alpha_pattern": [1]}, "the weights can't be loaded"),
    "alpha": ({"lora_alpha": "x"}, "the weights can't be loaded"),
}


@pytest.fixture
def written(tmp_path) -> Path:
    config = LoraConfig(2, layers="attention")
    gpt = adapted(config, tmp_path, **ARCHITECTURES["qwen3"])
    write_adapter(tmp_path, gpt, config, None)
    load_hf_model(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("change", "message"), ODD.values(), ids=ODD)
def test_what_is_not_lora_is_one_line(written, change, message):
    path = written / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError) as error:
        load_hf_model(written)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
TENSORS = {
    "another shape": ({A: torch.ones(2, 23)}, "does not fit the model"),
    "another rank": ({A: torch.ones(3, 24)}, "do not fit each other"),
    "three dimensions": ({A: torch.ones(2, 24, 1)}, "does not fit the model"),
    "another module": ({A.replace("q_proj", "x"): torch.ones(2, 24)}, "half an adapter"),
    "another name": ({"x": torch.ones(1)}, "x is not a matrix of LoRA"),
    "integers": ({A: torch.ones(2, 24, dtype=torch.int64)}, "is not a matrix of LoRA"),
}


@pytest.mark.parametrize(("change", "message"), TENSORS.values(), ids=TENSORS)
def test_matrices_that_do_not_fit_are_one_line(written, change, message):
    path = written / "adapter_model.safetensors"
    save_file(load_file(path) | change, path)
    with pytest.raises(UserError) as error:
        load_hf_model(written)
    assert message in str(error.value)


def test_its_config_alone_is_one_line(written):
    (written / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no such file: adapter_model\.safetensors"):
        load_hf_model(written)


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_a_run_on_a_folder_is_exported_for_that_folder(kind, tmp_path, capsys, monkeypatch):
    """Peft loads what was trained here on the folder itself, whose vocabulary is larger."""
    source = make_folder(tmp_path / "source", kind)
    text = write_text(tmp_path / "text.txt")
    keep = {"data.path": text, "data.cache": tmp_path / "cache"}
    keep |= {"trainer.default_root_dir": tmp_path / "logs", "trainer.enable_progress_bar": False}
    sizes = ("model.d_model", "model.num_blocks", "model.num_heads")
    small = {name: value for name, value in SMALL.items() if name not in sizes}
    monkeypatch.chdir(tmp_path)
    options = {"model.init_from": "source", "model.lora_rank": 2, "model.learning_rate": 0.02}
    monkeypatch.setattr("sys.argv", ["train.py"])
    assert main(["train", *command_line(small | keep | options)]) == 0
    run = tmp_path / "logs" / "version_0"
    out = tmp_path / "base"  # also the name of a folder that export works with
    capsys.readouterr()
    words = [f"--ckpt_path={run}", f"--out={out}"]
    assert main(["export", *words, "--adapter"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"Logits on \d+ windows of \d+ tokens: largest difference", printed)
    assert f"Exported as a LoRA adapter of a {'GPT-2' if kind == 'gpt2' else 'Qwen3'}" in printed
    assert f"The model that it adapts:  {source}" in printed
    assert sorted(p.name for p in out.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    monkeypatch.chdir(run)  # it is found from anywhere
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(out).eval()
    gpt, _ = load_checkpoint(run / "checkpoints" / "best.ckpt")
    rows = torch.from_numpy(from_hf(source)[1])
    ids = torch.arange(16)[None] * 11 % len(rows)
    ours = gpt(ids)
    assert close(ours, theirs(rows[ids]).logits[:, :, rows])
    assert not close(ours, load_hf_model(source)(rows[ids]).logits[:, :, rows])
    # By default, the whole model.
    assert main(["export", f"--ckpt_path={run}", f"--out={tmp_path / 'whole'}"]) == 0
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    assert close(ours, whole(ids).logits)


def test_the_folder_of_the_model_is_named_if_peft_would_load_that_model(tmp_path, monkeypatch):
    def found(source: str) -> str | None:
        return base_folder(
            Checkpoint(tmp_path / "x.ckpt", {"hyper_parameters": {"init_from": source}})
        )

    (tmp_path / "config.json").touch()
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert found(f"~/{tmp_path.name}") == str(tmp_path)
    assert found(str(tmp_path / "config.json")) is None
    assert found("\0") is None
    (tmp_path / "adapter_config.json").touch()
    assert found(str(tmp_path)) is None


def test_without_adapters_there_is_none_to_export(trained, tmp_path, capsys):
    words = ["export", f"--ckpt_path={trained}", f"--out={tmp_path / 'out'}", "--adapter"]
    assert main(words) == 2
    assert "has no adapters: it was trained without LoRA" in capsys.readouterr().err
