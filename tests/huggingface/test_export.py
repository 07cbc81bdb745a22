"""Exports: train, export and generate, and transformers that loads the folder."""

from __future__ import annotations

import io
import json
import re
import shlex
import socket
import sys
from contextlib import nullcontext, redirect_stdout
from copy import copy
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_gpt.__main__ import main
from lit_gpt.checkpoint import Checkpoint, load_checkpoint
from lit_gpt.command import run
from lit_gpt.errors import UserError
from lit_gpt.generation.sampling import Sampling
from lit_gpt.huggingface import export
from lit_gpt.huggingface.architectures import hf_weights
from lit_gpt.huggingface.export_check import check_greedy, spread_windows
from lit_gpt.huggingface.importing import load_folder
from lit_gpt.huggingface.model_card import model_card
from lit_gpt.huggingface.tokenizer import from_hf
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.reports.history import read_history
from lit_gpt.text.tokenizer import Tokenizer
from lit_gpt.text.vocabularies import load_tokenizer
from tests.conftest import SMALL, command_line

LINES = [f"The {animal} sat on {n} mats. 猫坐在垫子上，不是吗？\n" for animal in ("cat", "dog")
         for n in range(1990, 2050)]  # fmt: skip
PROMPT = "The cat"
KINDS = ("qwen3", "gpt2")
FILES = {
    *("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"),
    *("generation_config.json", "README.md"),
}


