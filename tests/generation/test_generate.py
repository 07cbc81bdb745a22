"""The generate command: prompts in batches, JSON lines, traces."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest
import torch

from lit_gpt.checkpoint import save_atomically
from lit_gpt.generation.generate import escape, unescape, write_samples
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.text.vocabularies import load_tokenizer


@pytest.fixture
def write(tmp_path, capsys):
    """`write(prompt=["a"])`: what the command prints, with an untrained model of bytes."""
    torch.manual_seed(1)
    tokenizer = load_tokenizer("bytes").with_end_of_text()
    config = GPTConfig(tokenizer.vocab_size, 16, 16, 1, 2)
    weights = {f"gpt.{name}": 3 * value for name, value in GPT(config).state_dict().items()}
    content = {"gpt": vars(config), "tokenizer": tokenizer.to_dict(), "state_dict": weights}
    save_atomically(content, tmp_path / "small.ckpt")

    def call(**options) -> str:
        defaults = {"ckpt_path": str(tmp_path / "small.ckpt"), "logs": "logs", "seed": 7}
        defaults |= {"max_new_tokens": 12, "num_samples": 1, "temperature": 1.0, "top_k": None}
        defaults |= {"top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
        defaults |= dict.fromkeys(("prompt", "prompt_file", "stop"))
        defaults |= dict.fromkeys(("interactive", "json", "trace"), False)
        capsys.readouterr()
        write_samples(Namespace(**defaults | options))
        return capsys.readouterr().out

    return call


def test_a_batch_of_prompts_is_what_each_writes_alone(write):
    """More of them than are computed at once, of all lengths."""
    prompts = ["prompt " * (i % 7) + str(i) for i in range(40)]
    lines = write(prompt=prompts, json=True).splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == prompts
    for number in (0, 5, 31, 32, 39):
        assert write(prompt=[prompts[number]], json=True).rstrip("\n") == lines[number]


def test_prompts_and_samples_are_headed_and_in_order(write):
    out = write(prompt=["one", "two"], num_samples=2)
    parts = [
        f"--- prompt {p + 1}, sample {s + 1}, seed {7 + s}\n" + write(prompt=[text], seed=7 + s)
        for p, text in enumerate(("one", "two"))
        for s in range(2)
    ]
    assert out == "".join(parts)


def test_a_file_has_a_prompt_in_each_line(write, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeff一只猫 \r\n\n  \nthe\u2028cat".encode())
    found = write(prompt_file=str(file), json=True).split("\n")[:-1]
    assert [json.loads(line)["prompt"] for line in found] == ["一只猫 ", "the\u2028cat"]
    found = write(prompt=["first"], prompt_file=str(file), json=True).split("\n")[:-1]
    prompts = [json.loads(line)["prompt"] for line in found]
    assert prompts == ["first", "一只猫 ", "the\u2028cat"]


def test_json_has_what_the_text_has(write):
    line = json.loads(write(prompt=["the cat"], json=True))
    text = write(prompt=["the cat"])
    assert text == f"the cat{line['text']}\n"
    assert (line["finish_reason"], line["num_tokens"], line["seed"]) == ("length", 12, 7)
    cut = json.loads(write(prompt=["the cat"], json=True, stop=[line["text"][4:6]]))
    assert cut["text"] == line["text"][:4]
    assert cut["finish_reason"] == "stop"
    assert cut["num_tokens"] < 12


def test_a_trace_as_json_and_as_a_table(write):
    steps = json.loads(write(prompt=["the cat"], json=True, trace=True))["trace"]
    assert len(steps) == 12
    for step in steps:
        ps = [entry["probability"] for entry in step["likeliest"]]
        assert len(ps) == 5
        assert ps == sorted(ps, reverse=True)
        assert step["drawn_with"] == pytest.approx(step["probability"], rel=1e-5)  # temperature 1
    table = write(prompt=["the cat"], trace=True).splitlines()
    rows = [line.split() for line in table if line.split()[:1] and line.split()[0].isdecimal()]
    rows = [row for row in rows if len(row) == 14]  # step, taken, two numbers, five pairs
    assert [row[1] for row in rows] == [step["token"] for step in steps]
    assert [row[4] for row in rows] == [step["likeliest"][0]["token"] for step in steps]
    numbers = [(row[2], row[5]) for row in rows]
    assert numbers == [
        tuple(
            f"{p:.0%}" if p >= 0.005 else "<1%"
            for p in (step["probability"], step["likeliest"][0]["probability"])
        )
        for step in steps
    ]


def test_without_a_prompt_a_new_document_begins(write):
    line = json.loads(write(json=True))
    assert line["prompt"] == ""
    assert write() == f"{line['text']}\n"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (r"\n", "\n"),
        (r"a\tb", "a\tb"),
        (r"\\n", r"\n"),
        (r"\x", r"\x"),
        ("。", "。"),
        (r"\\\n", "\\\n"),
    ],
)
def test_escapes(typed, meant):
    assert unescape(typed) == meant
    assert unescape(escape(meant)) == meant
