"""The evaluate command: its numbers by independent code, what it prints, what it refuses."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_gpt.__main__ import main
from lit_gpt.checkpoint import Checkpoint
from tests.recompute import adaptive_nats, nats_of, whole_nats

TEXT = "It rained — the cat sat on a mat; 一只猫坐在垫子上。\n" * 4 + "Größe über alles.\n" * 3


@pytest.fixture
def last(trained: Path) -> Path:
    return trained / "checkpoints" / "last.ckpt"


@pytest.fixture
def evaluate(last, tmp_path, capsys):
    """`evaluate("--json", max_tokens=9)`: exit status, stdout and stderr."""
    text = tmp_path / "other.txt"
    text.write_text(TEXT, encoding="utf-8")
    defaults = {"ckpt_path": last, "data.path": text, "data.cache": tmp_path / "cache"}
    defaults |= {"accelerator": "cpu"}

    def run(*args: str, **options: object) -> tuple[int, str, str]:
        given = (defaults | options).items()
        words = [f"--{name}={value}" for name, value in given if value is not None]
        capsys.readouterr()
        status = main(["evaluate", *words, *args])
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_its_numbers_are_those_of_independent_code(evaluate, last, batch_size, precision):
    status, out, err = evaluate("--json", batch_size=batch_size, precision=precision)
    assert (status, err) == (0, "")
    found = json.loads(out)
    model, tokenizer = Checkpoint.read(last).build()
    tokens = tokenizer.encode(TEXT)
    spelled = [tokenizer.tokens[i] for i in tokens]
    assert b"".join(spelled) == TEXT.encode()
    context = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")
    nats = whole_nats(model, tokens, 16, context)
    counted = adaptive_nats(tokens.tolist(), tokenizer.vocab_size)
    num_bytes = sum(map(len, spelled[1:]))
    sums = {"model": sum(nats), "adaptive_unigram": counted[0], "adaptive_bigram": counted[1]}
    for name, total in sums.items():
        loss = total / len(nats)
        assert found["results"][name] == {
            "loss": pytest.approx(loss, rel=2e-3 if "bf16" in precision else 1e-6),
            "perplexity": pytest.approx(math.exp(loss), rel=2e-2 if "bf16" in precision else 1e-5),
            "bits_per_byte": pytest.approx(total / math.log(2) / num_bytes, rel=2e-3),
            "num_tokens": len(nats),
            "of_tokens": len(nats),
        }
    assert found["text"]["num_characters"] == len(TEXT)
    assert found["text"]["num_bytes"] == len(TEXT.encode())
    assert (found["step"], found["context_length"], found["device"]) == (6, 16, "cpu")


def test_the_validation_split_of_a_run_gives_the_run_s_final_loss(evaluate, trained, tmp_path):
    history = json.loads((trained / "history.json").read_text(encoding="utf-8"))
    text = (trained.parents[1] / "text.txt").read_text(encoding="utf-8")
    tokenizer = Checkpoint.read(trained / "checkpoints" / "last.ckpt").tokenizer
    tokens = tokenizer.encode(text)
    path = tmp_path / "val.txt"
    path.write_text(tokenizer.decode(tokens[len(tokens) * 9 // 10 :]), encoding="utf-8")
    _, out, _ = evaluate("--json", **{"data.path": path})
    found = json.loads(out)["results"]["model"]
    wanted = history["final"]
    assert found["num_tokens"] == wanted["num_tokens"]
    for name in ("loss", "bits_per_byte"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-6)


def test_the_table_is_aligned_and_says_what_was_evaluated(evaluate, last):
    status, out, err = evaluate()
    assert (status, err) == (0, "")
    results = json.loads(evaluate("--json")[1])["results"]
    lines = [line.rstrip() for line in out.splitlines() if line.strip()]
    num_tokens = results["model"]["num_tokens"]
    assert lines[:2] == [
        f"Checkpoint: {last} (step 6)",
        f"Text: {len(TEXT):,} characters, {len(TEXT.encode()):,} bytes, {num_tokens + 1:,} tokens",
    ]
    rows = {row[0]: row[1:] for line in lines[-3:] if (row := re.split(r"  +", line.strip()))}
    assert list(rows) == ["model", "adaptive unigram", "adaptive bigram"]
    for name, row in rows.items():
        numbers = results[name.replace(" ", "_")]
        assert row == [
            f"{numbers['loss']:.4f}",
            f"{numbers['perplexity']:,.2f}",
            f"{numbers['bits_per_byte']:.4f}",
            f"all {num_tokens} tokens",
        ]
    assert len({len(line) for line in lines[-3:]}) == 1


def test_a_part_is_spread_over_the_text(evaluate, last):
    model, tokenizer = Checkpoint.read(last).build()
    tokens = tokenizer.encode(TEXT)
    windows = (len(tokens) - 1) // 16
    nats = nats_of(model, tokens, [0, 16 * ((windows - 1) // 2), 16 * (windows - 1)], 16)
    found = json.loads(evaluate("--json", max_tokens=50)[1])["results"]["model"]
    assert found["loss"] == pytest.approx(sum(nats) / 48, rel=1e-6)
    assert (found["num_tokens"], found["of_tokens"]) == (48, len(tokens) - 1)
    assert f"48 of {len(tokens) - 1} tokens" in evaluate(max_tokens=50)[1]


def test_long_texts_have_baselines_of_their_beginning(evaluate, monkeypatch, last):
    monkeypatch.setattr("lit_gpt.evaluation.evaluate.MAX_TARGETS", 20)
    found = json.loads(evaluate("--json")[1])["results"]
    tokenizer = Checkpoint.read(last).tokenizer
    tokens = tokenizer.encode(TEXT)
    unigram, _ = adaptive_nats(tokens[:21].tolist(), tokenizer.vocab_size)
    assert found["adaptive_unigram"]["loss"] == pytest.approx(unigram / 20, rel=1e-9)
    assert found["adaptive_unigram"]["num_tokens"] == 20
    assert found["model"]["num_tokens"] == len(tokens) - 1


def test_last_is_the_newest_run_s_last_checkpoint(evaluate, trained, last):
    _, out, err = evaluate("--json", ckpt_path="last", logs=trained.parent)
    assert err == f"Using {last}\n"
    assert json.loads(out)["checkpoint"] == str(last)
    _, out, err = evaluate("--json", ckpt_path=None, logs=trained.parent)
    assert err == f"Using {last.with_name('best.ckpt')}\n"


def test_changes_of_the_text_are_said(evaluate, tmp_path):
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    _, out, _ = evaluate(**{"data.path": tmp_path / "bom.txt"})
    assert "\nByte-order marks removed: 1\n" in out
    options = {"data.path": tmp_path / "*.txt", "data.exclude": "bom*"}
    _, out, _ = evaluate(**options)
    assert "\nFiles and folders excluded by bom*: 1\n" in out
    assert out.partition("Device")[2] == evaluate()[1].partition("Device")[2]


def test_the_files_options_are_those_of_training(evaluate, tmp_path):
    (tmp_path / "gb.txt").write_bytes(TEXT.encode("gb18030"))
    found = evaluate("--json", **{"data.path": tmp_path / "gb.txt", "data.encoding": "gb18030"})
    assert json.loads(found[1])["results"] == json.loads(evaluate("--json")[1])["results"]


def test_documents_end_with_a_blank_line_for_a_model_of_plain_text(evaluate, tmp_path):
    """As in a validation text of its own: the model has no end-of-text token to predict."""
    lines = TEXT.splitlines()
    rows = "".join(json.dumps({"text": line}) + "\n" for line in lines)
    (tmp_path / "docs.jsonl").write_text(rows, encoding="utf-8")
    (tmp_path / "plain.txt").write_text("".join(f"{x}\n\n" for x in lines), encoding="utf-8")
    found = evaluate("--json", **{"data.path": tmp_path / "docs.jsonl"})
    assert found[0] == 0, found[2]
    plain = evaluate("--json", **{"data.path": tmp_path / "plain.txt"})
    assert json.loads(found[1])["results"] == json.loads(plain[1])["results"]
    assert json.loads(found[1])["text"]["num_documents"] == len(lines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data.path": None}, "the following arguments are required: --data.path; "),
        ({"data.path": "no.txt"}, "--data.path 'no.txt': no such file or folder"),
        ({"data.path": "{}/one.txt"}, "--data.path '{}/one.txt': too short: "),
        ({"data.encoding": "klingon"}, "--data.encoding 'klingon': unknown encoding; "),
        ({"data.encoding": "ascii"}, "{}/other.txt is not ascii text"),
        ({"data.text_field": "a"}, "--data.text_field 'a': is for "),
        ({"ckpt_path": "no.ckpt"}, "no checkpoint at 'no.ckpt'; "),
        ({"ckpt_path": "last", "logs": "{}"}, "--ckpt_path 'last': no run below '{}' has a last"),
        ({"ckpt_path": "{}/nan.ckpt"}, "the loss of {}/nan.ckpt on this text is not finite; "),
        ({"batch_size": 0}, "--batch_size 0: must be at least 1"),
        ({"max_tokens": 0}, "--max_tokens 0: must be at least 1"),
        ({"accelerator": "tpu"}, "--accelerator 'tpu': must be one of auto, cpu, gpu, cuda, mps\n"),
        ({"precision": "8"}, "--precision '8': must be one of 32-true, bf16-mixed\n"),
        ({"data.cache": "{}/one.txt"}, "--data.cache: cannot store the tokens in {}/one.txt: "),
    ],
)
def test_what_is_wrong_is_one_line(evaluate, last, tmp_path, options, message):
    (tmp_path / "one.txt").write_text("a", encoding="utf-8")
    contents = dict(Checkpoint.read(last).contents)
    contents["state_dict"] = {
        name: torch.full_like(weight, np.nan) for name, weight in contents["state_dict"].items()
    }
    torch.save(contents, tmp_path / "nan.ckpt")
    given = {
        name: value.format(tmp_path) if isinstance(value, str) else value
        for name, value in options.items()
    }
    status, out, err = evaluate(**given)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {message.format(tmp_path)}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("accelerator", ["gpu", "cuda", "mps"])
def test_a_device_that_is_not_there_is_one_line(evaluate, accelerator, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert evaluate(accelerator=accelerator)[2] == (
        f"error: --accelerator {accelerator!r}: this machine has no such device that PyTorch can "
        "use; use auto or cpu\n"
    )
    assert evaluate(accelerator="auto")[0] == 0