def printed(*argv: object) -> str:
    """What a command prints."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with redirect_stdout(out):
        assert main([str(arg) for arg in argv]) == 0
    out.seek(0)
    return out.read()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def runs(base) -> dict[str, Path]:
    """The checkpoints of two short trainings."""
    text = base / "text.txt"
    text.write_text("".join(LINES), encoding="utf-8")
    documents = base / "documents.jsonl"
    rows = (json.dumps({"text": line}) for line in [*LINES, "<|endoftext|> as text"])
    documents.write_text("\n".join(rows))
    shared = {
        "data.context_length": 32,
        "data.batch_size": 8,
        "data.cache": base / "cache",
        "model.learning_rate": 1e-2,
        "trainer.max_steps": 60,
        "trainer.val_check_interval": 30,
    }
    for kind, options in {
        "qwen3": {"data.path": text, "model.style": "modern", "model.num_kv_heads": 1},
        "gpt2": {"data.path": documents, "data.tokenizer": "bpe:300"},
    }.items():
        options = SMALL | shared | options | {"trainer.default_root_dir": base / kind}
        printed("train", *command_line(options))
    return {kind: base / kind / "version_0" / "checkpoints" / "last.ckpt" for kind in KINDS}


@pytest.fixture(scope="module")
def exports(runs, base) -> dict[str, tuple[Path, list[str]]]:
    """The folder of each kind that `export` makes, and what it prints; no network is used."""

    def refuse(*args: object) -> None:
        raise AssertionError(f"looked for {args} in the network")

    exports = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        for kind, path in runs.items():
            out = printed("export", "--ckpt_path", path, "--out", base / f"{kind}-folder")
            exports[kind] = (base / f"{kind}-folder", out.splitlines())
    return exports


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_generates_the_same_text(kind, exports, runs):
    folder, _ = exports[kind]
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert model.config.model_type == kind
    prompt = tokenizer(PROMPT, return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0]
    text = tokenizer.decode(written, skip_special_tokens=True)
    assert len(text) > len(PROMPT) + 20
    options = ("--prompt", PROMPT, "--temperature", 0, "--max_new_tokens", 24)
    assert printed("generate", "--ckpt_path", runs[kind], *options) == text + "\n"


@pytest.mark.parametrize("kind", KINDS)
def test_export_prints_what_it_compared(kind, exports, runs):
    folder, lines = exports[kind]
    tokens, logits, text, made, use = lines
    info = Checkpoint.read(runs[kind]).corpus_info
    assert tokens == f"Tokens: {info['num_tokens']:,} identical"
    found = re.fullmatch(
        r"Logits on 8 windows of 32 tokens: largest difference (\S+), below 1e-04", logits
    )
    assert float(found[1]) < 1e-4
    assert re.fullmatch(r"Greedy text: \d+ tokens identical", text)
    assert made == f"Exported as {'Qwen3' if kind == 'qwen3' else 'GPT-2'}: {folder}"
    assert use.startswith("Use it:  python -c ")


def test_the_last_line_can_be_run(exports, capsys):
    _, lines = exports["gpt2"]
    python, option, code = shlex.split(lines[-1].removeprefix("Use it:  "))
    assert (python, option) == ("python", "-c")
    exec(code, {})
    assert capsys.readouterr().out.startswith("[{'generated_text': 'The ")


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_is_complete(kind, exports, base):
    folder, _ = exports[kind]
    assert {path.name for path in folder.iterdir()} == FILES
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    assert not list(base.glob(".*"))  # nothing half-made is left
    generation = json.loads((folder / "generation_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    end = len(tokenizer) - 1
    assert (generation["eos_token_id"], tokenizer.eos_token_id) == (end, end)
    assert generation["temperature"] == Sampling().temperature


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_card_has_the_results(kind, exports, base):
    card = (exports[kind][0] / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(card.split("---\n")[1])
    assert head == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lit_gpt"],
    }
    history = read_history(base / kind / "version_0")
    loss = dict(history.curves["val/loss"])[60]
    assert f"| {loss:.4f} | {np.exp(loss):.2f} |" in card
    assert f"{history.final.loss:.4f}" in card
    assert f"{history.final.bits_per_byte:.4f}" in card
    assert "At step 60." in card
    assert {"gpt2": "`documents.jsonl`", "qwen3": "`text.txt`"}[kind] in card
    assert str(base) not in card
    assert exports[kind][1][0] in card
    assert "on\nits training text:" in card


@pytest.mark.parametrize("kind", KINDS)
def test_training_can_start_from_an_export(kind, exports, runs):
    folder, model = str(exports[kind][0]), load_checkpoint(runs[kind])[0]
    again = load_folder(folder, 32)
    tokenizer, _ = from_hf(folder)
    assert tokenizer.tokens == load_checkpoint(runs[kind])[1].tokens
    ids = torch.randint(tokenizer.vocab_size, (2, 32), generator=torch.Generator().manual_seed(1))
    assert (again(ids) - model(ids)).abs().max() < 1e-5


def test_the_code_of_the_model_card_runs(exports, monkeypatch, capsys):
    folder, _ = exports["qwen3"]
    monkeypatch.chdir(folder.parent)
    card = (folder / "README.md").read_text(encoding="utf-8")
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], {})
    assert capsys.readouterr().out.startswith("The ")


# Checkpoints without a training, exported in this process


def write_checkpoint(folder: Path, tokenizer: Tokenizer, text: Path, **choices) -> Path:
    """A checkpoint of a model with random weights."""
    torch.manual_seed(0)
    sizes = {"context_length": 16, "d_model": 16, "num_blocks": 2, "num_heads": 2}
    config = GPTConfig(tokenizer.vocab_size, **sizes | choices)
    model = GPT(config)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3)
    content = {
        "gpt": asdict(config),
        "tokenizer": tokenizer.to_dict(),
        "state_dict": {f"gpt.{name}": weight for name, weight in model.state_dict().items()},
        "datamodule_hyper_parameters": {"path": str(text), "train_fraction": 0.5},
        "global_step": 3,
    }
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(content, folder / "some.ckpt")
    return folder / "some.ckpt"


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(LINES[:9]) + "It's 12345 <|endoftext|>\r\n\t 🦊 é\n", encoding="utf-8")
    return path


def compact(text: Path) -> Tokenizer:
    full = load_tokenizer("cl100k_base")
    return full.compact(full.encode(text.read_text()).tolist())[0]


def run_export(capsys, **options) -> tuple[int, str, str]:
    argv = [f"--{name}={value}" for name, value in options.items()]
    status = run(lambda: export.main(argv), export.option_name)
    return status, *capsys.readouterr()


@pytest.mark.parametrize("name", ["bytes", "cl100k_base, compact", "o200k_base, compact"])
@pytest.mark.parametrize(
    "choices",
    [
        {"bias": False, "tie_embeddings": True},
        {"position": "learned", "activation": "gelu"},
        {"style": "modern", "tie_embeddings": False, "num_kv_heads": 1, "head_size": 10},
    ],
)
def test_any_model_with_any_tokenizer(name, choices, text, tmp_path, capsys):
    tokenizer = load_tokenizer(name.split(",")[0])
    if "compact" in name:
        tokenizer = tokenizer.compact(tokenizer.encode(text.read_text()).tolist())[0]
    path = write_checkpoint(tmp_path, tokenizer, text, **choices)
    status, out, err = run_export(capsys, ckpt_path=path, out=tmp_path / "folder")
    assert (status, err) == (0, "")
    count = len(tokenizer.encode(text.read_bytes().decode()))
    assert out.startswith(f"Tokens: {count:,} identical\nLogits on 8 windows of 16 tokens")
    assert "At step 3." not in (tmp_path / "folder" / "README.md").read_text()
    assert "None are known for step 3." in (tmp_path / "folder" / "README.md").read_text()


def test_a_fast_model_is_refused_with_what_to_do(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # installing it would not help
    path = write_checkpoint(tmp_path, compact(text), text, style="fast", bigram_rows=50)
    status, out, err = run_export(capsys, ckpt_path=path, out=tmp_path / "folder")
    assert (status, out) == (2, "")
    assert err == (
        "error: no architecture of transformers adds to a token's embedding what the one before it "
        "says (smear True, bigram_rows 50); train a model that is to be exported with "
        "--model.style=modern\n"
    )
    assert not (tmp_path / "folder").exists()


def test_another_text_can_be_compared_on(text, tmp_path, capsys):
    path = write_checkpoint(tmp_path, compact(text), text)
    text.unlink()
    status, _, err = run_export(capsys, ckpt_path=path, out=tmp_path / "folder")
    assert (status, err.count("\n")) == (2, 1)
    assert err == (
        f"error: --data_path '{text}': no such file or folder; use --data_path to name any text to "
        "compare the export on\n"
    )
    assert not (tmp_path / "folder").exists()
    other = tmp_path / "other.txt"
    other.write_text("Grüße, 猫! " * 3, encoding="latin-1", errors="replace")
    status, out, err = run_export(
        capsys, ckpt_path=path, out=tmp_path / "folder", data_path=other, encoding="latin-1"
    )
    assert (status, err) == (0, "")
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "a text other than its training text" in card
    assert out.splitlines()[0] in card


def test_another_text_is_read_by_its_own_options(text, tmp_path, capsys):
    """Whatever the encoding and the field of the run's own text were."""
    path = write_checkpoint(tmp_path, compact(text), text)
    content = torch.load(path)
    content["datamodule_hyper_parameters"] |= {"encoding": "gb18030", "text_field": "body"}
    torch.save(content, path)
    other = tmp_path / "other.txt"
    other.write_text("猫坐在垫子上", encoding="utf-8")
    status, out, err = run_export(capsys, ckpt_path=path, out=tmp_path / "folder", data_path=other)
    assert (status, err) == (0, "")
    count = len(compact(text).encode("猫坐在垫子上"))
    assert out.startswith(f"Tokens: {count} identical\n")


