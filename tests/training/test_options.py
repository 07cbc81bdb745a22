"""Options and files of them: help, and one line for what the parser would stumble over."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lit_gpt.training.options import option_name
from tests.conftest import ALIASES


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (ALIASES.encode(), "too many values"),
        (b"model: &a {d_model: *a}", "one that contains itself"),
        (b"samples: {prompts: &a [*a]}", "one that contains itself"),
        (b"trainer: {callbacks: &a {class_path: *a, b: [*a]}}", "one that contains itself"),
        (b"[" * 2000 + b"]" * 2000, "exceeded maximum nesting depth"),
        (b"model: {d_model: null}", "--model.d_model 'None': must be a whole number"),
        (b"trainer: {accumulate_grad_batches: null}", "--trainer.accumulate_grad_batches 'None'"),
        (b"model: null", "--model is a group of options, so it can't be null"),
        (b"trainer: null", "--trainer is a group of options, so it can't be None"),
        (b"data: null", "--data is a group of options, so it can't be null"),
        (
            b"model: {style: baroque}",
            "--model.style 'baroque': must be one of classic, modern, fast",
        ),
        (b"trainer: {precision: half}", "--trainer.precision 'half': must be one of 32-true, "),
        (b'data: {path: "a\\0b"}', r"'a\x00b' in --data.path is not valid Unicode text without"),
        (b'samples: {prompts: ["\\ud800"]}', "invalid Unicode character escape code"),
        (b"model: {d_model: " + b"9" * 5000 + b"}", "Exceeds the limit"),
        (b"model: {d_model: 9223372036854775808}", "does not fit into 64 bits"),
        (b"model: {? [a] : b}", "unhashable key"),
        (b"model: !!python/name:os.system", "could not determine a constructor"),
        (b"model: \xff", "--config: a file is not UTF-8 text ("),
        (b"", "a --config file maps option names to values: `model: {d_model: 64}`"),
        (b"hello " * 10_000, "a --config file maps option names to values"),
        (b"model: {d_model: 1}\n---\nmodel: {d_model: 2}", "expected a single document"),
        (b'ckpt_path: "~nobody_at_all/x.ckpt"', "no checkpoint at '~nobody_at_all/x.ckpt'"),
    ],
    ids=lambda part: part[:30],
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
        ("--data.path=caf\udce9.txt", r"'--data.path=caf\udce9.txt' in the command line is not"),
        ("--config=a\0", r"'--config=a\x00' in the command line is not valid Unicode text without"),
        ("--samples.prompts=[a\ud83d]", "is not valid Unicode text"),
        ("--data=&a {path: *a}", "--data: Unable to load config"),
        ("--model=null", "--model: Unable to load config"),
        ("--trainer.max_steps=1.5e0", "--trainer.max_steps '1.5': must be a whole number"),
        ("--trainer.callbacks=Nothing", "must be a list or the name of a class or null"),
    ],
)
def test_an_option_that_cannot_be_used_is_one_line(word, message, train):
    result = train(word, defaults={})
    assert (result.status, len(result.err.splitlines())) == (2, 1), result.err
    assert message in result.err


@pytest.mark.parametrize("words", [["--trainer.max_steps=2e1"], ["--trainer.max_steps", "2E+1"]])
def test_a_whole_number_may_have_an_exponent(words, train):
    result = train(*words, "--model.learning_rate=1e-2", "--print_config", defaults={})
    assert (result.status, result.err) == (0, "")
    assert "  max_steps: 20\n" in result.out
    assert "  learning_rate: 0.01\n" in result.out


def options_in(text: str) -> set[str]:
    return {word.rstrip(",") for word in text.split() if word.startswith("--")}


def test_help_is_short_and_says_where_the_rest_is(train):
    """Thirty-odd options, each in the full help too, which has all that a config has."""
    short = train("--help", defaults={})
    everything = train("--help=all", defaults={})
    assert short.status == everything.status == 0
    assert len(short.out.splitlines()) <= 130
    assert 30 <= len(options_in(short.out)) <= 45
    assert "--help=all" in short.out
    assert options_in(short.out) <= options_in(everything.out)
    order = ["--model.style", "--data.path", "--checkpoints.every_n_steps", "--trainer.max_steps"]
    places = [short.out.index(option) for option in order]
    assert places == sorted(places)
    group = train("--help=trainer", defaults={})
    assert "--trainer.detect_anomaly" in group.out
    assert "--trainer.detect_anomaly" not in short.out
    assert "--model" not in group.out.partition("\n\n")[2]


@pytest.mark.parametrize(
    ("field", "option"),
    [
        ("context_length", "--data.context_length"),
        ("d_model", "--model.d_model"),
        ("learning_rate", "--model.learning_rate"),
        ("gradient_clip_val", "--trainer.gradient_clip_val"),
        ("prompts", "--samples.prompts"),
        ("patience", "--early_stopping.patience"),
        ("keep", "--checkpoints.keep"),
        ("seed", "--seed_everything"),
        ("ckpt_path", "--ckpt_path"),
        ("trainer.max_steps", "--trainer.max_steps"),
    ],
)
def test_fields_are_named_as_they_are_typed(field, option):
    assert option_name(field) == option


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trainer.callbacks=EarlyStopping"], "are required: monitor"),
        (["--trainer.callbacks=[EarlyStopping, Timer]"], "are required: monitor"),
        (["--trainer.callbacks=Timer", "--trainer.callbacks.durration=3"], "Option 'durration' is"),
        (["--trainer.callbacks={class_path: Timer, init_args: {verbose: x}}"],
         "'Timer': verbose 'x': must be true or false"),
        (["--trainer.logger=CSVLogger"], "'CSVLogger': the following arguments are required: save"),
        (["--trainer.plugins=BitsandbytesPrecision"], "'BitsandbytesPrecision': the following"),
    ],
)  # fmt: skip
def test_what_a_class_lacks_is_said(words, message, train):
    result = train(*words)
    assert (result.status, len(result.err.splitlines())) == (2, 1)
    option = words[0].partition("=")[0]
    assert result.err.startswith(f"error: {option}")
    assert message in result.err
    assert f"{option}.help=" in result.err


def test_the_help_of_a_class_lists_its_options(train):
    result = train("--trainer.callbacks.help=EarlyStopping")
    assert (result.status, result.err) == (0, "")
    assert "--trainer.callbacks.monitor" in result.out
    assert "quantity to be monitored" in result.out


def test_a_number_of_batches_is_no_share_whatever_was_imported_before():
    """typing gives Lightning's Optional[Union[int, float]] the order of an equal one it knows."""
    code = (
        "import lightning.pytorch.loops, typing, sys\n"
        "del sys.modules['lightning.pytorch.trainer.trainer']\n"
        "[clear() for clear in typing._cleanups]\n"
        "typing.Optional[typing.Union[float, int]]\n"
        "import lightning.pytorch.trainer.trainer as trainer\n"
        "import lightning.pytorch as pl\n"
        "pl.Trainer = pl.trainer.Trainer = trainer.Trainer\n"
        "from lit_gpt.training.options import TrainOptions\n"
        "print(repr(TrainOptions(['--trainer.limit_val_batches=2']).config.trainer.limit_val_batches))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "2\n"
