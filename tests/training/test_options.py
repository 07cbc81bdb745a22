"""Config files and command lines that would make the parser stumble: one line each."""

from __future__ import annotations

import pytest
import yaml

from lit_gpt.training.options import MAX_DEPTH, load_yaml, values_in


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{a: [1, 2.5, x]}", {"a": [1, 2.5, "x"]}),
        ("a: &x [1]\nb: *x", {"a": [1], "b": [1]}),
        ("1e3", 1000.0),
        ("农夫 🙂", "农夫 🙂"),
    ],
)
def test_values(text, value):
    assert load_yaml(text) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("&a [*a]", "nested too deeply, too large or part of itself"),
        ("&a {x: {y: *a}}", "nested too deeply, too large or part of itself"),
        ("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), "nested too deeply"),
        ("a: " + "9" * 5000, "Exceeds the limit"),
        ("a: \0", "control characters are not allowed"),
        ("a: \ud800", "surrogates not allowed"),
        ("? [a]\n: b", "unhashable key"),
        ("!!python/name:os.system", "could not determine a constructor"),
    ],
)
def test_what_no_config_can_hold(text, message):
    with pytest.raises(yaml.YAMLError, match=message):
        load_yaml(text)


def test_a_few_lines_that_stand_for_millions_of_values():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(yaml.YAMLError, match="too large"):
        load_yaml("\n".join(lines))


def test_values_are_found_with_their_keys():
    assert sorted(map(str, values_in({"a": ["b", {"c": 1}]}))) == [
        *("1", "['b', {'c': 1}]", "a", "b", "c", "{'a': ['b', {'c': 1}]}", "{'c': 1}")
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: &a {d_model: *a}", "part of itself"),
        (b"model: {d_model: null}", "--model.d_model: Expected a <class 'int'>. Got value: None"),
        (b"trainer: {accumulate_grad_batches: null}", "--trainer.accumulate_grad_batches: Exp"),
        (b"trainer: null", "--trainer has options of its own, so it can't be None"),
        (b'data: {path: "a\\0b"}', r"'a\x00b' in --data.path is not valid Unicode text without"),
        (b'samples: {prompts: ["\\ud800"]}', "invalid Unicode character escape code"),
        (b"model: \xff", "config.yaml is not UTF-8 text ("),
        (b"", "a file for --config holds options by name, as `model: {d_model: 64}`"),
        (b"hello " * 10_000, "a file for --config holds options by name"),
        (b"model: {d_model: 1}\n---\nmodel: {d_model: 2}", "expected a single document"),
        (
            b"model: {d_model: 9223372036854775808}",
            "9223372036854775808 in --model.d_model is beyo",
        ),
        (b'ckpt_path: "~nobody_at_all/x.ckpt"', "no checkpoint at '~nobody_at_all/x.ckpt'"),
    ],
)
def test_a_config_that_cannot_be_used_is_one_line(content, message, train, tmp_path):
    (tmp_path / "config.yaml").write_bytes(content)
    result = train(f"--config={tmp_path / 'config.yaml'}", defaults={})
    assert (result.status, len(result.err.splitlines())) == (2, 1), result.err
    assert result.err.startswith("error: ")
    assert message in result.err
    assert len(result.err) < 500


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--data.path=caf\udce9.txt", r"'--data.path=caf\udce9.txt' is not valid Unicode text"),
        ("--config=a\0", r"'--config=a\x00' is not valid Unicode text without NUL characters"),
        ("--samples.prompts=[a\ud83d]", "is not valid Unicode text"),
        ("--data=&a {path: *a}", "part of itself"),
        ("--model=null", "--model: Unable to load config"),
    ],
)
def test_a_word_that_cannot_be_used_is_one_line(word, message, train):
    result = train(word, defaults={})
    assert (result.status, len(result.err.splitlines())) == (2, 1), result.err
    assert message in result.err