def test_several_fields_of_a_text_can_be_compared_on(text, tmp_path, capsys):
    path = write_checkpoint(tmp_path, compact(text).with_end_of_text(), text)
    other = tmp_path / "other.jsonl"
    other.write_text('{"data": {"title": "On mats", "text": "The cat sat there."}}\n' * 2)
    options = {"data_path": other, "text_field": "[data.title, data.text]"}
    status, out, err = run_export(capsys, ckpt_path=path, out=tmp_path / "folder", **options)
    assert (status, err) == (0, "")
    count = 2 * (1 + len(compact(text).encode("On mats\nThe cat sat there.")))
    assert out.startswith(f"Tokens: {count} identical\n")


def test_text_of_a_file_that_a_checkpoint_names_is_not_shown(text, tmp_path, capsys):
    """It may come from a stranger, and the card may be published."""
    path = write_checkpoint(tmp_path, compact(text), text)
    _, out, _ = run_export(capsys, ckpt_path=path, out=tmp_path / "folder")
    assert "The" not in out
    assert '"The' not in (tmp_path / "folder" / "README.md").read_text()


@torch.no_grad()
def test_large_logits_may_differ_by_rounding(text, tmp_path, capsys):
    path = write_checkpoint(
        tmp_path, compact(text), text, style="modern", d_model=256, num_blocks=4
    )
    content = torch.load(path)
    content["state_dict"]["gpt.norm.weight"] *= 1e3
    torch.save(content, path)
    status, out, err = run_export(capsys, ckpt_path=path, out=tmp_path / "folder")
    assert (status, err) == (0, "")
    difference, allowed = re.search(r"difference (\S+), below (\S+)", out).groups()
    assert 1e-4 < float(difference) < float(allowed)


