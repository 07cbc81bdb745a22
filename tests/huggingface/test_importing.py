"""Starting from a GPT-2 or Qwen3 folder that transformers made: weights, tokenizer, options."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GemmaConfig

from lit_gpt.__main__ import main
from lit_gpt.checkpoint import Checkpoint, load_checkpoint
from lit_gpt.data import EvalBatches, TextDataModule
from lit_gpt.errors import UserError
from lit_gpt.huggingface.importing import check_logits, load_folder, load_hf_model
from lit_gpt.huggingface.tokenizer import from_hf
from lit_gpt.text.utf8 import unfinished_bytes
from lit_gpt.training.init_from import build_data, model_fields
from tests.conftest import SMALL
from tests.huggingface.folders import KINDS, TEXT, make_folder, make_model

PLAIN = {name: value for name, value in SMALL.items() if not name.startswith("model.")}
FINE_TUNING = TEXT[:3000] + "<|endoftext|> is text here, and <think> too. e\u0301\n" * 30


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "own.txt"
    path.write_text(FINE_TUNING, encoding="utf-8")
    return path


@pytest.fixture
def tune(train, text, tmp_path):
    """train.py on FINE_TUNING from a folder, in this process, without options of the model."""

    def run(source, *args: str, only=PLAIN, **options):
        places = {"data.path": text, "data.cache": tmp_path / "cache", "model.init_from": source}
        places["trainer.default_root_dir"] = tmp_path / "logs"
        return train(*args, defaults=only | places, **options)

    return run


def checkpoint_of(result) -> Path:
    return Path(result.run.trainer.log_dir) / "checkpoints" / "last.ckpt"


def their_loss(folder: Path, data: TextDataModule, split: str) -> float:
    """transformers' own, on the windows of the evaluation, of the tokens that we have."""
    theirs, rows = load_hf_model(folder), torch.from_numpy(from_hf(folder)[1])
    h, splits = data.hparams, {"train": data.train_tokens, "val": data.val_tokens}
    windows = (min(map(len, splits.values())) - 1) // h.context_length
    batches = EvalBatches(splits[split], h.batch_size, h.context_length, windows, limit=2)
    with torch.inference_mode():
        losses = [
            F.cross_entropy(theirs(rows[x]).logits[..., rows].flatten(0, 1), y.flatten())
            for x, y in batches
        ]
    return torch.stack(losses).mean().item()


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_starts_at_transformers_own_loss(tune, folders, text, tmp_path, kind):
    source = folders / kind
    result = tune(source, **{"trainer.max_steps": 2})
    assert (result.status, result.err) == (0, "")
    assert f"Weights, model and tokenizer: {source}" in result.out
    options = {"path": str(text), "tokenizer": str(source), "cache": str(tmp_path / "cache")}
    data = build_data(TextDataModule, context_length=16, **options)
    found = [float(part.split()[-1]) for part in result.steps[0].split(",")[1:]]
    expected = [their_loss(source, data, split) for split in ("train", "val")]
    assert found == pytest.approx(expected, abs=6e-4)  # printed with three places
    assert min(expected) > 3  # random weights, so not what any model would have


VARIANTS = [
    ("gpt2", {}),
    ("gpt2", {"activation_function": "gelu", "n_inner": 72, "tie_word_embeddings": False}),
    ("gpt2", {"activation_function": "relu"}),
    ("qwen3", {}),
    ("qwen3", {"tie_word_embeddings": False, "num_key_value_heads": 4, "head_dim": 8}),
    ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}),
]


