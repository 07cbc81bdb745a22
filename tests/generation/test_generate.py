"""The generate command: prompts in batches, JSON lines, traces, errors."""

from __future__ import annotations

import json

import pytest

from lit_gpt.__main__ import main
from lit_gpt.generation.generate import escape, unescape
from lit_gpt.text.vocabularies import load_tokenizer
from tests.conftest import ROOT
from tests.generation.models import save_model, small_model

PNG = ROOT / "docs" / "report.png"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    tokenizer = load_tokenizer("bytes").with_end_of_text()
    path = tmp_path_factory.mktemp("generate") / "small.ckpt"
    return save_model(small_model(tokenizer.vocab_size), tokenizer, path)


@pytest.fixture
def generate(checkpoint, capsys):
    """`generate("--prompt=a")`: what the command prints."""

    def call(*argv: str, status: int = 0) -> str:
        defaults = [f"--ckpt_path={checkpoint}", "--seed=7", "--max_new_tokens=12"]
        capsys.readouterr()
        assert main(["generate", *defaults, "--temperature=1", *argv]) == status
        out, err = capsys.readouterr()
        return err if status else out

    return call


def test_a_batch_of_prompts_is_what_each_writes_alone(generate):
    """More of them than are computed at once, of all lengths."""
    prompts = ["prompt " * (i % 7) + str(i) for i in range(40)]
    lines = generate("--json", *(f"--prompt={prompt}" for prompt in prompts)).splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == prompts
    for number in (0, 31, 32):
        assert generate(f"--prompt={prompts[number]}", "--json") == f"{lines[number]}\n"


def test_prompts_and_samples_are_headed_and_in_order(generate):
    parts = [
        f"--- prompt {p + 1}, sample {s + 1}, seed {7 + s}\n"
        + generate(f"--prompt={text}", f"--seed={7 + s}")
        for p, text in enumerate(("one", "two"))
        for s in range(2)
    ]
    assert generate("--prompt=one", "--prompt=two", "--num_samples=2") == "".join(parts)


def test_a_file_has_a_prompt_in_each_line(generate, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeff一只猫 \r\n\n  \nthe\u2028cat".encode())
    found = generate("--prompt=first", f"--prompt_file={file}", "--json").split("\n")[:-1]
    prompts = [json.loads(line)["prompt"] for line in found]
    assert prompts == ["first", "一只猫 ", "the\u2028cat"]


def test_prompts_and_stops_are_plain_text(generate):
    """What YAML or JSON would read as a list, a number or nothing is text here."""
    prompts = ["[1, 2]", "null", "1e3", "{}"]
    lines = generate("--json", *(f"--prompt={prompt}" for prompt in prompts)).splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == prompts


def test_options_from_a_file(generate, tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("prompt: [one, two]\njson: true\ntemperature: 0.5\nstop: ['\\n', x]\n")
    expected = generate("--prompt=one", "--prompt=two", "--json", "--temperature=0.5",
                        r"--stop=\n", "--stop=x")  # fmt: skip
    found = generate("--temperature=2", f"--config={file}")
    assert found == expected
    assert generate(f"--config={file}", "--temperature=2") != expected


def test_json_has_what_the_text_has(generate):
    line = json.loads(generate("--prompt=the cat", "--json"))
    text = generate("--prompt=the cat")
    assert text == f"the cat{line['text']}\n"
    assert (line["finish_reason"], line["num_tokens"], line["seed"]) == ("length", 12, 7)
    stop = escape(line["text"][4:6])
    cut = json.loads(generate("--prompt=the cat", "--json", "--stop=never", f"--stop={stop}"))
    assert cut["text"] == line["text"][:4]
    assert cut["finish_reason"] == "stop"
    assert cut["num_tokens"] < 12


def test_a_trace_as_json_and_as_a_table(generate):
    steps = json.loads(generate("--prompt=the cat", "--json", "--trace"))["trace"]
    assert len(steps) == 12
    for step in steps:
        ps = [entry["probability"] for entry in step["likeliest"]]
        assert len(ps) == 5
        assert ps == sorted(ps, reverse=True)
        assert step["drawn_with"] == pytest.approx(step["probability"], rel=1e-5)  # temperature 1
    table = generate("--prompt=the cat", "--trace").splitlines()
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


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("--seed=5", "o\u06b4AQ\x03D\xd6 and+` while\x1c\u5b5cz\u01ad\\^\t\x9fkth\u947ag"),
        (
            "--temperature=1.2 --top_k=20 --top_p=0.9 --min_p=0.02 --repetition_penalty=1.1",
            " 緞th it\x05\\K 嬯 andsat򒠣 and it秷p it} 上*j ",
        ),
    ],
)
def test_a_seed_gives_the_text_that_0_1_0_wrote(options, text, capsys):
    path = ROOT / "tests" / "data" / "0.1.0" / "adamw" / "checkpoints" / "last.ckpt"
    argv = [f"--ckpt_path={path}", "--prompt=the ", "--max_new_tokens=30", "--json"]
    assert main(["generate", *argv, *options.split()]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == text


def test_without_a_prompt_a_new_document_begins(generate):
    line = json.loads(generate("--json"))
    assert line["prompt"] == ""
    assert generate() == f"{line['text']}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--temperature=-1"], "--temperature -1.0: must be in [0, 1e6]"),
        (["--top_k=0"], "--top_k 0: must be at least 1"),
        (["--top_p=0"], "--top_p 0.0: must be in (0, 1]"),
        (["--repetition_penalty=0"], "--repetition_penalty 0.0: must be in [0.01, 100]"),
        (["--min_p=2"], "--min_p 2.0: must be in [0, 1]"),
        (["--max_new_tokens=0"], "--max_new_tokens 0: must be at least 1"),
        (["--seed=-1"], "--seed -1: must be in [0, 2**63)"),
        ([f"--seed={2**63 - 1}", "--num_samples=2"], f"--seed {2**63}: must be in [0, 2**63)"),
        (["--stop="], "--stop: must not be empty; leave it out"),
        (["--num_samples=-2"], "--num_samples -2: must be at least 1"),
        (["--prompt=\udcff"], "--prompt: is not valid Unicode text; check the terminal's encoding"),
        (["--prompt_file=none"], "--prompt_file 'none': can't be read (No such file or directory)"),
        ([f"--prompt_file={PNG}"], f"--prompt_file '{PNG}': can't be read (it is not UTF-8)"),
        (["--prompt_file=/dev/null"], "--prompt_file '/dev/null': has no line with a prompt"),
        (
            ["--interactive", "--json"],
            "--interactive: reads prompts from the terminal and completes each one once",
        ),
        (["--ckpt_path=nowhere.ckpt"], "no checkpoint at 'nowhere.ckpt'"),
        ([f"--ckpt_path={PNG}"], f"{PNG} is not a checkpoint that can be loaded"),
        (["--ckpt_path=", "--logs=nowhere"], "no checkpoint below 'nowhere'"),
        (["--temperature=hot"], "--temperature 'hot': must be a number"),
        (["--size=3"], "unrecognized arguments: --size=3"),
    ],
    ids=str,
)
def test_errors_are_one_line_that_names_the_option(generate, argv, message):
    error = generate(*argv, status=2)
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_help_has_every_option_with_description_and_default(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    text = capsys.readouterr().out
    assert "Write text with a trained model." in text
    assert "divides the logits; 0 always takes the likeliest token" in text
    assert "(default: 0.8)" in text
    for name in ("ckpt_path", "prompt_file", "max_new_tokens", "min_p", "stop", "trace", "config"):
        assert f"--{name}" in text
    assert len(text.splitlines()) < 50


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