def test_the_smallest_context_and_text(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("a")
    path = write_checkpoint(tmp_path, load_tokenizer("bytes"), text, context_length=1)
    status, out, _ = run_export(capsys, ckpt_path=path, out=tmp_path / "folder")
    assert status == 0
    assert "Logits on 1 windows of 1 tokens" in out
    assert "Greedy text: 1 tokens identical" in out


# What is not the same is found, and then there is no folder


def change_a_weight(weights: dict) -> dict:
    name = next(name for name in weights if "ln_1.weight" in name)
    weights[name][0] += 0.01
    return weights


def lose_a_merge(tokenizer):
    state = json.loads(tokenizer.to_str())
    state["model"]["merges"].pop()
    state["model"]["ignore_merges"] = False
    return type(tokenizer).from_str(json.dumps(state))


SABOTAGE = {
    "a weight": ("hf_weights", change_a_weight, "the exported model's logits differ by up to"),
    "a token": ("to_hf", lose_a_merge, "splits the text differently: token"),
    "the activation": (
        "hf_config",
        lambda config: config | {"activation_function": "gelu"},
        "the exported model's logits differ by up to",
    ),
}


@pytest.mark.parametrize("what", SABOTAGE)
def test_each_comparison_can_fail(what, text, tmp_path, capsys, monkeypatch):
    name, change, message = SABOTAGE[what]
    original = getattr(export, name)
    monkeypatch.setattr(export, name, lambda *args: change(original(*args)))
    path = write_checkpoint(tmp_path, compact(text), text)
    before = sorted(tmp_path.iterdir())
    status, out, err = run_export(capsys, ckpt_path=path, out=tmp_path / "folder")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert sorted(tmp_path.iterdir()) == before


def test_other_sampling_is_found(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export.Sampling, "repetition_penalty", 30.0)  # the default that is written
    path = write_checkpoint(tmp_path, compact(text), text)
    status, _, err = run_export(capsys, ckpt_path=path, out=tmp_path / "folder")
    assert status == 2
    assert "greedy text differs from token" in err


def test_a_wrong_end_of_text_is_found(tmp_path, capsys, monkeypatch):
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "one"}\n{"text": "two"}\n')
    path = write_checkpoint(tmp_path, load_tokenizer("bytes").with_end_of_text(), text)
    original = export.tokenizer_config
    monkeypatch.setattr(
        export, "tokenizer_config", lambda *args: original(*args) | {"eos_token": "!"}
    )
    status, _, err = run_export(capsys, ckpt_path=path, out=tmp_path / "folder")
    assert status == 2
    assert "the exported tokenizer ends a text with token 33" in err
    monkeypatch.undo()
    status, out, _ = run_export(capsys, ckpt_path=path, out=tmp_path / "folder")
    assert (status, out.splitlines()[0]) == (0, "Tokens: 8 identical")


def transformers_of(model: GPT) -> nn.Module:
    from transformers import AutoConfig

    from lit_gpt.huggingface.config import hf_config

    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf_config(model.config)))
    theirs.load_state_dict(hf_weights(model))
    return theirs.eval()