@pytest.mark.parametrize(("kind", "changes"), VARIANTS, ids=str)
def test_logits_are_transformers_own(tmp_path, kind, changes):
    folder = make_folder(tmp_path, kind, **changes)
    tokenizer, rows = from_hf(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    for context_length in (1, 20, 48):
        model = load_folder(str(folder), context_length)
        ids = torch.from_numpy(tokenizer.encode(TEXT)[:context_length].astype("int64"))[None]
        with torch.inference_mode():
            expected = theirs(torch.from_numpy(rows)[ids]).logits[..., rows]
            assert (model(ids) - expected).abs().max() < 1e-4
        assert expected.std() > 0.3
        assert model.config.context_length == context_length
        assert model.config.vocab_size == tokenizer.vocab_size


def test_fields_of_a_folder_s_model(folders):
    fields = {kind: model_fields(str(folders / kind)) for kind in KINDS}
    gpt2 = {"d_model": 32, "num_blocks": 2, "num_heads": 4, "num_kv_heads": 4, "head_size": 8}
    gpt2 |= {"hidden_size": 128, "activation": "gelu_tanh", "position": "learned", "norm": "layer"}
    gpt2 |= {"bias": True, "tie_embeddings": True, "qk_norm": False, "context_length": 48}
    assert gpt2.items() <= fields["gpt2"].items()
    qwen3 = {"d_model": 32, "num_blocks": 2, "num_heads": 4, "num_kv_heads": 2, "head_size": 12}
    qwen3 |= {"hidden_size": 56, "activation": "swiglu", "position": "rotary", "norm": "rms"}
    qwen3 |= {"bias": False, "tie_embeddings": True, "qk_norm": True, "context_length": 4096}
    assert (qwen3 | {"rotary_base": 1e6}).items() <= fields["qwen3"].items()
    assert "dropout" not in fields["gpt2"]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_several_files(folders, tmp_path, kind):
    sharded = make_folder(tmp_path, kind, shards="30KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    assert not (sharded / "model.safetensors").exists()
    found, expected = (load_folder(str(f), 16).state_dict() for f in (sharded, folders / kind))
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_weights_in_half_precision_are_trained_in_full(tmp_path):
    make_folder(tmp_path, "qwen3")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    (dtype,) = {weight.dtype for weight in load_file(tmp_path / "model.safetensors").values()}
    assert dtype == torch.bfloat16
    weights = load_folder(str(tmp_path), 16).state_dict()
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_tuning_that_is_interrupted_continues_without_the_folder(
    tune, train, folders, tmp_path, kind
):
    folder = shutil.copytree(folders / kind, tmp_path / kind)
    options = {"model.dropout": 0.2, "model.learning_rate": 1e-3}
    whole = tune(folder, **options, **{"trainer.max_steps": 8})
    first = tune(folder, **options, **{"trainer.max_steps": 4})
    assert first.status == 0, first.err
    path = checkpoint_of(first)
    shutil.rmtree(folder)
    if kind == "gpt2":  # by its config.yaml, and by the same options
        config = path.parents[1] / "config.yaml"
        argv = ["--config", str(config), "--ckpt_path", str(path), "--trainer.max_steps=8"]
        second = train(*argv, defaults={})
    else:
        second = tune(folder, "--ckpt_path=last", **options, **{"trainer.max_steps": 8})
    assert second.status == 0, second.err
    assert "other options" not in second.out
    assert second.steps == whole.steps[3:]
    assert checkpoint_of(second) == path
    weights = [Checkpoint.read(checkpoint_of(result)).weights for result in (whole, second)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def their_greedy_text(folder: Path, prompt: str, num_tokens: int, context_length: int) -> str:
    theirs, (tokenizer, rows) = load_hf_model(folder), from_hf(folder)
    ids, rows = tokenizer.encode(prompt).tolist(), torch.from_numpy(rows)
    for _ in range(num_tokens):
        with torch.no_grad():
            logits = theirs(rows[ids[-context_length:]][None]).logits[0, -1, rows]
        begun = unfinished_bytes(tokenizer.decode_bytes(ids))  # generate.py writes whole characters
        logits[~torch.from_numpy(tokenizer.may_follow(begun))] = -torch.inf
        ids.append(int(logits.argmax()))
    return tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tuned_checkpoint_generates_alone(tune, folders, capfd, monkeypatch, kind):
    """As transformers would: weights hardly moved, no folder, no transformers."""
    result = tune(folders / kind, **{"model.learning_rate": 1e-9, "trainer.max_steps": 1})
    assert result.status == 0, result.err
    expected = their_greedy_text(folders / kind, "The cat", 8, 16)
    for name in ("transformers", "tokenizers", "safetensors"):
        monkeypatch.setitem(sys.modules, name, None)
    argv = ["--ckpt_path", str(checkpoint_of(result)), "--prompt", "The cat"]
    assert main(["generate", *argv, "--temperature", "0", "--max_new_tokens", "8"]) == 0
    assert expected.rstrip("\ufffd") in capfd.readouterr().out  # no begun character is written
    assert len(expected) > 12
    monkeypatch.undo()
    tokenizer = load_checkpoint(checkpoint_of(result))[1]
    assert tokenizer == from_hf(folders / kind)[0]


# Options


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        ("gpt2", None, 48),  # all that it has positions for
        ("gpt2", 40, 40),
        ("qwen3", None, 1024),  # of 4096
        ("qwen3", 128, 128),  # the default, but asked for
        ("qwen3", 1100, 1100),
    ],
)
def test_the_context_length_can_be_chosen(tune, folders, kind, given, expected):
    options = {"data.train_fraction": 0.5, "trainer.max_steps": 1, "trainer.limit_val_batches": 0}
    words = [] if given is None else [f"--data.context_length={given}"]
    plain = {name: value for name, value in PLAIN.items() if name != "data.context_length"}
    result = tune(folders / kind, *words, only=plain, **options)
    assert result.status == 0, result.err
    assert result.run.model.gpt.config.context_length == expected
    assert result.run.data.hparams.context_length == expected


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("gpt2", {"data.context_length": 49}, "--data.context_length 49: contradicts the weights"),
        ("gpt2", {"data.context_length": 49}, "where it is at most 48; leave it out, or"),
        ("qwen3", {"data.context_length": 5000}, "where it is at most 4096; leave it out, or"),
        ("gpt2", {"model.d_model": 64}, "--model.d_model 64: contradicts the weights of"),
        ("qwen3", {"model.head_size": 8}, "--model.head_size 8: contradicts the weights of"),
        ("qwen3", {"model.rotary_base": 5e5}, "where it is 1000000.0; leave it out, or"),
        ("gpt2", {"model.activation": "gelu"}, "where it is gelu_tanh; leave it out, or"),
        ("gpt2", {"data.tokenizer": "bytes"}, "--data.tokenizer 'bytes': contradicts the weights"),
    ],
    ids=str,
)
def test_options_that_contradict_the_folder_are_refused(tune, folders, kind, options, message):
    result = tune(folders / kind, **options)
    assert (result.status, len(result.err.splitlines())) == (2, 1), result.err
    assert message in result.err


def test_dropout_can_be_chosen(tune, folders):
    result = tune(folders / "qwen3", **{"model.dropout": 0.3, "trainer.max_steps": 1})
    assert result.run.model.gpt.config.dropout == 0.3


def test_documents_end_with_the_folder_s_own_token(tune, folders, tmp_path):
    path, documents = tmp_path / "own.jsonl", [TEXT[:700], "<|endoftext|>", TEXT[700:3000]]
    lines = (json.dumps({"text": document}) + "\n" for document in documents)
    path.write_text("".join(lines), encoding="utf-8")
    result = tune(folders / "qwen3", **{"data.path": path, "trainer.max_steps": 1})
    assert result.status == 0, result.err
    data = result.run.data
    ids = data.corpus.tokens.tolist()
    assert ids.count(data.tokenizer.end_of_text) == 3
    rows = from_hf(folders / "qwen3")[1]
    assert (
        rows[ids[-1]]
        == json.loads((folders / "qwen3" / "tokenizer.json").read_text(encoding="utf-8"))["model"][
            "vocab"
        ]["<|endoftext|>"]
    )


@pytest.mark.parametrize("name", ["gpt2", "gpt2/tokenizer.json"])
def test_a_folder_can_give_only_its_tokenizer(train, folders, text, name):
    """For a model of its own; its ids are compared once for each text."""
    options = {"data.path": text, "data.tokenizer": folders / name}
    result = train(**options)
    assert result.status == 0, result.err
    data = result.run.data
    assert data.tokenizer == from_hf(folders / "gpt2")[0]
    assert f"Vocabulary: {data.vocab_size} tokens ({folders / name})" in result.out
    (kept,) = data.corpus.folder.glob("same_ids_*.json")
    assert '"value": true' in kept.read_text()