@pytest.mark.parametrize(("here", "expected"), [(1.0, (0, True)), (0.9, None)])
def test_only_a_tie_excuses_different_greedy_text(here, expected):
    torch.manual_seed(0)
    model = GPT(GPTConfig(20, context_length=8, d_model=16, num_blocks=1, num_heads=2)).eval()
    prompt = torch.tensor([[1, 2, 3]])
    theirs = transformers_of(model)
    assert check_greedy(theirs, model, prompt, []) == (6, False)
    likeliest = int(model(prompt)[0, -1].argmax())
    other = (likeliest + 1) % 20
    with torch.no_grad():  # there the other is a little likelier, here a little less so
        best = model.head.weight[likeliest].clone()
        model.head.weight[other], model.head.weight[likeliest] = here * best, (1 + 1e-6) * best
        theirs.lm_head.weight[other] = (1 + 1e-6) * best
    refused = nullcontext() if expected else pytest.raises(UserError, match="from token 1 of 6")
    with refused:
        assert check_greedy(theirs, model, prompt, []) == expected


@pytest.mark.parametrize(
    ("num_tokens", "length", "expected"),
    [
        (100, 2, [50, 56, 63, 70, 77, 84, 91, 98]),  # of the later half
        (20, 10, [10]),
        (20, 12, [0, 1, 2, 3, 4, 5, 6, 8]),  # of all: half is too short
        (5, 10, [0]),
    ],
)
def test_windows_are_spread_over_the_validation_split(num_tokens, length, expected):
    windows = spread_windows(np.arange(num_tokens, dtype=np.uint16), 0.5, length)
    assert windows[:, 0].tolist() == expected
    assert windows.size(1) == min(length, num_tokens)
    assert windows[0].tolist() == list(range(expected[0], expected[0] + windows.size(1)))


# Wrong input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": "taken"}, "--out '{here}/taken': already exists; name a new or an empty folder"),
        ({"out": "text.txt"}, "--out '{here}/text.txt': already exists"),
        (
            {"out": "text.txt/folder"},
            "--out '{here}/text.txt/folder': can't be written (",
        ),
        ({"ckpt_path": "none.ckpt"}, "no checkpoint at '{here}/none.ckpt'"),
        ({"ckpt_path": "taken"}, "--ckpt_path '{here}/taken': no run below"),
        ({"ckpt_path": "text.txt"}, "{here}/text.txt is not a checkpoint that can be loaded"),
        ({"data_path": "none"}, "--data_path '{here}/none': no such file or folder"),
        ({"data_path": "empty.txt"}, "--data_path: no text in {here}/empty.txt; "),
        ({"data_path": "rows.jsonl"}, "--data_path: has documents, but the model's tokenizer"),
        ({"data_path": "some.ckpt"}, "some.ckpt is a PyTorch checkpoint, not text"),
        ({"encoding": "utf-99"}, "utf-99"),
        ({"out": "link"}, "--out '{here}/link': is a link or a mounted disk; name a folder in it"),
    ],
)
def test_wrong_input_is_one_line(options, message, text, tmp_path, capsys):
    right = {"ckpt_path": write_checkpoint(tmp_path, compact(text), text), "out": "folder"}
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious").write_text("kept")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "link").symlink_to(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n')
    before = sorted(tmp_path.rglob("*"))
    given = {n: v if n == "encoding" else tmp_path / v for n, v in (right | options).items()}
    status, out, err = run_export(capsys, **given)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert message.format(here=tmp_path) in err
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_is_accepted(text, tmp_path, capsys):
    path = write_checkpoint(tmp_path, compact(text), text)
    (tmp_path / "folder").mkdir()
    assert run_export(capsys, ckpt_path=path, out=tmp_path / "folder")[0] == 0
    assert (tmp_path / "folder" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["tokens", "lock"])
def test_a_folder_may_have_the_name_of_a_file_that_export_works_with(name, text, tmp_path, capsys):
    """Its tokens, which are the user's text, are not in the folder."""
    path = write_checkpoint(tmp_path, compact(text), text)
    status, _, err = run_export(capsys, ckpt_path=path, out=tmp_path / name)
    assert (status, err) == (0, "")
    assert {path.name for path in (tmp_path / name).iterdir()} == FILES
    assert load_folder(str(tmp_path / name), 16)