def test_a_text_with_other_ids_is_refused(train, folder, tmp_path):
    """By the merges of the folder zqx is zq, x; by ranks it is a whole."""
    path, words = folder / "tokenizer.json", tmp_path / "words.txt"
    spec = json.loads(path.read_text(encoding="utf-8"))
    spec["model"]["vocab"] |= {"zq": 1000, "qx": 1001, "zqx": 1002}
    spec["model"]["merges"] = [["z", "q"], ["q", "x"], ["z", "qx"]]
    path.write_text(json.dumps(spec), encoding="utf-8")
    words.write_text("a zqx and a qx\n" * 100)
    result = train(**{"data.path": words, "data.tokenizer": folder})
    assert (result.status, len(result.err.splitlines())) == (2, 1), result.err
    assert "splits this text differently from lit_gpt's version of it, near" in result.err


# What can't be used


def drop_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(name for name in weights if "ln_2.weight" in name or "k_norm" in name))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    changed = {name: change(name, weight).contiguous() for name, weight in weights.items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})


def edit_tokenizer(folder: Path, **changes) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut_weights(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def add_head(folder: Path, change: float = 1.0) -> None:
    """Stores a weight of the output layer beside the embedding that it is tied to."""
    weights = load_file(folder / "model.safetensors")
    head = weights[next(name for name in weights if "wte" in name or "embed" in name)].clone()
    head[3, 3] += change
    weights["lm_head.weight"] = head
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_tied_output_layer_may_be_stored(folder):
    add_head(folder, change=0.0)
    model = load_folder(str(folder), 16)
    assert torch.equal(model.head.weight, model.embedding.weight)


WRONG = {
    "no config": (lambda f: (f / "config.json").unlink(), "the folder has no config.json"),
    "a damaged config": (lambda f: (f / "config.json").write_text("{"), "config.json can't be"),
    "a config that is none": (lambda f: (f / "config.json").write_text("[]"), "can't be read"),
    "a gemma": (
        lambda f: GemmaConfig().save_pretrained(f),
        "'gemma' is not supported, only gpt2",
    ),
    "no kind": (
        lambda f: (f / "config.json").write_text("{}"),
        "model_type None is not supported, only gpt2",
    ),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        "can't be loaded (ValueError: the folder has no model.s",
    ),
    "half of the weights": (cut_weights, "can't be loaded (SafetensorError: "),
    "a weight is missing": (drop_weight, "weight is missing (1 in total)"),
    "a weight of another shape": (
        lambda f: edit_weights(f, lambda name, weight: weight[:-1] if weight.ndim == 1 else weight),
        " has another shape (",
    ),
    "a block too much": (
        lambda f: edit_config(f, n_layer=1, num_hidden_layers=1, layer_types=["full_attention"]),
        " is unexpected (",
    ),
    "a version from the future": (
        lambda f: edit_tokenizer(f, version="9.9"),
        "can't be read (",
    ),
    "a tied output layer that differs": (add_head, "but lm_head.weight isn't the embedding"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json, nor a"),
    "no epsilon": (
        lambda f: edit_config(f, layer_norm_epsilon=0.0, rms_norm_eps=0.0),
        "norm_eps 0.0: must be in (0, 1)",
    ),
    "more tokens than rows": (
        lambda f: make_model(f.name, vocab_size=300).save_pretrained(f),
        "tokenizer and weights do not belong together",
    ),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_a_folder_that_cannot_be_used_is_one_line(tune, folder, change, message):
    change(folder)
    result = tune(folder)
    assert (result.status, len(result.err.splitlines())) == (2, 1), result.err
    assert message in result.err
    assert folder.name in result.err


def test_no_folder_and_no_transformers_are_one_line(tune, folders, tmp_path, monkeypatch):
    result = tune(tmp_path / "nowhere")
    assert (result.status, len(result.err.splitlines())) == (2, 1), result.err
    assert f"--model.init_from '{tmp_path / 'nowhere'}': no such checkpoint or" in result.err
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = tune(folders / "gpt2")
    message = "error: Hugging Face folders need the package transformers; install it with "
    message += 'pip install -e ".[hf]"\n'
    assert (result.status, result.err) == (2, message)


@torch.no_grad()
def test_other_logits_are_refused(folder):
    """Even if no check of the config noticed anything."""
    model, theirs, rows = load_folder(str(folder), 16), load_hf_model(folder), from_hf(folder)[1]
    check_logits(model, theirs, rows, folder)
    model.blocks[1].attention.out.weight *= 1.01
    with pytest.raises(UserError, match="differ from those of transformers by up to"):
        check_logits(model, theirs, rows, folder)