def test_a_model_of_neither_architecture_is_refused(text, tmp_path, capsys):
    path = write_checkpoint(tmp_path, compact(text), text, norm="rms")
    status, _, err = run_export(capsys, ckpt_path=path, out=tmp_path / "folder")
    assert status == 2
    assert "GPT-2 needs norm layer instead of rms" in err
    assert not (tmp_path / "folder").exists()


def test_without_a_run_or_a_checkpoint_it_says_so(tmp_path, capsys):
    status, _, err = run_export(capsys, out=tmp_path / "folder", logs=tmp_path)
    assert (status, err.count("\n")) == (2, 1)
    assert "name a checkpoint with --ckpt_path" in err


def test_without_transformers_it_says_what_to_install(text, tmp_path, capsys, monkeypatch):
    status, _, err = run_export(capsys)
    assert (status, err) == (
        2,
        "error: the following arguments are required: --out; --help lists all options\n",
    )
    monkeypatch.setitem(sys.modules, "transformers", None)
    path = write_checkpoint(tmp_path, compact(text), text)
    status, _, err = run_export(capsys, ckpt_path=path, out=tmp_path / "folder")
    assert (status, err.count("\n")) == (2, 1)
    assert 'pip install -e ".[hf]"' in err
    assert not (tmp_path / "folder").exists()


def card_of(checkpoint: Checkpoint, built: tuple[GPT, Tokenizer]) -> str:
    """The model card, without findings."""
    return model_card("title", checkpoint, *built, [], "", is_training_text=True)


@pytest.fixture(scope="module")
def built(runs) -> tuple[GPT, Tokenizer]:
    return load_checkpoint(runs["qwen3"])


@pytest.mark.parametrize("rubbish", [None, 3, "x", [1], {"path": 3, "val": "x"}, {"StepLines": 1}])
def test_the_card_survives_any_metadata_of_a_checkpoint(rubbish, built, tmp_path):
    names = ("corpus", "callbacks", "hyper_parameters", "datamodule_hyper_parameters", "trainer")
    contents = dict.fromkeys(names, rubbish) | {"global_step": rubbish}
    card = card_of(Checkpoint(tmp_path / "a.ckpt", contents), built)
    assert "\nNone are known" in card
    assert "\n| Text |" in card


def test_results_belong_to_the_exported_weights(base, runs, built):
    path = runs["qwen3"]
    checkpoint = Checkpoint.read(path)

    def card(path: Path = path, **changes) -> str:
        return card_of(Checkpoint(path, checkpoint.contents | changes), built)

    rows = r"\|.* validation split \|"
    assert len(re.findall(rows, card())) == 2
    assert len(re.findall(rows, card(global_step=30, callbacks={}))) == 1  # no final loss
    assert "\nNone are known for step 31.\n" in card(global_step=31, callbacks={})
    alone = card(base / "elsewhere.ckpt")  # only what is in the file
    best = checkpoint.best_evaluation
    assert best["step"] == 60
    assert f"| {best['val']:.4f} |" in alone
    assert len(re.findall(rows, alone)) == 1


def test_names_cannot_break_the_card(base, built):
    model, tokenizer = built[0], copy(built[1])
    tokenizer.name = "x|y\n\n# Injected\n<script>"
    contents = {"global_step": "3 |\n\n## Injected", "hyper_parameters": {"init_from": "/a/b|c"}}
    contents["datamodule_hyper_parameters"] = {"path": ["/home/me/a`|\nb", "c"]}
    card = card_of(Checkpoint(base / "x.ckpt", contents), (model, tokenizer))
    assert "tokens (`x y # Injected <script>`) |\n" in card
    assert card.count("Injected") == 1
    assert "| Steps | unknown |\n" in card
    assert "| Started from the weights of | `b c` |\n" in card
    assert "| Text | `a b`, `c` |\n" in card
    assert "home" not in card


@pytest.mark.parametrize("kilobytes", [4, 24, 72, 120])
def test_a_full_disk_is_one_line(kilobytes, small_disk, text, tmp_path, capsys):
    path = write_checkpoint(tmp_path, compact(text), text, d_model=32)
    disk = small_disk(kilobytes)
    status, out, err = run_export(capsys, ckpt_path=path, out=disk / "folder")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "No space left on device" in err
    assert "--out" in err
    assert list(disk.iterdir()) == []
